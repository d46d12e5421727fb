"""How a run scales: the bytes that a step sends under each ZeRO stage, and what they, checkpoints and loading cost.

Formulas and assumptions are in docs/performance.md ("Scaling"). `scripts/rehearse/traffic.py` and a test compare the bytes with
those of the collectives that ranks call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deris_llm.config import RunConfig
from deris_llm.models.deris import Deris
from deris_llm.planning.efficiency import PEAKS, Work, model_to_count
from deris_llm.planning.plan import (
    BUCKET_ELEMENTS,
    FP32_BYTES,
    GIB,
    RunPlan,
    ShapeSimulation,
    plan_cognition,
    shape_batch,
)
from deris_llm.structures import ReferringBatch

STAGES = (0, 1, 2, 3)
GPUS = (8, 16, 32, 64, 128, 256, 512)
GPUS_PER_NODE = 8
LINKS = {"NVLink": 450e9, "400 Gb/s": 50e9, "100 Gb/s": 12.5e9}
"""Bytes per second in one direction: of a GPU over NVLink (H100), and of all that leaves a node of 8 GPUs."""
STORES = {"local NVMe": 3e9, "NFS, 10 Gb/s": 1.25e9, "hub, 1 Gb/s": 0.125e9}
"""Bytes per second: of each node's own disk, of the file server that all nodes share, and of the site's line to the hub."""
GPU, UTILISATION = "H100", 0.4  # for the seconds of a step without communication
LATENCY = 20e-6  # seconds of a collective for each doubling of the number of ranks
PERSISTENT_ELEMENTS = 36_000  # stage3_param_persistence_threshold of ds_configs/zero3.json
REUSED_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance


@dataclass(frozen=True)
class Traffic:
    """What one rank sends for an optimizer step under one ZeRO stage."""

    stage: int
    all_reduced: int  # bytes of tensors that are summed over all ranks and that every rank receives whole
    spread: int  # bytes of tensors of which every rank holds a part before (all-gather) or after (reduce-scatter)
    collectives: int  # their number, estimated

    def sent(self, gpus: int) -> float:
        """Returns the bytes that a rank sends in a ring of ``gpus`` ranks."""
        return (2 * self.all_reduced + self.spread) * (gpus - 1) / gpus

    def seconds(self, gpus: int, bandwidth: float) -> float:
        """Returns how long the collectives take at ``bandwidth`` bytes per second."""
        return self.sent(gpus) / bandwidth + self.collectives * LATENCY * math.ceil(math.log2(gpus)) * (gpus > 1)


@dataclass(frozen=True)
class Point:
    """A stage on a number of GPUs over one link, with nothing of the communication hidden behind computation."""

    stage: int
    gpus: int
    link: str
    steps_per_second: float
    efficiency: float  # share of a step that is computation


@dataclass(frozen=True)
class Scaling:
    """What `deris-llm plan --scale` prints."""

    step_seconds: float  # of computation alone, on `GPU` at MFU `UTILISATION`
    images_per_device: int
    accumulation: int
    weight_bytes: int
    shardable_bytes: int  # gradients and optimizer state
    traffic: tuple[Traffic, ...]
    points: tuple[Point, ...]
    hidden_from: dict[str, int]  # link -> images per micro-batch from which ZeRO 3 can be hidden on 64 GPUs
    checkpoint_bytes: int
    save_every: int  # steps

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the bytes sent and the seconds of loading by number of GPUs."""
        tree = asdict(self)
        for row, traffic in zip(tree["traffic"], self.traffic, strict=True):
            row["sent"] = {gpus: traffic.sent(gpus) for gpus in GPUS}
        loading = {gpus: {name: self.loading_seconds(name, gpus) for name in STORES} for gpus in GPUS}
        return tree | {"loading_seconds": loading, "links": LINKS, "stores": STORES}

    def loading_seconds(self, store: str, gpus: int) -> float:
        """Returns how long reading the weights takes: every node reads them once; NFS and hub serve all nodes."""
        nodes = math.ceil(gpus / GPUS_PER_NODE) if store != "local NVMe" else 1
        return nodes * self.weight_bytes / STORES[store]


