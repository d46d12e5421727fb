"""Plans a run: parameters, memory per GPU under each ZeRO stage, steps and tokens per epoch.

The model is built on the meta device, where tensors have shapes but no memory, and one micro-batch runs forward and
backward there. `ShapeSimulation` tracks the lifetime of every storage, so the reported activations are the peak of the
real operators in their real order, and nothing about the model's structure is repeated here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from deris_llm.config import RunConfig
from deris_llm.data.check import KNOWN_VIDEOS, PLANNED_FRAMES, known_num_images, known_num_phrases
from deris_llm.data.collate import referring_batch
from deris_llm.data.dataset import group_by_image
from deris_llm.data.errors import DataError
from deris_llm.data.mix import training_mix
from deris_llm.data.sources import is_there
from deris_llm.models.cognition import PlannedInputs, resolve_backend
from deris_llm.models.deris import Deris, build_model
from deris_llm.structures import DerisOutput, ReferringBatch

GIB = 2**30
STAGES = ("0", "1", "2", "3", "3 + offload")
FP32_BYTES = 4  # of a master weight or a moment of a parameter
BUCKET_ELEMENTS = 13_000_000  # reduce_bucket_size of ds_configs/*.json
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: 4 bits, one byte of scale per 64, 4 bytes per 256 scales
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters: the most that are gathered at once
MATCHING_COPIES = 5  # float32 tensors of all queries' points that the matcher holds at once (measured: 5.1)
TYPICAL_PHRASE = "the woman in the red jacket on the left"


@dataclass(frozen=True)
class Part:
    """One part of the model."""

    name: str
    total: int  # parameters
    trainable: int


@dataclass(frozen=True)
class Memory:
    """Expected peak of one GPU under one ZeRO stage, in bytes."""

    stage: str  # "0", "1", "2", "3", "3 + offload"
    weights: int
    gradients: int
    optimizer: int
    activations: int  # peak of everything else that a micro-step allocates
    buffers: int  # DeepSpeed's communication buckets and, under stage 3, the gathered parameters

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class Epoch:
    """One pass over the training phrases."""

    source: str  # of the counts
    phrases: int
    images: int  # an image counts as often as it is shown
    steps: int  # optimizer steps
    tokens: int  # through the language model, image tokens included
    total_steps: int  # of the whole run


@dataclass(frozen=True)
class RunPlan:
    """What `deris-llm plan` prints."""

    name: str
    gpus: int
    precision: str
    images_per_device: int
    phrases_per_device: int
    tokens_per_phrase: int  # of a whole prompt, image tokens included
    shared_tokens: int  # of these, how many run once per image
    parts: tuple[Part, ...]
    lora_modules: int
    lora_parameters: int
    memory: tuple[Memory, ...]
    step_flops: (
        int  # floating-point operations of a micro-batch, forward, backward and what is recomputed, without the loss
    )
    epoch: Epoch

    def to_json(self) -> dict[str, Any]:
        """Plain values, bytes as integers."""
        tree = asdict(self)
        for row, memory in zip(tree["memory"], self.memory, strict=True):
            row["total"] = memory.total
        return tree


class ShapeSimulation(TorchDispatchMode):
    """Runs a program on shapes and counts the bytes of its live storages and its floating-point operations.

    Floating-point tensors are on the meta device. Integer and boolean tensors that do not depend on them (token ids,
    padding, indices) are computed on the CPU, so that lengths, boolean indexing and attention masks work.

    torch computes the shapes of a result in Python, in about 0.3 ms. They are kept for every operator and shapes of its
    arguments, so that equal layers are computed once (`_made_like`).

    Attributes:
        live: bytes of the storages that were created inside and are still alive.
        peak: largest value of `live`.
        flops: of matrix products and convolutions, by torch's formulas (`torch.utils.flop_counter`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operator on meta, or on the CPU if it only has known integers."""
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_meta = any(tensor.is_meta for tensor in tensors)
        wanted = kwargs.get("device")
        if not on_meta and wanted is not None and torch.device(wanted).type == "meta":
            dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else torch.get_default_dtype())
            if dtype.is_floating_point:
                on_meta = True
            else:
                kwargs["device"] = torch.device("cpu")
        if not on_meta:
            out = func(*args, **kwargs)
        elif func is torch.ops.aten._local_scalar_dense.default and tensors[0].dtype == torch.bool:
            return True  # there are no values: checks such as `isfinite(x).all()` pass
        else:
            out, flops = _run_on_meta(func, _known_indices(func, args), kwargs)
            self.flops += flops
        given = {tensor.untyped_storage()._cdata for tensor in tensors}
        for tensor in _leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor, given)
        return out

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in given:  # counted before, or a view of an argument such as a weight
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _leaves(value: Any) -> Iterator[Any]:
    """Yields what tuples, lists and dictionaries hold; as torch's `tree_iter`, which is several times slower."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


class _Kept(NamedTuple):
    """What an operator returns for arguments of some shapes."""

    shapes: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    kind: type | None  # tuple or list; None = a single tensor
    flops: int


_KEPT: dict[tuple[Any, ...], _Kept] = {}


def _run_on_meta(func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
    """Returns the result of an operator, on meta, and its floating-point operations."""
    key = (func, _shapes_of(args), _shapes_of(kwargs)) if _returns_new_tensors(func) else None
    if key is not None and (kept := _KEPT.get(key)):
        made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in kept.shapes]
        return made[0] if kept.kind is None else kept.kind(made), kept.flops
    args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
    out = func(*args, **kwargs)
    formula = flop_registry.get(func._overloadpacket)
    flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
    if key is not None and (kept := _made_like(out, flops, (args, kwargs))):
        _KEPT[key] = kept
    return out, flops


def _shapes_of(value: Any) -> Any:
    """Returns what the shapes of an operator's result depend on; a type is part of it because 1 == 1.0 == True."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_shapes_of(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _shapes_of(item)) for name, item in value.items())
    return type(value), value


