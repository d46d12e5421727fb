"""The runs of a table: their configs, and training and evaluating them, one after the other or side by side.

Each run trains in a folder that its complete config names, so that a second call goes on where the first one stopped, and
tables that share a run share its folder. torch is imported when something runs, not to list it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from scripts.ablate.comparisons import Comparison, Row

logger = logging.getLogger(__name__)

TIMED_STEPS = 12
WARM_UP_STEPS = 4  # of the timed ones, not counted
CONFIG_FILE = "run.yaml"  # in a run's folder: what is trained
LOG_FILE = "run.log"  # what training and evaluation print
COST_FILE = "cost.json"  # what the training took over all attempts; of an interrupted one, what its launcher counted
ASKED_FILE = "asked.json"  # beside a report: what was evaluated
_BUILTIN = "builtin:"
_WEIGHTS = ("perception.weights", "cognition.weights")
_LINES_OF_LOG = 5  # in the message about a run that failed
_OF_EVERY_RUN = (
    "training.eval_every=0",  # evaluated afterwards, as the row says
    "training.eval_max_images=8",
    "training.keep_checkpoints=1",
)


class AblationError(ValueError):
    """A run failed or cannot be made; what was finished stays."""


@dataclass(frozen=True)
class Unit:
    """What rows are compared on, pair by pair."""

    seed: int  # of the run: fresh weights, data order, point sampling
    world: str = ""  # data.root; empty = the config's
    backbone: str = ""  # folder of backbones; empty = the config's weights

    def __str__(self) -> str:
        named = [Path(path).name for path in (self.world, self.backbone) if path]
        return "-".join([*named, f"seed{self.seed}"])


@dataclass(frozen=True)
class Run:
    """One row with one unit."""

    row: Row
    unit: Unit
    config: RunConfig
    folder: Path  # of the training; rows that differ at test alone share it

    @property
    def report(self) -> Path:
        """Where the evaluation's report is."""
        return self.folder / "eval" / (_slug("_".join(self.row.evaluation)) or "as-trained") / "report.json"


def expand(
    table: Comparison,
    config: str,
    overrides: Sequence[str] = (),
    *,
    output: Path,
    seeds: int | Sequence[int] = 1,
    worlds: Sequence[str] = (),
    backbones: Sequence[str] = (),
    in_step: bool = False,
    steps: int | None = None,
) -> tuple[list[Run], dict[str, str]]:
    """Makes the runs of a table: every row with every unit.

    Args:
        table: from `comparison`.
        config: name or file of the run config that every row starts from.
        overrides: of every run; the row's come after them.
        output: folder of all runs of this config.
        seeds: the seeds, or how many: the config's own, then the next integers.
        worlds: data roots; none = the config's.
        backbones: folders as `scripts/pretrain_tiny/run.py` writes them: folder/NAME replaces the weights builtin:NAME.
        in_step: a unit is the k-th seed, world and backbone (one world or backbone serves all), not every combination.
        steps: optimizer steps of each; None = as the config says.

    Returns:
        The runs, all rows of a unit together; and why a row has none, by its name.

    Raises:
        ConfigError: the config is wrong without a row's overrides.
        ValueError: a backbone is not there, or `in_step` has lists of different lengths.
        AblationError: no row can be run.
    """
    length = () if steps is None else (f"training.max_steps={steps}",)
    base = load_config(config, [*overrides, *_OF_EVERY_RUN, *length])
    first = base.training.seed
    listed = range(first, first + seeds) if isinstance(seeds, int) else seeds
    units = _units(listed, worlds or ("",), backbones or ("",), in_step=in_step)
    runs, not_run = [], {row.name: row.not_run for row in table.rows if row.not_run}
    for unit, row in itertools.product(units, table.rows):
        if row.name in not_run:
            continue
        own = [*overrides, *row.overrides, *_OF_EVERY_RUN, *length, f"training.seed={unit.seed}"]
        try:
            made = load_config(config, own)
            _check_evaluation(made, row)
        except ConfigError as error:
            not_run[row.name] = "; ".join(error.problems)
            continue
        said = _changes(base, made)
        own += [f"data.root={json.dumps(unit.world)}"] if unit.world else []
        own += _backbone_overrides(made, unit.backbone) if unit.backbone else []
        made = load_config(config, [*own, f"name={json.dumps(_slug(f'{row.name}-{unit}'))}"])
        runs.append(Run(row, unit, made, output / f"{said}-{_slug(str(unit))}-{_digest(made)}"))
    if not runs:
        reasons = "\n".join(f"  - {name}: {reason}" for name, reason in not_run.items())
        raise AblationError(
            f"{table.name}: expected a row that {config} can run, got none; take another config\n{reasons}"
        )
    return runs, not_run


