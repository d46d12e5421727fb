#!/usr/bin/env python
"""What the cache of frozen towers' features (`data.feature_cache`) saves: a batch and a training step, from pictures and from it.

    python scripts/bench/features.py                 16 JPEGs of 640x480 px; 1, 4, 7 phrases; counted shares
    python scripts/bench/features.py --quick         2 JPEGs and the tiny model, in seconds

A batch: what the loader does, from the file to tensors. A step: loader, forward, loss and backward (no optimizer) of
`tiny-refcoco`, whole, with 4 pictures; and of a model with the proportions of DeRIS-0.5B (`bench_shared.py`: as many layers
of SigLIP and language model as --layers, drawn weights, Swin-S whole) with one. Both sides must give equal gradients. CPU
seconds of the process, the best of the repeats. Counted: floating-point operations of the towers in a training step.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _bench import Comparison, bench_console, compare, comparison_table, machine
from loader import write_groups
from rich.table import Column, Table
from shared import bench_config, write_weights_folder
from torch import Tensor

from deris_llm.config import RunConfig, load_config
from deris_llm.data.collate import ReferringCollator
from deris_llm.data.dataset import ImageGroup
from deris_llm.data.feature_cache import FeatureCache
from deris_llm.losses.criterion import build_criterion
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import Deris, build_model
from deris_llm.planning.efficiency import count_macs, training_flops
from deris_llm.planning.plan import plan_cognition, shape_batch
from deris_llm.training.features import feature_cache, keep_features

TOLERANCE = 1e-4  # relative to a gradient's largest value; measured: see docs/benchmarks.md


@dataclasses.dataclass(frozen=True)
class Sides:
    """A run's model with its two loaders."""

    config: RunConfig
    model: Deris
    pictures: ReferringCollator
    cached: ReferringCollator

    @classmethod
    def of(cls, config: RunConfig, groups: Sequence[ImageGroup], *, weights: bool) -> Sides:
        """Builds them and keeps the groups' features."""
        torch.manual_seed(0)
        model, processor = build_model(config, weights=weights, device="cpu"), build_processor(config)
        cache: FeatureCache = feature_cache(config, model, processor)
        keep_features(cache, config, model, processor, groups)
        pictures, cached = (ReferringCollator(config, processor, features=kept) for kept in (None, cache))
        return cls(config, model.train(), pictures, cached)

    def batches(self, groups: Sequence[ImageGroup], collator: ReferringCollator) -> list[Tensor]:
        """A batch per picture; the tensors that both sides have."""
        found = []
        for group in groups:
            batch = collator([group])
            assert batch.targets is not None
            found += [batch.targets.masks, batch.cognition.input_ids]
        return found

    def step(self, groups: Sequence[ImageGroup], collator: ReferringCollator) -> list[Tensor]:
        """Loads a micro-batch and gives the gradients of all that trains."""
        batch = collator(groups)
        assert batch.targets is not None
        self.model.zero_grad()
        generator = torch.Generator().manual_seed(0)
        build_criterion(self.config)(self.model(batch), batch.targets, generator=generator).total.backward()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def compare(
        self, name: str, run: Callable[[Sequence[ImageGroup], ReferringCollator], list[Tensor]],
        groups: Sequence[ImageGroup], repeats: int,
    ) -> Comparison:  # fmt: skip
        """A row."""
        return compare(
            name,
            lambda: run(groups, self.pictures),
            lambda: run(groups, self.cached),
            repeats=repeats,
            tolerance=TOLERANCE,
        )


def bench(num_pictures: int, phrases: Sequence[int], layers: int, repeats: int, *, only_tiny: bool) -> list[Comparison]:
    """Rows of both models."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = f"data.feature_cache={folder / 'features'}"
        together = "evaluation.images_per_device={}"  # as a step has: other numbers round otherwise
        groups = {number: write_groups(folder, num_pictures, number) for number in phrases}
        tiny = Sides.of(
            load_config("tiny-refcoco", [kept, "data.num_workers=0", together.format(4)]),
            groups[phrases[0]],
            weights=True,
        )
        for number in phrases:
            of_step = f"tiny-refcoco: step, 4 pictures, {_phrases(number)}"
            rows.append(tiny.compare(of_step, tiny.step, groups[number][:4], repeats))
        if only_tiny:
            return rows
        write_weights_folder(folder, layers=layers)
        half = Sides.of(bench_config(folder, kept, together.format(1)), groups[phrases[0]], weights=False)
        for number in phrases:
            of_batch = f"DeRIS-0.5B: {num_pictures} batches of a picture, {_phrases(number)}"
            rows.append(half.compare(of_batch, half.batches, groups[number], repeats))
        for number in phrases:
            of_step = f"DeRIS-0.5B, {layers} layers: step, a picture, {_phrases(number)}"
            rows.append(half.compare(of_step, half.step, groups[number][:1], repeats))
    return rows


def _phrases(number: int) -> str:
    return "1 phrase" if number == 1 else f"{number} phrases"


def counted(name: str, phrases: Sequence[int]) -> list[str]:
    """A run's TFLOP of the frozen towers for a picture, and for each number of phrases their share of a training step."""
    config = load_config(name)
    shapes = {}
    for number in phrases:
        data = dataclasses.replace(config.data, phrases_per_image=number, max_tokens_per_image=0)
        training = dataclasses.replace(config.training, images_per_device=1)
        shapes[number] = dataclasses.replace(config, data=data, training=training)
    model = build_model(config, weights=False, device="meta").requires_grad_(False).eval()
    macs = count_macs(model, shape_batch(shapes[phrases[0]], plan_cognition(shapes[phrases[0]])))
    towers = 2 * (macs["perception.backbone"] + macs.get("cognition.vision_tower", 0))  # BEiT-3 has none: it trains
    shares = [towers / training_flops(shapes[number]) for number in phrases]
    return [name, f"{towers / 1e12:.2f}", *(f"{100 * share:.1f} %" for share in shares)]


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16, metavar="N", help="(default 16)")
    parser.add_argument("--phrases", type=int, nargs="+", default=[1, 4, 7], metavar="K", help="(default 1 4 7)")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="of both parts of the 0.5B (default 2)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each (default 3)")
    parser.add_argument("--quick", action="store_true", help="few pictures, the tiny model alone, nothing counted")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pictures, arguments.phrases, arguments.repeats = 2, [1], 1
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    console = bench_console()
    console.print(machine("torch", "transformers", "safetensors", "pillow"))
    rows = bench(arguments.pictures, arguments.phrases, arguments.layers, arguments.repeats, only_tiny=arguments.quick)
    console.print(
        comparison_table(f"from pictures (plain) and from the cache (ours), best of {arguments.repeats}", rows)
    )
    if not arguments.quick:
        columns = [Column(_phrases(number), justify="right") for number in arguments.phrases]
        table = Table(
            "run", Column("TFLOP a picture", justify="right"), *columns, title="frozen towers' share of a step"
        )
        for name in ("deris-7b-refcoco", "deris-0.5b-refcoco", "deris-b-refcoco"):
            table.add_row(*counted(name, arguments.phrases))
        console.print(table)


if __name__ == "__main__":
    main()
