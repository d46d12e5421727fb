#!/usr/bin/env python
"""DeRIS-7B at its true shape with random weights: speed in training and at test, MFU, peak memory, and what costs most.

    python scripts/bench/deris_7b.py                            K = 1, 4, 7, 12 phrases of a picture, one GPU
    python scripts/bench/deris_7b.py --profile                  also where a training step's time goes: parts, largest operators
    python scripts/bench/deris_7b.py --budget-gib 24            also which settings fit a GPU of that size with one image
    python scripts/bench/deris_7b.py --set cognition.quantization=nf4
    python scripts/bench/deris_7b.py --tiny                     the same program at tiny size, on a CPU too: it says nothing about a 7B

A training step is forward, loss, backward, clipping and optimizer on one micro-batch of `training.images_per_device` pictures
with K phrases each; under DeepSpeed float32 master weights of what trains come on top (`deris-llm plan` counts them). MFU
is the step's floating-point operations without recomputation, counted from shapes, over its time and the GPU's dense bf16
peak. Pictures and phrases are tensors already: loading has its own bench.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _bench import bench_console, device_name, machine
from rich.console import Console
from rich.table import Column, Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.hooks import RemovableHandle
from transformers import AutoModel, AutoModelForUniversalSegmentation

from deris_llm.config import RunConfig, load_config
from deris_llm.losses.criterion import build_criterion
from deris_llm.models.deris import Deris, build_model
from deris_llm.models.pretrained import architecture_of
from deris_llm.planning.efficiency import PEAKS, training_flops
from deris_llm.planning.plan import GIB, plan_cognition, plan_run, shape_batch
from deris_llm.structures import ReferringBatch, ReferringTargets
from deris_llm.training.optimizer import build_optimizer

FORWARD = "forward pass"  # a phase of a step; its parts are told apart
SETTINGS = (
    ("plain", "cognition.gradient_checkpointing=false", "cognition.quantization=none"),
    ("checkpointing", "cognition.gradient_checkpointing=true", "cognition.quantization=none"),
    (
        "checkpointing, pixel decoder too",
        "cognition.gradient_checkpointing=true",
        "perception.activation_checkpointing=true",
    ),
    ("checkpointing, nf4", "cognition.gradient_checkpointing=true", "cognition.quantization=nf4"),
)


@dataclass(frozen=True)
class Speed:
    """One row of the main table."""

    phrases: int  # K
    inference_seconds: float  # of a picture with K phrases
    step_seconds: float
    flops: int  # of a step, without recomputation
    peak_bytes: int | None  # of a training step; None on a CPU, where nobody counts them


def phrases_of_picture(config: RunConfig, phrases: int) -> RunConfig:
    """The run with K phrases of each picture in a micro-batch."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, phrases_per_image=phrases))


def build(config: RunConfig, device: torch.device) -> Deris:
    """The model with drawn weights; those in 4 bits are packed as a run packs them, from files that are read."""
    torch.manual_seed(0)
    if config.cognition.quantization == "none":
        return build_model(config, weights=False, device=device)
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("cognition", config.cognition), ("perception", config.perception)):
            kind = AutoModel if name == "cognition" else AutoModelForUniversalSegmentation
            with device:
                drawn = kind.from_config(architecture_of(part.weights), dtype=torch.bfloat16)
            drawn.save_pretrained(Path(folder, name))
            del drawn
            free_memory()
        drawn_config = dataclasses.replace(
            config,
            cognition=dataclasses.replace(config.cognition, weights=f"{folder}/cognition"),
            perception=dataclasses.replace(config.perception, weights=f"{folder}/perception"),
        )
        return build_model(drawn_config, device=device)


