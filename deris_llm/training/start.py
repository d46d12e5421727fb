"""What happens before a run's slow work: checks of environment, output folder and checkpoints, and the process group."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from deris_llm.checkpoints.fingerprints import base_checkpoint, first_weights_folder
from deris_llm.checkpoints.layout import STATE_FILE, check_files, newest_checkpoint, newest_undamaged
from deris_llm.checkpoints.same_run import check_same_run
from deris_llm.common.folders import check_writable, finish_replacements
from deris_llm.common.locks import locked
from deris_llm.config import RunConfig
from deris_llm.training.deepspeed_config import read_deepspeed_config

logger = logging.getLogger(__name__)

FAST_DEV_RUN = "fast-dev-run"
_COLLECTIVE_SECONDS = 1800  # torch's default


def trial_folder(output: Path, *, fast_dev_run: bool = False, overfit: int = 0) -> Path | None:
    """Returns the folder of a trial run within the output folder, which replaces an earlier one; None of other runs."""
    name = FAST_DEV_RUN if fast_dev_run else f"overfit-{overfit}" if overfit else None
    return None if name is None else output / name


@contextlib.contextmanager
def sole_writer(output: Path, *, is_trial: bool = False) -> Iterator[None]:
    """Keeps other processes from writing to a run folder. One rank calls it.

    Args:
        output: run folder, or that of a trial run, which is removed and created again while its lock is held beside it.
        is_trial: whether it is of a trial run.

    Raises:
        FolderError: the folder cannot be written to, or another process writes to it.
    """
    check_writable(output.parent if is_trial else output, "--output")
    lock = output.with_name(f".{output.name}.lock") if is_trial else output / ".lock"
    with locked(lock, f"--output {output}"):
        yield


def check_start(
    config: RunConfig,
    *,
    output: Path,
    deepspeed: Path,
    resume: str = "auto",
    fast_dev_run: bool = False,
    overfit: int = 0,
    num_ranks: int = 1,
) -> None:
    """Makes the checks of `run.train` that need no ranks, so that an error is printed once. Arguments are those of `train`.

    Raises:
        ValueError: unusable config, DeepSpeed JSON, output folder, checkpoint or weights.
    """
    read_deepspeed_config(deepspeed, config, num_ranks=num_ranks)
    check_environment(config)
    first_weights_folder(config)
    trial = trial_folder(output, fast_dev_run=fast_dev_run, overfit=overfit)
    with sole_writer(trial or output, is_trial=trial is not None):
        if trial is not None:
            check_writable(trial, "--output")
        elif checkpoint_to_resume(config, output, resume) is not None:
            return
    if base_checkpoint(config) is None:
        from deris_llm.models.deris import (
            check_weight_files,  # imports transformers, which the other checks do not need
        )

        check_weight_files(config)


def check_environment(config: RunConfig) -> None:
    """Raises ValueError if this machine or its environment cannot run the config."""
    if value := os.environ.get("ACCELERATE_USE_CPU"):
        raise ValueError(
            f"environment: expected ACCELERATE_USE_CPU unset, got {value!r} (accelerate then silently disables DeepSpeed); unset it"
        )
    if config.cognition.quantization != "none" and not torch.cuda.is_available():
        raise ValueError(
            f"cognition.quantization={config.cognition.quantization}: expected a CUDA GPU for training, found none (on a CPU, "
            "bitsandbytes repacks its weights at the first evaluation and they give no gradient afterwards). Set it to none, or "
            "train on a GPU"
        )
    if config.training.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"training.precision=bf16: expected a GPU that computes in bf16, got {torch.cuda.get_device_name()}; set "
            "training.precision=fp32"
        )


def check_launcher(config: RunConfig, deepspeed: Path | None) -> None:
    """Raises ValueError if DeepSpeed, launcher and precision contradict each other."""
    if deepspeed is not None and "RANK" not in os.environ:
        raise ValueError(
            f"--deepspeed {deepspeed}: expected to be started by a launcher (RANK is not set); use `deris-llm train`, or "
            "`deepspeed --num_gpus 1 scripts/train.py ...` for a single process"
        )
    if config.training.precision == "bf16" and deepspeed is None:
        raise ValueError(
            "training.precision=bf16 needs DeepSpeed, which keeps float32 master weights; give --deepspeed ds_configs/zero2.json "
            "or set training.precision=fp32"
        )


def checkpoint_to_resume(config: RunConfig, output: Path, resume: str) -> Path | None:
    """Returns the checkpoint to resume from, checked, or None for a new run."""
    check_writable(output, "--output")
    finish_replacements(output)
    if resume == "auto":
        checkpoint = newest_undamaged(output)
    elif resume == "never":
        checkpoint = None
        if (newest := newest_checkpoint(output)) is not None:
            raise ValueError(
                f"--resume never: expected an output folder without checkpoints, got {newest}; give another --output"
            )
    else:
        checkpoint = Path(resume)
        if not (checkpoint / STATE_FILE).is_file():
            raise ValueError(
                f"--resume {resume}: expected `auto`, `never` or a folder checkpoint-STEP of a run, got a path without "
                f"{STATE_FILE} (`best` has no optimizer state)"
            )
        check_files(checkpoint, "--resume ", to_resume=True)
    if checkpoint is not None:
        check_same_run(checkpoint, config)
        logger.info("resuming from %s", checkpoint)
    return checkpoint


def announced_ranks() -> int:
    """Returns the number of ranks that the launcher announces in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks(*, uses_deepspeed: bool, hang_seconds: float = 0) -> None:
    """Creates the process group: NCCL on GPUs, gloo on CPUs.

    Args:
        uses_deepspeed: whether DeepSpeed creates it.
        hang_seconds: of the config; the group itself waits twice as long, so that the watchdog can name the rank first.
    """
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # two ranks that share the same cores are five times slower otherwise (2 cores)
    if torch.cuda.is_available():  # before the first collective, which uses the current GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=max(_COLLECTIVE_SECONDS, 2 * hang_seconds))
    if uses_deepspeed:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns if it has to find out
        import deepspeed  # takes seconds, and runs without it are common in tests
        from deepspeed.ops import __compatible_ops__

        if not torch.cuda.is_available():
            __compatible_ops__["deepspeed_shm_comm"] = False  # DeepSpeed would compile it at the first start
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    elif announced_ranks() > 1 and not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout)


def leave_ranks() -> None:
    """Destroys the process group. Without it, about 3 % of finished runs aborted at exit (measured with gloo)."""
    if dist.is_initialized():
        dist.destroy_process_group()