@functools.cache
def _returns_new_tensors(func: Any) -> bool:
    """Returns whether an operator neither writes to its arguments nor returns views of them."""
    schema = func._schema
    return all(each.alias_info is None for each in (*schema.arguments, *schema.returns))


def _made_like(out: Any, flops: int, arguments: Any) -> _Kept | None:
    """Returns how to make a result again; None unless it is new tensors that share no storage."""
    tensors = [out] if isinstance(out, Tensor) else out
    if type(tensors) not in (tuple, list) or not all(type(tensor) is Tensor and tensor.is_meta for tensor in tensors):
        return None
    given = {leaf.untyped_storage()._cdata for leaf in _leaves(arguments) if isinstance(leaf, Tensor)}
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    if len(storages) < len(tensors) or storages & given:
        return None
    for tensor in tensors:
        again = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if again.untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
            return None
    shapes = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
    return _Kept(shapes, None if isinstance(out, Tensor) else type(out), flops)


def _to_meta(tensor: Tensor) -> Tensor:
    return (
        tensor
        if tensor.is_meta
        else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    )


def _known_indices(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replaces boolean indices by positions: on meta, their result has no known shape."""
    if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default):
        return args
    indices: list[Tensor | None] = []
    for index in args[1]:
        if index is not None and index.dtype == torch.bool and not index.is_meta:
            indices.extend(index.nonzero(as_tuple=True))
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


class _EfficientAttention(torch.autograd.Function):
    """Saves what memory-efficient attention does: query, key, value, output and log-sum-exp, but no L x L matrix.

    Its operations are added to the simulation as those of the plain matrices, two products forward and four backward.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, simulation: ShapeSimulation) -> Tensor:
        ctx.simulation = simulation
        ctx.flops = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        simulation.flops += ctx.flops
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        ctx.simulation.flops += 2 * ctx.flops
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@contextlib.contextmanager
def _attention_as_on_gpu(simulation: ShapeSimulation) -> Iterator[None]:
    """Replaces SDPA, which computes plain matrices on meta, by the shapes of the fused kernel that GPUs run.

    The function itself is replaced, because recomputation in the backward pass runs in a thread without our mode.
    """
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return cast(Tensor, _EfficientAttention.apply(query, key, value, simulation))

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def plan_run(config: RunConfig, *, gpus: int = 1, stages: Sequence[str] = STAGES) -> RunPlan:
    """Plans a run; weights are not read, and data only if they are on disk.

    Args:
        config: the run.
        gpus: processes, one per GPU.
        stages: which of `STAGES` to plan.

    Raises:
        ValueError: fewer than one GPU, or the model cannot be built.
    """
    if gpus < 1:
        raise ValueError(f"--gpus: expected 1 or more, got {gpus}; give the number of GPUs the run would have")
    config = within_token_limit(config)
    model = build_model(config, weights=False, device="meta").train()
    planned = plan_cognition(config)
    batch = shape_batch(config, planned)
    step = simulate_step(model, batch)
    activations = step.peak + matching_bytes(config)
    in_4_bits = linears_in_4_bits(model) if config.cognition.quantization == "nf4" else ()
    activations += max(
        (weight.numel() * weight.element_size() for weight in in_4_bits), default=0
    )  # one is unpacked at a time
    tokens, shared = planned.tokens_per_phrase, planned.shared_tokens
    lora = {name: p.numel() for name, p in model.named_parameters() if ".lora_" in name}
    return RunPlan(
        name=config.name,
        gpus=gpus,
        precision=config.training.precision,
        images_per_device=len(batch.perception_image),
        phrases_per_device=batch.num_phrases,
        tokens_per_phrase=tokens,
        shared_tokens=shared,
        parts=tuple(_parts(model)),
        lora_modules=sum(".lora_A." in name for name in lora),
        lora_parameters=sum(lora.values()),
        memory=tuple(
            memory_per_gpu(
                model,
                stage,
                gpus=gpus,
                activations=activations,
                moments=3 if config.training.amsgrad else 2,
                in_4_bits=in_4_bits,
            )
            for stage in stages
            if not (in_4_bits and stage.startswith("3"))  # not supported: packed weights cannot be partitioned
        ),
        step_flops=step.flops,
        epoch=_epoch(config, gpus=gpus, tokens_per_phrase=tokens, shared_tokens=shared),
    )