def drawn_batch(config: RunConfig, device: torch.device) -> ReferringBatch:
    """A full micro-batch of noise pictures, typical prompts and a rectangle for each phrase."""
    generator = torch.Generator().manual_seed(0)
    shapes = shape_batch(config, plan_cognition(config))
    pixels = torch.randn(shapes.cognition.pixel_values.shape, generator=generator)
    size = config.perception.image_size
    masks = torch.zeros(shapes.num_phrases, size, size, dtype=torch.bool)
    for mask in masks:
        top, left = torch.randint(0, size // 2, (2,), generator=generator).tolist()
        mask[top : top + size // 3, left : left + size // 4] = True
    batch = dataclasses.replace(
        shapes,
        perception_image=torch.randn(shapes.perception_image.shape, generator=generator),
        cognition=dataclasses.replace(shapes.cognition, pixel_values=pixels),
        targets=ReferringTargets(masks, torch.arange(shapes.num_phrases)),
    )
    return batch.to(device, dtype=torch.bfloat16 if config.training.precision == "bf16" else None)


def training_step(
    model: Deris, config: RunConfig, batch: ReferringBatch, *, ended: Callable[[str], None] = lambda _: None
) -> Callable[[], None]:
    """Forward, loss, backward, clipping, optimizer; the optimizer's state lives as long as what is returned.

    Args:
        model: in training mode.
        config: of the run.
        batch: with targets.
        ended: told the name of each of these phases as it is over.
    """
    optimizer, criterion = build_optimizer(model, config), build_criterion(config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator(device=batch.image_index.device).manual_seed(0)
    assert batch.targets is not None
    targets = batch.targets

    def step() -> None:
        output = model(batch)
        ended(FORWARD)
        loss = criterion(output, targets, generator=generator).total
        ended("criterion")
        loss.backward()
        ended("backward pass")
        torch.nn.utils.clip_grad_norm_(trained, config.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ended("clipping, optimizer")

    return step


def best_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Wall time of a run, the best of the repeats, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def measure(model: Deris, config: RunConfig, device: torch.device, repeats: int) -> Speed:
    """One row: inference of one picture, then training steps."""
    one_picture = dataclasses.replace(config, training=dataclasses.replace(config.training, images_per_device=1))
    asked = drawn_batch(one_picture, device)
    with torch.inference_mode():
        inference = best_seconds(lambda: model.eval()(asked), device, repeats)
    free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = training_step(model.train(), config, drawn_batch(config, device))
    seconds = best_seconds(step, device, repeats)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return Speed(config.data.phrases_per_image, inference, seconds, training_flops(config), peak)


def show_speeds(config: RunConfig, rows: list[Speed], device: torch.device, repeats: int, console: Console) -> None:
    """The main table."""
    name, peak = device_name(device), peak_flops(device)
    columns = ("K", "inference ms per phrase", "training phrases/s", "step ms", "TFLOP a step", "MFU", "peak GiB")
    table = Table(
        *(Column(column, justify="right") for column in columns), title=f"{config.name} on {name}, best of {repeats}"
    )
    for row in rows:
        num_phrases = row.phrases * config.training.images_per_device
        table.add_row(
            str(row.phrases),
            f"{1e3 * row.inference_seconds / row.phrases:,.2f}",
            f"{num_phrases / row.step_seconds:,.1f}",
            f"{1e3 * row.step_seconds:,.1f}",
            f"{row.flops / 1e12:,.3f}",
            f"{row.flops / row.step_seconds / peak:.1%}" if peak else "-",
            f"{row.peak_bytes / GIB:.2f}" if row.peak_bytes is not None else "-",
        )
    console.print(table)


def show_largest_costs(
    model: Deris, config: RunConfig, device: torch.device, console: Console, *, number: int = 3
) -> None:
    """The operators of a training step in which most time goes."""
    step = training_step(model.train(), config, drawn_batch(config, device))
    step()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        step()
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events)
    right = [Column(column, justify="right") for column in ("ms", "share", "calls")]
    table = Table("operator", *right, title=f"largest costs of a training step, {device_name(device)}")
    for event in events[:number]:
        spent = getattr(event, attribute)
        table.add_row(event.key[:60], f"{spent / 1e3:,.1f}", f"{spent / total:.1%}", str(event.count))
    console.print(table)


def moment(device: torch.device) -> Any:
    """Now, on a GPU in the queue of its work: nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: Any, end: Any) -> float:
    """Between two moments that are over."""
    return start.elapsed_time(end) if isinstance(start, torch.cuda.Event) else 1e3 * (end - start)


def parts_of(model: Deris) -> dict[str, nn.Module]:
    """The parts that run in a forward pass, by name; those of the image-text model one by one."""
    inner = getattr(model.cognition, "model", model.cognition)
    found = {f"cognition.{name}": module for name, module in inner.named_children()}
    if model.perception is not None:
        found |= {f"perception.{name}": module for name, module in model.perception.named_children()}
    return found | {"loopback": model.loopback}


def time_by_part(model: Deris, config: RunConfig, device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds of the fastest of some training steps: the forward pass by part, all else by phase."""
    moments: list[tuple[str, Any]] = []
    spans: list[tuple[str, Any, Any]] = []
    step = training_step(
        model.train(), config, drawn_batch(config, device), ended=lambda name: moments.append((name, moment(device)))
    )

    def watch(name: str, part: nn.Module) -> list[RemovableHandle]:
        def enters(*_: object) -> None:
            if len(moments) == 1:  # not again in the backward pass, where checkpointing repeats it
                spans.append((name, moment(device), None))

        def leaves(*_: object) -> None:
            if len(moments) == 1:
                spans[-1] = (*spans[-1][:2], moment(device))

        return [part.register_forward_pre_hook(enters), part.register_forward_hook(leaves)]

    handles = [handle for name, part in parts_of(model).items() for handle in watch(name, part)]
    fastest: dict[str, float] = {}
    for number in range(repeats + 1):
        spans.clear()
        moments[:] = [("", moment(device))]
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found = {name: 0.0 for name, *_ in spans}
        for name, start, end in spans:
            found[name] += milliseconds(start, end)
        phases = {
            name: milliseconds(start, end) for (_, start), (name, end) in zip(moments[:-1], moments[1:], strict=True)
        }
        found["rest of the forward pass"] = phases.pop(FORWARD) - sum(found.values())
        found |= phases
        if number and (not fastest or sum(found.values()) < sum(fastest.values())):  # the first one warms up
            fastest = found
    for handle in handles:
        handle.remove()
    return fastest


def show_time_by_part(model: Deris, config: RunConfig, device: torch.device, repeats: int, console: Console) -> None:
    """Where a training step's time goes, in terms of our parts."""
    found = time_by_part(model, config, device, repeats)
    right = [Column(column, justify="right") for column in ("ms", "share")]
    title = f"a training step by part, K = {config.data.phrases_per_image}, {device_name(device)}, best of {repeats}"
    table = Table("part", *right, title=title)
    for name, spent in found.items():
        table.add_row(name, f"{spent:,.1f}", f"{spent / sum(found.values()):.1%}")
    console.print(table)


def show_settings(name: str, overrides: list[str], budget_gib: float, device: torch.device, console: Console) -> None:
    """Which settings fit a GPU of this size with one picture: planned everywhere, measured under that limit on a GPU."""
    right = [Column(column, justify="right") for column in ("planned GiB", "measured peak GiB", "fits")]
    table = Table("one picture a micro-batch", *right, title=f"{name} within {budget_gib:g} GiB")
    for label, *options in SETTINGS:
        config = load_config(name, [*overrides, *options, "training.images_per_device=1"])
        planned = plan_run(config, stages=("2",)).memory[0].total
        if device.type == "cuda":
            measured, fits = peak_under_limit(config, device, budget_gib)
        else:
            measured, fits = "-", "planned: yes" if planned < budget_gib * GIB else "planned: no"
        table.add_row(label, f"{planned / GIB:.2f}", measured, fits)
    console.print(table)


def peak_under_limit(config: RunConfig, device: torch.device, budget_gib: float) -> tuple[str, str]:
    """Peak of two training steps, allocations beyond the limit refused once the model is built; and whether they fit."""
    free_memory()
    model = build(config, device)
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(budget_gib * GIB / torch.cuda.get_device_properties(device).total_memory)
    try:
        step = training_step(model.train(), config, drawn_batch(config, device))
        step()
        step()
        return f"{torch.cuda.max_memory_allocated() / GIB:.2f}", "yes"
    except torch.OutOfMemoryError:
        return "-", "no"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def free_memory() -> None:
    """Gives back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_flops(device: torch.device) -> float:
    """Dense bf16 peak of this GPU in FLOP/s; 0 where it is not known."""
    known = [1e12 * peak for name, peak in PEAKS.items() if name in device_name(device)]
    return known[0] if known else 0.0


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", metavar="NAME", help="run config (default deris-7b-refcoco; tiny-refcoco with --tiny)"
    )
    parser.add_argument("--tiny", action="store_true", help="at tiny size, on a CPU where there is no GPU")
    parser.add_argument("--phrases", type=int, nargs="+", default=[1, 4, 7, 12], metavar="K")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each (default 5)")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes, at the largest K")
    parser.add_argument("--budget-gib", type=float, metavar="GIB", help="which settings fit a GPU of this size")
    parser.add_argument("--set", nargs="+", default=[], metavar="A.B=VALUE", help="override fields of the run config")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", message="You'd better set embed_dim")  # at tiny size, of transformers
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("expected a CUDA GPU for the true shape, found none; --tiny runs the same program on a CPU")
    name = arguments.config or ("tiny-refcoco" if arguments.tiny else "deris-7b-refcoco")
    on_cpu = ["training.precision=fp32"] if device.type == "cpu" else []
    overrides = [*on_cpu, *arguments.set]
    config = load_config(name, overrides)
    if device.type == "cpu" and config.cognition.quantization != "none":
        parser.error("cognition.quantization: expected a CUDA GPU, found none; bitsandbytes does not train on a CPU")
    console = bench_console()
    console.print(machine("torch", "transformers", "peft") + "\n")
    model = build(config, device)
    runs = [phrases_of_picture(config, phrases) for phrases in arguments.phrases]
    rows = [measure(model, run, device, arguments.repeats) for run in runs]
    show_speeds(config, rows, device, arguments.repeats, console)
    if arguments.profile:
        show_time_by_part(model, runs[-1], device, arguments.repeats, console)
        show_largest_costs(model, runs[-1], device, console)
    del model
    if arguments.budget_gib:
        show_settings(name, overrides, arguments.budget_gib, device, console)


if __name__ == "__main__":
    main()
