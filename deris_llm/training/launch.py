"""Starts the ranks of a run on this machine: one per GPU, or two on the CPU, by DeepSpeed's launcher."""

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
from deris_llm.common.error_file import ERROR_FILE, INTERRUPTED, last_words
from deris_llm.config import load_config
from deris_llm.models.out_of_memory import killed_message

logger = logging.getLogger(__name__)

CPU_RANKS = 2
_KILLED = 256 - signal.SIGKILL  # exit status of DeepSpeed's launcher when a rank was
_SECONDS_TO_END = 10.0  # of interrupted ranks


def launch(
    config: str,
    *,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    deepspeed: str | Path | None = None,
    resume: str | None = None,
    fast_dev_run: bool = False,
    allow_other_data: bool = False,
    gpus: int | None = None,
) -> int:
    """Runs ``scripts/train.py`` under DeepSpeed's launcher and waits for it.

    Args:
        config: name or file of a run config.
        overrides: ``section.field=value`` each.
        output: folder of the run; None = ``runs/NAME``.
        deepspeed: a DeepSpeed JSON; None = ``ds_configs/zero2.json``.
        resume: ``auto``, ``never`` or a checkpoint folder; None = ``auto``.
        fast_dev_run: load, 2 steps, save, reload, evaluate.
        allow_other_data: go on from a checkpoint that was trained on other data.
        gpus: number of ranks; None = every GPU, and without a GPU `CPU_RANKS`.

    Returns:
        its exit status, `INTERRUPTED` after SIGINT or SIGTERM. Why a rank stopped is the last that is printed.

    Raises:
        ValueError: more GPUs are asked for than there are.
    """
    command = training_command(
        config,
        overrides=overrides,
        output=output,
        deepspeed=deepspeed,
        resume=resume,
        fast_dev_run=fast_dev_run,
        allow_other_data=allow_other_data,
        gpus=gpus,
    )
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", "1")
    logger.info(
        "this stands for:\n  OMP_NUM_THREADS=%s %s", environment["OMP_NUM_THREADS"], shlex.join(["deepspeed", *command])
    )
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder, "error.json")
        environment[ERROR_FILE] = str(error_file)
        status = _run([sys.executable, "-m", "deepspeed.launcher.runner", *command], environment, error_file)
        said = last_words(error_file)
    if status == INTERRUPTED and not said:
        said = interrupted_message(output or Path("runs") / load_config(config, overrides).name)
    if status == _KILLED and not said:
        said = killed_message(load_config(config, overrides), ranks=num_ranks(gpus))
    if status and said:
        sys.stderr.write(f"\n{said}\n")
    return status


def _run(command: Sequence[str], environment: dict[str, str], error_file: Path) -> int:
    """Runs the launcher and waits; SIGINT and SIGTERM end it and every process that it started.

    It gets a process group of its own: it hands no signal on, and a terminal's Ctrl-C would print a traceback per process.
    """
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    is_interrupted = False

    def end(*_: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
        if not is_interrupted:
            return status
        deadline = time.monotonic() + _SECONDS_TO_END
        while time.monotonic() < deadline and not error_file.is_file():  # what the first rank says
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def training_command(
    config: str,
    *,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    deepspeed: str | Path | None = None,
    resume: str | None = None,
    fast_dev_run: bool = False,
    allow_other_data: bool = False,
    gpus: int | None = None,
) -> list[str]:
    """The arguments of ``deepspeed`` for `launch`."""
    root = source_root()
    command = [
        "--num_gpus",
        str(num_ranks(gpus)),
        "--master_port",
        str(free_port()),
        str(root / "scripts" / "train.py"),
    ]
    command += ["--config", config, "--deepspeed", str(deepspeed or root / "ds_configs" / "zero2.json")]
    if overrides:
        command += ["--set", *overrides]
    if output is not None:
        command += ["--output", str(output)]
    if resume is not None:
        command += ["--resume", resume]
    command += ["--fast-dev-run"] * fast_dev_run
    return command + ["--allow-other-data"] * allow_other_data


def num_ranks(gpus: int | None = None) -> int:
    """How many ranks this machine gets: ``gpus`` if given, else one per GPU, else `CPU_RANKS`, which is the most without one."""
    found = torch.cuda.device_count()
    most = found or CPU_RANKS
    if gpus is None:
        return most
    if not found and gpus > most:
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        raise ValueError(
            f"--gpus: expected {gpus} GPUs, found none (torch {torch.__version__} is built {built}; nvidia-smi says whether the "
            f"driver sees them). Mend that, or leave --gpus out to run on the CPU, with {CPU_RANKS} ranks"
        )
    if not 1 <= gpus <= most:
        raise ValueError(f"--gpus: expected 1 to {most}, got {gpus}; leave it out to use all")
    return gpus


def source_root() -> Path:
    """The checkout that holds ``scripts/`` and ``ds_configs/``."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "scripts" / "train.py").is_file():
        raise ValueError(
            f"deris-llm train: expected scripts/train.py in {root}, found none; install the checkout: pip install -e ."
        )
    return root


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
