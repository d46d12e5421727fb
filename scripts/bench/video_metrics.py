#!/usr/bin/env python
"""J and F of video frames: boundaries matched through scipy's exact distance transform against our dilation, in one process.

    python scripts/bench/video_metrics.py                    480 x 854 to 2160 x 3840; about two minutes
    python scripts/bench/video_metrics.py --quick            in seconds

Blobs are two ellipses as objects are; noise has a boundary at nearly every pixel, the most that a frame can have.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from _bench import bench_console, compare, comparison_table, machine
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from deris_llm.evaluation.video.metrics import boundary_of, boundary_radius
from deris_llm.evaluation.video.protocols import frame_score

SIZES = ((480, 854), (720, 1280), (1080, 1920), (2160, 3840))  # height, width
Pair = tuple[np.ndarray, np.ndarray]


def blobs(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two ellipses."""
    y, x = np.ogrid[:height, :width]
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(2):
        centre, axes = generator.uniform(0.2, 0.8, 2), generator.uniform(0.05, 0.25, 2)
        mask |= ((y / height - centre[0]) / axes[0]) ** 2 + ((x / width - centre[1]) / axes[1]) ** 2 < 1
    return mask


def noise(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Every pixel by chance."""
    return generator.random((height, width)) < 0.5


def plain_way(pairs: Sequence[Pair]) -> list[Tensor]:
    """J and F with the distance of every pixel to the other boundary."""
    found: list[tuple[float, float]] = []
    for truth, answer in pairs:
        radius = boundary_radius(*truth.shape)
        ours, theirs = boundary_of(answer), boundary_of(truth)
        precision, recall = (
            np.count_nonzero(one & (distance_transform_edt(~other) <= radius)) / np.count_nonzero(one)
            for one, other in ((ours, theirs), (theirs, ours))
        )
        both = precision + recall
        overlap = np.count_nonzero(truth & answer) / np.count_nonzero(truth | answer)
        found.append((overlap, 2 * precision * recall / both if both else 0.0))
    return [torch.tensor(found)]


def our_way(pairs: Sequence[Pair]) -> list[Tensor]:
    """What the protocols compute of a frame."""
    return [torch.tensor([tuple(frame_score(truth, answer)) for truth, answer in pairs])]


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=12, metavar="N", help="of each size and kind (default 12)")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="runs of each (default 2)")
    parser.add_argument("--quick", action="store_true", help="two frames of the smallest size, once")
    arguments = parser.parse_args()
    sizes = SIZES
    if arguments.quick:
        sizes, arguments.frames, arguments.repeats = SIZES[:1], 2, 1
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    console = bench_console()
    console.print(machine("numpy", "scipy", "opencv-python-headless"))
    kinds: tuple[Callable[[np.random.Generator, int, int], np.ndarray], ...] = (blobs, noise)
    rows = []
    for height, width in sizes:
        for make in kinds:
            generator = np.random.default_rng(0)
            pairs = [(make(generator, height, width), make(generator, height, width)) for _ in range(arguments.frames)]
            rows.append(
                compare(
                    f"{height} x {width}, {make.__name__}",
                    lambda pairs=pairs: plain_way(pairs),
                    lambda pairs=pairs: our_way(pairs),
                    repeats=arguments.repeats,
                    tolerance=1e-6,
                )
            )
    console.print(comparison_table(f"J and F of {arguments.frames} frames, best of {arguments.repeats}", rows))
    for row in rows:
        plain, ours = (1e3 * seconds / arguments.frames for seconds in (row.plain_seconds, row.our_seconds))
        console.print(f"{row.name}: plain {plain:.1f}, ours {ours:.2f} ms a frame")


if __name__ == "__main__":
    main()
