"""Hits a tiny run at random moments, lets it go on until it is finished, and compares it with the undisturbed run.

    python scripts/rehearse/faults.py                              # every fault once: 26 rounds
    python scripts/rehearse/faults.py --rounds 50 --seed 7
    python scripts/rehearse/faults.py --faults sigterm kill-in-save --rounds 20

Each round takes a fault, ZeRO-2 or 3, and 1 or 2 ranks. The fault has an expected effect (exit status, message, what is saved), and
the finished run must have the weights, moments, losses of each step (so the order of the data) and metrics of the undisturbed one:
bit for bit, or, under ZeRO-2 on 2 ranks and after a change of their number, within the tolerance measured in tests/training.

Ranks are forked from this process, which has imported everything once, and are ended together as launchers do; the faults of
launchers start `deris-llm train` itself. Everything runs on the CPU. Exit status: 0 if all rounds passed, 1 if not, 77 if ranks
cannot be forked.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

NUM_STEPS, SAVE_EVERY, EVAL_EVERY, IMAGES_PER_STEP = 6, 2, 4, 4
PATIENCE = 400.0  # seconds until a start counts as hanging
TOLERANCE = 1e-6  # tests/training/test_training_runs.py measures it
NOISE = 1e-8  # root of Adam's second moment below which a gradient is rounding noise
HUNG, INTERRUPTED, KILLED, FAILED = 124, 130, -signal.SIGKILL, 1
CAP_DAC_OVERRIDE = 1  # the right of root to write where permissions forbid it

os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed's Muon, which nothing here uses, would import the compiler
}


class Unexpected(Exception):  # noqa: N818
    """A round did not go as it should."""


def expect(is_so: object, said: str) -> None:
    """Raises Unexpected with the text unless the first argument is true."""
    if not is_so:
        raise Unexpected(said)


# -- one start of a run ----------------------------------------------------------------------------------------------


class Start:
    """The ranks of one start, forked from this process."""

    def __init__(self, folder: Path, command: Sequence[str], num_ranks: int, inject: Callable[[int], None]) -> None:
        folder.mkdir(parents=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
        }
        self.ranks = [self._fork(rank, command, environment, inject) for rank in range(num_ranks)]
        self.statuses: dict[int, int] = {}

    def _fork(
        self, rank: int, command: Sequence[str], environment: dict[str, str], inject: Callable[[int], None]
    ) -> int:
        process = os.fork()
        if process:
            return process
        try:
            os.setpgid(0, 0)  # a Ctrl-C at this script is not one at the rank
            log = os.open(self.logs[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            from deris_llm.training.__main__ import main

            inject(rank)
            status = main(command)
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def text(self) -> str:
        """What all ranks wrote."""
        return "".join(log.read_text(errors="replace") for log in self.logs if log.is_file())

    def poll(self) -> bool:
        """Collects ranks that ended; returns whether some still run."""
        for rank, process in enumerate(self.ranks):
            if rank not in self.statuses:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) < len(self.ranks)

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to ranks that still run; None: to all."""
        self.poll()
        for rank, process in enumerate(self.ranks):
            if rank not in self.statuses and (ranks is None or rank in ranks):
                os.kill(process, number)

    def wait_for(self, text: str, patience: float = PATIENCE) -> bool:
        """Waits until rank 0 wrote a text; returns whether it did before the ranks ended."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if text in self.logs[0].read_text(errors="replace") if self.logs[0].is_file() else False:
                return True
            if not self.poll():
                return False
            time.sleep(0.02)
        self.end()
        raise Unexpected(f"no {text!r} within {patience:g} s")

    def wait(self) -> int:
        """Waits as a launcher does: the first rank that fails ends the others. Returns its status."""
        deadline, first, ending = time.monotonic() + PATIENCE, 0, 0.0
        while self.poll():
            failed = [status for status in self.statuses.values() if status]
            if failed and not ending:
                first, ending = failed[0], time.monotonic()
                self.send(signal.SIGTERM)
            if ending and time.monotonic() > ending + 30:  # as DeepSpeed's launcher and torchrun
                self.send(signal.SIGKILL)
            if time.monotonic() > deadline:
                self.end()
                raise Unexpected(f"a rank waits forever: {self.text()[-600:]}")
            time.sleep(0.05)
        return first or next((status for status in self.statuses.values() if status), 0)

    def end(self) -> None:
        """Kills all ranks."""
        self.send(signal.SIGKILL)
        while self.poll():
            time.sleep(0.05)


def free_port() -> int:
    """Returns a free TCP port."""
    from deris_llm.training.launch import free_port as found

    return found()


# -- a round ---------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """What all rounds share."""

    work: Path
    weights: list[str]
    references: dict[tuple[int, int], Path] = field(default_factory=dict)  # by stage and ranks


@dataclass
class Round:
    """One run of a fault."""

    place: Place
    folder: Path
    stage: int
    ranks: int
    random: random.Random
    hang_seconds: int = 0  # of the next start
    starts: int = 0
    is_tolerant: bool = False

    @property
    def output(self) -> Path:
        """Run folder."""
        return self.folder / "run"

    @property
    def world(self) -> Path:
        """This round's own copy of the data."""
        return self.folder / "world"

    def overrides(self, ranks: int | None = None) -> list[str]:
        """The config of a start."""
        return [
            *self.place.weights,
            f"data.root={self.world}",
            "data.train=[refcoco]",
            "data.eval=[refcoco/val]",
            "data.phrases_per_image=1",
            "data.check_images=never",
            "data.num_workers=1",
            "training.images_per_device=1",
            f"training.accumulation={IMAGES_PER_STEP // (ranks or self.ranks)}",
            f"training.max_steps={NUM_STEPS}",
            f"training.save_every={SAVE_EVERY}",
            f"training.eval_every={EVAL_EVERY}",
            "training.log_every=1",
            "training.eval_max_images=0",
            "training.warmup_ratio=0.5",
            f"training.hang_seconds={self.hang_seconds}",
        ]

    def command(self, ranks: int | None = None, output: Path | None = None) -> list[str]:
        """Options of a rank."""
        stage = self.place.work / f"zero{self.stage}.json"
        options = ["--config", "tiny-refcoco", "--deepspeed", str(stage), "--output", str(output or self.output)]
        return [*options, "--set", *self.overrides(ranks)]

    def start(
        self, *, inject: Callable[[int], None] = lambda _: None, ranks: int | None = None, output: Path | None = None
    ) -> Start:
        """Starts the run, or resumes it."""
        self.starts += 1
        return Start(self.folder / f"start-{self.starts}", self.command(ranks, output), ranks or self.ranks, inject)

    def hit(self, start: Start) -> int:
        """Waits for a random moment of training and returns the step that was logged last."""
        step = self.random.randrange(1, NUM_STEPS)
        start.wait_for(f"step {step} of {NUM_STEPS}")
        time.sleep(self.random.uniform(0, 0.4))
        return step

    def finish(self) -> None:
        """Resumes until the run is finished, then compares it with the undisturbed one."""
        for _ in range(3):
            start = self.start()
            if start.wait() == 0:
                break
        else:
            raise Unexpected(f"the run does not finish: {start.text()[-600:]}")
        reference = self.place.references[self.stage, self.ranks]
        compare(self.output, reference, is_exact=not self.is_tolerant and not (self.stage == 2 and self.ranks == 2))
        left = [path.name for path in self.output.glob(".*") if path.name != ".ranks"]  # of a rank that was killed
        expect(not left, f"left behind: {left}")

    def newest(self) -> int:
        """Step of the newest checkpoint, 0 without one."""
        from deris_llm.checkpoints.layout import newest_checkpoint

        found = newest_checkpoint(self.output)
        return int(found.name.rpartition("-")[2]) if found else 0

    def newest_before(self, checkpoint: Path) -> int:
        """Step of the checkpoint before another one."""
        return int(checkpoint.name.rpartition("-")[2]) - SAVE_EVERY

    def images(self, split: str) -> list[Path]:
        """Image files of a split, in this round's copy."""
        return [self.world / name for name in json.loads((self.place.work / f"images-{split}.json").read_text())]


