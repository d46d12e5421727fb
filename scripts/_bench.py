"""Imported by benches: two ways of computing the same thing, run in turn, compared, and set side by side in a table.

CPU seconds are those of the process: other work on the machine disturbs them least. The best run of each side counts, since
disturbances only ever add.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """The same result in a plain way and in ours."""

    name: str
    plain_seconds: float  # CPU
    our_seconds: float  # CPU
    difference: float  # largest, relative to the largest value of each result

    @property
    def ratio(self) -> float:
        return self.plain_seconds / max(self.our_seconds, 1e-9)


def compare(
    name: str,
    plain: Callable[[], Sequence[Tensor]],
    ours: Callable[[], Sequence[Tensor]],
    *,
    repeats: int,
    tolerance: float,
) -> Comparison:
    """Runs both in turn.

    Args:
        name: of the row.
        plain: gives results of any kind and number.
        ours: gives the same.
        repeats: runs of each, at least 1.
        tolerance: how far results may be apart, relative to the largest value of each.

    Raises:
        AssertionError: the results differ.
    """
    seconds: dict[Callable[[], Sequence[Tensor]], float] = {}
    results: list[Sequence[Tensor]] = []
    for _ in range(repeats):
        for side in (plain, ours):
            start = time.process_time()
            results = [*results, side()][:2]
            seconds[side] = min(seconds.get(side, float("inf")), time.process_time() - start)
    expected, found = results[:2]
    difference = 0.0
    for reference, got in zip(expected, found, strict=True):
        assert got.shape == reference.shape, f"{name}: results of shapes {list(reference.shape)} and {list(got.shape)}"
        if reference.numel():
            reference, got = reference.detach().float(), got.detach().float()
            largest = max(float(reference.abs().max()), 1e-12)
            difference = max(difference, float((got - reference).abs().max()) / largest)
    assert difference <= tolerance, f"{name}: results differ by {difference:.1e} of their largest value"
    return Comparison(name, seconds[plain], seconds[ours], difference)


def comparison_table(title: str, rows: Sequence[Comparison]) -> Table:
    """The rows with their ratios."""
    right = [Column(name, justify="right") for name in ("plain CPU ms", "ours CPU ms", "ratio", "differ by at most")]
    table = Table("", *right, title=title)
    for row in rows:
        times = (f"{1e3 * row.plain_seconds:.1f}", f"{1e3 * row.our_seconds:.1f}")
        table.add_row(row.name, *times, f"{row.ratio:.2f}", f"{row.difference:.0e}" if row.difference else "0")
    return table


def bench_console() -> Console:
    """A console as wide as the tables."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def machine(*packages: str) -> str:
    """Processor, threads and versions, for the record."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.machine()} {model}, {torch.get_num_threads()} thread(s), {versions}"
