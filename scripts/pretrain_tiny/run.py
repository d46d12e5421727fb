#!/usr/bin/env python
"""Make the tiny backbones that ship inside the package, from a seed, on pictures disjoint from every split.

    python scripts/pretrain_tiny/run.py all --out tiny --seed 7

draws the pool of scenes, half of them crowds, and pre-trains the tiny Mask2Former-Swin, the tiny LLaVA-OneVision and the tiny
BEiT-3, two at a time; it leaves `tiny/tiny-mask2former`,
`tiny/tiny-llava-onevision` and `tiny/tiny-beit3`. A run that was stopped continues where it was when the same command is given again.
"""

import argparse
import logging
import multiprocessing
import os
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import each other as `scripts.*`
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a second thread makes a tiny model's step slower

from scripts.pretrain_tiny.beit3 import Beit3Recipe, pretrain_beit3
from scripts.pretrain_tiny.cognition import CognitionRecipe, pretrain_cognition
from scripts.pretrain_tiny.perception import pretrain_perception
from scripts.pretrain_tiny.pool import HELD_OUT_FIRST_INDEX, write_pool

logger = logging.getLogger("pretrain_tiny")

PERCEPTION_FOLDER = "tiny-mask2former"
COGNITION_FOLDER = "tiny-llava-onevision"
BEIT3_FOLDER = "tiny-beit3"


def run_pool(arguments: argparse.Namespace) -> None:
    """Draw the pools `train` and `held_out`, unless they are there."""
    for name, num_scenes, first_index in (
        ("train", arguments.scenes, 0),
        ("held_out", arguments.held_out_scenes, HELD_OUT_FIRST_INDEX),
    ):
        folder = arguments.out / "pool" / name
        if folder.exists():
            logger.info("pool %s is there", folder)
            continue
        write_pool(
            folder, num_scenes=num_scenes, seed=arguments.seed, workers=arguments.workers, first_index=first_index
        )


def run_perception(arguments: argparse.Namespace) -> None:
    """Pre-train the tiny Mask2Former-Swin."""
    pretrain_perception(
        arguments.out / PERCEPTION_FOLDER,
        arguments.pool or arguments.out / "pool",
        seed=arguments.seed,
        steps=arguments.perception_steps,
    )


def run_cognition(arguments: argparse.Namespace) -> None:
    """Pre-train the tiny LLaVA-OneVision."""
    names = [field.name for field in fields(CognitionRecipe)]
    recipe = CognitionRecipe(**{name: getattr(arguments, name) for name in names})
    pretrain_cognition(
        arguments.out / COGNITION_FOLDER,
        arguments.pool or arguments.out / "pool",
        recipe,
        evaluate_seconds=arguments.evaluate_seconds,
        command=shlex.join(["python", "scripts/pretrain_tiny/run.py", *sys.argv[1:]]),
    )


def run_beit3(arguments: argparse.Namespace) -> None:
    """Pre-train the tiny BEiT-3."""
    pretrain_beit3(
        arguments.out / BEIT3_FOLDER,
        arguments.pool or arguments.out / "pool",
        Beit3Recipe(seed=arguments.seed),
        evaluate_seconds=arguments.evaluate_seconds,
        command=shlex.join(["python", "scripts/pretrain_tiny/run.py", *sys.argv[1:]]),
    )


def run_all(arguments: argparse.Namespace) -> None:
    """Draw the pool, then pre-train all three, as many at a time as there are workers."""
    run_pool(arguments)
    with ProcessPoolExecutor(
        arguments.workers, mp_context=multiprocessing.get_context("spawn"), initializer=_log_progress
    ) as processes:
        for done in [processes.submit(stage, arguments) for stage in (run_perception, run_cognition, run_beit3)]:
            done.result()


def _log_progress() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand a stage, and `all`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{pool,perception,cognition,beit3,all}")
    for name, function in (
        ("pool", run_pool),
        ("perception", run_perception),
        ("cognition", run_cognition),
        ("beit3", run_beit3),
        ("all", run_all),
    ):
        command = commands.add_parser(
            name,
            help=function.__doc__,
            description=function.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(run=function)
        command.add_argument("--out", type=Path, required=True, help="folder of the results")
        command.add_argument("--seed", type=int, default=7, help="of the scenes, the weights and the order of training")
        if name in ("pool", "all"):
            command.add_argument("--scenes", type=int, default=12000, help="scenes to train on")
            command.add_argument("--held-out-scenes", type=int, default=500, help="scenes to measure on")
            command.add_argument("--workers", type=int, default=2, help="processes")
        if name != "pool":
            command.add_argument("--pool", type=Path, help="folder with train/ and held_out/; default: pool/ in --out")
        if name in ("perception", "all"):
            command.add_argument(
                "--perception-steps", type=int, default=4200, help="optimizer steps of the Mask2Former"
            )
        if name in ("cognition", "all"):
            _add_cognition_arguments(command)
        if name in ("cognition", "beit3", "all"):
            command.add_argument("--evaluate-seconds", type=float, default=300.0, help="time between measurements")
    return parser


def _add_cognition_arguments(command: argparse.ArgumentParser) -> None:
    """One flag for each field of the recipe, with its default."""
    group = command.add_argument_group("recipe of the LLaVA-OneVision (see CognitionRecipe)")
    for field in fields(CognitionRecipe):
        if field.name != "seed" and field.default is not MISSING:
            flag = "--" + field.name.replace("_", "-")
            group.add_argument(flag, type=type(field.default), default=field.default, help="field of CognitionRecipe")


def main() -> None:
    """Parse the command line and run it."""
    _log_progress()
    arguments = build_parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