def compare(output: Path, reference: Path, *, is_exact: bool) -> None:
    """Compares the last checkpoint, `best`, losses and metrics of two runs."""
    import safetensors.torch

    last = f"checkpoint-{NUM_STEPS}"
    weights, moments = (
        [safetensors.torch.load_file(folder / last / f"{name}.safetensors") for folder in (output, reference)]
        for name in ("trainable", "optimizer")
    )
    worst = 0.0
    for now, then, are_weights in ((*weights, True), (*moments, False)):
        expect(now.keys() == then.keys(), "other tensors")
        for name in then:
            difference = (now[name] - then[name]).abs()
            if are_weights and not is_exact:
                difference = difference[moments[1][f"exp_avg_sq/{name}"].sqrt() > NOISE]
            worst = max(worst, float(difference.max()) if difference.numel() else 0.0)
    expect(worst <= (0.0 if is_exact else TOLERANCE), f"weights or moments differ by {worst:.1e}")
    found = [history(folder / last) for folder in (output, reference)]
    best = [json.loads((folder / "best" / "metrics.json").read_text()) for folder in (output, reference)]
    for now, then in (*zip(*found, strict=True), tuple(best)):
        expect(now.keys() == then.keys(), f"other numbers: {now} instead of {then}")
        for name, value in then.items():
            is_same = value == now[name] or (
                not is_exact and isinstance(value, float) and math.isclose(value, now[name], rel_tol=1e-4)
            )
            expect(is_same, f"{name} at step {then.get('step')}: {now[name]} instead of {value}")


