#!/usr/bin/env python
"""Tables of the paper as runs: a table becomes run configs, these are trained and evaluated, the numbers stand beside the paper's.

`tables.yaml` beside this file has the tables. Each run trains in a folder that its complete config names, so that a
second call goes on where the first one stopped, and tables that share a run share its folder. torch is imported when
something runs, not to list it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deris_llm.common.strict_files import parse_yaml
from deris_llm.config import (
    ConfigError,
    RunConfig,
    apply_overrides,
    config_from_dict,
    config_to_dict,
    iter_fields,
    load_config,
    save_config,
)

logger = logging.getLogger(__name__)

TIMED_STEPS = 12
WARM_UP_STEPS = 4  # of the timed ones, not counted
CONFIG_FILE = "run.yaml"  # in a run's folder: what the launcher is given
RIS_METRICS = ("mIoU", "oIoU", "Pr@0.9")  # of a split on which every phrase has a target
NOTE = (
    "The paper's figures are of other data and another size (DeRIS-B on the real gRefCOCO val): what can be compared is the "
    "order of the rows, not their numbers."
)
_OF_EVERY_RUN = (
    "training.eval_every=0",  # evaluated afterwards, as the row says
    "training.eval_max_images=8",
    "training.keep_checkpoints=1",
)


class AblationError(ValueError):
    """A run failed or cannot be made; what was finished stays."""


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    label: str  # as the paper has it
    paper: Mapping[str, float]  # the paper's figures by name, percent unless the name says otherwise
    overrides: tuple[str, ...]  # of the run config
    evaluation: tuple[str, ...]  # overrides at test alone
    not_run: str = ""  # why there is no such run; empty = there is


@dataclass(frozen=True)
class Comparison:
    """A table or figure of the paper."""

    name: str  # "table 7"
    title: str
    metrics: tuple[str, ...]  # of our reports
    rows: tuple[Row, ...]
    notes: str = ""


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: Row
    seed: int
    config: RunConfig
    folder: Path  # of the training; rows that differ at test alone share it

    @property
    def report(self) -> Path:
        """Where the evaluation's report is."""
        return self.folder / "eval" / (_slug("_".join(self.row.evaluation)) or "as-trained") / "report.json"


def comparison_names() -> tuple[str, ...]:
    """Names of all tables and figures."""
    return tuple(_tables())


def comparison(name: str, *, tiny: bool = False) -> Comparison:
    """Reads a table.

    Args:
        name: of `comparison_names()`.
        tiny: for a config with the shipped tiny weights.

    Raises:
        ValueError: there is no such table.
    """
    tables = _tables()
    if name not in tables:
        raise ValueError(f"--table, --figure: expected one of {', '.join(tables)}, got {name}; take one of these")
    table = tables[name]
    return Comparison(
        name, table["title"], tuple(table["metrics"]), tuple(_row(row, tiny=tiny) for row in table["rows"]),
        table.get("notes", ""),
    )  # fmt: skip


def rows_of(table: Comparison, names: Sequence[str]) -> Comparison:
    """The table with these rows alone, in its own order.

    Raises:
        ValueError: a name that the table has not.
    """
    known = [row.name for row in table.rows]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"--rows: expected some of {', '.join(known)} ({table.name}), got {', '.join(unknown)}; take these"
        )
    return dataclasses.replace(table, rows=tuple(row for row in table.rows if row.name in names))


def is_tiny(config: RunConfig) -> bool:
    """Whether the run has the tiny weights that are shipped."""
    return config.perception.weights.startswith("builtin:")


