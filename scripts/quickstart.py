"""The main job at tiny size, stage by stage: data, step 0, fine-tuning, evaluation, table.

Each stage is a `deris-llm` command that is said before it runs. A finished stage leaves a stamp with a hash of all it
depends on, so a second call goes on where the first one stopped and repeats nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from rich.console import Console

from deris_llm.checkpoints.fingerprints import base_fingerprints
from deris_llm.checkpoints.layout import BEST, CheckpointError, newest_checkpoint, read_json
from deris_llm.checkpoints.same_run import check_same_run
from deris_llm.common.version import __version__
from deris_llm.config import RunConfig, config_to_dict, load_config
from deris_llm.data.synthetic import WORLD_FILE
from deris_llm.evaluation.report import read_report, report_table, update_report
from deris_llm.training.launch import CPU_RANKS, num_ranks

CONFIG = "tiny-refcoco"
DATA_SEED = 0
STEP0_IMAGES = 24  # of each split: before fine-tuning the numbers are near zero and a sample says it
TIMED_STEPS = 10
QUIET_SECONDS = 20  # a stage that says nothing for so long gets a line from us
_STEP_LINE = re.compile(r"step (?P<step>\d+) of \d+: .* (?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d) left")
_LIBRARY_NOISE = re.compile(
    r"^Loading weights: |^\[\d{4}-\d\d-\d\d .*\] \[(INFO|WARNING)\]|^W\d{4} |UserWarning|FutureWarning|warnings\.warn"
)


@dataclass(frozen=True)
class Stage:
    """A step of the main job."""

    name: str  # in stamps, log and report["timing"]
    about: str
    command: tuple[str, ...]  # of `deris-llm`
    depends_on: object  # plain values; other ones repeat this stage and those after it
    advice: str  # what to do when it fails
    prepare: Callable[[], None] = lambda: None
    remark: Callable[[str], str | None] = lambda line: None  # on a line that it prints


class Expectation:
    """Says once how long training and evaluation take on this machine, after ten timed steps.

    Args:
        evaluation: returns the expected seconds of the evaluation after training.
    """

    def __init__(self, evaluation: Callable[[], float]) -> None:
        self._evaluation = evaluation
        self._is_said = False

    def __call__(self, line: str) -> str | None:
        """Returns the sentence if a line of training is the first one after ten steps."""
        found = _STEP_LINE.search(line)
        if self._is_said or found is None or int(found["step"]) < TIMED_STEPS:
            return None
        self._is_said = True
        training = int(found["hours"]) * 3600 + int(found["minutes"]) * 60 + int(found["seconds"])
        evaluation = self._evaluation()
        return (
            f"about {_minutes(training + evaluation)} left on this machine: training {_minutes(training)}, "
            f"evaluation {_minutes(evaluation)}"
        )


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'' if minutes == 1 else 's'}"


def seconds_of_evaluation(output: Path, data_root: Path) -> float:
    """Returns how long the last stage takes, going by the same splits in stage `step0`, of which it evaluated a sample."""
    timing, world = read_report(output / "report.json")["timing"], read_json(data_root / WORLD_FILE)
    sampled = {name.rpartition(" ")[2]: taken for name, taken in timing.items() if name.startswith("evaluate step0 ")}
    started = _read_stamp(output / "stages" / "step0.json")["seconds"] - sum(sampled.values())
    images = {split: world["num_val" if split.endswith("/val") else "num_test"] for split in sampled}
    whole = sum(taken * max(images[split] / STEP0_IMAGES, 1) for split, taken in sampled.items())
    return started + 2 * whole  # every phrase, then the control


class StageError(Exception):
    """A stage's command did not succeed."""

    def __init__(self, stage: Stage, status: int) -> None:
        self.stage, self.status = stage, status
        super().__init__(f"{stage.name}: exit status {status}")


