"""Prepared sets, as `deris-llm data prepare` writes them, are memory-mapped, not loaded.

    ROOT/NAME/manifest.json             counts, hashes, image folder; only a folder with it is a prepared set
    ROOT/NAME/arrow/images.arrow        a row per image: id, file, size, sha256
    ROOT/NAME/arrow/SPLIT-00000.arrow   a row per phrase (`deris_llm.data.validation.phrase_schema`), in the source's order

A process holds a few integers per phrase and image. The mapped pages belong to the system's cache and are shared by all
ranks and loader workers of a machine. The name of a set is the name of its folder.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deris_llm.common.strict_files import json_of
from deris_llm.data.errors import DataError
from deris_llm.data.store.records import Records, distinct_ids
from deris_llm.structures import Exif, InstanceAnnotation, ReferringRecord

MANIFEST_FILE = "manifest.json"
ARROW_FOLDER = "arrow"
IMAGES_FILE = "images.arrow"
LEFT_OUT_FILE = "left_out.jsonl"
"""Entries that ``skip_bad`` left out, and referents without pixels, one line each, beside the manifest."""
LAYOUT = 2
"""Version of the layout above; other versions are refused. Raise it when the content of rows changes."""

IMAGE_SCHEMA = pa.schema(
    {
        "image_id": pa.string(),  # equal ids are the same image, across datasets
        "file": pa.string(),  # below the manifest's image folder
        "height": pa.int32(),  # px, as annotated
        "width": pa.int32(),
        "sha256": pa.string(),  # of the file; empty if images were not read
    }
)


COCO_STEM = re.compile(r"COCO_(train|val|test)20\d\d_\d{12}")
"""Image names by which datasets over COCO recognise each other's images."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """A prepared set's manifest."""

    folder: Path
    content: Mapping[str, Any]
    image_folder: Path

    @property
    def is_generalised(self) -> bool:
        return bool(self.content["is_generalised"])

    @property
    def splits(self) -> Mapping[str, Mapping[str, Any]]:
        """Split -> num_refs, num_phrases, num_images, num_no_target, notes, shards; of videos num_videos and num_sentences too."""
        return self.content["splits"]

    def has_truth(self, split: str) -> bool:
        """Whether the referents of a split's phrases are known."""
        return self.splits.get(split, {}).get("has_truth", True)

    def num_skipped(self, split: str) -> int:
        """Counts the phrases of a split that `data prepare --skip-bad` left out."""
        return sum(self.content.get("skipped", {}).get(split, {}).values())


def find_manifest(root: str | Path, dataset: str) -> Manifest | None:
    """Reads the manifest of ``root/dataset``; None if there is no prepared set of that name.

    Raises:
        DataError: the manifest cannot be used.
    """
    path = Path(root) / dataset / MANIFEST_FILE
    if not dataset or "/" in dataset or not path.is_file():
        return None
    return read_manifest(path.parent)


def prepared_sets(root: str | Path) -> tuple[str, ...]:
    """Returns the names of the prepared sets below a data root."""
    return tuple(sorted(path.parent.name for path in Path(root).glob(f"*/{MANIFEST_FILE}")))


def read_manifest(folder: Path, image_folder: Path | None = None) -> Manifest:
    """Reads the manifest of a prepared set.

    Args:
        folder: of the set.
        image_folder: where the images are; None = where the manifest says, relative to the data root so that a root
            can be moved as a whole.

    Raises:
        DataError: it is not a manifest of this layout.
    """
    path = folder / MANIFEST_FILE
    content = _manifest_content(path, path.stat().st_mtime_ns)
    return Manifest(folder, content, folder.parent / content["image_folder"] if image_folder is None else image_folder)


@lru_cache(maxsize=64)
def _manifest_content(path: Path, _modified_ns: int) -> Mapping[str, Any]:
    try:
        content = json_of(path.read_bytes())
        layout = content["layout"]
        for split in content["splits"].values():
            if not {"num_refs", "num_phrases", "num_images", "num_no_target", "shards"} <= split.keys():
                raise KeyError(f"only {', '.join(split)} of a split")
            if outside := [shard["file"] for shard in split["shards"] if Path(shard["file"]).name != shard["file"]]:
                raise ValueError(f"a shard that is no file of {ARROW_FOLDER}/: {outside[0]}")
        if not {"is_generalised", "image_folder", "images", "exif", "source"} <= content.keys():
            raise KeyError(f"only {', '.join(content)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: expected the manifest of a prepared set, got {type(error).__name__}: {error}. Remove this folder and "
            "run `deris-llm data prepare` again"
        ) from error
    if layout != LAYOUT:
        raise DataError(
            f"{path}: expected layout {LAYOUT}, got {layout!r}, made by {content.get('made_by')}. Remove this folder and run "
            "`deris-llm data prepare` again"
        )
    return content


