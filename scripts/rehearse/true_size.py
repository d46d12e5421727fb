#!/usr/bin/env python
"""The real commands on weights of the true size: train, resume, eval, predict, merge, load, export, with their memory.

Random weights of the published names and shapes are written first (`scripts/rehearse/weights.py`), and data of a few images
with one phrase each. Every stage is the command that a user would type, in a process of its own; the table shows its
seconds, its peak memory and what it wrote beside the memory that `deris-llm plan` predicts for a GPU.

What a process maps from a weight file is resident but not held: the kernel drops such pages when memory is short. So the
table has both numbers: resident, and private, which is what a machine must have.

Exit status: 0 all stages passed, 1 one failed, 2 wrong arguments, 77 this machine has too little memory or disk.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Column, Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import each other as `scripts.*`

from deris_llm.config import RunConfig, load_config
from scripts.rehearse.memory import Peak, measured

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
CANNOT_RUN = 77
EXAMPLES = """\
examples:
  scripts/rehearse/true_size.py --config tiny-refcoco                        a minute: tests the script
  scripts/rehearse/true_size.py --config deris-0.5b-refcoco --ranks 2 --zero 2 3 --image-tokens 4 --set perception.image_size=128
  scripts/rehearse/true_size.py --config deris-7b-refcoco                    a GPU
  scripts/rehearse/true_size.py --config deris-7b-refcoco --image-tokens 4 --set perception.image_size=128 \\
      'cognition.prompt="<image>\\n{phrase}"'                                24 GB and no GPU: bf16 is slow there, so few tokens
"""


@dataclass(frozen=True)
class Done:
    """A stage that was run."""

    name: str
    seconds: float
    peak: Peak
    written: int  # bytes of files that are new
    planned: int | None  # bytes of a GPU


class StageError(RuntimeError):
    """A stage failed or left something wrong; the message says what."""


@dataclass
class Rehearsal:
    """Runs stages and keeps their numbers."""

    config: RunConfig
    work: Path
    ranks: int
    done: list[Done] = field(default_factory=list)

    def run(self, name: str, *command: str, planned: int | None = None) -> str:
        """Runs `deris-llm` with these arguments and returns what it printed.

        Raises:
            StageError: it failed.
        """
        before = _num_bytes(self.work)
        print(f"\n{name}\n  deris-llm {shlex.join(command)}", flush=True)
        threads = str(max(1, (os.cpu_count() or 1) // self.ranks))
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), "HF_HUB_OFFLINE": "1"}
        log = self.work.with_suffix(".log")
        stage = measured([sys.executable, "-m", "deris_llm.cli", *command], environment=environment, log=log)
        written = max(0, _num_bytes(self.work) - before)
        self.add(Done(name, stage.seconds, stage.peak, written, planned))
        if stage.status:
            print(log.read_text()[-3000:])
            raise StageError(f"{name}: expected exit status 0, got {stage.status}; the end of {log} is above")
        return stage.output

    def add(self, done: Done) -> None:
        """Keeps and prints the numbers of a stage."""
        self.done.append(done)
        print(
            f"  {done.seconds:.0f} s, {_gb(done.peak.private)} GB private, {_gb(done.written)} GB written", flush=True
        )


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--config", default="deris-7b-refcoco", metavar="NAME", help="a run config with LLaVA-OneVision and Mask2Former"
    )
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="new folder for everything (default: runs/true-size-NAME); deleted at the end",
    )
    add(
        "--image-tokens", type=int, metavar="N", help="a square number: image tokens, fewer compute less (default: 729)"
    )
    add("--ranks", type=int, default=1, metavar="N", help="ranks of training (default 1)")
    add("--zero", type=int, nargs="+", default=[2], choices=(1, 2, 3), metavar="STAGE", help="ZeRO stages (default: 2)")
    add("--keep", action="store_true", help="keep the folder; its `weights` can be used again by another call")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="overrides of the run config")
    arguments = parser.parse_args()
    if arguments.image_tokens is not None and math.isqrt(arguments.image_tokens) ** 2 != arguments.image_tokens:
        parser.error(f"--image-tokens: expected a square number, got {arguments.image_tokens}")
    work = (arguments.work or Path("runs") / f"true-size-{arguments.config}").resolve()
    if work.exists() and {path.name for path in work.iterdir()} - {"weights"}:
        parser.error(f"--work {work}: expected a new folder or one with `weights` alone; remove it or give another")
    config = load_config(arguments.config, arguments.set)
    work.mkdir(parents=True, exist_ok=True)
    if reason := reason_against(config, work):
        print(f"cannot run here: {reason}", file=sys.stderr)
        return CANNOT_RUN
    rehearsal = Rehearsal(config, work, arguments.ranks)
    try:
        rehearse(rehearsal, arguments)
    except StageError as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
        return 1
    finally:
        show(rehearsal)
        if not arguments.keep:
            shutil.rmtree(work)
    return 0


def in_child(function: str, *arguments: Any, **options: Any) -> Any:
    """Calls a function of `scripts.rehearse.weights` in a process of its own: importing torch takes 0.8 GB."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_call, function, arguments, options).result()


