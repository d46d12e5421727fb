"""Imported by benches: two ways of computing the same thing, run in turn, compared, and set side by side in a table.

CPU seconds are those of the process: other work on the machine disturbs them least. On a GPU it is wall time, from an idle
device until it has finished. The best run of each side counts, since disturbances only ever add.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """The same result in a plain way and in ours."""

    name: str
    plain_seconds: float  # CPU; wall on a GPU
    our_seconds: float  # the same
    difference: float  # largest, relative to the largest value of each result

    @property
    def ratio(self) -> float:
        return self.plain_seconds / max(self.our_seconds, 1e-9)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """`--device`, read by `chosen_device`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default cpu)")


def chosen_device(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> torch.device:
    """Checks `--device`; float32 is float32 from here on, so that results can be compared: no TF32."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA GPU, found none; leave it out to run on the CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(arguments.device)


def time_unit(device: torch.device) -> str:
    """For headers: what `timed` measures there, in milliseconds."""
    return "GPU wall ms" if device.type == "cuda" else "CPU ms"


def timed(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of a run, and what it gives."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    result = run()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start, result


def compare(
    name: str,
    plain: Callable[[], Sequence[Tensor]],
    ours: Callable[[], Sequence[Tensor]],
    *,
    repeats: int,
    tolerance: float,
    device: torch.device = CPU,
) -> Comparison:
    """Runs both in turn; on a GPU once more before, so that what is set up or compiled at the first call does not count.

    Args:
        name: of the row.
        plain: gives results of any kind and number.
        ours: gives the same.
        repeats: runs of each, at least 1.
        tolerance: how far results may be apart, relative to the largest value of each.
        device: where they run.

    Raises:
        AssertionError: the results differ.
    """
    if device.type == "cuda":
        plain(), ours()
    seconds: dict[Callable[[], Sequence[Tensor]], float] = {}
    results: list[Sequence[Tensor]] = []
    for _ in range(repeats):
        for side in (plain, ours):
            spent, result = timed(side, device)
            results = [*results, result][:2]
            seconds[side] = min(seconds.get(side, float("inf")), spent)
    expected, found = results[:2]
    difference = 0.0
    for reference, got in zip(expected, found, strict=True):
        assert got.shape == reference.shape, f"{name}: results of shapes {list(reference.shape)} and {list(got.shape)}"
        if reference.numel():
            reference, got = (tensor.detach().float().cpu() for tensor in (reference, got))
            largest = max(float(reference.abs().max()), 1e-12)
            difference = max(difference, float((got - reference).abs().max()) / largest)
    assert difference <= tolerance, f"{name}: results differ by {difference:.1e} of their largest value"
    return Comparison(name, seconds[plain], seconds[ours], difference)


def comparison_table(title: str, rows: Sequence[Comparison], *, device: torch.device = CPU) -> Table:
    """The rows with their ratios."""
    unit = time_unit(device)
    right = [Column(name, justify="right") for name in (f"plain {unit}", f"ours {unit}", "ratio", "differ by at most")]
    table = Table("", *right, title=title)
    for row in rows:
        times = (f"{1e3 * row.plain_seconds:.1f}", f"{1e3 * row.our_seconds:.1f}")
        table.add_row(row.name, *times, f"{row.ratio:.2f}", f"{row.difference:.0e}" if row.difference else "0")
    return table


def bench_console() -> Console:
    """A console as wide as the tables."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def device_name(device: torch.device) -> str:
    """Of a GPU; a CPU says that it is one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU (says nothing about a GPU)"


def machine(*packages: str) -> str:
    """Processor, threads and versions, for the record."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.machine()} {model}, {torch.get_num_threads()} thread(s), {versions}"
