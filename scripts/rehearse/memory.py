"""Runs a command and watches the memory of all its processes."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_SECONDS = 0.5
_FIELDS = re.compile(r"^(VmHWM|RssAnon):\s+(\d+) kB", re.MULTILINE)


@dataclass
class Peak:
    """The most memory that the processes of a command used, in bytes."""

    resident: int = 0  # of one process, with the files that it maps: the kernel drops those when memory is short
    private: int = 0  # of one process, without files
    all_private: int = 0  # of all processes at one time

    def add(self, statuses: Sequence[Mapping[str, int]]) -> None:
        """Takes in what /proc/PID/status says of each process at one time."""
        self.resident = max([self.resident, *(status.get("VmHWM", 0) for status in statuses)])
        private = [status.get("RssAnon", 0) for status in statuses]
        self.private = max([self.private, *private])
        self.all_private = max(self.all_private, sum(private))


@dataclass(frozen=True)
class Measured:
    """How a command ended."""

    status: int
    output: str  # stdout
    seconds: float
    peak: Peak


def measured(command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> Measured:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        environment: variables beside those of this process.
        log: file to which stderr is appended.
    """
    start, peak = time.monotonic(), Peak()
    output = log.with_suffix(".out")
    with log.open("a") as errors, output.open("w") as out:
        process = psutil.Popen(command, env={**os.environ, **environment}, stdout=out, stderr=errors)
        while True:
            try:
                process.wait(POLL_SECONDS)
                break
            except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
                peak.add([_status(child.pid) for child in (process, *process.children(recursive=True))])
    return Measured(process.returncode, output.read_text(), time.monotonic() - start, peak)


def _status(pid: int) -> dict[str, int]:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return {}
    return {name: 1024 * int(value) for name, value in _FIELDS.findall(text)}
