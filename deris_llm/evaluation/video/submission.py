"""Writes predictions for videos as the zip that an evaluation server takes.

| layout    | names                                  | PNG                                     |
| --------- | -------------------------------------- | --------------------------------------- |
| mevis     | VIDEO/EXPRESSION/FRAME.png             | grey, 0 and 255                         |
| ref-ytvos | Annotations/VIDEO/EXPRESSION/FRAME.png | grey, 0 and 255                         |
| davis     | SEQUENCE/FRAME.png                     | label map with the palette of DAVIS     |

Masks are taken one by one, so a submission of any size needs the memory of one mask. The zip gets its name when it is complete: a
frame that is missing leaves no file behind. Equal masks in equal order give equal bytes.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from deris_llm.common.words import count_of
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.sources import manifest_of, source_format
from deris_llm.data.store.prepared import LEFT_OUT_FILE
from deris_llm.evaluation.answers import Answer
from deris_llm.structures import ReferringRecord

Layout = Literal["mevis", "ref-ytvos", "davis"]
SERVER_FORMATS: tuple[Layout, ...] = ("mevis", "ref-ytvos")
"""Formats of `deris-llm data prepare` whose test splits a server evaluates; the layout has the same name."""
SubmittedMask = tuple[str, str, str, np.ndarray]
"""Video, expression ("" in DAVIS), name of the frame, and bool (H, W) or in DAVIS a uint8 label map."""
_LISTED = 5
_MOST_OBJECTS = 254


class SubmissionZipError(ValueError):
    """Predictions that do not make a complete submission."""


def write_submission(
    out: Path, layout: Layout, masks: Iterable[SubmittedMask], asked: Mapping[tuple[str, str], Sequence[str]]
) -> Path:
    """Writes a zip and returns its path.

    Args:
        out: name of the zip; an existing one is replaced when the new one is complete.
        layout: see above.
        masks: in any order, at the size of the video's frames.
        asked: names of the frames of every (video, expression) that the server expects.

    Raises:
        SubmissionZipError: a mask that is not asked for, twice there, of the wrong kind or size, or missing.
    """
    if layout not in get_args(Layout):
        raise SubmissionZipError(f"layout {layout!r}: expected one of {', '.join(get_args(Layout))}: choose one")
    if out.suffix != ".zip":
        raise SubmissionZipError(f"{out}: expected a name that ends in .zip: servers take nothing else")
    left = {(video, expression, frame) for (video, expression), frames in asked.items() for frame in frames}
    if not left:
        raise SubmissionZipError(f"{out}: expected frames to write, got none asked for: check the split")
    number = len(left)
    done: set[tuple[str, str, str]] = set()
    sizes: dict[str, tuple[int, ...]] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".partial-{out.name}")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for video, expression, frame, mask in masks:
                key = (video, expression, frame)
                name = _entry_name(layout, *key)
                if key not in left:
                    why = "it is there twice" if key in done else "the split does not ask for it"
                    raise SubmissionZipError(f"{name}: expected each asked frame once, got one more: {why}")
                _check_mask(name, layout, mask, sizes.setdefault(video, mask.shape))
                archive.writestr(_entry(name), _png(layout, mask))
                left.remove(key)
                done.add(key)
        if left:
            missing = [_entry_name(layout, *key) for key in sorted(left)]
            raise SubmissionZipError(
                f"{out}: expected {count_of(number, 'mask')}, got {len(done):,}; missing: {', '.join(missing[:_LISTED])}"
                f"{', ...' if len(missing) > _LISTED else ''}: nothing was written; predict all frames of all expressions"
            )
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def asked_frames(records: Iterable[ReferringRecord]) -> dict[tuple[str, str], list[str]]:
    """Returns the frames of every (video, expression) of a split, as `write_submission` takes them.

    Args:
        records: of a video dataset; the last part of an image id is the name of the frame.

    Raises:
        ValueError: a record is no frame of a video.
    """
    asked: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record.video is None or record.expression is None:
            raise ValueError(
                f"{record.phrase_id}: expected a frame of a video, got an image: only video splits have a submission"
            )
        asked.setdefault((record.video, record.expression), []).append(record.image_id.rpartition("/")[2])
    return asked


def check_submission(root: str | Path, splits: Sequence[str], out: Path, *, max_images: int) -> None:
    """Checks, before the work, that answers to a split make a zip that a server takes.

    Raises:
        ValueError: several splits, some of the images only, a split that no server evaluates, or one that lacks frames.
    """
    where = f"--submission {out}"
    if len(splits) != 1 or max_images:
        raise ValueError(
            f"{where}: expected one whole split, got {', '.join(splits)}{' and --max-images' if max_images else ''}: name it with --splits"
        )
    form = source_format(root, splits[0].partition("/")[0])
    if form not in SERVER_FORMATS:
        raise ValueError(
            f"{where}: expected a split of videos in the format of {' or '.join(SERVER_FORMATS)}, got {splits[0]}, prepared from {form}: "
            "other sets have no evaluation server; the predictions are in the output folder"
        )
    dataset, _, split = splits[0].partition("/")
    if number := manifest_of(root, dataset).num_skipped(split):
        raise ValueError(
            f"{where}: expected all frames and sentences of {splits[0]}, got a set that data prepare --skip-bad left {number:,} out of: "
            f"the server would miss them; complete the source and prepare it again ({LEFT_OUT_FILE} names them)"
        )
    if out.suffix != ".zip":
        raise ValueError(f"{where}: expected a name that ends in .zip, got {out.name}: servers take nothing else")


def submitted(answer: Answer, record: ReferringRecord) -> SubmittedMask:
    """Returns the answer to an expression in a frame as `write_submission` takes it."""
    assert record.video is not None, "a frame of a video"
    assert record.expression is not None, "a frame of a video"
    mask = decode_segmentation(answer.mask, record.height, record.width)
    return record.video, record.expression, record.image_id.rpartition("/")[2], mask


@cache
def davis_palette() -> bytes:
    """Returns the 256 colours of DAVIS' (and PASCAL VOC's) label maps as RGB.

    The bits of a label are dealt out to red, green and blue in turn, the lowest to the highest bit of a colour.
    """
    colours = bytearray()
    for label in range(256):
        for channel in range(3):
            bits = [label >> (3 * i + channel) & 1 for i in range(3)]
            colours.append(sum(bit << (7 - i) for i, bit in enumerate(bits)))
    return bytes(colours)


def _entry_name(layout: Layout, video: str, expression: str, frame: str) -> str:
    parts = [video, frame] if layout == "davis" else [video, expression, frame]
    if any(not part or part in (".", "..") or "/" in part or "\\" in part for part in parts):
        raise SubmissionZipError(
            f"{parts}: expected names of a video, an expression and a frame, got one that is a path"
        )
    return "/".join(["Annotations"] * (layout == "ref-ytvos") + parts) + ".png"


def _check_mask(name: str, layout: Layout, mask: np.ndarray, size: tuple[int, ...]) -> None:
    kind = np.uint8 if layout == "davis" else np.bool_
    if mask.ndim != 2 or mask.dtype != kind:
        raise SubmissionZipError(
            f"{name}: expected {np.dtype(kind)} (H, W), got {mask.dtype} {mask.shape}: no probabilities"
        )
    if mask.shape != size:
        raise SubmissionZipError(
            f"{name}: expected the size of the video's other masks, {size[0]} x {size[1]}, got {mask.shape[0]} x "
            f"{mask.shape[1]} (height x width): write masks at the size of the frames"
        )
    if layout == "davis" and mask.max(initial=0) > _MOST_OBJECTS:
        raise SubmissionZipError(f"{name}: expected labels up to {_MOST_OBJECTS}, got 255: that is void in DAVIS")


def _png(layout: Layout, mask: np.ndarray) -> bytes:
    if layout == "davis":
        image = Image.fromarray(mask)
        image.putpalette(davis_palette())
    else:
        image = Image.fromarray(mask.astype(np.uint8) * 255)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    """An entry without a date, so that equal masks make equal files."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    entry.create_system = 3
    return entry
