#!/usr/bin/env python
"""What `data.phrases_per_image` does to a training step: how alike the gradients of phrases of one picture are.

    python scripts/bench/batch_statistics.py --config tiny-refcoco --set data.root=data/synth           before fine-tuning
    python scripts/bench/batch_statistics.py --checkpoint runs/tiny-refcoco/best                        after it

Takes k phrases each of N training pictures and the gradient of each phrase by itself. With g the gradient of a phrase, rho is

    (mean g.g' of two phrases of a picture - mean g.g' of phrases of two pictures) / (mean g.g - the latter),

the share of a gradient's noise that phrases of a picture have in common: 0 = they are worth as much as phrases of k
pictures, 1 = as much as one phrase. k phrases of a picture then reduce the noise as k / (1 + (k - 1) rho) phrases of
different pictures do (Kish's design effect).
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from _bench import bench_console
from rich.table import Column, Table
from torch import Tensor

from deris_llm.checkpoints.load import load_checkpoint
from deris_llm.config import RunConfig, load_config
from deris_llm.data.collate import ReferringCollator
from deris_llm.data.dataset import ImageGroup, group_by_image
from deris_llm.data.sources import read_split
from deris_llm.losses.criterion import build_criterion
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import Deris, build_model


def drawn_phrases(config: RunConfig, phrases: int, pictures: int, seed: int) -> list[ImageGroup]:
    """Some phrases of some training pictures of the first dataset that have so many."""
    records = read_split(Path(config.data.root), f"{config.data.train[0]}/train", phrase_field=config.data.phrase_field)
    groups = [group for group in group_by_image(records) if len(group.records) >= phrases]
    if len(groups) < pictures or phrases < 2:
        raise SystemExit(f"expected {pictures} pictures with at least {max(phrases, 2)} phrases, found {len(groups)}")
    random = np.random.default_rng(seed)
    chosen = (groups[number] for number in random.choice(len(groups), pictures, replace=False))
    return [
        ImageGroup(tuple(group.records[k] for k in random.choice(len(group.records), phrases, replace=False)))
        for group in chosen
    ]


def gradients_by_phrase(model: Deris, config: RunConfig, groups: list[ImageGroup]) -> tuple[Tensor, Tensor]:
    """Gradients of every phrase alone, picture by picture: of LoRA (or what else of cognition trains), and of all."""
    collate, criterion = ReferringCollator(config, build_processor(config)), build_criterion(config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    is_cognition = torch.cat([torch.full((p.numel(),), name.startswith("cognition.")) for name, p in trained.items()])
    rows = []
    for record in (record for group in groups for record in group.records):
        model.zero_grad()
        batch = collate([ImageGroup((record,))])
        assert batch.targets is not None
        generator = torch.Generator().manual_seed(0)  # the same points for all
        criterion(model(batch), batch.targets, generator=generator).total.backward()
        rows.append(torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None]))
    gradients = torch.stack(rows).double()
    return gradients[:, is_cognition], gradients


def likeness(gradients: Tensor, phrases: int) -> float:
    """The rho of gradients whose rows come picture by picture, so many of each."""
    products = gradients @ gradients.T
    picture = torch.arange(len(gradients)) // phrases
    is_same = picture[:, None] == picture
    is_pair = is_same & ~torch.eye(len(gradients), dtype=torch.bool)
    between = products[~is_same].mean()
    return float((products[is_pair].mean() - between) / (products.diagonal().mean() - between))


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="NAME", help="a run config's model before fine-tuning")
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help="`best` or `checkpoint-STEP` of a run")
    parser.add_argument("--phrases", type=int, default=4, metavar="K", help="of a picture (default 4)")
    parser.add_argument("--pictures", type=int, default=40, metavar="N", help="default 40")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default 0)")
    parser.add_argument("--set", nargs="+", default=[], metavar="A.B=VALUE", help="override fields of the run config")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    if arguments.checkpoint is not None:
        config, model = load_checkpoint(arguments.checkpoint, overrides=arguments.set)
    else:
        config = load_config(arguments.config, arguments.set)
        torch.manual_seed(config.training.seed)
        model = build_model(config)
    groups = drawn_phrases(config, arguments.phrases, arguments.pictures, arguments.seed)
    objects = np.mean([len({tuple(i.annotation_id for i in r.instances) for r in group.records}) for group in groups])
    columns = ("rho", f"{arguments.phrases} phrases of a picture are worth")
    table = Table("gradient of", *(Column(name, justify="right") for name in columns))
    found = gradients_by_phrase(model.train(), config, groups)
    for name, gradients in zip(("cognition", "all that trains"), found, strict=True):
        if gradients.shape[1]:
            rho = likeness(gradients, arguments.phrases)
            worth = arguments.phrases / (1 + (arguments.phrases - 1) * rho)
            table.add_row(name, f"{rho:.3f}", f"{worth:.2f} of different pictures")
    console = bench_console()
    console.print(f"{config.name}: {arguments.pictures} pictures, {objects:.2f} objects in {arguments.phrases} phrases")
    console.print(table)


if __name__ == "__main__":
    main()