def expand(
    table: Comparison,
    config: str,
    overrides: Sequence[str] = (),
    *,
    output: Path,
    seeds: int = 1,
    steps: int | None = None,
) -> tuple[list[Run], dict[str, str]]:
    """Makes the runs of a table.

    Args:
        table: from `comparison`.
        config: name or file of the run config that every row starts from.
        overrides: of every run; the row's come after them.
        output: folder of all runs of this config.
        seeds: how many; the first is the config's own, then the next integers.
        steps: optimizer steps of each; None = as the config says.

    Returns:
        The runs, rows first, then seeds; and why a row has none, by its name.

    Raises:
        ConfigError: the config is wrong without a row's overrides.
        AblationError: no row can be run.
    """
    length = () if steps is None else (f"training.max_steps={steps}",)
    base = load_config(config, [*overrides, *_OF_EVERY_RUN, *length])
    runs, not_run = [], {row.name: row.not_run for row in table.rows if row.not_run}
    for row in table.rows:
        if row.not_run:
            continue
        for seed in range(base.training.seed, base.training.seed + seeds):
            own = (f"training.seed={seed}", f"name={row.name}-seed{seed}")
            try:
                made = load_config(config, [*overrides, *row.overrides, *_OF_EVERY_RUN, *length, *own])
                _check_evaluation(made, row)
            except ConfigError as error:
                not_run[row.name] = "; ".join(error.problems)
                break
            runs.append(Run(row, seed, made, output / _folder_name(base, made)))
    if not runs:
        reasons = "\n".join(f"  - {name}: {reason}" for name, reason in not_run.items())
        raise AblationError(
            f"{table.name}: expected a row that {config} can run, got none; take another config\n{reasons}"
        )
    return runs, not_run


def seconds_per_step(config: str, overrides: Sequence[str], *, output: Path, gpus: int | None = None) -> float:
    """Times a few optimizer steps of a run config, or reads what was measured for it in this folder before.

    Args:
        config: name or file of the run config.
        overrides: of it.
        output: folder of all runs of this config.
        gpus: ranks; None = every GPU, or two on the CPU.

    Returns:
        median seconds of a step, start, saving and evaluation not counted.
    """
    from deris_llm.training.launch import num_ranks

    ranks = num_ranks(gpus)
    short = (f"training.max_steps={TIMED_STEPS}", "training.log_every=1", "training.eval_max_images=1", "name=timing")
    made = load_config(config, [*overrides, *_OF_EVERY_RUN, *short])
    path, key = output / "timing.json", f"{_digest(made)}-{ranks}"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if key not in known:
        state = _trained(made, output / f"timing-{key}", gpus=gpus)
        rates = [entry["images_per_second"] for entry in state["log_history"] if "images_per_second" in entry]
        images = made.training.images_per_device * made.training.accumulation * ranks
        known[key] = images / statistics.median(rates[WARM_UP_STEPS:])
        _write_json(path, known)
    return known[key]


def train_and_evaluate(run: Run, *, gpus: int | None = None, max_images: int = 0) -> None:
    """Trains and evaluates a run; what is finished is reused, a training that was cut off goes on.

    Args:
        run: from `expand`.
        gpus: ranks; None = every GPU, or two on the CPU.
        max_images: evenly spaced pictures of the split; 0 = all.

    Raises:
        AblationError: training or evaluation failed.
    """
    from deris_llm.checkpoints.layout import newest_checkpoint

    _trained(run.config, run.folder, gpus=gpus)
    split = run.config.training.eval_split
    if _numbers(run, max_images=max_images) is not None:
        return
    checkpoint = newest_checkpoint(run.folder)
    command = [sys.executable, "-m", "deris_llm.cli.main", "eval", "--checkpoint", str(checkpoint), "--splits", split]
    command += ["--output", str(run.report.parent), "--max-images", str(max_images)]
    command += [] if gpus is None else ["--gpus", str(gpus)]
    command += ["--set", *run.row.evaluation] if run.row.evaluation else []
    run.report.unlink(missing_ok=True)  # of another number of pictures
    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False)
    if done.returncode != 0 or not run.report.is_file():
        raise AblationError(
            f"{run.folder}: expected the evaluation to end with a report, got exit status {done.returncode}; see the messages "
            "above, then call this again: what is finished is reused"
        )
    _write_json(run.report.with_name("asked.json"), {"max_images": max_images})


