"""Reads predictions for videos as any method writes them: a tree of PNGs, or one JSON file of RLE.

    VIDEO/EXPRESSION/FRAME.png            masks (MeViS, Ref-YouTube-VOS, Ref-DAVIS17 B); Annotations/ may stand above
    SEQUENCE/FRAME.png                    label maps (DAVIS, Ref-DAVIS17 A): `read_labels`
    {VIDEO: {EXPRESSION: [RLE, ...]}}     one RLE per frame, in the order of the frames; null = an empty mask.
                                          {EXPRESSION: {"prediction_masks": [...]}}, as Sa2VA writes it, is read too

A PNG belongs to the frame of its name; only RLE lists are matched by position. A missing folder and an empty folder mean the
same. A mask must have the size of the truth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import read_json_file
from deris_llm.data.images import MAX_PIXELS, opened_image
from deris_llm.data.masks import check_palette, decode_segmentation

TOP_FOLDER = "Annotations"
"""The videos lie below it in submissions to Ref-YouTube-VOS."""
_SA2VA_KEY = "prediction_masks"


class FrameError(DataError):
    """A prediction that cannot be compared with the truth."""


@dataclass(frozen=True)
class PngTree:
    """A folder ``VIDEO/EXPRESSION/FRAME.png``."""

    path: Path

    @classmethod
    def of(cls, path: Path) -> PngTree:
        """Opens a folder; if it holds ``Annotations/`` and no other folder, that is opened."""
        return cls(path / TOP_FOLDER if _folders(path) == [TOP_FOLDER] else path)

    def found(self, video: str, expression: str, frames: Sequence[str]) -> list[bool]:
        """Returns which frames have a mask: none if the folder is missing or empty."""
        names = self._frames(video, expression)
        return [frame in names for frame in frames]

    def mask(self, video: str, expression: str, position: int, frame: str, size: tuple[int, int]) -> np.ndarray:
        """Reads the mask of a frame.

        Args:
            video: its name.
            expression: its id.
            position: of the frame in the list of frames; RLE lists go by it.
            frame: name without extension; PNGs go by it.
            size: (H, W) of the truth.

        Returns:
            bool (H, W).

        Raises:
            FrameError: it is no mask of this size.
        """
        return read_mask(self.path / video / expression / f"{frame}.png", size)

    def unknown(self, frames: Mapping[tuple[str, str], Iterable[str]]) -> list[str]:
        """Returns what the tree holds beside the frames of the given (video, expression): ``video/expression[/frame]``."""
        found: list[str] = []
        for video in _folders(self.path):
            for expression in _folders(self.path / video):
                if (video, expression) not in frames:
                    found.append(f"{video}/{expression}")
                else:
                    extra = self._frames(video, expression).difference(frames[video, expression])
                    found += [f"{video}/{expression}/{frame}" for frame in sorted(extra)]
        return found

    def of_video(self, video: str) -> PngTree:
        """Returns what a process needs that scores one video."""
        return self

    def _frames(self, video: str, expression: str) -> set[str]:
        return {path.stem for path in (self.path / video / expression).glob("*.png")}


@dataclass(frozen=True)
class RleFile:
    """A JSON file ``{VIDEO: {EXPRESSION: [RLE, ...]}}``."""

    path: Path
    tree: Mapping[str, Mapping[str, Sequence[Any]]]

    @classmethod
    def of(cls, path: Path) -> RleFile:
        """Reads a file.

        Raises:
            DataError: it has another form.
        """
        tree = read_json_file(path)
        if not isinstance(tree, dict) or not all(isinstance(found, dict) for found in tree.values()):
            raise DataError(
                f"{path}: expected {{video: {{expression: [RLE, ...]}}}}, got {describe(tree)}: write one list of RLEs for each "
                "expression of each video"
            )
        return cls(
            path,
            {
                video: {expression: _rles(path, f"{video}/{expression}", value) for expression, value in found.items()}
                for video, found in tree.items()
            },
        )

    def found(self, video: str, expression: str, frames: Sequence[str]) -> list[bool]:
        """Returns which frames have a mask: none if there is no list or an empty one.

        Raises:
            FrameError: the list has another length.
        """
        number = len(self.tree.get(video, {}).get(expression, ()))
        if number not in (0, len(frames)):
            raise FrameError(
                f"{video}/{expression}: expected {len(frames)} RLEs, one per frame in the order of the frames, got {number}: "
                "frames cannot be matched; write null for a frame with an empty mask"
            )
        return [bool(number)] * len(frames)

    def mask(self, video: str, expression: str, position: int, frame: str, size: tuple[int, int]) -> np.ndarray:
        """Reads the mask of a frame, as `PngTree.mask` does."""
        rle = self.tree[video][expression][position]
        if rle is None:
            return np.zeros(size, dtype=bool)
        try:
            return decode_segmentation(rle, *size)
        except ValueError as error:
            raise FrameError(f"{video}/{expression}/{frame}: {error}") from error

    def unknown(self, frames: Mapping[tuple[str, str], Iterable[str]]) -> list[str]:
        """Returns what the file holds beside the given (video, expression)."""
        return [f"{v}/{e}" for v, expressions in self.tree.items() for e in expressions if (v, e) not in frames]

    def of_video(self, video: str) -> RleFile:
        """Returns what a process needs that scores one video."""
        return RleFile(self.path, {video: self.tree.get(video, {})})


def open_predictions(path: Path) -> PngTree | RleFile:
    """Opens a tree of PNGs or a JSON file.

    Raises:
        DataError: it is neither.
    """
    if path.is_dir():
        return PngTree.of(path)
    if path.suffix == ".json" and path.is_file():
        return RleFile.of(path)
    raise DataError(
        f"{path}: expected a folder VIDEO/EXPRESSION/FRAME.png or a .json file of RLEs, got "
        f"{'a file of another kind' if path.is_file() else 'nothing there'}: check the path; unpack a zip first"
    )


def read_mask(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads a mask: every grey value above 0 is inside, as in the public code of MeViS.

    Args:
        path: of a PNG with 8 bits per channel, grey, with a palette or in colours.
        size: (H, W) that it must have.

    Returns:
        bool (H, W).

    Raises:
        FrameError: it is none.
    """
    with _opened(path, size) as image:
        if image.mode == "P":
            values = np.asarray(image)
            check_palette(image, values)
            return values > 0
        return np.asarray(image.convert("L")) > 0