class PreparedSplit(Records):
    """The records of one split of a prepared set.

    Args:
        manifest: of the set.
        split: name of the split.
        phrase_field: which text becomes the phrase.

    Raises:
        DataError: a file is missing or differs from the manifest, or some phrases have no raw text.
    """

    def __init__(self, manifest: Manifest, split: str, *, phrase_field: Literal["sent", "raw"]) -> None:
        self.folder, self.split, self.phrase_field = manifest.folder, split, phrase_field
        self.dataset = dataset = manifest.folder.name
        self._images = read_images(manifest)
        self._image_columns = {
            name: self._images.column(name).combine_chunks() for name in ("image_id", "file", "height", "width")
        }
        self._image_folder = manifest.image_folder
        self._exif: Exif = manifest.content["exif"]
        if not self._image_folder.is_dir():
            raise DataError(
                f"{dataset}/{split}: expected its images in {self._image_folder}, got no such folder. Put them there, or "
                f"name their folder as `image_folder` in {manifest.folder / MANIFEST_FILE}"
            )
        self._batches: list[pa.RecordBatch] = []
        for shard in manifest.splits[split]["shards"]:
            self._batches += map_arrow(manifest.folder / ARROW_FOLDER / shard["file"], shard["bytes"])
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        if len(self) != manifest.splits[split]["num_phrases"]:
            raise DataError(
                f"{manifest.folder}: expected {manifest.splits[split]['num_phrases']:,} phrases of {split}, got {len(self):,}. "
                "Remove this folder and run `deris-llm data prepare` again"
            )
        columns = [batch.column("image").to_numpy() for batch in self._batches]
        self.image_rows: np.ndarray = np.concatenate(columns) if columns else np.zeros(0, np.int32)
        self._text = "raw" if phrase_field == "raw" else "phrase"
        if phrase_field == "raw" and (missing := sum(batch.column("raw").null_count for batch in self._batches)):
            if missing < len(self):
                raise DataError(
                    f"{dataset}/{split}: expected phrases as typed (data.phrase_field=raw), got {missing:,} of {len(self):,} "
                    "without. Set data.phrase_field=sent"
                )
            self._text = "phrase"  # the source has one text only

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the paths; another process maps the files again."""
        return _reopened, (self.folder, self._image_folder, self.split, self.phrase_field)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def record(self, row: int) -> ReferringRecord:
        batch, row_of_batch = self._place(row)  # column by column: half the time of a slice's to_pylist
        fields = {
            name: column[row_of_batch].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        return self._record(
            fields, {name: column[fields["image"]].as_py() for name, column in self._image_columns.items()}
        )

    def __iter__(self) -> Iterator[ReferringRecord]:
        for batch in self._batches:
            yield from map(self._record, batch.to_pylist(), self._images.take(batch.column("image")).to_pylist())

    @property
    def image_ids(self) -> pa.Array:
        """Image ids of the whole set, text; `image_rows` are indices of it."""
        return self._images.column("image_id").combine_chunks()

    @property
    def image_hashes(self) -> pa.Array:
        """Content hashes of the images of the whole set; `image_rows` are indices of it."""
        return self._images.column("sha256").combine_chunks()

    def image_numbers(self) -> tuple[np.ndarray, pa.Array]:
        return distinct_ids(self.image_rows, [self.image_ids])

    def phrase_ids(self, rows: np.ndarray) -> list[str]:
        return [f"{self.dataset}/{self.split}/{name}" for name in self._texts("id", rows)]

    def phrases(self, rows: np.ndarray) -> list[str]:
        return self._texts(self._text, rows)

    def sentences(self) -> dict[tuple[str, str], np.ndarray]:
        """Groups the split's rows by sentence.

        Returns:
            (video, expression) -> int64, the rows in the order of the frames; empty if the images are no frames.
        """
        if not self._batches or "video" not in self._batches[0].schema.names:
            return {}
        numbers = pa.chunked_array([sentence_names(batch) for batch in self._batches]).combine_chunks().dictionary_encode()
        indices = numbers.indices.to_numpy()
        rows = np.argsort(indices, kind="stable")
        groups = np.split(rows, np.flatnonzero(np.diff(indices[rows])) + 1)
        places = (self._place(int(group[0])) for group in groups)
        names = ((batch.column("video")[row].as_py(), batch.column("expression")[row].as_py()) for batch, row in places)
        return dict(zip(names, groups, strict=True))

    def _texts(self, column: str, rows: np.ndarray) -> list[str]:
        places = map(self._place, map(int, rows))
        return [batch.column(column)[row].as_py() for batch, row in places]

    def _place(self, index: int) -> tuple[pa.RecordBatch, int]:
        number = bisect_right(self._ends, index)
        return self._batches[number], index - (int(self._ends[number - 1]) if number else 0)

    def _record(self, row: Mapping[str, Any], image: Mapping[str, Any]) -> ReferringRecord:
        size = [image["height"], image["width"]]
        if image["file"].startswith("/") or ".." in image["file"].split("/"):  # `data prepare` writes no such name
            raise DataError(
                f"{self.dataset}/{self.split}: expected an image inside {self._image_folder}, got {image['file']!r}. This set "
                "was not made by `deris-llm data prepare`; do not use it"
            )
        return ReferringRecord(
            phrase_id=f"{self.dataset}/{self.split}/{row['id']}",
            dataset=self.dataset,
            split=self.split,
            image_id=image["image_id"],
            image_path=f"{self._image_folder}/{image['file']}",
            width=image["width"],
            height=image["height"],
            phrase=row[self._text],
            instances=_annotations(row["instances"], size),
            crowds=_annotations(row["crowds"], size),
            exif=self._exif,
            category=row["category"],
            num_same_class=row["num_same_class"],
            ref_id=row["ref_id"],
            ignored=_rle(row.get("ignored"), size),
            video=row.get("video"),
            frame=row.get("frame"),
            expression=row.get("expression"),
            has_truth=row.get("has_truth", True),
        )


def _annotations(found: Sequence[Mapping[str, Any]], size_hw: list[int]) -> tuple[InstanceAnnotation, ...]:
    return tuple(
        InstanceAnnotation(each["id"], {"size": size_hw, "counts": each["counts"].decode("ascii")}) for each in found
    )


def _rle(counts: bytes | None, size_hw: list[int]) -> dict[str, Any] | None:
    return None if counts is None else {"size": size_hw, "counts": counts.decode("ascii")}


def _reopened(folder: Path, image_folder: Path, split: str, phrase_field: Literal["sent", "raw"]) -> PreparedSplit:
    return PreparedSplit(read_manifest(folder, image_folder), split, phrase_field=phrase_field)


def sentence_names(batch: pa.RecordBatch) -> pa.Array:
    """Returns ``video/expression`` of each row of a batch whose images are frames."""
    return pc.call_function("binary_join_element_wise", [batch.column("video"), batch.column("expression"), pa.scalar("/")])


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_images(manifest: Manifest) -> pa.Table:
    """Opens the table of a set's images, memory-mapped."""
    images = manifest.content["images"]
    batches = map_arrow(manifest.folder / ARROW_FOLDER / IMAGES_FILE, images["bytes"])
    return pa.Table.from_batches(batches, IMAGE_SCHEMA)


def map_arrow(path: Path, num_bytes: int) -> list[pa.RecordBatch]:
    """Opens an Arrow stream as memory-mapped batches.

    Raises:
        DataError: it is not the file that the manifest describes.
    """
    found = path.stat().st_size if path.is_file() else None
    if found != num_bytes:
        raise DataError(
            f"{path}: expected a file of {num_bytes:,} bytes, as the manifest says, got "
            f"{'none' if found is None else f'{found:,} bytes'}. Remove {path.parent.parent} and run `deris-llm data prepare` "
            "again"
        )
    try:
        batches = list(pa.ipc.open_stream(pa.memory_map(str(path))))
        for batch in batches:
            batch.validate()  # that no column reaches beyond the file
        return batches
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: expected an Arrow stream as it was written, got {error}: the file was changed. Remove {path.parent.parent} and run `deris-llm data prepare` again"
        ) from error
