"""The truth of video benchmarks: read by the readers of `data prepare`, kept as masks per expression and frame.

A video keeps the order of the source's list of frames: RLEs are matched to it by position, PNGs by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deris_llm.data.errors import DataError, bad_records_error, describe, missing_path_error
from deris_llm.data.formats import mevis, ref_ytvos
from deris_llm.data.formats.base import BadEntryError, LabelMask, PrepareOptions, SourceFault
from deris_llm.data.formats.mevis import MevisReader
from deris_llm.data.formats.ref_davis import RefDavisReader
from deris_llm.data.formats.ref_ytvos import RefYtvosReader
from deris_llm.data.formats.video import Video, VideoReader, read_videos
from deris_llm.data.images import BROKEN, MAX_PIXELS, opened_image
from deris_llm.data.masks import decode_segmentation
from deris_llm.evaluation.video.trees import FrameError, read_labels

_READERS: dict[str, tuple[type[VideoReader], tuple[str, ...]]] = {
    "mevis": (MevisReader, mevis.SPLITS),
    "ref-ytvos": (RefYtvosReader, ref_ytvos.SPLITS),
    "ref-davis": (RefDavisReader, ("train", "val")),
}


@dataclass(frozen=True)
class TruthVideo:
    """A video with its expressions."""

    name: str
    frames: tuple[str, ...]  # names without extension, in the order of the source's list
    size: tuple[int, int]  # (H, W)
    phrases: Mapping[str, str]  # expression id -> text
    referents: Mapping[str, Sequence[Sequence[Any]]]
    """Expression id -> the masks of its objects in each frame: RLE, or `LabelMask` of a file below the folder."""
    folder: Path = Path()
    own_frames: Mapping[str, tuple[int, ...]] | None = None
    """Expression id -> positions of the frames that the source lists for its object; None if it has no such lists."""

    def masks(self, position: int) -> dict[str, np.ndarray]:
        """Reads the truth of a frame: expression id -> bool (H, W), the union of its objects.

        Raises:
            DataError: a mask is malformed, or has another size than the video.
        """
        files: dict[str, np.ndarray] = {}
        found: dict[str, np.ndarray] = {}
        for expression, of_frames in self.referents.items():
            found[expression] = np.zeros(self.size, dtype=bool)
            for mask in of_frames[position]:
                found[expression] |= self._drawn(mask, position, files)
        return found

    def _drawn(self, mask: Any, position: int, files: dict[str, np.ndarray]) -> np.ndarray:
        if isinstance(mask, LabelMask):
            if mask.name not in files:
                files[mask.name] = read_labels(self.folder / mask.name, self.size)
            return files[mask.name] == mask.label
        try:
            return decode_segmentation(mask, *self.size)
        except ValueError as error:
            raise DataError(f"truth of {self.name}, frame {self.frames[position]}: {error}") from error


def read_truth(form: str, source: Path, split: str, *, mapping: Mapping[str, str] | None = None) -> list[TruthVideo]:
    """Reads the videos of a split as it is published.

    Args:
        form: ``mevis``, ``ref-ytvos`` or ``ref-davis``.
        source: folder of the dataset, as of ``data prepare --source``; the images are not needed.
        split: as the dataset calls it.
        mapping: as of ``data prepare --mapping``.

    Raises:
        DataError: files are missing, the masks of the split are not published, or everything that does not fit together.
    """
    reader_of_form, splits = _READERS[form]
    if split not in splits:
        raise DataError(
            f"--split {split}: expected one of {', '.join(splits)} for {form}, got another name: correct it"
        )
    reader = reader_of_form(PrepareOptions(form, str(source), Path(form), splits=(split,), mapping=mapping or {}))
    own_frames = _frames_of_objects(source, split) if form == "ref-ytvos" else None
    problems: list[str] = []
    found: list[TruthVideo] = []
    for video in reader.videos[split]:
        if isinstance(video, SourceFault):
            problems.append(f"{video.where}: {video.message}")
        elif video.sentences:
            found += _video(reader, video, own_frames, problems)
    if problems:
        raise bad_records_error(str(source), problems, num_records=len(reader.videos[split]))
    if not found:
        raise DataError(f"{source}: expected expressions in {split}, got none: check --source and --split")
    return found


def _video(
    reader: VideoReader, video: Video, own_frames: Mapping[str, Any] | None, problems: list[str]
) -> Iterable[TruthVideo]:
    """Yields the video, or adds to the problems why it cannot be scored."""
    referents: dict[str, list[list[Any]]] = {}
    where = f"{video.split}/{video.name}"
    for sentence in video.sentences:
        try:
            at = reader.referents(video, sentence).at
        except BadEntryError as error:
            problems.append(f"{where} expression {sentence.id}: {error}")
            return
        if at is None:
            raise DataError(
                f"{reader.source}: expected the masks of {video.split}, got none: they are not published, or not at hand, so this "
                "split cannot be scored here; choose another --split"
            )
        referents[sentence.id] = [[each.mask for each in at(position)] for position in range(len(video.frames))]
    masks = [mask for of_frames in referents.values() for of_frame in of_frames for mask in of_frame]
    files = sorted({mask.name for mask in masks if isinstance(mask, LabelMask)})
    if absent := [name for name in files if not (reader.source / name).is_file()]:
        problems.append(f"{where}: expected {len(files)} label maps, one per frame, got no {absent[0]}")
        return
    try:
        size = _size(reader.source, video, masks)
        own = None if own_frames is None else _own_frames(video, referents, own_frames)
    except (BadEntryError, FrameError) as error:
        problems.append(f"{where}: {error}")
        return
    if size is None:
        problems.append(f"{where}: expected a mask or an image in {video.folder}/, got neither: its size is not known")
        return
    phrases = {sentence.id: str(sentence.fields.get("exp", "")) for sentence in video.sentences}
    yield TruthVideo(video.name, video.frames, size, phrases, referents, reader.source, own)


def _own_frames(
    video: Video, referents: Mapping[str, Sequence[Sequence[Any]]], listed: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Expression id -> positions of the frames that meta.json lists for its object; the reader has checked the objects.

    Raises:
        BadEntryError: it has no such list.
    """
    objects = listed.get(video.name, {}).get("objects", {})
    found: dict[str, tuple[int, ...]] = {}
    for expression, of_frames in referents.items():
        for label in {mask.label for mask in of_frames[0]}:
            frames = objects[str(label)].get("frames")
            if not isinstance(frames, list):
                raise BadEntryError(
                    "structure",
                    f"expected `frames`, a list of names, of object {label} in meta.json, got {describe(frames)}",
                )
            found[expression] = tuple(video.frames.index(frame) for frame in frames if frame in video.frames)
    return found