def scaling_of(config: RunConfig, plan: RunPlan, work: Work, *, model: Deris | None = None) -> Scaling:
    """Computes how a run scales with the GPUs, at the same micro-batch on each.

    Args:
        config: the run.
        plan: of it.
        work: of it.
        model: from `model_to_count`; None builds it.
    """
    model = (model or model_to_count(config)).train()
    training = config.training
    traffic = traffic_of_step(model, shape_batch(config, plan_cognition(config)), accumulation=training.accumulation)
    seconds = work.flops / (plan.epoch.total_steps * work.gpus) / (PEAKS[GPU] * 1e12 * UTILISATION)
    points = tuple(
        Point(each.stage, gpus, link, 1 / (seconds + waiting), seconds / (seconds + waiting))
        for each in traffic
        for gpus in GPUS
        for link, bandwidth in LINKS.items()
        for waiting in [each.seconds(gpus, bandwidth)]
    )
    per_image = seconds / (training.images_per_device * training.accumulation)
    hidden = {link: traffic[3].seconds(64, speed) / training.accumulation / per_image for link, speed in LINKS.items()}
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = 3 if training.amsgrad else 2
    return Scaling(
        step_seconds=seconds,
        images_per_device=training.images_per_device,
        accumulation=training.accumulation,
        weight_bytes=_bytes(model.parameters()),
        shardable_bytes=_bytes(p for p in model.parameters() if p.requires_grad)
        + FP32_BYTES * (1 + moments) * num_trainable,
        traffic=traffic,
        points=points,
        hidden_from={link: max(1, math.ceil(images)) for link, images in hidden.items()},
        checkpoint_bytes=FP32_BYTES * (1 + moments) * num_trainable,
        save_every=training.save_every,
    )