def history(checkpoint: Path) -> list[dict[str, Any]]:
    """Losses and gradient norms of every step, and the metrics of every evaluation."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    kept = ("step", "loss", "grad_norm", "eval_")
    entries = [entry for entry in state["log_history"] if "loss" in entry or "eval_n_phrases" in entry]
    steps = [entry["step"] for entry in entries if "loss" in entry]
    expect(steps == list(range(1, NUM_STEPS + 1)), f"logged steps: {steps}")
    return [{name: value for name, value in entry.items() if name.startswith(kept)} for entry in entries]


# -- faults ----------------------------------------------------------------------------------------------------------

Fault = Callable[[Round], str]
FAULTS: dict[str, Fault] = {}
TWO_RANKS = ("stopped-rank", "one-rank-fails-in-evaluation")  # whatever was drawn
ZERO_3 = ("one-rank-fails-in-evaluation",)


def fault(name: str) -> Callable[[Fault], Fault]:
    """Registers a fault by name; it returns what happened in a few words."""

    def register(function: Fault) -> Fault:
        FAULTS[name] = function
        return function

    return register


@fault("kill-one")
def _(run: Round) -> str:
    start = run.start()
    run.hit(start)
    start.send(signal.SIGKILL, [run.random.randrange(run.ranks)])
    expect(start.wait() == KILLED, f"status {start.statuses}")
    return "the others ended with it"


@fault("kill-all")
def _(run: Round) -> str:
    start = run.start()
    run.hit(start)
    start.end()
    return "killed"


@fault("kill-at-start")
def _(run: Round) -> str:
    start = run.start()
    time.sleep(run.random.uniform(0, 3))
    start.end()
    return "killed before the first step"


def asked(run: Round, number: int, ranks: Sequence[int] | None = None) -> str:
    """Asks ranks to stop, in the middle of training; checks what is saved."""
    start = run.start()
    step = run.hit(start)
    start.send(number, ranks)
    status = start.wait()
    if status == 0:
        return "came after the last step"
    expect(status == INTERRUPTED, f"status {start.statuses}: {start.text()[-600:]}")
    # One more step may have been logged meanwhile; an evaluation is ended at once, after its step was saved.
    expect(run.newest() >= step, f"asked after step {step}, newest checkpoint {run.newest()}")
    if ranks is None:
        expect(f"the last checkpoint is {run.output}/checkpoint-{run.newest()}" in start.text(), "no message")
    logged = start.text().count(f" of {NUM_STEPS}: loss")
    expect(logged == run.newest(), f"logged {logged} steps, saved {run.newest()}: a step was lost")
    return f"status {INTERRUPTED}, every step saved"


@fault("sigterm")
def _(run: Round) -> str:
    return asked(run, signal.SIGTERM)


@fault("sigint")
def _(run: Round) -> str:
    return asked(run, signal.SIGINT)


@fault("sigusr1")
def _(run: Round) -> str:
    return asked(run, signal.SIGUSR1)


@fault("sigterm-one")
def _(run: Round) -> str:
    return asked(run, signal.SIGTERM, [run.random.randrange(run.ranks)])


@fault("stopped-rank")
def _(run: Round) -> str:
    run.hang_seconds = 30  # a step takes seconds where ranks share cores
    start = run.start()
    run.hit(start)
    stopped = run.random.randrange(2)
    start.send(signal.SIGSTOP, [stopped])
    while start.poll() and not start.statuses:
        time.sleep(0.1)
    start.send(signal.SIGKILL, [stopped])
    start.wait()
    run.hang_seconds = 0
    said = start.text()
    expect(start.statuses[1 - stopped] == HUNG, f"status {start.statuses}: {said[-600:]}")
    expect(f"rank {stopped} does not run (process " in said, f"not named: {said[-900:]}")
    return f"status {HUNG}, rank and step named"


@fault("kill-in-save")
def _(run: Round) -> str:
    number = run.random.randrange(1, 140)
    start = run.start(inject=lambda rank: on_file_call(run.output, number, die) if rank == 0 else None)
    if start.wait() == 0:
        return "came after the last write"
    expect(KILLED in start.statuses.values(), f"status {start.statuses}: {start.text()[-600:]}")
    return "killed at a random call of a save"


@fault("disk-full")
def _(run: Round) -> str:
    number = run.random.randrange(1, 140)
    start = run.start(inject=lambda rank: on_file_call(run.output, number, no_space, WRITES) if rank == 0 else None)
    status, said = start.wait(), start.text()
    if status == 0:
        return "came after the last write, or where it does no harm"
    expect(status == FAILED, f"status {start.statuses}: {said[-600:]}")
    expect("No space left on device" in said, f"not named: {said[-600:]}")
    expect("Traceback" not in start.logs[0].read_text(), f"traceback: {said[-1500:]}")
    return "named; the checkpoint before is intact"


def damaged(run: Round, how: Callable[[Path], None]) -> str:
    """Damages a file of the newest of two checkpoints."""
    start = run.start()
    expect(start.wait_for(f"step {2 * SAVE_EVERY + 1} of"), start.text()[-600:])
    start.end()
    newest = run.output / f"checkpoint-{run.newest()}"
    names = sorted(path.name for path in newest.iterdir() if path.name != "checksums.json")
    name = run.random.choice(names)
    how(newest / name)
    again = run.start()
    expect(again.wait() == 0, again.text()[-600:])
    expect(
        f"resuming from the previous one, checkpoint-{run.newest_before(newest)}" in again.text(), f"{name} unnoticed"
    )
    shutil.rmtree(run.output / f"damaged-{newest.name}")
    return "went back to the checkpoint before, and said so"


@fault("flipped-byte")
def _(run: Round) -> str:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[run.random.randrange(len(content))] ^= 1 << run.random.randrange(8)
        path.write_bytes(content)

    return damaged(run, flip)


@fault("truncated-file")
def _(run: Round) -> str:
    return damaged(run, lambda path: os.truncate(path, run.random.randrange(path.stat().st_size)))


@fault("missing-file")
def _(run: Round) -> str:
    return damaged(run, Path.unlink)


def obey_permissions() -> None:
    """Takes root's right to ignore permissions from this process (capset); another user has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    rights = ctypes.create_string_buffer(24)  # twice effective, permitted, inheritable, 32 bits each
    expect(libc.capget(header, rights) == 0, "capget failed")
    effective, *others = struct.unpack("6I", rights.raw)
    rights.raw = struct.pack("6I", effective & ~(1 << CAP_DAC_OVERRIDE), *others)
    expect(libc.capset(header, rights) == 0, "capset failed")


