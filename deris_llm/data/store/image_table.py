"""The first pass of `deris-llm data prepare`: looks at every image once and writes the table of images."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from deris_llm.data.formats.base import BadEntryError, MaskFile, SourceEntry
from deris_llm.data.images import BROKEN, ImageError, ImageFacts, ImageFolder, image_facts, opened_image
from deris_llm.data.store.prepared import COCO_STEM, IMAGE_SCHEMA, IMAGES_FILE, file_sha256
from deris_llm.data.validation import is_text, look_at
from deris_llm.structures import Exif

_IMAGES_PER_JOB = 32


@dataclass(eq=False)
class _Claims:
    """What the entries of an image say about it."""

    sizes_hw: list[Any] = field(default_factory=list)  # different ones, in the order of the entries
    ids: list[Any] = field(default_factory=list)  # different ones
    mask_file: str | None = None  # name of a mask, whose size tells the orientation if no entry declares a size


class ImageTable:
    """The images of a source.

    Args:
        folder: of the images.
        exif: orientation to take if sizes do not decide; None if the user did not say.
        decode: False takes sizes from the entries and does not open the images.
    """

    def __init__(self, folder: ImageFolder, *, exif: Exif | None, decode: bool) -> None:
        self.folder = folder
        self.exif: Exif | None = exif
        self.decode = decode
        self.rows: list[dict[str, Any]] = []
        self.places: dict[str, tuple[int, int, int] | BadEntryError] = {}  # file -> row, height and width in px
        self.undecided: list[str] = []  # files whose size does not tell which orientation was annotated
        self._claims: dict[str, _Claims] = {}

    def add(self, entry: SourceEntry) -> None:
        """Collects what an entry says about its image."""
        claims = self._claims.setdefault(entry.image, _Claims())
        size_hw = _declared_size(entry)
        if size_hw is not None and size_hw not in claims.sizes_hw:
            claims.sizes_hw.append(size_hw)
        if entry.image_id is not None and entry.image_id not in claims.ids:
            claims.ids.append(entry.image_id)
        for instance in entry.instances:
            if isinstance(instance.mask, MaskFile):
                claims.mask_file = instance.mask.name

    def look(self, pool: ProcessPoolExecutor | None, on_progress: Callable[[int, int], None]) -> None:
        """Fills ``rows`` and ``places``."""
        first_of_id: dict[str, tuple[str, int, int]] = {}
        for name, facts in self._facts(pool, on_progress).items():
            try:
                row = self._row(name, facts)
                one = (row["sha256"], row["height"], row["width"])
                if first_of_id.setdefault(row["image_id"], one) != one:
                    raise BadEntryError(
                        "reference",
                        f"expected each image_id to be one image in one orientation, got {row['image_id']!r} for {name} and another",
                    )
            except BadEntryError as error:
                self.places[name] = error
                continue
            self.places[name] = (len(self.rows), row["height"], row["width"])
            self.rows.append(row)

    def write(self, folder: Path) -> dict[str, Any]:
        """Writes the table; returns its description for the manifest."""
        path = folder / IMAGES_FILE
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, IMAGE_SCHEMA) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist(self.rows, IMAGE_SCHEMA))
        return {"file": IMAGES_FILE, "count": len(self.rows), "bytes": path.stat().st_size, "sha256": file_sha256(path)}

    def _facts(
        self, pool: ProcessPoolExecutor | None, on_progress: Callable[[int, int], None]
    ) -> dict[str, ImageFacts | str]:
        names = list(self._claims)
        if not self.decode:
            return {name: self._declared_facts(name) for name in names}
        found: dict[str, ImageFacts | str] = {}
        jobs = [names[i : i + _IMAGES_PER_JOB] for i in range(0, len(names), _IMAGES_PER_JOB)]
        look = partial(look_at, self.folder)
        on_progress(0, len(names))
        for part in pool.map(look, jobs) if pool else map(look, jobs):
            found |= part
            on_progress(len(found), len(names))
        return found

    def _declared_facts(self, name: str) -> ImageFacts | str:
        if not self._claims[name].sizes_hw:
            return f"image {name}: expected its size in the source, got none"
        height, width = self._claims[name].sizes_hw[0]
        return ImageFacts(height, width, orientation=1, sha256="")

    def _row(self, name: str, facts: ImageFacts | str) -> dict[str, Any]:
        if isinstance(facts, str):
            raise BadEntryError("image", facts)
        claims = self._claims[name]
        if len(claims.ids) > 1:
            raise BadEntryError("reference", f"expected one image_id of {name}, got {claims.ids[0]!r} and {claims.ids[1]!r}")
        given_id = claims.ids[0] if claims.ids else None
        is_id = isinstance(given_id, (int, str)) and not isinstance(given_id, bool) and is_text(str(given_id))
        if given_id is not None and not is_id:
            raise BadEntryError("structure", f"expected image_id to be a text or number, got {given_id!r}")
        sizes_hw = claims.sizes_hw or (self._size_of_mask(claims.mask_file) if facts.is_sideways else [])
        if not sizes_hw and self.exif is None and facts.is_sideways and facts.height != facts.width:
            raise BadEntryError(
                "size",
                f"image {name}: expected width and height, or --exif displayed or stored for all images, got neither: EXIF turns it "
                f"by 90 degrees and nothing says for which orientation the masks were drawn, {facts.width} x {facts.height} px as "
                f"stored or {facts.height} x {facts.width} px as displayed",
            )
        self.undecided += [name] if facts.is_undecided else []
        exif: Exif = "stored" if self.exif is None else self.exif
        size_hw = next((size for size in sizes_hw if facts.fits(size)), facts.size_hw(exif))
        stem = Path(name if given_id is None else str(given_id)).stem  # an image_id may be COCO's file name
        by_content = f"sha256-{facts.sha256[:24]}" if facts.sha256 else stem
        image_id = by_content if given_id is None else str(given_id)
        return {
            "image_id": stem if COCO_STEM.fullmatch(stem) else image_id,
            "file": name,
            "height": size_hw[0],
            "width": size_hw[1],
            "sha256": facts.sha256,
        }

    def _size_of_mask(self, name: str | None) -> list[tuple[int, int]]:
        """Height and width of a mask file; none if it cannot be read, which is reported when masks are read."""
        path = self.folder.file(name)[0] if name is not None else None
        try:
            facts = image_facts(path) if path is not None else None
        except ImageError:
            return []
        return [] if facts is None else [(facts.height, facts.width)]


def _declared_size(entry: SourceEntry) -> Any:
    """Height and width for which an entry, or its RLE, was made; None if nothing says."""
    if entry.size_hw is not None:
        return tuple(entry.size_hw)
    for instance in entry.instances:
        size = instance.mask.get("size") if isinstance(instance.mask, dict) else None
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return tuple(size)
        if isinstance(instance.mask, bytes):
            try:
                with opened_image(io.BytesIO(instance.mask)) as file:
                    return (file.height, file.width)
            except BROKEN:
                return None
    return None


def undecided_note(names: Sequence[str], *, exif: Exif, is_given: bool) -> str:
    """Names images of which both orientations have the same size, and the orientation that was taken."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    other = "stored" if exif == "displayed" else "displayed"
    return (
        f"images that EXIF turns by 180 degrees, mirrors, or turns and that are square: {len(names):,}; their size does not say "
        f"which orientation was annotated, so their masks are taken as drawn on the image as {exif}: {', '.join(names[:10])}{more}"
    ) + ("" if is_given else f". If they were drawn on the image as {other}: --exif {other}")