def _units(seeds: Sequence[int], worlds: Sequence[str], backbones: Sequence[str], *, in_step: bool) -> list[Unit]:
    if not in_step:
        return [Unit(*unit) for unit in itertools.product(seeds, worlds, backbones)]
    if {len(worlds), len(backbones)} - {1, len(seeds)}:
        raise ValueError(
            f"in step: expected one world and backbone, or as many as seeds, got {len(seeds)} seeds, {len(worlds)} worlds "
            f"and {len(backbones)} backbones; give lists of the same length"
        )
    worlds, backbones = (list(one) * len(seeds) if len(one) == 1 else one for one in (worlds, backbones))
    return [Unit(*unit) for unit in zip(seeds, worlds, backbones, strict=True)]


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
        state = _trained(made, output / f"timing-{key}", gpus=gpus, processes=Processes())
        rates = [entry["images_per_second"] for entry in state["log_history"] if "images_per_second" in entry]
        images = made.training.images_per_device * made.training.accumulation * ranks
        known[key] = images / statistics.median(rates[WARM_UP_STEPS:])
        write_json(path, known)
    return known[key]


# -- one run ---------------------------------------------------------------------------------------------------------


class Interrupted(Exception):  # noqa: N818 (no error)
    """The processes were ended."""


class Processes:
    """Starts processes from any thread, and ends all of them on request."""

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._lock = threading.Lock()
        self._is_ended = False

    def run(self, command: Sequence[str], log: Path) -> tuple[int, float]:
        """Runs a command and waits.

        Args:
            command: program and arguments.
            log: output is added to this file.

        Returns:
            exit status, and CPU seconds (user and system) of the process and all that it started and waited for.

        Raises:
            Interrupted: `end` was called before.
        """
        with log.open("ab") as file, self._lock:
            self.raise_if_ended()
            # A session of its own: Ctrl-C in a terminal reaches this process alone, which then ends the others.
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )  # fmt: skip
            self._running.add(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:  # in the main thread
            self.end()
            _, status, usage = os.wait4(process.pid, 0)
            raise
        process.returncode = os.waitstatus_to_exitcode(status)  # subprocess need not wait again
        with self._lock:
            self._running.discard(process.pid)
        return process.returncode, usage.ru_utime + usage.ru_stime

    def raise_if_ended(self) -> None:
        """Raises Interrupted if `end` was called."""
        if self._is_ended:
            raise Interrupted

    def end(self) -> None:
        """Ends everything that runs (`deris-llm train` then ends its ranks) and starts nothing more."""
        with self._lock:
            self._is_ended = True
            for pid in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)