def within_token_limit(config: RunConfig) -> RunConfig:
    """Lowers `data.phrases_per_image` to the number of typical phrases that `data.max_tokens_per_image` allows."""
    limit = config.data.max_tokens_per_image
    if limit == 0:
        return config
    planned = plan_cognition(config)
    fitting = (limit - planned.shared_tokens) // (planned.tokens_per_phrase - planned.shared_tokens)
    if fitting < 1:
        raise ValueError(
            f"data.max_tokens_per_image={limit}: expected a typical phrase to fit with its image, got "
            f"{planned.tokens_per_phrase} tokens; set the limit to at least that."
        )
    data = dataclasses.replace(config.data, phrases_per_image=min(fitting, config.data.phrases_per_image))
    return dataclasses.replace(config, data=data)


def plan_cognition(config: RunConfig) -> PlannedInputs:
    """Returns the cognition inputs of a full micro-batch of one GPU."""
    backend = resolve_backend(config.cognition.backend)
    return backend.plan_inputs(config.cognition, TYPICAL_PHRASE, _planned_image_index(config))


def _planned_image_index(config: RunConfig) -> list[int]:
    return [image for image in range(config.training.images_per_device) for _ in range(config.data.phrases_per_image)]


def shape_batch(config: RunConfig, planned: PlannedInputs) -> ReferringBatch:
    """Returns a full micro-batch of one GPU, with real token ids and images on the meta device."""
    num_images, size = config.training.images_per_device, config.perception.image_size
    image_index = _planned_image_index(config)
    pixel_values = planned.inputs.pixel_values.to("meta")
    return referring_batch(
        torch.empty(num_images, 3, size, size, device="meta"),
        dataclasses.replace(planned.inputs, pixel_values=pixel_values),
        [TYPICAL_PHRASE] * len(image_index),
        image_index,
    )