def collect(
    table: Comparison, runs: Sequence[Run], not_run: Mapping[str, str], *, max_images: int = 0
) -> dict[str, Any]:
    """Gathers the numbers of all runs of a table.

    Args:
        table: from `comparison`.
        runs: from `expand`, trained and evaluated.
        not_run: from `expand`.
        max_images: as it was evaluated.

    Returns:
        plain values: per row the paper's figures, each run's numbers (percent), their mean and, of two seeds or more,
        their standard deviation (n - 1).
    """
    from deris_llm.evaluation.report import library_versions

    config = runs[0].config
    metrics = table.metrics if config.training.eval_split.startswith("grefcoco/") else RIS_METRICS
    rows = []
    for row in table.rows:
        found = [_collected(run, metrics, max_images=max_images) for run in runs if run.row.name == row.name]
        values = {name: [one["metrics"][name] for one in found if one["metrics"][name] is not None] for name in metrics}
        rows.append(
            {
                "name": row.name,
                "label": row.label,
                "paper": dict(row.paper),
                "not_run": not_run.get(row.name, ""),
                "runs": found,
                "mean": {name: statistics.fmean(all_of) for name, all_of in values.items() if all_of},
                "std": {name: statistics.stdev(all_of) for name, all_of in values.items() if len(all_of) > 1},
            }
        )
    return {
        "comparison": table.name,
        "title": table.title,
        "split": config.training.eval_split,
        "max_images": max_images,
        "protocol": config.evaluation.protocols[0],
        "metrics": list(metrics),
        "note": NOTE,
        "notes": table.notes,
        "rows": rows,
        "versions": library_versions(),
    }


def results_table(results: Mapping[str, Any]) -> Table:
    """Our numbers, mean and deviation over the seeds, beside the paper's."""
    paper = list(dict.fromkeys(name for row in results["rows"] for name in row["paper"]))
    table = Table(title=f"{results['comparison'].capitalize()}: {results['title']}")
    table.add_column("", overflow="fold")
    for name in (*results["metrics"], "seeds", "phrases/s"):
        table.add_column(name, justify="right")
    for name in paper:
        table.add_column(f"paper: {name}", justify="right", style="dim")
    for row in results["rows"]:
        ours = [
            f"{row['mean'][name]:.2f}" + (f" ± {row['std'][name]:.2f}" if name in row["std"] else "")
            if name in row["mean"]
            else "-"
            for name in results["metrics"]
        ]
        speeds = [run["phrases_per_second"] for run in row["runs"] if run["phrases_per_second"] is not None]
        cited = [f"{row['paper'][name]:g}" if name in row["paper"] else "-" for name in paper]
        table.add_row(
            row["label"], *ours, str(len(row["runs"])), f"{statistics.fmean(speeds):.1f}" if speeds else "-", *cited
        )
    return table


# -- details ---------------------------------------------------------------------------------------------------------


@functools.cache
def _tables() -> dict[str, Any]:
    return parse_yaml(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))


def _row(row: Mapping[str, Any], *, tiny: bool) -> Row:
    overrides = row.get("tiny", row["set"]) if tiny else row["set"]
    reason = overrides if isinstance(overrides, str) else ""
    return Row(
        row["name"], row["label"], row["paper"], () if reason else tuple(overrides), tuple(row.get("eval", ())), reason
    )


def _check_evaluation(config: RunConfig, row: Row) -> None:
    """Raises ConfigError where the run cannot be evaluated as the row says."""
    problems: list[str] = []
    tree = apply_overrides(config_to_dict(config), row.evaluation, problems)
    config_from_dict(tree, where=row.name, problems=problems)


