"""What commands say while they work: log lines on stderr, without messages of libraries that look like errors and are none."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from deris_llm.common.words import printable

_CLOCK = "%H:%M:%S"


class _Lines(logging.Formatter):
    """Our own progress as time and sentence; warnings, and whatever else a library logs, with level and origin.

    Control characters of names are escaped.
    """

    def __init__(self, rank: int) -> None:
        who = f"rank {rank}: " if rank else ""
        super().__init__(f"%(asctime)s {who}%(levelname)s %(name)s: %(message)s", _CLOCK)
        self._progress = logging.Formatter(f"%(asctime)s {who}%(message)s", _CLOCK)

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        is_progress = record.levelno == logging.INFO and record.name.startswith("deris_llm")
        if not is_progress:
            return printable(super().format(record))
        return printable(self._progress.format(record)).replace("\n", "\n" + " " * len("00:00:00 "))


def log_to_stderr(*, rank: int = 0, quiet: bool = False) -> None:
    """Logs to stderr: progress and warnings on rank 0, warnings on the other ranks, only errors if ``quiet``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(rank))
    handler.setLevel(logging.ERROR if quiet else logging.WARNING if rank else logging.INFO)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("deris_llm").setLevel(logging.INFO)
    if quiet:
        warnings.simplefilter("ignore")


def quiet_libraries() -> None:
    """Silences, one by one, messages of libraries that call for no action. Called before those libraries are imported."""
    # Bars of downloads and weights appear when they last: tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DELAY", "5")
    # DeepSpeed calls collectives by the names that they had before torch 2.15.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", FutureWarning)
    # The Trainer gives accelerate 1 and DeepSpeed training.accumulation, on purpose: DeepSpeed accumulates.
    logging.getLogger("accelerate.accelerator").addFilter(_is_no_accumulation_mismatch)


def _is_no_accumulation_mismatch(record: logging.LogRecord) -> bool:
    return "Gradient accumulation steps mismatch" not in record.getMessage()