def train_and_evaluate(
    run: Run, *, gpus: int | None = None, max_images: int = 0, processes: Processes | None = None
) -> None:
    """Trains and evaluates a run; what is finished is reused, a training that was cut off goes on.

    Args:
        run: from `expand`.
        gpus: ranks; None = every GPU, or two on the CPU.
        max_images: evenly spaced images of the split; 0 = all.
        processes: what starts them; None = of its own.

    Raises:
        AblationError: training or evaluation failed.
        Interrupted: `processes` was ended.
    """
    from deris_llm.checkpoints.layout import newest_checkpoint

    processes = processes or Processes()
    _trained(run.config, run.folder, gpus=gpus, processes=processes)
    if numbers_of(run, max_images=max_images) is not None:
        return
    arguments = ["eval", "--checkpoint", str(newest_checkpoint(run.folder)), "--output", str(run.report.parent)]
    arguments += ["--splits", run.config.training.eval_split, "--max-images", str(max_images)]
    arguments += ["--set", *run.row.evaluation] if run.row.evaluation else []
    run.report.unlink(missing_ok=True)  # of another number of images
    status, seconds = processes.run(_command(arguments, gpus), run.folder / LOG_FILE)
    if status != 0 or not run.report.is_file():
        processes.raise_if_ended()
        raise _failed(run.folder, "the evaluation to end with a report", status)
    write_json(run.report.with_name(ASKED_FILE), {"max_images": max_images, "cpu_seconds": round(seconds, 1)})


def numbers_of(run: Run, *, max_images: int) -> dict[str, Any] | None:
    """What the run's evaluation on so many images gave; None = it was not done."""
    asked = run.report.with_name(ASKED_FILE)
    if not asked.is_file() or json.loads(asked.read_text(encoding="utf-8"))["max_images"] != max_images:
        return None
    report = json.loads(run.report.read_text(encoding="utf-8"))
    return next(iter(report["splits"][run.config.training.eval_split].values()))  # of the first protocol