def simulate_step(model: nn.Module, batch: ReferringBatch) -> ShapeSimulation:
    """Runs a micro-batch forward and backward; `peak` is of what it allocates besides weights and their gradients.

    The sum of all outputs replaces the loss; `matching_bytes` counts what the criterion needs in addition.

    Args:
        model: on the meta device, in training mode.
        batch: from `shape_batch`.
    """
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        with ShapeSimulation() as simulation, _attention_as_on_gpu(simulation):
            sum_of_outputs(model(batch)).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return simulation


def sum_of_outputs(output: DerisOutput) -> Tensor:
    """Replaces the loss where only the shapes of the backward pass matter."""
    loss = output.presence_logit.float().sum()
    for one in output.rounds:
        loss = loss + one.mask_logits.float().sum() + one.referring_logits.float().sum()
    return loss


def matching_bytes(config: RunConfig) -> int:
    """Returns the bytes of the matcher: every query of every round at `num_points` points."""
    num_phrases = config.training.images_per_device * config.data.phrases_per_image
    num_masks = num_phrases * config.loopback.num_queries * (config.loopback.rounds + 1)
    return MATCHING_COPIES * 4 * num_masks * config.criterion.num_points


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def linears_in_4_bits(model: nn.Module) -> tuple[Tensor, ...]:
    """Returns the weights that `cognition.quantization=nf4` packs: the frozen linear layers of the language model."""
    return tuple(
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".language_model." in name and ".lora_" not in name
    )