class Log:
    """Says things on the terminal and keeps them, with all that the stages say, in a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file: IO[str] = path.open("a", encoding="utf-8", buffering=1)
        self.console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)

    def say(self, text: str = "", *, style: str | None = None) -> None:
        """A line of our own."""
        self.console.print(text, style=style, markup=False)
        self.file.write(f"{text}\n")

    def repeat(self, line: str) -> None:
        """A line of a stage: all go to the file, those of interest to the terminal."""
        self.file.write(f"{line}\n")
        if line.strip() and not _LIBRARY_NOISE.search(line):
            self.console.print(f"  {line}", markup=False)


def stages_of(
    config: RunConfig, overrides: Sequence[str], *, output: Path, worlds: Sequence[str], gpus: int | None
) -> list[Stage]:
    """The commands of the main job.

    Args:
        config: the run.
        overrides: what was given to make it, repeated to the commands.
        output: folder of everything that comes out but the data.
        worlds: options of `deris-llm data synth` that change its size.
        gpus: ranks; None = every GPU, or two on the CPU. A step has the same images on any number of them.
    """
    train = output / "train"
    images_per_step = config.training.images_per_device * CPU_RANKS
    num_training_ranks = max(n for n in range(1, num_ranks(gpus) + 1) if images_per_step % n == 0)
    images_per_device = f"training.images_per_device={images_per_step // num_training_ranks}"
    options = ("--config", CONFIG, *(("--set", *overrides) if overrides else ()))
    ranks = () if gpus is None else ("--gpus", str(gpus))
    made_of = {"version": __version__, "config": config_to_dict(config), "base": base_fingerprints(config)}
    workers = str(os.cpu_count() or 1)
    return [
        Stage(
            "data",
            f"a synthetic world in REFER's format, {config.data.root}",
            ("data", "synth", "--out", config.data.root, "--seed", str(DATA_SEED), "--workers", workers, *worlds),
            {"version": __version__, "root": config.data.root, "worlds": list(worlds)},
            f"look at the message above; free some disk space (1 GB), or remove {config.data.root} if it holds something else",
        ),
        Stage(
            "step0",
            "the same model before fine-tuning, on a sample of every split",
            ("eval", *options, "--output", str(output), "--max-images", str(STEP0_IMAGES), *ranks),
            made_of,
            "look at the message above; free some memory (each of two ranks takes about 1.5 GB)",
            lambda: (output / "report.json").unlink(missing_ok=True),
        ),
        Stage(
            "train",
            "fine-tuning under DeepSpeed (ZeRO 2); an interrupted run goes on from its last checkpoint",
            (
                "train",
                "--config",
                CONFIG,
                "--set",
                *overrides,
                images_per_device,
                "--output",
                str(train),
                "--gpus",
                str(num_training_ranks),
            ),
            made_of,
            "look at the message above; free some memory (each of two ranks takes about 2 GB) and disk space (1 GB)",
            lambda: _set_aside_other_run(train, config),
            Expectation(lambda: seconds_of_evaluation(output, Path(config.data.root))),
        ),
        Stage(
            "evaluate",
            "all splits, and the control: each phrase swapped with one that names another object of its image",
            ("eval", "--checkpoint", str(train / BEST), "--control", "--output", str(output), *ranks),
            made_of,
            f"look at the message above; {train / BEST} is the checkpoint",
        ),
    ]


def run_stages(stages: Sequence[Stage], *, output: Path, log: Log) -> list[str]:
    """Runs what is not done yet.

    Returns:
        names of the stages that ran.

    Raises:
        StageError: a stage's command did not succeed; the stages before it are kept.
    """
    stamps = output / "stages"
    chain = hashlib.sha256()
    ran: list[str] = []
    for number, stage in enumerate(stages, start=1):
        chain.update(json.dumps([stage.name, stage.depends_on], sort_keys=True).encode())
        wanted = chain.hexdigest()
        stamp = stamps / f"{stage.name}.json"
        title = f"[{number}/{len(stages)}] {stage.name}: {stage.about}"
        if _read_stamp(stamp).get("made_of") == wanted:
            log.say(f"{title}: done already", style="bold")
            continue
        stamp.unlink(missing_ok=True)
        stage.prepare()
        log.say(title, style="bold")
        log.say(f"  deris-llm {shlex.join(stage.command)}", style="dim")
        started = time.monotonic()
        status = _run_teed(stage, log)
        if status:
            raise StageError(stage, status)
        seconds = round(time.monotonic() - started, 1)
        stamp.write_text(json.dumps({"made_of": wanted, "seconds": seconds}), encoding="utf-8")
        log.say(f"  {stage.name} took {seconds:.0f} s")
        ran.append(stage.name)
    return ran


def _run_teed(stage: Stage, log: Log) -> int:
    """Runs a stage's command, repeating its lines; says that it is alive when it says nothing."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "deris_llm.cli.main", *stage.command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment,
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None, "asked for above"
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    started = time.monotonic()
    try:
        while True:
            try:
                line = lines.get(timeout=QUIET_SECONDS)
            except queue.Empty:
                log.say(f"  ... {stage.name} is at work, {time.monotonic() - started:.0f} s")
                continue
            if line is None:
                return process.wait()
            log.repeat(line)
            if remark := stage.remark(line):
                log.say(f"  {remark}", style="bold")
    finally:
        if process.poll() is None:  # we are being interrupted: the ranks get the chance to end
            process.terminate()
            process.wait()


