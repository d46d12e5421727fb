"""Starts the ranks of an evaluation on this machine and reports once why they failed."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deris_llm.common.error_file import QUIET

_NO_MESSAGE = "<NONE>"  # torch's value for a rank that left no message


def run_on_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Runs `deris-llm ARGUMENTS` on several ranks, as torchrun does, without torchrun's own traceback.

    Args:
        arguments: of the command line; each rank learns its number from the environment.
        ranks: processes.

    Returns:
        the exit status: 0, or that of a rank that failed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[QUIET] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it names processes, not reasons
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, max_restarts=0,
        run_id=str(uuid.uuid4()), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    sys.stdout.flush()
    try:
        elastic_launch(config, sys.executable)("-m", "deris_llm.cli.main", *arguments)
    except SignalException as error:
        sys.stderr.write("interrupted\n")
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        return _said(error)
    finally:
        del os.environ[QUIET]
    return 0


def _said(error: ChildFailedError) -> int:
    """Prints why the ranks failed: a rank's own message, or how one ended."""
    # The launcher ends the other ranks with SIGTERM as soon as one fails: they are listed last.
    failures = sorted(error.failures.items(), key=lambda each: (each[1].exitcode == -signal.SIGTERM, each[0]))
    told = [each for _, each in failures if each.error_file_data.get("message", _NO_MESSAGE) != _NO_MESSAGE]
    if told:
        sys.stderr.write(f"{told[0].message}\n(`deris-llm --debug ...` shows where)\n")
        return told[0].exitcode if told[0].exitcode > 0 else 2  # it left a message and was ended before it could exit
    rank, failure = failures[0]
    if failure.exitcode < 0:
        sys.stderr.write(
            f"error: evaluation: expected the ranks to finish, got rank {rank} ended by {failure.signal_name()}. Where that is "
            "SIGKILL, the system ends what exceeds the machine's memory: lower --gpus or evaluation.images_per_device\n"
        )
        return 128 - failure.exitcode
    sys.stderr.write(f"error: evaluation: rank {rank} ended with status {failure.exitcode}; its message is above\n")
    return failure.exitcode