def _folder_name(base: RunConfig, config: RunConfig) -> str:
    """What differs from the base, in words, then the seed and a hash of the complete config."""
    defaults = {field.name: field.default for field in iter_fields()}  # of fields that only the row's backend reads
    before, now = defaults | _flat(config_to_dict(base)), _flat(config_to_dict(config))
    aside = ("name", "training.seed")
    changed = [
        f"{name.rpartition('.')[2]}={now[name]}" for name in now if now[name] != before[name] and name not in aside
    ]
    return f"{_slug('_'.join(changed)) or 'as-configured'}-seed{config.training.seed}-{_digest(config)}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=-]+", "-", text.replace("evaluation.", ""))[:60].strip("-.")


def _digest(config: RunConfig) -> str:
    tree = {name: value for name, value in config_to_dict(config).items() if name != "name"}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _trained(config: RunConfig, folder: Path, *, gpus: int | None) -> dict[str, Any]:
    """Trains to the end, going on from what is there; the Trainer's state of the last step."""
    from deris_llm.training.launch import launch, num_ranks, training_command

    state = _final_state(folder)
    if state is not None:
        logger.info("%s is trained already", folder)
        return state
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / CONFIG_FILE)
    ranks = num_ranks(gpus)
    command = training_command(str(folder / CONFIG_FILE), output=folder, ranks=ranks)
    status = launch(command, config, output=folder, ranks=ranks)
    state = _final_state(folder)
    if status != 0 or state is None:
        raise AblationError(
            f"{folder}: expected the training to reach its last step, got exit status {status}; see the messages above, then "
            "call this again: it goes on from the last checkpoint"
        )
    return state


