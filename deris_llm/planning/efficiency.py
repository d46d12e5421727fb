"""Efficiency: multiply-accumulates (counted) and milliseconds (measured) of a phrase, and the operations of a training run.

The columns are those of the paper's Table 11 (MACs, parameters, inference ms). Phrases of an image share what depends on
the image alone, so a phrase costs less the more phrases an image has; costs of one phrase and of several are both given.
All counts are from shapes.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch.utils.flop_counter import FlopCounterMode

from deris_llm.config import RunConfig
from deris_llm.models.cpu_inference import for_cpu_inference, linear_times
from deris_llm.models.deris import Deris, build_model
from deris_llm.planning.plan import (
    RunPlan,
    ShapeSimulation,
    plan_cognition,
    shape_batch,
    sum_of_outputs,
    within_token_limit,
)
from deris_llm.structures import ReferringBatch

PHRASES_PER_IMAGE = 7  # RefCOCO val has 7.2
PAPER_TABLE_11 = {1: (37.0, 230.9, 22.5), 3: (37.1, 235.9, 23.4), 5: (37.2, 240.9, 23.9)}
"""DeRIS-B by number of rounds: MACs (G), parameters (M), inference (ms, on the authors' GPU)."""
PEAKS = {"H100": 989, "H200": 989, "H800": 989, "L40S": 362, "A100": 312, "A800": 312, "RTX 4090": 165, "A10": 125}
"""Dense bf16 peak of GPUs in TFLOP/s, from the vendor's data sheets."""
UTILISATIONS = (0.2, 0.3, 0.4)
"""MFU (operations of the model without recomputation, over time and peak) for which `plan` estimates the hours of a run."""
_ROOM = 1.3  # memory that running a model needs, relative to its weights


@dataclass(frozen=True)
class PartCost:
    """Multiply-accumulates per phrase in one part of the model."""

    name: str
    alone: int  # of an image with one phrase
    together: float  # of an image with `Efficiency.phrases` phrases, divided by their number


@dataclass(frozen=True)
class Measurement:
    """Milliseconds per phrase on this machine, with random weights, from tensors to tensors."""

    machine: str
    alone_ms: float
    together_ms: float
    repeats: int


@dataclass(frozen=True)
class Efficiency:
    """The efficiency table of a run."""

    phrases: int
    parameters: int
    parts: tuple[PartCost, ...]  # matrix products and convolutions; attention counts in full, masked or not
    measured: Measurement | None = None
    not_measured: str = ""  # the reason, if a measurement was requested but not made
    paper: tuple[float, float, float] | None = None  # MACs (G), parameters (M), ms of the same model in the paper

    @property
    def alone(self) -> int:
        """MACs of an image with one phrase."""
        return sum(part.alone for part in self.parts)

    @property
    def together(self) -> float:
        """MACs per phrase of an image with `phrases` phrases."""
        return sum(part.together for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"alone": self.alone, "together": self.together}


def efficiency_of(
    config: RunConfig,
    *,
    phrases: int = PHRASES_PER_IMAGE,
    measure: bool = False,
    repeats: int = 5,
    model: Deris | None = None,
) -> Efficiency:
    """Counts, and measures on request, the forward pass of one image.

    Args:
        config: the run; no weights are read.
        phrases: number of phrases that share an image.
        measure: also time it on this machine, on its GPU if there is one, unless memory is too small.
        repeats: timed runs; the fastest counts, because other load only adds time.
        model: from `model_to_count`; None builds it.
    """
    model = (model or model_to_count(config)).eval()
    runs = [_one_image(config, number) for number in (1, phrases)]
    alone, together = (count_macs(model, shape_batch(run, plan_cognition(run))) for run in runs)
    parts = tuple(PartCost(name, macs, together[name] / phrases) for name, macs in alone.items())
    bytes_of_weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found = Efficiency(
        phrases=phrases,
        parameters=sum(p.numel() for p in model.parameters()),
        parts=parts,
        paper=paper_numbers(config),
    )
    if not measure:
        return found
    room = _free_memory()
    if bytes_of_weights * _ROOM > room:
        needed = f"{bytes_of_weights * _ROOM / 2**30:.1f} GiB"
        return dataclasses.replace(
            found, not_measured=f"it needs about {needed}, {room / 2**30:.1f} GiB are free on {_machine()}"
        )
    return dataclasses.replace(found, measured=_measured(config, phrases, repeats))


def paper_numbers(config: RunConfig) -> tuple[float, float, float] | None:
    """Returns MACs (G), parameters (M) and inference (ms) of the paper's Table 11 if this run is a DeRIS-B."""
    is_deris_b = config.cognition.backend == "beit3" and Path(config.cognition.weights).name.startswith("beit3-base")
    return PAPER_TABLE_11.get(config.loopback.rounds) if is_deris_b else None


def _one_image(config: RunConfig, phrases: int) -> RunConfig:
    data = dataclasses.replace(config.data, phrases_per_image=phrases, max_tokens_per_image=0)
    return dataclasses.replace(config, data=data, training=dataclasses.replace(config.training, images_per_device=1))


def count_macs(model: Deris, batch: ReferringBatch) -> dict[str, int]:
    """Counts the multiply-accumulates of a forward pass by part.

    Args:
        model: in evaluation mode; on the meta device or real.
        batch: from `shape_batch`, or a real one.
    """
    simulation, counter = ShapeSimulation(), FlopCounterMode(display=False)  # the second one for a real model
    on_meta = next(model.parameters()).is_meta
    flops: dict[str, int] = {}

    def count(name: str, sign: int) -> Callable[..., None]:
        def add(*_: Any) -> None:
            total = simulation.flops if on_meta else counter.get_total_flops()
            flops[name] = flops.get(name, 0) + sign * total

        return add

    parts = {name: model.get_submodule(name) for name in _part_names(model)} | {"": model}
    hooks = [part.register_forward_pre_hook(count(name, -1)) for name, part in parts.items()]
    hooks += [part.register_forward_hook(count(name, 1)) for name, part in parts.items()]
    try:
        with torch.no_grad(), simulation if on_meta else counter:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    rest = flops.pop("") // 2
    found = {name.replace(".model.", "."): number // 2 for name, number in flops.items() if number}
    rest -= sum(found.values())
    return found | ({"rest": rest} if rest else {})


def training_flops(config: RunConfig, *, model: Deris | None = None) -> int:
    """Counts the floating-point operations of one micro-batch, forward and backward, without the loss and recomputation.

    Args:
        config: the run; no weights are read.
        model: from `model_to_count`; None builds it.
    """
    model = (model or model_to_count(config)).train()
    batch = shape_batch(config, plan_cognition(config))
    with ShapeSimulation() as simulation:
        sum_of_outputs(model(batch)).backward()
    return simulation.flops


def model_to_count(config: RunConfig) -> Deris:
    """Builds the model of a run on the meta device, without recomputation in its backward pass."""
    cognition = dataclasses.replace(config.cognition, gradient_checkpointing=False)
    perception = dataclasses.replace(config.perception, activation_checkpointing=False)
    config = dataclasses.replace(config, cognition=cognition, perception=perception)
    return build_model(config, weights=False, device="meta")


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a whole training run."""

    images: int  # shown; an image counts as often as it is shown
    phrases_per_image: float  # mean
    flops: float  # forward and backward
    flops_with_repeats: float  # including recomputation
    flops_one_by_one: float  # of the same phrases with `data.phrases_per_image=1`, without recomputation
    gpus: int

    @property
    def ratio(self) -> float:
        """Operations of one phrase at a time, relative to these."""
        return self.flops_one_by_one / self.flops

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"ratio": self.ratio}


def work_of_run(config: RunConfig, plan: RunPlan, *, model: Deris | None = None) -> Work:
    """Counts a whole run: an image with the mean number of phrases, times the images of all steps.

    Operations grow linearly with the phrases of an image (DeRIS-7B, 1 to 4 phrases: within 3e-5), so two counts give those
    of the mean. Recomputation is a constant share of them (within 1e-4).

    Args:
        config: the run.
        plan: of the same run.
        model: from `model_to_count`; None builds it.
    """
    most = within_token_limit(config).data.phrases_per_image
    mean = plan.epoch.phrases / plan.epoch.images
    images = plan.epoch.total_steps * plan.images_per_device * config.training.accumulation * plan.gpus
    full = _one_image(config, most)
    model = model or model_to_count(config)
    alone = together = training_flops(_one_image(config, 1), model=model)
    flops = float(alone)
    if most > 1:
        together = training_flops(full, model=model)
        flops = alone + (together - alone) * (mean - 1) / (most - 1)
    repeats = config.cognition.gradient_checkpointing or config.perception.activation_checkpointing
    share = plan.step_flops / (plan.images_per_device * together) if repeats else 1.0
    return Work(images, mean, images * flops, images * flops * share, images * mean * alone, plan.gpus)


def run_hours(flops: float, peak_tflops: float, utilisation: float, gpus: int) -> float:
    """Computes hours from operations, peak and MFU."""
    return flops / (peak_tflops * 1e12 * utilisation * gpus) / 3600


def _part_names(model: Deris) -> Iterator[str]:
    """Yields the names of the modules that the table lists."""
    inner = getattr(model.cognition, "model", None)
    if inner is None or not any(True for _ in inner.named_children()):
        yield "cognition"
    else:
        yield from (f"cognition.model.{name}" for name, _ in inner.named_children())
    if model.perception is not None:
        yield from (f"perception.{name}" for name, _ in model.perception.named_children())
    yield "loopback"


def _measured(config: RunConfig, phrases: int, repeats: int) -> Measurement:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":  # as `deris-llm eval` does
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision="fp32"))
    model = for_cpu_inference(build_model(config, weights=False, device=device).eval())
    seconds = {number: min(_run_seconds(model, config, number, repeats, device)) for number in (1, phrases)}
    return Measurement(_machine(), 1e3 * seconds[1], 1e3 * seconds[phrases] / phrases, repeats)


@torch.inference_mode()
def _run_seconds(
    model: torch.nn.Module, config: RunConfig, phrases: int, repeats: int, device: torch.device
) -> Iterator[float]:
    config = _one_image(config, phrases)
    shapes = shape_batch(config, plan_cognition(config))
    dtype = next(model.parameters()).dtype
    cognition = dataclasses.replace(shapes.cognition, pixel_values=torch.randn(shapes.cognition.pixel_values.shape))
    image = torch.randn(shapes.perception_image.shape)
    batch = dataclasses.replace(shapes, perception_image=image, cognition=cognition).to(device, dtype=dtype)
    for number in range(repeats + 1):
        start = time.perf_counter()
        model(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:  # the first one warms up
            yield time.perf_counter() - start


def _free_memory() -> int:
    """Bytes."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    if info.is_file():  # counts the memory of caches as free
        lines = info.read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {cpu_name()}, {torch.get_num_threads()} thread(s), linear layers through {linear_times().library}"


def cpu_name() -> str:
    """Returns the name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show_efficiency(found: Efficiency, console: Console) -> None:
    """Prints the table."""
    columns = ("one phrase", f"of {found.phrases} together", "ratio")
    table = Table(
        "per phrase", *(Column(name, justify="right") for name in columns), title="efficiency at test, GMACs counted"
    )
    for part in found.parts:
        table.add_row(part.name, *_cells(part.alone / 1e9, part.together / 1e9))
    table.add_section()
    table.add_row("all", *_cells(found.alone / 1e9, found.together / 1e9), style="bold")
    if found.measured is not None:
        table.add_row("measured, ms", *_cells(found.measured.alone_ms, found.measured.together_ms), style="bold")
    console.print(table)
    said = [
        f"{found.parameters / 1e6:,.1f} M parameters. Multiply-accumulates of matrix products and convolutions, from shapes, for a "
        "typical phrase."
    ]
    if found.measured is not None:
        said.append(
            f"measured on {found.measured.machine}: random weights, best of {found.measured.repeats}, without loading."
        )
    if found.not_measured:
        said.append(f"not measured: {found.not_measured}.")
    if found.paper is not None:
        macs, parameters, milliseconds = found.paper
        said.append(
            f"the paper (Table 11, DeRIS-B): {macs} GMACs, {parameters} M, {milliseconds} ms on its GPU; it does not say how it counts."
        )
    console.print("\n".join(said) + "\n", highlight=False)


def _cells(alone: float, together: float) -> tuple[str, str, str]:
    return f"{alone:,.2f}", f"{together:,.2f}", f"{alone / together:.2f}" if together else ""


def show_work(work: Work, console: Console) -> None:
    """Prints how long the run takes by GPU and MFU."""
    several = f" / {work.gpus} GPUs" if work.gpus > 1 else ""
    columns = ("TFLOP/s", *(f"{share:.0%}" for share in UTILISATIONS))
    table = Table(
        "GPU", *(Column(name, justify="right") for name in columns), title=f"hours of the run on 1 GPU{several}, by MFU"
    )
    by_peak: dict[int, list[str]] = {}
    for name, peak in PEAKS.items():
        by_peak.setdefault(peak, []).append(name)
    kinds = {
        f"{work.phrases_per_image:.2f} phrases an image": work.flops,
        "one phrase at a time": work.flops_one_by_one,
    }
    for title, flops in kinds.items():
        table.add_section()
        table.add_row(title, style="bold")
        for peak, names in by_peak.items():
            hours = [[run_hours(flops, peak, share, n) for n in sorted({1, work.gpus})] for share in UTILISATIONS]
            table.add_row(", ".join(names), str(peak), *(" / ".join(map(_short, numbers)) for numbers in hours))
    console.print(table)
    with_repeats = f" ({_flop(work.flops_with_repeats)} with recomputation)"
    console.print(
        f"the whole run: {work.images:,} images shown with {work.phrases_per_image:.2f} phrases each, {_flop(work.flops)}"
        f"{with_repeats if work.flops_with_repeats > work.flops else ''}; the same phrases one at a time "
        f"{_flop(work.flops_one_by_one)}: {work.ratio:.2f} times as much.\n"
        "Hours are computed, not measured: operations without recomputation / (dense bf16 peak of the data sheets x MFU x GPUs). "
        "Loading, evaluation and communication between GPUs are not included. scripts/bench/deris_7b.py measures a GPU's MFU.\n",
        highlight=False,
    )


def _short(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"


def _flop(number: float) -> str:
    unit, size = next(
        (u, s) for u, s in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)) if number >= s or s == 1e12
    )
    return f"{number / size:,.2f} {unit}"