def memory_per_gpu(
    model: nn.Module,
    stage: str,
    *,
    gpus: int,
    activations: int,
    moments: int = 2,
    in_4_bits: Sequence[Tensor] = (),
) -> Memory:
    """Estimates the peak under a ZeRO stage; stage 0 is plain data parallelism (the table in docs/design.md).

    Args:
        model: with its frozen parameters set.
        stage: one of `STAGES`.
        gpus: processes that share the partitions.
        activations: from `simulate_step` and `matching_bytes`.
        moments: that the optimizer keeps per parameter: 2 in Adam and AdamW, 3 with AMSGrad.
        in_4_bits: weights that are stored in 4 bits.
    """
    level, offload = int(stage[0]), stage.endswith("offload")
    trainable = [p for p in model.parameters() if p.requires_grad]
    weights = _bytes(model.parameters()) + _bytes(model.buffers())
    weights -= _bytes(in_4_bits) - round(NF4_BYTES * sum(weight.numel() for weight in in_4_bits))
    gradients = _bytes(trainable)
    masters = level > 0 or gradients < 4 * sum(p.numel() for p in trainable)  # DeepSpeed keeps them in fp32 runs too
    optimizer = FP32_BYTES * (moments + int(masters)) * sum(p.numel() for p in trainable)
    if level == 0:  # DDP's buckets are a second set of gradients
        buffers = gradients if gpus > 1 else 0
    else:
        buffers = 2 * BUCKET_ELEMENTS * trainable[0].element_size()
    if level == 3 and gpus > 1:
        buffers += min(LIVE_PARAMETERS * trainable[0].element_size(), weights)
    return Memory(
        stage=stage,
        weights=0 if offload else _share(weights, gpus if level == 3 else 1),
        gradients=_share(gradients, gpus if level >= 2 else 1),
        optimizer=0 if offload else _share(optimizer, gpus if level >= 1 else 1),
        activations=activations,
        buffers=buffers,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _share(size: int, gpus: int) -> int:
    return -(-size // gpus)


def _parts(model: Deris) -> Iterator[Part]:
    """Counts the parameters of each branch by part, with LoRA as a part of its own."""
    tallies: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        branch, part, *_ = name.replace("cognition.model.", "cognition.").split(".")
        if ".lora_" in name:
            part = "lora"
        if branch == "loopback" and part != "query_decoder":
            part = "rounds, heads, fusion"
        part = f"{branch}.{part}"
        tally = tallies.setdefault(part, [0, 0])
        tally[0] += parameter.numel()
        tally[1] += parameter.numel() * parameter.requires_grad
    for part, (total, trainable) in tallies.items():
        yield Part(part, total, trainable)


def _epoch(config: RunConfig, *, gpus: int, tokens_per_phrase: int, shared_tokens: int) -> Epoch:
    per_image = config.data.phrases_per_image
    if not any(is_there(config.data.root, dataset) for dataset in config.data.train):
        splits = [f"{name}/train" for name in config.data.train]
        phrases = sum(known_num_phrases(split) for split in splits)
        if not phrases:
            raise DataError(
                f"data.train: expected a dataset whose published counts are known, or data under {config.data.root!r}, got "
                f"{', '.join(config.data.train)} and no data. Prepare the data, or set data.root"
            )
        shown = expected_parts(phrases, max(map(known_num_images, splits)), per_image)
        source = (
            f"the published train splits of {', '.join(config.data.train)} (no data under {config.data.root!r}): slightly more than "
            "the mix, which leaves out the images of every evaluation split; images shown are estimated, as if all splits had "
            "the same images"
        )
        if any(split in KNOWN_VIDEOS for split in splits):
            source += f"; {PLANNED_FRAMES} frames of each video, as with `data prepare --train-frames {PLANNED_FRAMES}`"
    else:
        mix = training_mix(config.data)
        phrases = mix.report.num_phrases
        shown = sum(-(-size // per_image) for size in group_by_image(mix.records).sizes.tolist())
        source = f"the files under {config.data.root!r}"
    per_step = config.training.images_per_device * config.training.accumulation * gpus
    steps = -(-shown // per_step)
    total_steps = config.training.max_steps if config.training.max_steps > 0 else round(steps * config.training.epochs)
    tokens = shown * shared_tokens + phrases * (tokens_per_phrase - shared_tokens)
    return Epoch(source, phrases, shown, steps, tokens, total_steps)


def expected_parts(phrases: int, images: int, per_image: int) -> int:
    """Estimates how often images are shown, if an image's phrases are split into parts of at most `per_image`.

    It assumes that the last part of an image has any size from 1 to `per_image` with equal probability (error on the
    synthetic world with 2 to 8 phrases per part: at most 1.3 %).

    Args:
        phrases: of all images.
        images: their number; 0 if not known, then all parts are full.
        per_image: largest number of phrases in a part.
    """
    return -(-(2 * phrases + images * (per_image - 1)) // (2 * per_image))


def show_plan(plan: RunPlan, console: Console) -> None:
    """Prints a plan as tables."""
    parts = Table("part", Column("parameters", justify="right"), Column("trainable", justify="right"), title=plan.name)
    for part in plan.parts:
        parts.add_row(part.name, f"{part.total:,}", f"{part.trainable:,}" if part.trainable else "frozen")
    total, trainable = sum(p.total for p in plan.parts), sum(p.trainable for p in plan.parts)
    parts.add_section()
    parts.add_row("all", f"{total:,}", f"{trainable:,}", style="bold")
    console.print(parts)
    console.print(f"LoRA: {plan.lora_modules} modules, {plan.lora_parameters:,} parameters\n")

    columns = ("weights", "grads", "optimizer", "activations", "buffers", "sum")
    memory = Table(
        "ZeRO stage",
        *(Column(name, justify="right") for name in columns),
        title=f"GiB per GPU, {plan.gpus} GPU{'s' if plan.gpus > 1 else ''}, {plan.precision}",
    )
    for row in plan.memory:
        sizes = (row.weights, row.gradients, row.optimizer, row.activations, row.buffers, row.total)
        memory.add_row("0 (none)" if row.stage == "0" else row.stage, *(f"{size / GIB:.2f}" for size in sizes))
    console.print(memory)
    console.print(
        f"for a micro-batch of {plan.images_per_device} image(s) x {plan.phrases_per_device // plan.images_per_device} phrases of "
        f"{plan.tokens_per_phrase} tokens, {plan.shared_tokens} of them once per image.\n"
        "Counted from shapes, checked against the CPU; "
        "not measured on a GPU: add the CUDA context (about 0.5 GiB) and leave 10-20 % for workspaces and fragmentation.\n",
        highlight=False,
    )
    epoch = plan.epoch
    console.print(
        f"an epoch: {epoch.phrases:,} phrases in {epoch.images:,} images shown, {epoch.steps:,} steps, {epoch.tokens:,} tokens "
        f"through the language model; the whole run: {epoch.total_steps:,} steps\ncounts from {epoch.source}",
        highlight=False,
    )
