"""The truth of video benchmarks, read as it is published.

| benchmark       | expressions                                    | masks                                                          |
| --------------- | ---------------------------------------------- | -------------------------------------------------------------- |
| MeViS           | ``meta_expressions.json`` with ``anno_id``     | ``mask_dict.json``: one RLE or null per frame and ``anno_id``  |
| Ref-YouTube-VOS | ``meta_expressions.json``; ``obj_id`` in it    | ``Annotations/VIDEO/FRAME.png``: label maps                    |
|                 | or in ``obj_id.json`` {video: {expression: id}}|                                                                |
| Ref-DAVIS17     | ``meta_expressions.json`` with ``obj_id``      | DAVIS' ``Annotations_unsupervised/480p/VIDEO/FRAME.png``, or   |
|                 |                                                | ``mask_dict.json`` (`davis_mask_keys`)                         |
| DAVIS 2017      | -                                              | ``Annotations[_unsupervised]/480p/SEQUENCE/FRAME.png``         |

The list ``frames`` of a video is kept in its order: the RLEs of ``mask_dict.json`` are matched to it by position, PNGs by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deris_llm.data.errors import DataError, bad_records_error, describe, missing_path_error
from deris_llm.data.formats.base import read_json_file
from deris_llm.data.masks import decode_segmentation
from deris_llm.evaluation.video.protocols import VOID
from deris_llm.evaluation.video.trees import read_labels

logger = logging.getLogger(__name__)

META_FILE = "meta_expressions.json"
MASK_FILE = "mask_dict.json"
OBJECT_FILE = "obj_id.json"
_VALID_AND_TEST, _VALID_ALONE = 507, 202  # videos of Ref-YouTube-VOS: in the JSON of valid, and without those of test


@dataclass(frozen=True)
class TruthVideo:
    """A video with its expressions."""

    name: str
    frames: tuple[str, ...]  # names without extension, in the order of the source's list
    size: tuple[int, int]  # (H, W)
    phrases: Mapping[str, str]  # expression id -> text
    own_frames: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Expression id -> positions of the frames that the source lists for its object (Ref-YouTube-VOS)."""

    def masks(self, position: int) -> dict[str, np.ndarray]:
        """Reads the truth of a frame: expression id -> bool (H, W)."""
        raise NotImplementedError


@dataclass(frozen=True)
class RleVideo(TruthVideo):
    """Masks of objects as RLE; an expression means the union of its objects."""

    rles: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # object id -> RLE or None of each frame
    objects: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # expression id -> object ids

    def masks(self, position: int) -> dict[str, np.ndarray]:
        drawn = {name: self._drawn(name, position) for name in self.rles}
        nothing = np.zeros(self.size, dtype=bool)
        return {
            expression: np.logical_or.reduce([nothing, *(drawn[name] for name in set(objects))])
            for expression, objects in self.objects.items()
        }

    def _drawn(self, name: str, position: int) -> np.ndarray:
        rle = self.rles[name][position]
        if rle is None:
            return np.zeros(self.size, dtype=bool)
        try:
            return decode_segmentation(rle, *self.size)
        except ValueError as error:
            raise DataError(f"truth of {self.name}, object {name}, frame {self.frames[position]}: {error}") from error


@dataclass(frozen=True)
class LabelVideo(TruthVideo):
    """Label maps as PNGs; an expression means one label."""

    folder: Path = Path()
    labels: Mapping[str, int] = field(default_factory=dict)  # expression id -> label

    def masks(self, position: int) -> dict[str, np.ndarray]:
        labels = read_labels(self.folder / f"{self.frames[position]}.png", self.size)
        return {expression: labels == label for expression, label in self.labels.items()}


def read_mevis(folder: Path) -> list[RleVideo]:
    """Reads a split of MeViS whose masks are published (train, valid_u).

    Args:
        folder: of the split: ``meta_expressions.json``, ``mask_dict.json``, and ``JPEGImages/`` for videos without any object.

    Raises:
        DataError: files are missing, the masks of the split are not published, or everything that does not fit together.
    """
    meta = read_meta(folder / META_FILE)
    hidden = [video for video, (_, found) in meta.items() if any("anno_id" not in e for e in found.values())]
    if hidden:
        raise DataError(
            f"{folder / META_FILE}: expected `anno_id` of every expression, got none in {len(hidden)} of {len(meta)} videos "
            f"({hidden[0]}, ...): the masks of this split are not published, so it cannot be scored here; use valid_u"
        )
    rles = _read_file(folder / MASK_FILE, "the masks of MeViS")
    problems: list[str] = []
    videos: list[RleVideo] = []
    for video, (frames, found) in meta.items():
        objects = {expression: tuple(str(a) for a in entry["anno_id"]) for expression, entry in found.items()}
        own = _lists_of(rles, {name for names in objects.values() for name in names}, video, frames, problems)
        size = _size_of(own, folder / "JPEGImages" / video, frames)
        if size is None:
            problems.append(
                f"{video}: expected a mask or an image in JPEGImages/{video}, got neither: its size is not known"
            )
            continue
        videos.append(RleVideo(video, frames, size, _texts(found), rles=own, objects=objects))
    _raise(folder, problems, len(meta))
    return videos


