#!/usr/bin/env python
"""Tables of the paper as runs: a table becomes run configs, these are trained and evaluated, the numbers stand beside the paper's.

`comparisons` has the tables (`tables.yaml`), `runs` trains and evaluates, `results` gathers and compares.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import each other as `scripts.*`

from deris_llm.config import RunConfig, load_config
from scripts.ablate.comparisons import (
    Comparison,
    check_reference,
    comparison,
    comparison_names,
    comparison_of_file,
    crossed,
    is_tiny,
    rows_of,
)
from scripts.ablate.results import collect, paired_table, remarks, results_table
from scripts.ablate.runs import AblationError, Run, expand, run_all, seconds_per_step, write_json

EXAMPLES = """\
examples:
  scripts/ablate/run.py --table 7 --config tiny-grefcoco --dry-run                 what would run
  scripts/ablate/run.py --table 7 --config tiny-grefcoco --num-seeds 3 --budget 10     ten minutes of training for each run
  scripts/ablate/run.py --table 7 --config tiny-refcoco --cross loopback.num_queries=4,10,20 --num-seeds 5 --steps 341 \\
      --jobs 2 --reference loopback                                                two at a time, differences in pairs
  scripts/ablate/run.py --table 8 --config deris-b-grefcoco --set data.root=/data/refer    the recipe's own length
"""


def build_parser() -> argparse.ArgumentParser:
    """The options of ``scripts/ablate/run.py``."""
    numbers = {kind: [n.split()[1] for n in comparison_names() if n.startswith(kind)] for kind in ("table", "figure")}
    parser = argparse.ArgumentParser(
        prog="scripts/ablate/run.py",
        description="Trains and evaluates the rows of a table of the paper. Call it again to go on: finished runs are reused.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", choices=numbers["table"], help="of the paper; init: ours, how the loopback starts")
    which.add_argument("--figure", choices=numbers["figure"], help="of the paper")
    which.add_argument(
        "--rows-file", type=Path, metavar="FILE", help="a table of your own: an entry of tables.yaml as a YAML file"
    )
    parser.add_argument(
        "--config", required=True, metavar="NAME|FILE", help="the run config that every row starts from"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="A.B=VALUE", help="overrides of every run"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows (names as --dry-run lists them)")
    parser.add_argument(
        "--cross", nargs="+", action="extend", default=[], metavar="A.B=V1,V2",
        help="all rows once for each of these values of a field",
    )  # fmt: skip
    parser.add_argument(
        "--reference",
        metavar="ROW",
        help="add each other row's difference to this one, paired by world, backbone and seed",
    )
    _add_units(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--budget", type=float, metavar="MIN",
        help="minutes of training for each run: as many steps as the config without a row's changes takes in them, timed first",
    )  # fmt: skip
    length.add_argument(
        "--steps", type=int, metavar="N", help="optimizer steps of each run (default: the config's length)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the runs (default runs/ablate/NAME of the config)"
    )
    parser.add_argument(
        "--max-images", type=int, default=0, metavar="N", help="images evaluated (default 0 = all of the split)"
    )
    parser.add_argument("--gpus", type=int, help="ranks of a run (default: every GPU; without one, 2 CPU ranks)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs side by side, each on one rank, with as many images a step as on all (default 1: as --gpus says)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs, start nothing")
    parser.add_argument("--collect", action="store_true", help="start nothing, print the table of what is finished")
    return parser


def _add_units(parser: argparse.ArgumentParser) -> None:
    units = parser.add_argument_group("what each row is run with", "every combination of seed, world and backbone")
    seeds = units.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="of the runs (default: the config's own)")
    seeds.add_argument("--num-seeds", type=int, metavar="N", help="N seeds, from the config's own on")
    units.add_argument("--worlds", nargs="+", default=[], metavar="ROOT", help="data roots (default: the config's)")
    units.add_argument(
        "--backbones", nargs="+", default=[], metavar="FOLDER",
        help="folders of scripts/pretrain_tiny/run.py, whose weights replace the shipped ones of the same name",
    )  # fmt: skip
    units.add_argument(
        "--in-step", action="store_true",
        help="the first seed with the first world and backbone, the second with the second, ...; instead of every combination",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``scripts/ablate/run.py``.

    Args:
        argv: arguments; None reads the process's own.

    Returns:
        exit status: 0 done, 1 a run failed, 2 the input was wrong.
    """
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        return _ablate(arguments)
    except AblationError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; call this again to go on\n")
        return 130