def _size(source: Path, video: Video, masks: Sequence[Any]) -> tuple[int, int] | None:
    """The size of the truth, or where it names nothing of the images, never that of a prediction.

    Raises:
        BadEntryError: an image or a size cannot be read.
        FrameError: a label map cannot be read.
    """
    for mask in masks:
        if isinstance(mask, LabelMask):
            height, width = read_labels(source / mask.name).shape
            return height, width
        size = mask.get("size")
        if isinstance(size, list) and len(size) == 2:
            if not all(isinstance(side, int) and side > 0 for side in size) or size[0] * size[1] > MAX_PIXELS:
                raise BadEntryError("mask", f"expected an RLE of size [height, width] in px, got {size}")
            return size[0], size[1]
    for path in (source / video.folder / f"{frame}.jpg" for frame in video.frames):
        if path.is_file():
            try:
                with opened_image(path) as image:
                    return image.height, image.width
            except BROKEN as error:
                raise BadEntryError(
                    "image", f"{path}: expected an image, got {type(error).__name__}: {error}"
                ) from error
    return None


def _frames_of_objects(source: Path, split: str) -> Mapping[str, Any] | None:
    """The videos of YouTube-VOS' ``meta.json``, None if there is none; the reader has checked the objects."""
    path = source / (ref_ytvos.VALID_TRUTH if split == "valid" else split) / "meta.json"
    return read_videos(path) if path.is_file() else None


@dataclass(frozen=True)
class DavisSequence:
    """A sequence of DAVIS 2017."""

    name: str
    folder: Path  # of the label maps of the truth

    @property
    def frames(self) -> tuple[str, ...]:
        """Names without extension, in order."""
        return tuple(sorted(path.stem for path in self.folder.glob("*.png")))

    def labels(self) -> list[np.ndarray]:
        """Reads the label maps of all frames, uint8 (H, W); 255 is void.

        Raises:
            DataError: they do not have one size.
        """
        first = read_labels(self.folder / f"{self.frames[0]}.png")
        size = (first.shape[0], first.shape[1])
        return [first, *(read_labels(self.folder / f"{frame}.png", size) for frame in self.frames[1:])]


def read_davis(folder: Path, *, unsupervised: bool, split: str = "val") -> list[DavisSequence]:
    """Finds the sequences of DAVIS 2017 at 480p.

    Args:
        folder: with ``Annotations/480p`` or ``Annotations_unsupervised/480p``, and ``ImageSets/2017``.
        unsupervised: which of the two annotations.
        split: name of the list in ``ImageSets/2017``.

    Raises:
        DataError: files are missing.
    """
    listed = folder / "ImageSets" / "2017" / f"{split}.txt"
    if not listed.is_file():
        raise missing_path_error(listed, "sequences of DAVIS 2017")
    annotations = folder / ("Annotations_unsupervised" if unsupervised else "Annotations") / "480p"
    sequences = [DavisSequence(name, annotations / name) for name in listed.read_text(encoding="utf-8").split()]
    for sequence in sequences:
        if not sequence.frames:
            raise missing_path_error(sequence.folder / "00000.png", f"truth of {sequence.name}")
    return sequences
