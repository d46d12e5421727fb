#!/usr/bin/env python
"""Predicted masks to numbers: a plain loop over decoded masks against `deris-llm score`'s own functions, in one process.

    python scripts/bench/evaluation.py                       100,000 phrases, pictures of 640x480 px, 7 phrases each; minutes
    python scripts/bench/evaluation.py --phrases 10000       a tenth of them
    python scripts/bench/evaluation.py --quick               in seconds

Both read the same JSON lines with COCO RLE and the same polygons, and give mIoU, oIoU and Pr@X under `original` (at the
picture's size) and `deris` (at 384 px, both masks resized). The plain loop draws both masks of every phrase and counts
pixels. Ours checks every mask besides, counts on the runs where nothing is resized, and draws a truth once per picture.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from _bench import bench_console, compare, comparison_table, machine
from pycocotools import mask as coco_mask
from torch import Tensor

from deris_llm.config.protocols import protocols_of_file
from deris_llm.evaluation.metrics import PRECISION_LEVELS
from deris_llm.evaluation.score import score_submission
from deris_llm.evaluation.submissions import read_submission
from deris_llm.structures import InstanceAnnotation, ReferringRecord

WIDTH, HEIGHT, PHRASES_PER_PICTURE, OBJECTS = 640, 480, 7, 3
DERIS_PX = 384


def outline(generator: np.random.Generator) -> list[float]:
    """A rugged blob inside the picture, as people draw outlines: 40 points."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = generator.uniform(30, 120) * (1 + 0.15 * generator.standard_normal(40))
    x = np.clip(generator.uniform(0, WIDTH) + radius * np.cos(angles), 0, WIDTH)
    y = np.clip(generator.uniform(0, HEIGHT) + radius * np.sin(angles), 0, HEIGHT)
    return np.stack([x, y], axis=1).ravel().tolist()


def write_predictions(path: Path, num_phrases: int) -> list[ReferringRecord]:
    """Phrases with outlines, and a file of predictions that overlap them."""
    generator = np.random.default_rng(0)
    coco: Any = coco_mask
    records = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_phrases):
            picture, phrase = divmod(number, PHRASES_PER_PICTURE)
            if phrase == 0:
                outlines = [outline(generator) for _ in range(OBJECTS)]
            chosen = phrase % OBJECTS
            record = ReferringRecord(
                phrase_id=f"refcoco/val/{number}",
                dataset="refcoco",
                split="val",
                image_id=str(picture),
                image_path=f"{picture}.jpg",
                width=WIDTH,
                height=HEIGHT,
                phrase="a phrase",
                instances=(InstanceAnnotation(OBJECTS * picture + chosen, [outlines[chosen]]),),
            )
            shifted = (np.array(outlines[chosen]) + generator.normal(0, 4, 80)).clip(0, HEIGHT).tolist()
            rle = coco.frPyObjects([shifted], HEIGHT, WIDTH)[0]
            mask = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode("ascii")}
            file.write(json.dumps({"phrase_id": record.phrase_id, "mask": mask}) + "\n")
            records.append(record)
    return records


def plain_loop(path: Path, records: Sequence[ReferringRecord], protocols: Sequence[str]) -> list[Tensor]:
    """Draws, resizes and counts, phrase by phrase."""
    coco: Any = coco_mask
    counts: dict[str, list[tuple[int, int]]] = {name: [] for name in protocols}
    with path.open(encoding="utf-8") as file:
        predictions = {line["phrase_id"]: line["mask"] for line in map(json.loads, file)}
    for record in records:
        outlines = coco.frPyObjects(record.instances[0].segmentation, record.height, record.width)
        truth = coco.decode(coco.merge(outlines))
        mask = coco.decode(predictions[record.phrase_id])
        for name in protocols:
            if name == "deris":
                mask, truth = (
                    cv2.resize(drawn, (DERIS_PX, DERIS_PX), interpolation=cv2.INTER_NEAREST) for drawn in (mask, truth)
                )
            intersection = int(np.logical_and(mask, truth).sum())
            counts[name].append((intersection, int(np.logical_or(mask, truth).sum())))
    numbers = []
    for found in counts.values():
        intersections, unions = np.array(found, dtype=np.float64).T
        iou = intersections / unions
        numbers += [
            iou.mean(),
            intersections.sum() / unions.sum(),
            *((iou >= level).mean() for level in PRECISION_LEVELS),
        ]
    return [torch.tensor(numbers) * 100]


def our_way(path: Path, records: Sequence[ReferringRecord], protocols: Sequence[str]) -> list[Tensor]:
    """What `deris-llm score` does between reading the split and writing the report."""
    asked = protocols_of_file(protocols, text_field="sent")
    submission = read_submission(path, records)
    scored = score_submission(submission, records, asked, is_generalised=False, workers=1)
    names = ("mIoU", "oIoU", *(f"Pr@{level}" for level in PRECISION_LEVELS))
    return [torch.tensor([scored.result.numbers[protocol][name] for protocol in protocols for name in names])]


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phrases", type=int, default=100_000, metavar="N", help="(default 100,000)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="runs of each (default 1)")
    parser.add_argument("--quick", action="store_true", help="70 phrases")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.phrases = 70
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    console = bench_console()
    console.print(machine("numpy", "pycocotools"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        records = write_predictions(path, arguments.phrases)
        rows = [
            compare(
                f"{arguments.phrases:,} phrases, {' and '.join(protocols)}",
                lambda asked=protocols: plain_loop(path, records, asked),
                lambda asked=protocols: our_way(path, records, asked),
                repeats=arguments.repeats,
                tolerance=1e-6,
            )
            for protocols in (("original",), ("original", "deris"))
        ]
    console.print(comparison_table(f"predictions to numbers, best of {arguments.repeats}", rows))
    for row in rows:
        plain, ours = (1e3 * seconds / arguments.phrases for seconds in (row.plain_seconds, row.our_seconds))
        console.print(f"{row.name}: plain {plain:.2f}, ours {ours:.2f} ms a phrase")


if __name__ == "__main__":
    main()
