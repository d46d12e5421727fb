#!/usr/bin/env python
"""Batches from picture files: the plain loop with Pillow, a sample per phrase, against our collator, in one process.

    python scripts/bench/loader.py                 16 JPEGs of 640x480 px with 1, 4, 7 phrases each
    python scripts/bench/loader.py --quick         2 JPEGs, in seconds

The plain loop opens, warps and normalises the picture and draws the mask anew for every phrase, as a data set of (picture,
phrase) samples does. Ours reads a picture once per batch and draws an object once, however many phrases name it. Sizes are
those of DeRIS-7B: 384 px for perception and for cognition. Both give the same batch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from _bench import Comparison, bench_console, compare, comparison_table, machine
from PIL import Image
from shared import PHRASES, bench_config, write_weights_folder
from torch import Tensor
from torchvision.transforms import functional

from deris_llm.config import RunConfig
from deris_llm.data.collate import ReferringCollator
from deris_llm.data.dataset import ImageGroup
from deris_llm.data.masks import decode_segmentation
from deris_llm.models.cognition import CognitionProcessor, build_processor
from deris_llm.models.preprocess import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB
from deris_llm.structures import InstanceAnnotation, ReferringRecord

WIDTH, HEIGHT = 640, 480  # COCO's usual size
OBJECTS = 3  # named in a picture; phrases take turns


def write_groups(folder: Path, num_pictures: int, num_phrases: int) -> list[ImageGroup]:
    """Pictures with some structure and some noise, which decode about as photographs do, and round objects."""
    generator = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    outlines = [
        np.stack([150 + 150 * k + 90 * np.cos(angles), 220 + 90 * np.sin(angles)], axis=1).ravel().tolist()
        for k in range(OBJECTS)
    ]
    groups = []
    for number in range(num_pictures):
        path = folder / f"{number}.jpg"
        if not path.exists():
            rough = Image.fromarray(generator.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8))
            smooth = np.asarray(rough.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int64)
            noisy = smooth + generator.integers(-12, 13, smooth.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        groups.append(
            ImageGroup(
                tuple(
                    ReferringRecord(
                        phrase_id=f"bench/train/{number}-{phrase}",
                        dataset="bench",
                        split="train",
                        image_id=str(number),
                        image_path=str(path),
                        width=WIDTH,
                        height=HEIGHT,
                        phrase=PHRASES[phrase % len(PHRASES)],
                        instances=(InstanceAnnotation(phrase % OBJECTS, [outlines[phrase % OBJECTS]]),),
                    )
                    for phrase in range(num_phrases)
                )
            )
        )
    return groups


def plain_loop(groups: Sequence[ImageGroup], config: RunConfig, processor: CognitionProcessor) -> list[Tensor]:
    """A sample per phrase: perception pictures, cognition pictures, masks."""
    size = config.perception.image_size
    samples = []
    for record in (record for group in groups for record in group.records):
        with Image.open(record.image_path) as file:
            image = file.convert("RGB")
        warped = image.resize((size, size), Image.Resampling.BILINEAR)
        pixels = functional.normalize(
            functional.to_tensor(warped), mean=list(IMAGENET_MEAN_RGB), std=list(IMAGENET_STD_RGB)
        )
        cognition = processor([image], [record.phrase], [0])
        mask = decode_segmentation(record.instances[0].segmentation, record.height, record.width)
        truth = np.array(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
        samples += [pixels, cognition.pixel_values[0], torch.from_numpy(truth)]
    return samples


def our_batches(groups: Sequence[ImageGroup], collator: ReferringCollator) -> list[Tensor]:
    """A batch per picture; the same tensors in the same order."""
    samples = []
    for group in groups:
        batch = collator([group])
        assert batch.targets is not None
        for image, mask in zip(batch.image_index.tolist(), batch.targets.masks, strict=True):
            samples += [batch.perception_image[image], batch.cognition.pixel_values[image], mask]
    return samples


def bench(num_pictures: int, phrases: Sequence[int], repeats: int) -> list[Comparison]:
    """A row for each number of phrases."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_weights_folder(Path(folder), layers=1)
        config = bench_config(Path(folder))
        processor = build_processor(config)
        collator = ReferringCollator(config, processor)
        for number in phrases:
            groups = write_groups(Path(folder), num_pictures, number)
            rows.append(
                compare(
                    f"{num_pictures} pictures, {number} phrase{'s' if number > 1 else ''} each",
                    lambda groups=groups: plain_loop(groups, config, processor),
                    lambda groups=groups: our_batches(groups, collator),
                    repeats=repeats,
                    tolerance=1e-6,  # of normalised values; resized bytes and masks are equal
                )
            )
    return rows


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16, metavar="N", help="(default 16)")
    parser.add_argument("--phrases", type=int, nargs="+", default=[1, 4, 7], metavar="K", help="(default 1 4 7)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each (default 5)")
    parser.add_argument("--quick", action="store_true", help="few pictures, one run of each")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pictures, arguments.phrases, arguments.repeats = 2, [1, 4], 1
    torch.set_num_threads(1)
    console = bench_console()
    console.print(machine("torch", "pillow"))
    rows = bench(arguments.pictures, arguments.phrases, arguments.repeats)
    console.print(comparison_table(f"batches at 384 px, best of {arguments.repeats}", rows))
    for row in rows:
        plain, ours = (arguments.pictures / seconds for seconds in (row.plain_seconds, row.our_seconds))
        console.print(f"{row.name}: plain {plain:.0f}, ours {ours:.0f} pictures a second and core")


if __name__ == "__main__":
    main()