def read_ref_youtube_vos(folder: Path, expressions: Path | None = None) -> list[LabelVideo]:
    """Reads a split of Ref-YouTube-VOS whose masks are at hand.

    Args:
        folder: with ``Annotations/``, and perhaps ``obj_id.json`` and ``meta.json``.
        expressions: ``meta_expressions.json``; default: in the folder, or ``../meta_expressions/SPLIT/`` beside it, where SPLIT is
            the folder's name (without ``_gt``). Videos of ``../test/meta_expressions.json`` beside it are left out.

    Raises:
        DataError: files are missing, or everything that does not fit together.
    """
    found_at = expressions or _expressions_beside(folder)
    meta = without_test_videos(read_meta(found_at), found_at)
    labels = _labels_of(folder, meta)
    own = _frames_of_objects(folder / "meta.json")
    return _label_videos(folder, folder / "Annotations", meta, labels, own)


def read_ref_davis(folder: Path) -> list[LabelVideo]:
    """Reads Ref-DAVIS17 for protocol B.

    Args:
        folder: with ``meta_expressions/valid/`` and ``DAVIS/Annotations_unsupervised/480p/``.

    Raises:
        DataError: files are missing, or everything that does not fit together.
    """
    meta = read_meta(folder / "meta_expressions" / "valid" / META_FILE)
    return _label_videos(
        folder, folder / "DAVIS" / "Annotations_unsupervised" / "480p", meta, _labels_of(folder, meta), {}
    )


def davis_mask_keys(meta: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]]) -> dict[tuple[str, str], str]:
    """Returns the key of every (video, expression) in Ref-DAVIS17's ``mask_dict``: a running number.

    Videos and expression ids are sorted as text: 0, 1, 10, 11, 2, ... A numeric order reads wrong masks.
    """
    pairs = [(video, expression) for video in sorted(meta) for expression in sorted(meta[video][1])]
    return {pair: str(number) for number, pair in enumerate(pairs)}


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
        found = [read_labels(self.folder / f"{frame}.png") for frame in self.frames]
        for labels in found:
            if labels.shape != found[0].shape:
                raise DataError(
                    f"{self.folder}: expected label maps of one size, got {found[0].shape} and {labels.shape}"
                )
        return found


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


Meta = dict[str, tuple[tuple[str, ...], dict[str, dict[str, Any]]]]
"""Video -> frames, expressions by id."""


def read_meta(path: Path) -> Meta:
    """Reads a ``meta_expressions.json``; videos, frames and expressions keep their order.

    Raises:
        DataError: it is missing or malformed.
    """
    tree = _read_file(path, "expressions")
    videos = tree.get("videos") if isinstance(tree, dict) else None
    if not isinstance(videos, dict) or not videos:
        raise DataError(f"{path}: expected {{'videos': {{...}}}}, got {describe(tree)}: give the published file")
    problems: list[str] = []
    found: Meta = {}
    for video, entry in videos.items():
        frames, expressions = (entry.get(key) if isinstance(entry, dict) else None for key in ("frames", "expressions"))
        if not isinstance(frames, list) or not frames or not all(isinstance(frame, str) for frame in frames):
            problems.append(f"{video}: expected a list of frame names as `frames`, got {describe(frames)}")
        elif len(set(frames)) < len(frames):
            problems.append(f"{video}: expected every frame once, got {len(frames) - len(set(frames))} twice")
        elif not isinstance(expressions, dict) or not all(isinstance(e, dict) for e in expressions.values()):
            problems.append(f"{video}: expected expressions by id, got {describe(expressions)}")
        else:
            found[video] = (tuple(frames), expressions)
    _raise(path, problems, len(videos))
    return found


def without_test_videos(meta: Meta, path: Path) -> Meta:
    """Returns the videos of Ref-YouTube-VOS' valid split, sorted: its JSON also holds those of test.

    Args:
        meta: of ``path``.
        path: ``.../valid/meta_expressions.json``; beside it lies ``.../test/meta_expressions.json``. Other splits are returned as
            they are.

    Raises:
        DataError: the published file does not leave 202 videos.
    """
    if path.parent.name != "valid":
        return meta
    beside = path.parent.parent / "test" / META_FILE
    test = read_meta(beside) if beside.is_file() else {}
    left = {video: entry for video, entry in sorted(meta.items()) if video not in test}
    if len(meta) == _VALID_AND_TEST and len(left) != _VALID_ALONE:
        raise DataError(
            f"{path}: expected {_VALID_ALONE} videos of its {_VALID_AND_TEST} without those of test, got {len(left)}: put the "
            f"published file of test at {beside}"
        )
    return left