def final_state(folder: Path) -> dict[str, Any] | None:
    """The Trainer's state at the last step; None = the training is not finished."""
    from deris_llm.checkpoints.layout import TRAINER_STATE_FILE, newest_checkpoint

    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    state = json.loads((newest / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    return state if state["global_step"] >= state["max_steps"] else None


def cpu_seconds(run: Run) -> float | None:
    """CPU seconds of training and evaluation, all attempts together; None for runs that did not record it."""
    paths = (run.folder / COST_FILE, run.report.with_name(ASKED_FILE))
    training, evaluation = (_read(path).get("cpu_seconds") for path in paths)
    return None if training is None or evaluation is None else training + evaluation


def write_json(path: Path, content: Any) -> None:
    """Writes aside, then replaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


# -- all runs --------------------------------------------------------------------------------------------------------


def run_all(
    runs: Sequence[Run], *, jobs: int, gpus: int | None, max_images: int, say: Callable[[str], None]
) -> dict[str, str]:
    """Trains and evaluates runs side by side; runs that share a folder go one after the other.

    Args:
        runs: from `expand`.
        jobs: how many at a time.
        gpus: ranks of each.
        max_images: as of `train_and_evaluate`.
        say: gets a line per finished folder.

    Returns:
        messages of the runs that failed, by folder name; the others were finished all the same.

    Raises:
        KeyboardInterrupt: after everything that ran was ended.
    """
    groups: dict[Path, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.folder, []).append(run)
    left = [
        members for members in groups.values() if any(numbers_of(r, max_images=max_images) is None for r in members)
    ]
    if len(left) < len(groups):
        say(f"{len(groups) - len(left)} of {len(groups)} trainings and their evaluations were finished before")
    processes, failed, started = Processes(), {}, time.monotonic()
    seconds: list[float] = []  # of the finished ones

    def finish(members: Sequence[Run]) -> None:
        begun = time.monotonic()
        try:
            for run in members:
                train_and_evaluate(run, gpus=gpus, max_images=max_images, processes=processes)
        finally:
            seconds.append(time.monotonic() - begun)

    with _terminable(), ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(finish, members): members for members in left}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                members = futures[future]
                elapsed, ahead = time.monotonic() - started, statistics.fmean(seconds) * (len(left) - number) / jobs
                times = f"{_minutes(elapsed)} so far, about {_minutes(ahead)} left"
                try:
                    future.result()
                    said = _result(members, max_images)
                except AblationError as error:
                    failed[members[0].folder.name] = str(error)
                    said = f"failed: {error}"
                names = ", ".join(run.row.name for run in members)
                say(f"[{number} of {len(left)}] {names}, {members[0].unit}: {said}; {times}")
        except BaseException:  # Ctrl-C, or a defect
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise
    return failed


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Handles SIGTERM like Ctrl-C, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _result(members: Sequence[Run], max_images: int) -> str:
    numbers = [numbers_of(run, max_images=max_images) or {} for run in members]
    mains = ("mIoU", "gIoU", "oracle_mIoU", "oracle_gIoU")
    said = [
        ", ".join(f"{name} {found[name]:.2f}" for name in mains if found.get(name) is not None) for found in numbers
    ]
    return " | ".join(said)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# -- details ---------------------------------------------------------------------------------------------------------


def _trained(config: RunConfig, folder: Path, *, gpus: int | None, processes: Processes) -> dict[str, Any]:
    """Trains to the end, going on from what is there; the Trainer's state of the last step."""
    state = final_state(folder)
    if state is not None:
        logger.info("%s is trained already", folder)
        return state
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / CONFIG_FILE)
    arguments, begun = ["train", "--config", str(folder / CONFIG_FILE), "--output", str(folder)], time.monotonic()
    status, seconds = processes.run(_command(arguments, gpus), folder / LOG_FILE)
    before = _read(folder / COST_FILE)
    cost = {
        "cpu_seconds": round(before.get("cpu_seconds", 0.0) + seconds, 1),
        "wall_seconds": round(before.get("wall_seconds", 0.0) + time.monotonic() - begun, 1),
        "attempts": before.get("attempts", 0) + 1,
    }
    write_json(folder / COST_FILE, cost)
    state = final_state(folder)
    if status != 0 or state is None:
        processes.raise_if_ended()
        raise _failed(folder, "the training to reach its last step", status)
    return state


def _command(arguments: Sequence[str], gpus: int | None) -> list[str]:
    return [sys.executable, "-m", "deris_llm.cli.main", *arguments, *([] if gpus is None else ["--gpus", str(gpus)])]


def _failed(folder: Path, expected: str, status: int) -> AblationError:
    lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LINES_OF_LOG:]
    return AblationError(
        f"{folder}: expected {expected}, got exit status {status}; see {LOG_FILE} there, then call this again: what is finished "
        "is reused, a training goes on from its last checkpoint. The log ends with\n  " + "\n  ".join(lines)
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_evaluation(config: RunConfig, row: Row) -> None:
    """Raises ConfigError where the run cannot be evaluated as the row says."""
    problems: list[str] = []
    tree = apply_overrides(config_to_dict(config), row.evaluation, problems)
    config_from_dict(tree, where=row.name, problems=problems)


def _backbone_overrides(config: RunConfig, backbone: str) -> list[str]:
    """The overrides that replace shipped weights by those of a folder."""
    flat, overrides = _flat(config_to_dict(config)), []
    for field in _WEIGHTS:
        if not flat[field].startswith(_BUILTIN):
            continue
        folder = Path(backbone, flat[field].removeprefix(_BUILTIN))
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"--backbones: expected the folder {folder} with weights that replace {field}={flat[field]}, got none; "
                "scripts/pretrain_tiny/run.py makes them"
            )
        overrides.append(f"{field}={json.dumps(str(folder))}")
    if not overrides:
        raise ValueError(
            f"--backbones: expected a config with the shipped weights ({_BUILTIN}NAME), got {flat[_WEIGHTS[0]]}; leave it out"
        )
    return overrides


def _changes(base: RunConfig, config: RunConfig) -> str:
    """What differs from the base, in words."""
    defaults = {field.name: field.default for field in iter_fields()}  # of fields that only the row's backend reads
    before, now = defaults | _flat(config_to_dict(base)), _flat(config_to_dict(config))
    aside = ("name", "training.seed")
    changed = [
        f"{name.rpartition('.')[2]}={now[name]}" for name in now if now[name] != before[name] and name not in aside
    ]
    return _slug("_".join(changed)) or "as-configured"


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
