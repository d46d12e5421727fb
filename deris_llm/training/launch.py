"""Starts the ranks of a run on this machine with DeepSpeed's launcher: one per GPU, or two on the CPU."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from deris_llm.checkpoints.layout import interrupted_message
from deris_llm.common.error_file import ERROR_FILE, INTERRUPTED, read_error_file
from deris_llm.config import RunConfig
from deris_llm.models.out_of_memory import killed_message
from deris_llm.training import interruption
from deris_llm.training.deepspeed_config import DEFAULT_FILE

logger = logging.getLogger(__name__)

CPU_RANKS = 2
_KILLED = 256 - signal.SIGKILL  # exit status of DeepSpeed's launcher if a rank was killed
_LAUNCHER_KILLED = 1
_SECONDS_TO_END = 10.0  # for what the launcher leaves


def launch(command: Sequence[str], config: RunConfig, *, output: Path, ranks: int) -> int:
    """Runs DeepSpeed's launcher and waits. The reason for a failure is printed last.

    Args:
        command: from `training_command`.
        config: of the run; the last three arguments are for messages.
        output: run folder.
        ranks: their number.

    Returns:
        the launcher's exit status, usually that of the rank that failed first; `INTERRUPTED` after SIGINT, SIGTERM or SIGUSR1.
    """
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", "1")
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns in every process if it has to find out
    logger.info(
        "running:\n  OMP_NUM_THREADS=%s %s", environment["OMP_NUM_THREADS"], shlex.join(["deepspeed", *command])
    )
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder, "error.json")
        environment[ERROR_FILE] = str(error_file)
        status = _run([sys.executable, "-m", "deepspeed.launcher.runner", *command], environment, error_file)
        message = read_error_file(error_file)
    if status == INTERRUPTED and not message:
        message = interrupted_message(output)
    if status == _KILLED and not message:
        message = killed_message(config, ranks=ranks)
    if status and message:
        sys.stderr.write(f"\n{message}\n")
    return status


def _run(command: Sequence[str], environment: dict[str, str], error_file: Path) -> int:
    """Runs the launcher and waits. The first SIGINT, SIGTERM or SIGUSR1 asks the ranks to save and end, a second one ends them.

    The launcher gets its own process group, since a Ctrl-C in a terminal would print a traceback per process. It passes SIGTERM on
    but kills the ranks 30 s later, so the ranks get SIGUSR1, which the launcher ignores, and take the time that a step takes.
    """
    number_asked = 0

    def end(*_: object) -> None:
        nonlocal number_asked
        number_asked += 1
        if number_asked == 1:
            sys.stderr.write("\nstopping after this step; once more stops at once, without saving\n")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGUSR1 if number_asked == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, signal.SIG_IGN) for number in interruption.SIGNALS}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # a child inherits what is ignored: SIGUSR1 alone
            signal.signal(number, signal.SIG_DFL)
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        for number in before:
            signal.signal(number, end)
        status = process.wait()
        deadline = time.monotonic() + _SECONDS_TO_END
        if number_asked:
            while time.monotonic() < deadline and not error_file.is_file():  # the first rank writes what was saved
                time.sleep(0.1)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return INTERRUPTED
        return _without_leftovers(process.pid, status)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _without_leftovers(group: int, status: int) -> int:
    """Returns the launcher's exit status. Ranks that outlived it, which only happens if it was killed, are ended."""
    deadline = time.monotonic() + _SECONDS_TO_END
    while left := _members(group):
        if time.monotonic() > deadline:
            logger.error("the launcher was killed; ending the ranks that it left (processes %s)", left)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            return status or _LAUNCHER_KILLED
        time.sleep(0.1)
    return status


def _members(group: int) -> list[int]:
    """Returns the running processes of a process group (none on systems without /proc)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, fields = stat.read_text(errors="replace").rpartition(") ")
            state, _, of_group, *_ = fields.split()
            if int(of_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def training_command(
    config: str,
    *,
    output: Path,
    ranks: int,
    overrides: Sequence[str] = (),
    deepspeed: Path = DEFAULT_FILE,
    options: Sequence[str] = (),
) -> list[str]:
    """Returns the arguments of ``deepspeed`` that start ``python -m deris_llm.training`` on every rank.

    Args:
        config: name or file of a run config.
        output: run folder.
        ranks: their number, from `num_ranks`.
        overrides: ``section.field=value`` each.
        deepspeed: a DeepSpeed JSON.
        options: further options of a rank, such as ``--resume never``.
    """
    # A module, not scripts/train.py: an installed package has no scripts/.
    # The launcher's own lines below errors are about a missing hostfile and about what it starts.
    command = ["--num_gpus", str(ranks), "--master_port", str(free_port()), "--log_level", "error"]
    command += ["--module", "deris_llm.training"]
    command += ["--config", config, "--deepspeed", str(deepspeed), "--output", str(output), *options]
    return [*command, *(("--set", *overrides) if overrides else ())]


def num_ranks(gpus: int | None = None) -> int:
    """Returns the number of ranks: ``gpus`` if given, else one per GPU, and without a GPU `CPU_RANKS`, which is the maximum.

    Raises:
        ValueError: there are fewer GPUs.
    """
    found = torch.cuda.device_count()
    most = found or CPU_RANKS
    if gpus is None:
        return most
    if not found and gpus > most:
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        raise ValueError(
            f"--gpus: expected {gpus} GPUs, found none (torch {torch.__version__} is built {built}; nvidia-smi shows whether the "
            f"driver finds them). Fix that, or leave --gpus out to run on the CPU, with {CPU_RANKS} ranks"
        )
    if not 1 <= gpus <= most:
        raise ValueError(f"--gpus: expected 1 to {most}, got {gpus}; leave it out to use all")
    return gpus


def free_port() -> int:
    """Returns a TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