def traffic_of_step(
    model: nn.Module,
    batch: ReferringBatch,
    *,
    accumulation: int = 1,
    reused: int = REUSED_ELEMENTS,
    persistent: int = PERSISTENT_ELEMENTS,
) -> tuple[Traffic, ...]:
    """Counts what a rank sends for an optimizer step under each of `STAGES`.

    Args:
        model: on the meta device, in training mode, its frozen parameters set.
        batch: from `shape_batch`.
        accumulation: micro-batches of a step.
        reused: parameters between two uses of one under which ZeRO 3 keeps it gathered.
        persistent: size up to which ZeRO 3 never partitions a parameter; it is gathered after the step.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients, buckets = _bytes(trainable), -(-sum(p.numel() for p in trainable) // BUCKET_ELEMENTS)
    backward = [p for p in parameters_of_backward(model, batch) if p.numel() > persistent]
    # The parameters used last in the forward pass are still there when the backward pass begins with them.
    gathered_again = max(0, _bytes(backward) - reused // 2 * trainable[0].element_size())
    gathered = _bytes(model.parameters()) + gathered_again
    num_gathers = sum(p.numel() > persistent for p in model.parameters()) + len(backward) * (gathered_again > 0)
    return (
        Traffic(0, gradients, 0, buckets),
        Traffic(1, gradients, gradients, buckets + 1),
        Traffic(2, accumulation * gradients, gradients, accumulation * buckets + 1),
        Traffic(3, 0, accumulation * (gathered + gradients), accumulation * (num_gathers + buckets)),
    )


def parameters_of_backward(model: nn.Module, batch: ReferringBatch) -> list[Tensor]:
    """Returns the parameters that the backward pass reads: those of modules whose output depends on a trainable one."""
    found: dict[int, Tensor] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
            found.update({id(p): p for p in module.parameters(recurse=False)})

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with ShapeSimulation():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def show_scaling(found: Scaling, console: Console, *, stages: tuple[int, ...] = (2, 3)) -> None:
    """Prints the tables.

    Args:
        found: from `scaling_of`.
        console: to print to.
        stages: those that get a table of steps per second.
    """
    sent = Table("ZeRO", *_right("8 GPUs", "64 GPUs", "512 GPUs", "collectives"), title="GB that a GPU sends in a step")
    for traffic in found.traffic:
        sizes = (f"{traffic.sent(gpus) / 1e9:.3f}" for gpus in (8, 64, 512))
        sent.add_row("0 (none)" if traffic.stage == 0 else str(traffic.stage), *sizes, f"{traffic.collectives:,}")
    console.print(sent)
    points = {(point.stage, point.gpus, point.link): point for point in found.points}
    for stage in stages:
        table = Table("GPUs", *_right(*LINKS), title=f"ZeRO {stage}: steps/s (efficiency), nothing hidden")
        for gpus in GPUS:
            table.add_row(str(gpus), *(_cell(points[stage, gpus, link]) for link in LINKS))
        console.print(table)
    console.print(
        f"A step computes {found.step_seconds:.3f} s on one {GPU} at {UTILISATION:.0%} MFU ({found.images_per_device} image(s) x "
        f"{found.accumulation} micro-batch(es) on each GPU; more GPUs make the batch larger). Communication that overlaps with "
        "computation costs nothing until it takes longer: at an efficiency e of 50 % or more the step can be as fast as without "
        "communication, below that e / (1 - e) of it.\n",
        highlight=False,
    )
    console.print(_verdict(found) + "\n", highlight=False)
    loading = Table("GPUs", *_right(*STORES), title=f"seconds to read {found.weight_bytes / GIB:.1f} GiB of weights")
    for gpus in (8, 64, 512):
        loading.add_row(str(gpus), *(f"{found.loading_seconds(store, gpus):,.0f}" for store in STORES))
    console.print(loading)
    console.print(_said_of_checkpoints(found), highlight=False)


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def _cell(point: Point) -> str:
    return f"{point.steps_per_second:.2f} ({point.efficiency:.0%})"


def _verdict(found: Scaling) -> str:
    """Says where ZeRO 3 pays."""
    stage2, stage3 = found.traffic[2], found.traffic[3]
    needed = stage3.sent(64) / found.step_seconds
    freed = found.weight_bytes * (1 - 1 / GPUS_PER_NODE) / GIB
    images = ", ".join(f"{link} {count}" for link, count in found.hidden_from.items())
    return (
        f"ZeRO 3 sends {stage3.sent(64) / stage2.sent(64):,.0f} times as much as ZeRO 2. On 8 GPUs it frees {freed:.1f} GiB of weights "
        f"per GPU, less what is gathered at a time; gradients and optimizer state, which ZeRO 2 shards too, are "
        f"{found.shardable_bytes / GIB:.2f} GiB. Its gathers hide behind computation from {needed / 1e9:,.0f} GB/s, or with so many images "
        f"in a micro-batch: {images}. Below that ZeRO 2 is faster; ZeRO 3 pays where ZeRO 2 does not fit."
    )


def _said_of_checkpoints(found: Scaling) -> str:
    disks = [(name, found.checkpoint_bytes / speed) for name, speed in STORES.items() if "hub" not in name]
    between = found.save_every * found.step_seconds
    times = ", ".join(f"{name} {seconds:.2g} s ({seconds / between:.1%})" for name, seconds in disks)
    return (
        "Every node reads the weights once; file server and line to the hub are shared by all nodes. With HF_HOME on a shared disk "
        "the hub is asked once.\n"
        f"A checkpoint has {found.checkpoint_bytes / 1e6:,.0f} MB (trained weights and moments in fp32, nothing frozen). One rank "
        f"writes it while the others wait: {times} of the {found.save_every:,} steps between two.\n"
        "Computed, not measured: docs/performance.md has the formulas."
    )