@fault("read-only-output")
def _(run: Round) -> str:
    run.output.mkdir()
    run.output.chmod(0o555)
    start = run.start(inject=lambda _: obey_permissions())
    status, said = start.wait(), start.text()
    run.output.chmod(0o755)
    expect(status == FAILED, f"status {status}")
    expect(f"--output {run.output}: expected a folder that can be written to" in said, said[-600:])
    return "refused before any slow work"


@fault("clock-set-back")
def _(run: Round) -> str:
    start = run.start()
    run.hit(start)
    start.end()
    tomorrow = time.time() + 86400
    for path in run.output.rglob("*"):
        os.utime(path, (tomorrow, tomorrow), follow_symlinks=False)
    real = time.time

    def yesterday(_: int) -> None:
        time.time = lambda: real() - 86400

    again = run.start(inject=yesterday)
    expect(again.wait() == 0, again.text()[-600:])
    return "no effect"


def spoiled_image(run: Round, split: str, spoil: Callable[[Path], None]) -> Start:
    """Spoils an image of a split after the first step, and waits for the end; the image is restored."""
    start = run.start()
    start.wait_for(f"step 1 of {NUM_STEPS}")
    images = run.images(split)
    whole = {path: path.read_bytes() for path in (images if split == "train" else images[-1:])}
    for path in whole:
        spoil(path)
    status = start.wait()
    for path, content in whole.items():
        path.write_bytes(content)
    expect(status == FAILED, f"status {start.statuses}: {start.text()[-600:]}")
    expect(any(str(path) in start.text() for path in whole), f"no image named: {start.text()[-600:]}")
    return start