def read_labels(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads a label map: the palette's numbers, or the values of a grey PNG.

    Args:
        path: of a PNG of one channel with 8 bits.
        size: (H, W) that it must have.

    Returns:
        uint8 (H, W).

    Raises:
        FrameError: it is none.
    """
    with _opened(path, size) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(
                f"expected a label map, a PNG with a palette whose numbers are the objects, got colours (mode {image.mode}): "
                "save the numbers, not the colours"
            )
        return np.asarray(image).astype(np.uint8)


@contextlib.contextmanager
def _opened(path: Path, size: tuple[int, int] | None) -> Iterator[Image.Image]:
    """Yields a decoded PNG of 8 bits; errors of the block name it, too."""
    try:
        with opened_image(path) as image:
            found = (image.height, image.width)
            if size is not None and found != size:
                raise ValueError(
                    f"expected the truth's size, {_hw(size)}, got {_hw(found)}: write masks at the size of the video's frames"
                )
            if image.height * image.width > MAX_PIXELS:
                raise ValueError(
                    f"expected at most {MAX_PIXELS:,} pixels, got {_hw(found)}: write masks at the size of the video's frames"
                )
            image.load()
            if image.mode[0] in "IF":
                raise ValueError(
                    f"expected 8 bits per channel, got mode {image.mode}: programs read 16-bit values differently; save 0 and "
                    "255, or a palette"
                )
            yield image
    except FileNotFoundError as error:
        raise FrameError(f"{path}: expected a PNG for this frame, got no file: write one for every frame") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise FrameError(
            f"{path}: expected a PNG, got a file that does not decode ({error}): write it again"
        ) from error
    except ValueError as error:
        raise FrameError(f"{path}: {error}") from error


def _hw(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} px (height x width)"


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def _rles(path: Path, where: str, value: object) -> Sequence[Any]:
    if isinstance(value, dict) and _SA2VA_KEY in value:
        value = value[_SA2VA_KEY]
    if not isinstance(value, list):
        raise DataError(
            f"{path}: {where}: expected a list of RLEs, one per frame, got {describe(value)}: write a list, in the order of the "
            "frames"
        )
    return value
