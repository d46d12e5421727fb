"""Ends a run in which nothing moves any more, and names the rank and the step that stopped (`training.hang_seconds`).

A rank that is stopped, that waits for a dead disk or whose GPU hangs leaves the others waiting in a collective, at full price.
Every rank has two threads: one writes a sign of life and the rank's progress into OUTPUT/.ranks/ several times within the limit,
the other compares. Progress counts forward passes and the stages of a step; the rank with the least has stopped. A limit counts
only while this process runs, so a run that is suspended as a whole and continued is not ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deris_llm.checkpoints.layout import newest_checkpoint
from deris_llm.common.error_file import HUNG, write_error_file

logger = logging.getLogger(__name__)

_FOLDER = ".ranks"
_MOST_SECONDS_BETWEEN_SIGNS = 15.0
_SECONDS_TO_LOOK = 30.0  # for reading the other ranks' signs
_SIGNS_TO_MISS = 4  # a rank without a new sign for so long is not running


class _Sign(NamedTuple):
    """What a rank says of itself."""

    beat: int  # counts signs of life
    ticks: int  # counts progress
    doing: str
    where: str  # process and machine


class Watchdog:
    """Watches one rank and, through the output folder, the others, from the first `tick` on.

    Args:
        output: run folder, which all ranks see; where they do not, other machines' ranks count as silent.
        seconds: without progress, after which the run ends; 0 watches nothing.
        rank: of this process.
        num_ranks: their number.
    """

    def __init__(self, output: Path, seconds: float, *, rank: int, num_ranks: int) -> None:
        self._output = output
        self._seconds = seconds
        self._rank = rank
        self._num_ranks = num_ranks
        self._between = min(seconds / 20, _MOST_SECONDS_BETWEEN_SIGNS)
        self._ticks = self._beat = 0
        self._doing = "starting"
        self._is_over = threading.Event()

    def tick(self, doing: str | None = None) -> None:
        """Notes progress, and what comes next unless it is the same. Cheap: two assignments."""
        self._ticks += 1
        self._doing = doing or self._doing

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches inside the block."""
        if not self._seconds:
            yield
            return
        threads = [threading.Thread(target=each, daemon=True) for each in (self._show_signs, self._compare)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            threads[0].join(1.0)  # not longer: its disk may be the one that hangs
            with contextlib.suppress(OSError):
                self._file(self._rank).unlink()
                self._file(self._rank).parent.rmdir()  # by the last rank

    def _file(self, rank: int) -> Path:
        return self._output / _FOLDER / f"{rank}.json"

    def _show_signs(self) -> None:
        where = f"process {os.getpid()} on {socket.gethostname()}"
        while not self._is_over.is_set():
            self._beat += 1
            with contextlib.suppress(OSError):
                self._file(self._rank).parent.mkdir(exist_ok=True)
                aside = self._file(self._rank).with_suffix(".part")
                aside.write_text(json.dumps(_Sign(self._beat, self._ticks, self._doing, where)))
                os.replace(aside, self._file(self._rank))
            self._is_over.wait(self._between)

    def _compare(self) -> None:
        ticks, waited = self._ticks, 0.0
        while not self._is_over.wait(
            self._between
        ):  # this process's own time: it stands still while the process is stopped
            is_still = self._ticks and ticks == self._ticks  # before the first step, the engine and the loaders start
            waited = waited + self._between if is_still else 0.0
            ticks = self._ticks
            if waited < self._seconds:
                continue
            found: list[str] = []
            # Reading may hang on the disk that everything waits for.
            looking = threading.Thread(target=self._look, args=(found,), daemon=True)
            looking.start()
            looking.join(self._between * _SIGNS_TO_MISS + _SECONDS_TO_LOOK)
            if ticks == self._ticks and not self._is_over.is_set():
                self._end(found[0] if found else f"  - the ranks' signs in {self._output / _FOLDER} cannot be read")
            waited = 0.0

    def _look(self, found: list[str]) -> None:
        before = self._signs()
        self._is_over.wait(self._between * _SIGNS_TO_MISS)
        with contextlib.suppress(OSError), (self._output / f"hang-rank-{self._rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        found.append("\n".join(_described(before, self._signs())))

    def _signs(self) -> list[_Sign | None]:
        return [_read(self._file(rank)) for rank in range(self._num_ranks)]

    def _end(self, findings: str) -> None:
        newest = newest_checkpoint(self._output)
        message = (
            f"{self._doing}: expected progress within {self._seconds:g} s (training.hang_seconds), got none; the run was ended\n"
            f"{findings}\n"
            f"Look at that process and its machine (a stopped process, a full or dead disk, nvidia-smi, dmesg); hang-rank-*.txt in "
            f"{self._output} hold where each waiting rank stood. Then run the same command again: it resumes from "
            f"{newest or 'the beginning, as no step was saved'}. If a step or an evaluation really takes longer, raise "
            "training.hang_seconds"
        )
        if write_error_file(message):
            sys.stderr.write(f"\nrank {self._rank}: error: {message}\n")
            sys.stderr.flush()
        os._exit(HUNG)  # the main thread waits, perhaps in a library that never returns


def _read(file: Path) -> _Sign | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        content: list[Any] = json.loads(file.read_text())
        return _Sign(*content)
    return None


def _described(before: Sequence[_Sign | None], now: Sequence[_Sign | None]) -> list[str]:
    """Says of each rank what it does; those that have stopped come first."""
    silent = [
        sign is None or (then is not None and sign.beat == then.beat) for then, sign in zip(before, now, strict=True)
    ]
    least = min((sign.ticks for sign, is_silent in zip(now, silent, strict=True) if sign and not is_silent), default=0)
    are_level = all(sign is None or sign.ticks == least for sign in now)
    stopped: list[str] = []
    others: list[str] = []
    for rank, (sign, is_silent) in enumerate(zip(now, silent, strict=True)):
        if is_silent:
            last = f"{sign.where}; last seen {sign.doing}" if sign else "it left no sign in the output folder"
            stopped.append(f"  - rank {rank} does not run ({last})")
        elif sign is not None and sign.ticks == least and not any(silent) and not are_level:
            stopped.append(f"  - rank {rank} has stopped {sign.doing} ({sign.where})")
        elif sign is not None:
            others.append(f"  - rank {rank} waits {sign.doing} ({sign.where})")
    return stopped + others