def _final_state(folder: Path) -> dict[str, Any] | None:
    from deris_llm.checkpoints.layout import TRAINER_STATE_FILE, newest_checkpoint

    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    state = json.loads((newest / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    return state if state["global_step"] >= state["max_steps"] else None


def _numbers(run: Run, *, max_images: int) -> dict[str, float | None] | None:
    """What the run's evaluation on so many pictures gave; None = it was not done."""
    asked = run.report.with_name("asked.json")
    if not asked.is_file() or json.loads(asked.read_text(encoding="utf-8")) != {"max_images": max_images}:
        return None
    report = json.loads(run.report.read_text(encoding="utf-8"))
    return next(iter(report["splits"][run.config.training.eval_split].values()))  # of the first protocol


def _collected(run: Run, metrics: Sequence[str], *, max_images: int) -> dict[str, Any]:
    numbers, state = _numbers(run, max_images=max_images), _final_state(run.folder)
    assert numbers is not None, "evaluated before"
    assert state is not None, "trained before"
    speeds = [entry["phrases_per_second"] for entry in state["log_history"] if "phrases_per_second" in entry]
    return {
        "seed": run.seed,
        "folder": run.folder.name,
        "steps": state["global_step"],
        "phrases_per_second": statistics.median(speeds) if speeds else None,  # shorter than log_every
        "metrics": {name: numbers.get(name) for name in metrics},
        "n_phrases": numbers["n_phrases"],
    }


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


# -- command line ----------------------------------------------------------------------------------------------------

EXAMPLES = """\
examples:
  scripts/ablate/run.py --table 7 --config tiny-grefcoco --dry-run                 what would run
  scripts/ablate/run.py --table 7 --config tiny-grefcoco --seeds 3 --budget 10     ten minutes of training for each run
  scripts/ablate/run.py --table 8 --config deris-b-grefcoco --set data.root=/data/refer    the recipe's own length
"""


def build_parser() -> argparse.ArgumentParser:
    """The options of ``scripts/ablate/run.py``."""
    numbers = {kind: [n.split()[1] for n in comparison_names() if n.startswith(kind)] for kind in ("table", "figure")}
    parser = argparse.ArgumentParser(
        prog="ablate.py",
        description="Trains and evaluates the rows of a table of the paper. Call it again to go on: finished runs are reused.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", choices=numbers["table"], help="of the paper")
    which.add_argument("--figure", choices=numbers["figure"], help="of the paper")
    parser.add_argument(
        "--config", required=True, metavar="NAME|FILE", help="the run config that every row starts from"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="A.B=VALUE", help="overrides of every run"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows (names as --dry-run lists them)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each row (default 1)")
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
        "--max-images", type=int, default=0, metavar="N", help="pictures evaluated (default 0 = all of the split)"
    )
    parser.add_argument("--gpus", type=int, help="ranks (default: every GPU; without one, 2 CPU ranks)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, start nothing")
    return parser


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
    for name in ("seeds", "steps", "budget"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name}: expected more than 0, got {value}; give another number")
    config = load_config(arguments.config, arguments.set)
    output = arguments.output or Path("runs") / "ablate" / config.name
    name = f"table {arguments.table}" if arguments.table else f"figure {arguments.figure}"
    table = comparison(name, tiny=is_tiny(config))
    if arguments.rows:
        table = rows_of(table, arguments.rows)
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    steps = arguments.steps
    if arguments.budget and not arguments.dry_run:
        seconds = seconds_per_step(arguments.config, arguments.set, output=output, gpus=arguments.gpus)
        steps = max(1, int(60 * arguments.budget / seconds))
        console.print(f"{seconds:.3f} s a step: {steps} steps in {arguments.budget:g} minutes")
    runs, not_run = expand(table, arguments.config, arguments.set, output=output, seeds=arguments.seeds, steps=steps)
    console.print(_plan(table, runs, not_run, is_timed=bool(arguments.budget and arguments.dry_run)))
    if arguments.dry_run:
        return 0
    for number, run in enumerate(runs, start=1):
        console.print(f"run {number} of {len(runs)}: {run.row.label}, seed {run.seed}, {run.folder}", markup=False)
        train_and_evaluate(run, gpus=arguments.gpus, max_images=arguments.max_images)
    results = collect(table, runs, not_run, max_images=arguments.max_images)
    results |= {"config": arguments.config, "overrides": list(arguments.set)}
    path = output / f"{table.name.replace(' ', '-')}.json"
    _write_json(path, results)
    console.print(results_table(results))
    for line in _remarks(results):
        console.print(line, markup=False)
    console.print(f"written to {path}", markup=False)
    return 0


def _plan(table: Comparison, runs: Sequence[Run], not_run: Mapping[str, str], *, is_timed: bool) -> Table:
    plan = Table(title=f"{table.name.capitalize()}: {table.title}, {len({run.folder for run in runs})} trainings")
    for name in ("row", "seed", "steps", "overrides", "at test", "folder"):
        plan.add_column(name, overflow="fold")
    for run in runs:
        training = run.config.training
        length = str(training.max_steps) if training.max_steps > 0 else f"{training.epochs:g} epochs"
        plan.add_row(
            run.row.name, str(run.seed), "by timing" if is_timed else length, "\n".join(run.row.overrides),
            "\n".join(run.row.evaluation), "by timing" if is_timed else run.folder.name,
        )  # fmt: skip
    for name, reason in not_run.items():
        plan.add_row(name, "-", "-", f"not run: {reason}", "", "")
    return plan


def _remarks(results: Mapping[str, Any]) -> list[str]:
    pictures = f"{results['max_images']} pictures of " if results["max_images"] else ""
    lines = [
        f"Ours: {results['config']} on {pictures}{results['split']}, protocol {results['protocol']}, percent; mean ± standard "
        "deviation over the seeds.",
        f"Paper: {results['comparison'].capitalize()}. {NOTE}",
        results["notes"],
    ]
    lines += [f"Not run: {row['label']}: {row['not_run']}" for row in results["rows"] if row["not_run"]]
    return [line for line in lines if line]


if __name__ == "__main__":
    sys.exit(main())