@fault("image-vanishes")
def _(run: Round) -> str:
    spoiled_image(run, "train", Path.unlink)
    return "image and phrases named"


@fault("image-breaks")
def _(run: Round) -> str:
    spoiled_image(run, "train", lambda path: os.truncate(path, path.stat().st_size // 2))
    return "image and phrases named"


@fault("image-changes")
def _(run: Round) -> str:
    from PIL import Image

    start = spoiled_image(run, "train", lambda path: Image.new("RGB", (33, 44)).save(path, "PNG"))
    expect("got 33 x 44 px" in start.text(), start.text()[-600:])
    return "image and sizes named"


@fault("one-rank-fails-in-evaluation")
def _(run: Round) -> str:
    began = time.monotonic()
    start = spoiled_image(run, "val", Path.unlink)
    expect("the evaluation on training.eval_split=refcoco/val failed" in start.text(), start.text()[-600:])
    expect(run.newest() == EVAL_EVERY, "the step before the evaluation is not saved")
    return f"ended, {'all' if time.monotonic() - began < PATIENCE else 'not all'} ranks"


@fault("nan-of-one-image")
def _(run: Round) -> str:
    at = run.random.randrange(2, NUM_STEPS)

    def poison(rank: int) -> None:
        import torch

        from deris_llm.training.trainer import DerisTrainer

        prepare = DerisTrainer._prepare_inputs

        def poisoned(trainer: Any, inputs: Any) -> Any:
            batch = prepare(trainer, inputs)
            if rank == 0 and trainer.state.global_step + 1 == at:
                batch.perception_image.fill_(torch.nan)
            return batch

        DerisTrainer._prepare_inputs = poisoned  # type: ignore[method-assign]

    start = run.start(inject=poison)
    status, said = start.wait(), start.text()
    expect(status == FAILED, f"status {start.statuses}: {said[-600:]}")
    expect(f"training step {at}: expected a finite loss, got NaN or infinity for these phrases" in said, said[-900:])
    expect(run.newest() == (at - 1) // SAVE_EVERY * SAVE_EVERY, f"newest checkpoint {run.newest()}")
    return "step and phrases named; nothing saved after it"


@fault("loader-worker-killed")
def _(run: Round) -> str:
    start = run.start()
    run.hit(start)
    workers = Path(f"/proc/{start.ranks[0]}/task/{start.ranks[0]}/children").read_text().split()
    expect(workers, "no loader worker")
    os.kill(int(workers[-1]), signal.SIGKILL)
    status, said = start.wait(), start.text()
    if status == 0:
        return "came after the last batch was read"
    expect(status == FAILED, f"status {start.statuses}: {said[-900:]}")
    expect("DataLoader worker (pid" in said and "data.num_workers" in said, said[-900:])
    return "named, with the settings that need less memory"


@fault("data-changed")
def _(run: Round) -> str:
    start = run.start()
    expect(start.wait_for(f"step {SAVE_EVERY + 1} of"), start.text()[-600:])
    start.end()
    kept = run.folder / "kept"
    run.world.rename(kept)
    in_child(lambda: write_world(run.world, seed=12))
    again = run.start()
    expect(again.wait() == FAILED, "not refused")
    expect("expected the data it was trained on (data.json), got other data" in again.text(), again.text()[-600:])
    expect("refcoco/train: " in again.text(), "not named")
    shutil.rmtree(run.world)
    kept.rename(run.world)
    return "refused; dataset, counts and hashes named"


@fault("other-number-of-ranks")
def _(run: Round) -> str:
    run.is_tolerant = True
    others = run.random.sample([n for n in (1, 2, 4) if n != run.ranks], 2)
    for number, ranks in enumerate(others):
        start = run.start(ranks=ranks)
        expect(start.wait_for(f"step {SAVE_EVERY * (number + 1) + 1} of"), start.text()[-900:])
        start.end()
        expect(run.newest() >= SAVE_EVERY * (number + 1), "nothing saved")
    return f"{' -> '.join(map(str, others))} -> {run.ranks} ranks"


@fault("second-run")
def _(run: Round) -> str:
    start = run.start()
    start.wait_for(f"step 1 of {NUM_STEPS}")
    start.send(signal.SIGSTOP)  # or it might end while the second one waits for it
    second = run.start(ranks=1)
    expect(second.wait() == FAILED, f"status {second.statuses}: {second.text()[-600:]}")
    said = second.text()
    expect("expected a folder that no other process writes to, got one in use by process" in said, said[-600:])
    start.send(signal.SIGCONT)
    expect(start.wait() == 0, f"the first run failed too: {start.text()[-600:]}")
    return "refused, the first run unharmed"


@fault("launcher-killed")
def _(run: Round) -> str:
    process, log = launched(run)
    wait_for_step(process, log, 2)
    launcher = next(pid for pid in descendants(process.pid) if "deepspeed.launcher.launch" in command_of(pid))
    os.kill(launcher, signal.SIGKILL)
    status = process.wait(PATIENCE)
    expect(status not in (0, None), "success was reported")
    return f"`deris-llm train` ended the ranks, status {status}"


@fault("launcher-sigint")
def _(run: Round) -> str:
    process, log = launched(run)
    wait_for_step(process, log, 2)
    process.send_signal(signal.SIGINT)
    expect(process.wait(PATIENCE) == INTERRUPTED, f"status {process.returncode}: {log.read_text()[-600:]}")
    logged = log.read_text().count(f" of {NUM_STEPS}: loss")
    expect(logged == run.newest(), f"logged {logged} steps, saved {run.newest()}")
    return f"status {INTERRUPTED}, every step saved"


def launched(run: Round) -> tuple[subprocess.Popen[bytes], Path]:
    """Starts `deris-llm train` itself."""
    run.starts += 1
    log = run.folder / f"start-{run.starts}.log"
    command = [sys.executable, "-m", "deris_llm.cli", "train", "--gpus", str(run.ranks)]
    with log.open("wb") as file:
        return subprocess.Popen([*command, *run.command()], stdout=file, stderr=subprocess.STDOUT), log


def wait_for_step(process: subprocess.Popen[bytes], log: Path, step: int) -> None:
    """Waits until a step was logged."""
    deadline = time.monotonic() + 2 * PATIENCE
    while f"step {step} of {NUM_STEPS}" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise Unexpected(f"no step {step}: {log.read_text()[-900:]}")
        time.sleep(0.1)


def descendants(process: int) -> Iterator[int]:
    """Yields the processes that a process started, and theirs."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


def command_of(process: int) -> str:
    """Returns the command line of a process."""
    return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()


# -- faults inside a rank --------------------------------------------------------------------------------------------


CHANGES = ("rename", "replace", "mkdir", "unlink", "rmdir", "link")
WRITES = ("rename", "replace", "mkdir", "link")  # what a full disk refuses, beside the content of files


def on_file_call(output: Path, number: int, happens: Callable[[], None], names: Sequence[str] = CHANGES) -> None:
    """Lets something happen at the number-th call of this process that changes a file or folder below the output folder."""
    counted = 0

    def wrapped(module: Any, name: str) -> None:
        call = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal counted
            if arguments and str(output) in str(arguments[0]) and ".ranks" not in str(arguments[0]):
                counted += 1
                if counted == number:
                    happens()
            return call(*arguments, **options)

        setattr(module, name, counting)

    for name in names:
        wrapped(os, name)
    for name in ("write_bytes", "write_text"):
        wrapped(Path, name)


def die() -> None:
    """Ends this process as a power failure does."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> NoReturn:
    """Fails as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- the campaign ----------------------------------------------------------------------------------------------------


def in_child(action: Callable[[], None]) -> None:
    """Runs something in a forked process, so that this one starts no threads, which a fork would lose."""
    process = os.fork()
    if process == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    expect(os.waitpid(process, 0)[1] == 0, "a preparation failed")


def write_world(folder: Path, *, seed: int = 3) -> None:
    """Writes the data: 16 training images, and 3 of val, which are not divided evenly between ranks."""
    from deris_llm.data.synthetic.world import write_world as write

    write(folder, seed=seed, num_train=16, num_val=3, num_test=3)


def prepared(work: Path, configurations: Sequence[tuple[int, int]]) -> Place:
    """Writes weights, data and DeepSpeed JSONs, and trains the undisturbed runs."""
    from deris_llm.data.sources import read_split
    from deris_llm.testing import tiny_weights

    overrides: list[str] = []
    place = Place(work, overrides)
    (work / "weights").mkdir()

    def write() -> None:
        (work / "overrides.json").write_text(json.dumps(tiny_weights(work / "weights")))
        write_world(work / "world")
        for split in ("train", "val"):
            paths = {record.image_path for record in read_split(work / "world", f"refcoco/{split}")}
            names = sorted(str(Path(path).relative_to(work / "world")) for path in paths)
            (work / f"images-{split}.json").write_text(json.dumps(names))

    in_child(write)
    overrides += json.loads((work / "overrides.json").read_text())
    root = Path(__file__).parents[2]
    for stage in (2, 3):
        content = json.loads((root / "ds_configs" / f"zero{stage}.json").read_text())
        if stage == 3:
            content["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # partitions tiny tensors too
        (work / f"zero{stage}.json").write_text(json.dumps(content))
    for stage, ranks in configurations:
        run = Round(place, work / f"undisturbed-{stage}-{ranks}", stage, ranks, random.Random())
        shutil.copytree(work / "world", run.world)
        began, start = time.monotonic(), run.start()
        expect(start.wait() == 0, f"the undisturbed run failed:\n{start.text()[-3000:]}")
        place.references[stage, ranks] = run.output
        say(f"undisturbed: ZeRO-{stage}, {ranks} rank{'s' * (ranks > 1)}: {time.monotonic() - began:.0f} s")
    return place


def say(text: str) -> None:
    """Prints a line of progress."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the rounds and prints the table."""
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=f"faults: {', '.join(FAULTS)}",
    )
    add = parser.add_argument
    add(
        "--rounds",
        type=int,
        default=len(FAULTS),
        metavar="N",
        help="rounds; each takes the next fault (default: each fault once)",
    )
    add("--seed", type=int, default=0, help="of the moments, the ranks that are hit and the configurations")
    add("--faults", nargs="+", choices=sorted(FAULTS), metavar="FAULT", help="only these (default: all)")
    add("--ranks", type=int, choices=(1, 2), help="always so many (default: 1 and 2 in turn)")
    add("--zero", type=int, choices=(2, 3), help="always this stage (default: 2 and 3 in turn)")
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="a new folder, which is kept (default: a temporary one, removed if all passed)",
    )
    arguments = parser.parse_args(argv)
    if not hasattr(os, "fork") or not Path("/proc/self/task").is_dir():
        say("cannot run here: expected Linux, whose processes can be forked and have /proc")
        return 77
    work = arguments.work or Path(tempfile.mkdtemp(prefix="deris-faults-"))
    work.mkdir(parents=True, exist_ok=True)
    work.chmod(0o755)  # for the fault that needs a user without rights
    import deepspeed  # noqa: F401
    import safetensors.torch  # noqa: F401

    import deris_llm.training.run  # noqa: F401

    stages, numbers = [arguments.zero] if arguments.zero else [3, 2], [arguments.ranks] if arguments.ranks else [2, 1]
    names = arguments.faults or list(FAULTS)
    configurations = [(stage, ranks) for ranks in numbers for stage in stages]
    taken = [names[number % len(names)] for number in range(arguments.rounds)]
    of_round = []
    for number, name in enumerate(taken):
        stage, ranks = configurations[(number + number // len(names)) % len(configurations)]
        of_round.append((3 if name in ZERO_3 else stage, 2 if name in TWO_RANKS else ranks))
    place = prepared(work, sorted(set(of_round)))
    rows: dict[str, list[str]] = {}
    num_failed = 0
    for number, (name, (stage, ranks)) in enumerate(zip(taken, of_round, strict=True)):
        said, is_good = one_round(place, name, number, stage, ranks, arguments.seed)
        num_failed += not is_good
        rows.setdefault(name, []).append(f"{'passed' if is_good else 'FAILED'}: {said}")
    say(table(rows, num_rounds=arguments.rounds, num_failed=num_failed, seed=arguments.seed))
    if arguments.work is None and not num_failed:
        shutil.rmtree(work)
    else:
        say(f"logs and run folders: {work}")
    return 1 if num_failed else 0


def one_round(place: Place, name: str, number: int, stage: int, ranks: int, seed: int) -> tuple[str, bool]:
    """Runs one round; returns what happened and whether it was as it should be."""
    run = Round(place, place.work / f"{number:03}-{name}", stage, ranks, random.Random(f"{seed} {number}"))
    shutil.copytree(place.work / "world", run.world)
    began, is_good = time.monotonic(), True
    try:
        said = FAULTS[name](run)
        run.finish()
    except (Unexpected, subprocess.TimeoutExpired, OSError, StopIteration) as error:
        said, is_good = f"{type(error).__name__}: {error}", False
    say(
        f"{number + 1:3} {name:<30} ZeRO-{run.stage}, {run.ranks} rank{'s' if run.ranks > 1 else ' '} {run.starts} starts "
        f"{time.monotonic() - began:4.0f} s  {'passed' if is_good else 'FAILED'}: {said}"
    )
    if is_good:
        shutil.rmtree(run.folder)
    return said, is_good


def table(rows: dict[str, list[str]], *, num_rounds: int, num_failed: int, seed: int) -> str:
    """Fault x outcome, in Markdown."""
    lines = ["", "| fault | rounds | passed | what happened |", "| --- | --- | --- | --- |"]
    for name, outcomes in rows.items():
        passed = [outcome for outcome in outcomes if outcome.startswith("passed")]
        said = dict.fromkeys(outcome.partition(": ")[2].splitlines()[0][:160] for outcome in outcomes)
        lines.append(f"| {name} | {len(outcomes)} | {len(passed)} | {'; '.join(said)} |")
    return "\n".join(
        [*lines, "", f"{num_rounds} rounds (seed {seed}), {num_rounds - num_failed} passed, {num_failed} failed"]
    )


if __name__ == "__main__":
    sys.exit(main())