def _call(function: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    from scripts.rehearse import weights

    return getattr(weights, function)(*arguments, **options)


def reason_against(config: RunConfig, work: Path) -> str | None:
    """Says why this machine cannot run the rehearsal of a config, or returns None."""
    names = [name for name in (config.cognition.weights, config.perception.weights) if not name.startswith("builtin:")]
    if not names:
        return None
    sizes = {name: in_child("size_of", name) for name in names}
    if unknown := [name for name, size in sizes.items() if size is None]:
        return f"expected weights of a LLaVA-OneVision and a Mask2Former of the hub, got {', '.join(unknown)}"
    size = sum(sizes.values())
    disk = 2 * size - _num_bytes(work) + 2 * GB  # base and merged weights
    memory = size + 4 * GB  # weights that do not stay in memory are read again for every step
    if (free := shutil.disk_usage(work).free) < disk:
        return f"expected {_gb(disk)} GB of free disk in {work}, got {_gb(free)}; give another --work"
    if (total := psutil.virtual_memory().total) < memory:
        return f"expected {_gb(memory)} GB of memory, got {_gb(total)}; try --config deris-0.5b-refcoco"
    return None


def rehearse(rehearsal: Rehearsal, arguments: argparse.Namespace) -> None:
    """Runs all stages; what is not needed again is deleted in between, so that base and merged weights fit a disk once each."""
    work = rehearsal.work
    settings = [*write_inputs(rehearsal, arguments.image_tokens), *arguments.set]
    plan = json.loads(
        rehearsal.run(
            "plan",
            "plan",
            *_config(arguments, rehearsal.work),
            "--gpus",
            str(arguments.ranks),
            "--json",
            "--set",
            *settings,
        )
    )
    planned = {memory["stage"]: memory["total"] for memory in plan["memory"]}
    trainable = sum(part["trainable"] for part in plan["parts"])
    weights = next(memory["weights"] for memory in plan["memory"] if memory["stage"] == "0")
    run = work / "run"
    for zero in arguments.zero:
        shutil.rmtree(run, ignore_errors=True)
        train(rehearsal, arguments, settings, zero=zero, planned=planned[str(zero)], trainable=trainable)
    image = str(work / "data" / "0.png")
    rehearsal.run(
        "eval of 1 image", "eval", "--checkpoint", str(run), "--max-images", "1", "--gpus", "1",
        "--output", str(work / "eval"), planned=weights,
    )  # fmt: skip
    ask = ("--image", image, "--phrase", "the red circle", "--json")
    rehearsal.run(
        "predict", "predict", "--checkpoint", str(run), *ask, "--out", str(work / "predicted"), planned=weights
    )
    rehearsal.run("export", "convert", "export", str(run), "--out", str(work / "exported"))
    merged = work / "merged"
    rehearsal.run("merge, bf16", "convert", "merge", str(run), "--out", str(merged), "--dtype", "bf16", planned=weights)
    rehearsal.run(
        "predict of merged", "predict", "--checkpoint", str(merged), *ask, "--out", str(work / "predicted-merged"),
        planned=weights,
    )  # fmt: skip
    shutil.rmtree(merged)
    rehearsal.run(
        "export, merged, bf16", "convert", "export", str(run), "--out", str(work / "published"), "--merge", "--dtype", "bf16",
        planned=weights,
    )  # fmt: skip


def train(
    rehearsal: Rehearsal,
    arguments: argparse.Namespace,
    settings: Sequence[str],
    *,
    zero: int,
    planned: int,
    trainable: int,
) -> None:
    """Trains two steps, then the second one again from the checkpoint of the first: the same bytes."""
    run = rehearsal.work / "run"
    command = (
        "train", *_config(arguments, rehearsal.work), "--output", str(run), "--gpus", str(rehearsal.ranks),
        "--deepspeed", str(ROOT / "ds_configs" / f"zero{zero}.json"), "--quiet", "--set", *settings,
    )  # fmt: skip
    ranks = f"ZeRO {zero}, {rehearsal.ranks} rank" + "s" * (rehearsal.ranks > 1)
    rehearsal.run(f"train, {ranks}", *command, planned=planned)
    first, second = run / "checkpoint-1", run / "checkpoint-2"
    for checkpoint in (first, second, run / "best"):
        if (size := _num_bytes(checkpoint)) > 16 * trainable + GB // 100:
            raise StageError(
                f"{checkpoint} has {size:,} bytes for {trainable:,} trainable parameters: it holds the base"
            )
    files = ("trainable.safetensors", "optimizer.safetensors")
    before = {file: (second / file).read_bytes() for file in files}
    shutil.rmtree(second)
    rehearsal.run(f"resume, {ranks}", *command, planned=planned)
    if differ := [file for file in files if (second / file).read_bytes() != before[file]]:
        raise StageError(f"{second}: {', '.join(differ)} differ between the straight and the resumed run")


def write_inputs(rehearsal: Rehearsal, image_tokens: int | None) -> list[str]:
    """Writes weights and data.

    Returns:
        overrides that use them.
    """
    config, work = rehearsal.config, rehearsal.work
    found = {"cognition": config.cognition.weights, "perception": config.perception.weights}
    if not config.cognition.weights.startswith("builtin:"):
        for part, name in found.items():
            folder = work / "weights" / part
            found[part] = str(folder)
            if folder.is_dir():  # of an earlier call with --keep
                continue
            print(f"\nrandom weights of {name}", flush=True)
            start = time.monotonic()
            unfinished = folder.with_suffix(".partial")
            size, resident = in_child("write_weights", name, unfinished, image_tokens=image_tokens)
            unfinished.rename(folder)
            rehearsal.add(Done(f"write {part}", time.monotonic() - start, Peak(resident=resident), size, None))
    write_data(work / "data")
    return [
        *(f"{part}.weights={name}" for part, name in found.items()),
        "data.phrases_per_image=1", "data.num_workers=0", "training.max_steps=2", "training.save_every=1",
        "training.log_every=1", "training.eval_every=0", "training.eval_max_images=1", "training.images_per_device=1",
    ]  # fmt: skip


def write_data(folder: Path, num_images: int = 4) -> None:
    """Writes images of one circle on noise, with one phrase each, as JSONL; the last one is for evaluation."""
    folder.mkdir()
    lines = []
    for i in range(num_images):
        image = Image.effect_noise((160, 120), 40).convert("RGB")
        x, y = 10 + 20 * i, 20
        ImageDraw.Draw(image).ellipse((x, y, x + 60, y + 60), fill="red")
        image.save(folder / f"{i}.png")
        square = [x + 9, y + 9, x + 51, y + 9, x + 51, y + 51, x + 9, y + 51]
        split = "train" if i < num_images - 1 else "val"
        lines.append({"image": f"{i}.png", "phrase": "the red circle", "polygons": [square], "split": split})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def show(rehearsal: Rehearsal) -> None:
    """Prints the table."""
    numbers = ("s", "resident", "private", "private, all", "plan, GPU", "written")
    columns = [Column(title, justify="right") for title in numbers]
    title = f"{rehearsal.config.name}: seconds; GB of the largest process, of all, and of new files"
    table = Table("stage", *columns, title=title)
    for done in rehearsal.done:
        peak = done.peak
        table.add_row(
            done.name, f"{done.seconds:.0f}", _gb(peak.resident), _gb(peak.private), _gb(peak.all_private),
            "" if done.planned is None else _gb(done.planned), _gb(done.written),
        )  # fmt: skip
    Console(width=110).print(table)


def _config(arguments: argparse.Namespace, work: Path) -> tuple[str, ...]:
    return ("--config", arguments.config, "--data", str(work / "data"))


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.2f}" if num_bytes else ""


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
