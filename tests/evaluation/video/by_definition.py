"""J and F written out pixel by pixel from their definition, each rule a switch, and the golden cases that they are recorded for.

    python -m tests.evaluation.video.by_definition tests/golden/video_metrics.json

writes the golden file: drawn masks as RLE, with J, F and the counts of this file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


@dataclass(frozen=True)
class Rules:
    """The rules of J and F; every default is right, every other value is a mistake that a golden case must show."""

    float32_radius: bool = False
    floor_radius: bool = False
    last_row: bool = True  # compared with the pixel to the right
    last_column: bool = True  # compared with the pixel below
    corner: bool = False  # the last pixel is a boundary if it is set
    diagonal: bool = True
    square: bool = False  # the neighbourhood
    both_empty: float = 1.0  # J
    no_boundary: float = 1.0  # F
    void: bool = True


def slow_counts(
    truth: np.ndarray, answer: np.ndarray, void: np.ndarray | None, rules: Rules = Rules()
) -> dict[str, Any]:
    """Returns J, F, the radius and all counts of two masks, bool (H, W)."""
    height, width = truth.shape
    if void is not None and rules.void:
        truth, answer = truth & ~void, answer & ~void
    inter, union = int((truth & answer).sum()), int((truth | answer).sum())
    if rules.float32_radius:
        radius = math.ceil(np.float32(0.008) * np.linalg.norm(np.array([height, width], dtype=np.float32)))
    else:
        radius = (math.floor if rules.floor_radius else math.ceil)(0.008 * math.sqrt(height**2 + width**2))
    outlines = [list(_boundary(mask.tolist(), rules)) for mask in (truth, answer)]
    matched = [_matched(ours, theirs, radius, rules) for ours, theirs in (outlines, outlines[::-1])]
    counts = [len(pixels) for pixels in outlines]
    if not any(counts):
        accuracy = rules.no_boundary
    elif not all(counts):
        accuracy = 0.0
    else:
        precision, recall = matched[1] / counts[1], matched[0] / counts[0]
        accuracy = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    similarity = inter / union if union else rules.both_empty
    return {"J": similarity, "F": accuracy, "radius": radius, "boundary": counts, "matched": matched}


def _boundary(mask: list[list[bool]], rules: Rules) -> Iterator[tuple[int, int]]:
    height, width = len(mask), len(mask[0])
    for y in range(height):
        for x in range(width):
            right, below = x + 1 < width, y + 1 < height
            differs = right and (below or rules.last_row) and mask[y][x] != mask[y][x + 1]
            differs |= below and (right or rules.last_column) and mask[y][x] != mask[y + 1][x]
            differs |= right and below and rules.diagonal and mask[y][x] != mask[y + 1][x + 1]
            differs |= not right and not below and rules.corner and mask[y][x]
            if differs:
                yield y, x


def _matched(ours: list[tuple[int, int]], theirs: list[tuple[int, int]], radius: int, rules: Rules) -> int:
    """How many of our pixels have one of theirs within the radius."""
    if not ours or not theirs:
        return 0
    offsets = np.abs(np.array(ours)[:, None] - np.array(theirs)[None])
    near = offsets.max(axis=2) <= radius if rules.square else (offsets**2).sum(axis=2) <= radius**2
    return int(near.any(axis=1).sum())


def drawn_cases() -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Yields name, truth, answer and void of the golden cases."""

    def box(top: int, left: int, bottom: int, right: int, size: tuple[int, int] = (24, 32)) -> np.ndarray:
        mask = np.zeros(size, dtype=bool)
        mask[top:bottom, left:right] = True
        return mask

    empty, full = box(0, 0, 0, 0), ~box(0, 0, 0, 0)
    yield "both_empty", empty, empty, None
    yield "full_against_empty", full, empty, None
    yield "empty_against_box", empty, box(3, 4, 9, 14), None
    yield "left_half_against_right_half", box(0, 0, 24, 16), box(0, 16, 24, 32), None
    yield "shift_of_two", box(5, 6, 15, 20), box(7, 8, 17, 22), None
    yield "touches_the_bottom", box(20, 3, 24, 9), box(20, 5, 24, 12), None
    yield "touches_the_right", box(4, 28, 10, 32), box(6, 27, 12, 32), None
    yield "last_pixel", box(23, 31, 24, 32), box(22, 30, 24, 32), None
    yield "single_pixels", box(10, 10, 11, 11), box(11, 11, 12, 12), None
    yield "void_cuts_the_object", box(4, 4, 16, 20), box(5, 6, 18, 18), box(10, 0, 14, 32)
    yield "void_covers_the_truth", box(4, 4, 8, 8), box(4, 12, 8, 16), box(0, 0, 24, 10)
    size = (105, 360)  # a diagonal of 375 px: the radius is exactly 3
    yield "exact_radius", box(20, 40, 60, 200, size), box(24, 44, 64, 204, size), None
    yield "corners_at_distance", box(20, 40, 60, 200, size), box(22, 43, 62, 203, size), None
    rng = np.random.default_rng(16)
    noise = rng.random((2, 30, 41)) < 0.3
    yield "noise", noise[0], noise[1], None
    yield "noise_with_void", noise[0], noise[1], rng.random((30, 41)) < 0.2


def _rle(mask: np.ndarray | None) -> dict[str, Any] | None:
    if mask is None:
        return None
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def main(path: Path) -> None:
    """Writes the golden file."""
    cases = [
        {"name": name, "truth": _rle(truth), "answer": _rle(answer), "void": _rle(void)}
        | slow_counts(truth, answer, void)
        for name, truth, answer, void in drawn_cases()
    ]
    lines = ",\n".join(f"  {json.dumps(case)}" for case in cases)
    command = f"python -m tests.evaluation.video.by_definition {path.as_posix()}"
    path.write_text(f'{{"command": {json.dumps(command)},\n "cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