def _label_videos(
    folder: Path,
    annotations: Path,
    meta: Meta,
    labels: Mapping[str, Mapping[str, int]],
    own_frames: Mapping[str, Mapping[str, Sequence[str]]],
) -> list[LabelVideo]:
    videos: list[LabelVideo] = []
    problems: list[str] = []
    for video, (frames, found) in meta.items():
        first = annotations / video / f"{frames[0]}.png"
        missing = [frame for frame in frames if not (annotations / video / f"{frame}.png").is_file()]
        if missing:
            problems.append(
                f"{annotations / video}: expected a label map of each of the {len(frames)} frames, got none of {missing[0]} and "
                f"{len(missing) - 1} others"
            )
            continue
        with Image.open(first) as image:
            size = (image.height, image.width)
        own = {
            expression: tuple(frames.index(frame) for frame in own_frames[video][str(label)] if frame in frames)
            for expression, label in labels[video].items()
            if str(label) in own_frames.get(video, {})
        }
        videos.append(LabelVideo(video, frames, size, _texts(found), own, annotations / video, labels[video]))
    _raise(folder, problems, len(meta))
    return videos


def _labels_of(folder: Path, meta: Meta) -> dict[str, dict[str, int]]:
    """The label of every expression, from ``obj_id`` in its entry or from ``obj_id.json``."""
    beside = read_json_file(folder / OBJECT_FILE) if (folder / OBJECT_FILE).is_file() else {}
    problems: list[str] = []
    labels: dict[str, dict[str, int]] = {}
    for video, (_, found) in meta.items():
        labels[video] = {}
        for expression, entry in found.items():
            label = entry.get("obj_id", beside.get(video, {}).get(expression))
            if not str(label).isdecimal() or not 0 < int(label) < VOID:
                problems.append(
                    f"{video}/{expression}: expected the object's label as `obj_id` or in {OBJECT_FILE}, got {label!r}: without it "
                    "the split cannot be scored"
                )
                continue
            labels[video][expression] = int(label)
    _raise(folder, problems, sum(len(found) for _, found in meta.values()))
    return labels


def _frames_of_objects(path: Path) -> dict[str, dict[str, list[str]]]:
    """Video -> label -> frames, of YouTube-VOS' ``meta.json``; empty if there is none."""
    if not path.is_file():
        return {}
    videos = read_json_file(path)["videos"]
    return {
        video: {label: found["frames"] for label, found in entry["objects"].items()} for video, entry in videos.items()
    }


def _expressions_beside(folder: Path) -> Path:
    inside = folder / META_FILE
    beside = folder.parent / "meta_expressions" / folder.resolve().name.removesuffix("_gt") / META_FILE
    if not inside.is_file() and not beside.is_file():
        raise DataError(f"{folder}: expected {inside} or {beside}, got neither: give --expressions FILE")
    return inside if inside.is_file() else beside


def _lists_of(
    rles: Any, names: set[str], video: str, frames: Sequence[str], problems: list[str]
) -> dict[str, Sequence[Any]]:
    """The lists of some objects of a video, of which one that is missing or too short is a problem."""
    found: dict[str, Sequence[Any]] = {}
    for name in sorted(names):
        rle_list = rles.get(name)
        if not isinstance(rle_list, list) or len(rle_list) < len(frames):
            problems.append(
                f"{video}: expected {len(frames)} masks of object {name} in {MASK_FILE}, one per frame, got "
                f"{len(rle_list) if isinstance(rle_list, list) else 'none'}"
            )
            continue
        if len(rle_list) > len(frames):
            logger.warning(
                "%s: %s has %d masks of object %s for %d frames; the first ones are used, by position",
                video, MASK_FILE, len(rle_list), name, len(frames),
            )  # fmt: skip
        found[name] = rle_list[: len(frames)]
    return found


def _size_of(rles: Mapping[str, Sequence[Any]], images: Path, frames: Sequence[str]) -> tuple[int, int] | None:
    for rle in (rle for rle_list in rles.values() for rle in rle_list if rle is not None):
        height, width = rle["size"]
        return int(height), int(width)
    for path in (images / f"{frame}.jpg" for frame in frames):
        if path.is_file():
            with Image.open(path) as image:
                return image.height, image.width
    return None


def _texts(expressions: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {expression: str(entry.get("exp", "")) for expression, entry in expressions.items()}


def _read_file(path: Path, purpose: str) -> Any:
    if not path.is_file():
        raise missing_path_error(path, purpose)
    return read_json_file(path)


def _raise(where: Path, problems: Sequence[str], number: int) -> None:
    if problems:
        raise bad_records_error(str(where), problems, num_records=number)