def _read_stamp(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _set_aside_other_run(train: Path, config: RunConfig) -> None:
    """A training folder of another config is renamed, not mixed and not deleted."""
    newest = newest_checkpoint(train) if train.is_dir() else None
    if newest is None:
        return
    try:
        check_same_run(newest, config)
    except CheckpointError:
        number = 1
        while (aside := train.with_name(f"{train.name}-old-{number}")).exists():
            number += 1
        train.rename(aside)


def show_results(output: Path, log: Log, *, with_table: bool) -> None:
    """Completes the report's timing, prints the table (unless it was just printed) and says where everything is."""
    report_path = output / "report.json"
    timing = {path.stem: float(_read_stamp(path)["seconds"]) for path in (output / "stages").glob("*.json")}
    timing["total"] = sum(timing.values())
    report = update_report(report_path, timing=timing)
    if with_table:
        table = report_table(report)
        log.console.print(table)
        Console(file=log.file, width=200).print(table)
    minutes = " + ".join(
        f"{name} {timing[name] / 60:.1f}" for name in ("install", "data", "step0", "train", "evaluate")
    )
    log.say(f"minutes: {minutes} = {timing['total'] / 60:.1f}")
    for name, path in (
        ("page", output / "report.html"),
        ("numbers", report_path),
        ("pictures", output / "overlays.html"),
        ("sheets", output / "overlays"),
        ("predictions", output / "predictions"),
        ("checkpoint", output / "train" / BEST),
        ("log", log.path),
    ):
        log.say(f"{name:12} {path}")
    best = output / "train" / BEST
    log.say(
        f"\nTry the model in the browser (after `pip install -e '.[demo]'`):\n  deris-llm demo --checkpoint {shlex.quote(str(best))}"
    )


def _note_install(stamp: Path, seconds: float) -> None:
    """Keeps the longest installation: a second call finds everything installed."""
    stamp.parent.mkdir(parents=True, exist_ok=True)
    if seconds >= _read_stamp(stamp).get("seconds", 0.0):
        stamp.write_text(json.dumps({"seconds": seconds}), encoding="utf-8")


def _interrupt(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(f"signal {number}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python scripts/quickstart.py`.

    Args:
        argv: arguments; None reads the process's own.

    Returns:
        exit status: 0 done, 1 a stage failed, 2 the input was wrong, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="default runs/quickstart"
    )
    parser.add_argument("--gpus", type=int, help="ranks (default: every GPU; without one, 2 on the CPU)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="A.B=VALUE", help=f"override fields of {CONFIG}"
    )
    parser.add_argument(
        "--world", nargs="+", default=[], metavar="N", help="images of train, val and test (default 2400 120 120)"
    )
    parser.add_argument("--install-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    sizes = [f"--num-{name}={size}" for name, size in zip(("train", "val", "test"), arguments.world, strict=False)]
    log = Log(arguments.output / "quickstart.log")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _note_install(arguments.output / "stages" / "install.json", arguments.install_seconds)
        config = load_config(CONFIG, arguments.set)
        stages = stages_of(config, arguments.set, output=arguments.output, worlds=sizes, gpus=arguments.gpus)
        ran = run_stages(stages, output=arguments.output, log=log)
        show_results(arguments.output, log, with_table="evaluate" not in ran)
    except StageError as failure:
        stage = failure.stage
        log.say(f"\nFAILED: step {stage.name!r} ({stage.about}), exit status {failure.status}", style="bold red")
        log.say(f"  What to do: {stage.advice}. Then call this again: it goes on from there.")
        log.say(f"  Its command: deris-llm {shlex.join(stage.command)}")
        log.say(f"  Log: {log.path}")
        return 1
    except (ValueError, OSError) as error:
        log.say(f"error: {error}", style="bold red")
        return 2
    except KeyboardInterrupt:
        log.say("interrupted; call this again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
