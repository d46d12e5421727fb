"""ReasonSeg's annotations, which LISA reads: a JSON file beside each image, similar to LabelMe's.

    ReasonSeg/val/123.jpg, ReasonSeg/val/123.json; also train/ and test/
    {"text": ["something that can bark", ...], "is_sentence": true,
     "shapes": [{"label": "target", "points": [[x, y], ...]}, {"label": "ignore", "points": [...]}]}

As in LISA's code (dvlab-research/LISA, utils/data_processing.py and dataset.py): shapes are drawn with their outlines, the
largest first, so that a smaller one covers it; ``ignore`` marks pixels that no metric counts, ``flag`` means nothing, every other
label is the target. Outside train only the first text is asked. The split test is also read as test_short and test_long, by
``is_sentence``. Some files are not UTF-8 but cp1252.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import SourceEntry, SourceFault, SourceInstance, SourcePhrase, read_json_file
from deris_llm.data.images import ImageError, ImageFolder, image_facts
from deris_llm.data.masks import encode_mask
from deris_llm.structures import Exif

_IGNORED = 255
_FARTHEST_PX = 100_000


def is_reasonseg(content: object) -> bool:
    """Whether the content of a file is ReasonSeg's."""
    return isinstance(content, dict) and "text" in content and "shapes" in content


def read_any_encoding(file: Path) -> Any:
    """Parses JSON in UTF-8, or ReasonSeg's in cp1252.

    Raises:
        DataError: it is neither.
    """
    try:
        return read_json_file(file)
    except DataError:
        try:
            content = json.loads(file.read_bytes().decode("cp1252"))
        except (ValueError, RecursionError):
            content = None
        if is_reasonseg(content):
            return content
        raise


def entries_of_file(
    content: Mapping[str, Any], where: str, split: str, name: str, image: Any, folder: ImageFolder, exif: Exif
) -> Iterator[SourceEntry | SourceFault]:
    """Yields the entry of a file, and of a test file also that of its half of test.

    Args:
        content: of the file.
        where: the file, for messages.
        split: train, val or test.
        name: of the phrases.
        image: file name in the folder.
        folder: of all images.
        exif: the orientation that was annotated.
    """
    texts = content["text"] if isinstance(content["text"], list) else [content["text"]]
    texts = texts if split == "train" else texts[:1]
    is_sentence = content.get("is_sentence")
    halves = ("test_long" if is_sentence else "test_short",) if split == "test" else ()
    path, _ = folder.file(image)
    try:
        if not texts:
            raise ValueError("expected a phrase in text, got an empty list")
        if halves and is_sentence not in (True, False):
            raise ValueError(f"expected is_sentence to be true or false, got {is_sentence!r}")
        height, width = image_facts(path).size_hw(exif) if path is not None else (1, 1)
        labels = _drawn(content["shapes"], height, width)
    except ImageError:  # the pass over the images says what is wrong with it
        height, width, labels = 1, 1, np.ones((1, 1), np.uint8)
    except ValueError as error:
        yield SourceFault(where, split, "mask", str(error), max(1, len(texts)))
        return
    phrases = tuple(SourcePhrase(f"{name}-{k}", text) for k, text in enumerate(texts))
    ignored = encode_mask(labels == _IGNORED) if (labels == _IGNORED).any() else None
    for each in (split, *halves):
        yield SourceEntry(
            where, each, image, phrases, (SourceInstance(encode_mask(labels == 1)),), size_hw=(height, width), ignored=ignored
        )


def notes_of_split(contents: list[Mapping[str, Any]], split: str) -> tuple[str, ...]:
    """What must be read with the numbers of a split."""
    labels = [Counter(str(shape.get("label")).lower() for shape in content["shapes"]) for content in contents]
    num_ignored = sum(any("ignore" in label for label in found) for found in labels)
    num_left_out = sum(len(content["text"]) - 1 for content in contents if isinstance(content["text"], list) and content["text"])
    notes = [f"images with pixels that no metric counts, as in LISA: {num_ignored:,}"] if num_ignored else []
    if num_left_out and split != "train":
        notes.append(f"further texts of an image that are not asked, as in LISA: {num_left_out:,}")
    return tuple(notes)


def _drawn(shapes: list[Mapping[str, Any]], height: int, width: int) -> np.ndarray:
    """Draws shapes as LISA does.

    Returns:
        uint8 (height, width): 1 = target, 255 = ignored.

    Raises:
        ValueError: points that are none.
    """
    drawn: list[tuple[int, int, np.ndarray]] = []  # pixels, value, points
    for number, shape in enumerate(shapes):
        label, points = str(shape.get("label")).lower(), shape.get("points")
        if label == "flag":
            continue
        try:
            corners = np.array(points, dtype=np.float64).reshape(-1, 2)
        except (ValueError, TypeError):
            corners = np.empty((0, 2))
        if not corners.size or not (np.abs(corners) < _FARTHEST_PX).all():  # NaN is not
            raise ValueError(f"shape {number}: expected points [[x, y], ...] in px, got {describe(points)}")
        corners = corners.astype(np.int32)[None]
        alone = _with_outline(np.zeros((height, width), np.uint8), corners, 1)
        drawn.append((int(alone.sum()), _IGNORED if "ignore" in label else 1, corners))
    found = np.zeros((height, width), np.uint8)
    for place in np.argsort([pixels for pixels, *_ in drawn])[::-1]:
        _, value, corners = drawn[place]
        _with_outline(found, corners, value)
    return found


def _with_outline(labels: np.ndarray, corners: np.ndarray, value: int) -> np.ndarray:
    cv2.polylines(labels, list(corners), isClosed=True, color=value, thickness=1)
    cv2.fillPoly(labels, list(corners), value)
    return labels