def _ablate(arguments: argparse.Namespace) -> int:
    _check(arguments)
    config = load_config(arguments.config, arguments.set)
    output = arguments.output or Path("runs") / "ablate" / config.name
    table = _table(arguments, config)
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    gpus, overrides = arguments.gpus, list(arguments.set)
    if arguments.jobs > 1:
        gpus, overrides = 1, [*overrides, *_as_on_all_ranks(config)]
    steps = arguments.steps
    if arguments.budget and not arguments.dry_run:
        seconds = seconds_per_step(arguments.config, overrides, output=output, gpus=gpus)
        steps = max(1, int(60 * arguments.budget / seconds))
        console.print(f"{seconds:.3f} s a step: {steps} steps in {arguments.budget:g} minutes")
    runs, not_run = expand(
        table, arguments.config, overrides, output=output, steps=steps,
        seeds=arguments.seeds or arguments.num_seeds or 1,
        worlds=arguments.worlds, backbones=arguments.backbones, in_step=arguments.in_step,
    )  # fmt: skip
    if not arguments.collect:
        console.print(_plan(table, runs, not_run, is_timed=bool(arguments.budget and arguments.dry_run)))
    if arguments.dry_run:
        return 0
    failed: dict[str, str] = {}
    if not arguments.collect:
        failed = run_all(
            runs, jobs=arguments.jobs, gpus=gpus, max_images=arguments.max_images,
            say=lambda line: console.print(line, markup=False, soft_wrap=True),
        )  # fmt: skip
    results = collect(table, runs, not_run, max_images=arguments.max_images, reference=arguments.reference)
    results |= {"config": arguments.config, "overrides": overrides}
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join([table.name, *arguments.cross]))
    path = output / f"{name}.json"
    write_json(path, results)
    console.print(results_table(results))
    if arguments.reference:
        console.print(paired_table(results))
    for line in remarks(results):
        console.print(line, markup=False)
    console.print(f"written to {path}", markup=False)
    if failed:
        listed = "\n".join(f"  - {message}" for message in failed.values())
        raise AblationError(f"{len(failed)} of {len({run.folder for run in runs})} trainings failed:\n{listed}")
    return 0


def _as_on_all_ranks(config: RunConfig) -> list[str]:
    """Overrides by which a step on one rank has as many images as one on all ranks (which are two without a GPU)."""
    import torch

    from deris_llm.training.launch import num_ranks

    training, ranks = config.training, num_ranks()
    if torch.cuda.is_available():  # a larger micro-batch may not fit
        return [f"training.accumulation={training.accumulation * ranks}"]
    return [f"training.images_per_device={training.images_per_device * ranks}"]


def _check(arguments: argparse.Namespace) -> None:
    counts = {name: getattr(arguments, name) for name in ("steps", "budget", "jobs", "num_seeds")}
    for name, value in counts.items():
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected more than 0, got {value}; give another number")
    for name in ("seeds", "worlds", "backbones"):
        values = getattr(arguments, name) or []
        if len(set(values)) < len(values):
            raise ValueError(
                f"--{name}: expected each once, got {' '.join(map(str, values))}; leave out what is repeated"
            )
    if arguments.jobs > 1 and (arguments.gpus or 1) > 1:
        raise ValueError(
            f"--jobs {arguments.jobs} runs each on one rank, got --gpus {arguments.gpus}; leave out one of them"
        )


def _table(arguments: argparse.Namespace, config: RunConfig) -> Comparison:
    if arguments.rows_file:
        table = comparison_of_file(arguments.rows_file, tiny=is_tiny(config))
    else:
        name = f"table {arguments.table}" if arguments.table else f"figure {arguments.figure}"
        table = comparison(name, tiny=is_tiny(config))
    if arguments.rows:
        table = rows_of(table, arguments.rows)
    table = crossed(table, arguments.cross)
    if arguments.reference:
        check_reference(table, arguments.reference)
    return table


def _plan(table: Comparison, runs: Sequence[Run], not_run: Mapping[str, str], *, is_timed: bool) -> Table:
    plan = Table(title=f"{table.name.capitalize()}: {table.title}, {len({run.folder for run in runs})} trainings")
    for name in ("row", "run", "steps", "overrides", "at test", "folder"):
        plan.add_column(name, overflow="fold")
    for run in runs:
        training = run.config.training
        length = str(training.max_steps) if training.max_steps > 0 else f"{training.epochs:g} epochs"
        plan.add_row(
            escape(run.row.name), str(run.unit), "by timing" if is_timed else length,
            escape("\n".join(run.row.overrides)), "\n".join(run.row.evaluation), "by timing" if is_timed else run.folder.name,
        )  # fmt: skip
    for name, reason in not_run.items():
        plan.add_row(escape(name), "-", "-", escape(f"not run: {reason}"), "", "")
    return plan


if __name__ == "__main__":
    sys.exit(main())
