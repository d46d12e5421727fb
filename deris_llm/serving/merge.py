"""LoRA folded into the weights beside it: a full checkpoint that needs neither base weights nor network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from deris_llm.checkpoints.layout import CONFIG_FILE, find_checkpoint
from deris_llm.checkpoints.load import LORA, checkpoint_config, load_checkpoint, without_base_layer
from deris_llm.checkpoints.save import TensorToWrite, files_beside_weights, write_full_checkpoint
from deris_llm.common.folders import check_new_folder
from deris_llm.config import Beit3Cognition, RunConfig, config_from_dict, config_to_dict, load_config
from deris_llm.data.collate import ReferringCollator
from deris_llm.models.cognition import build_processor
from deris_llm.models.pretrained import linear_weights
from deris_llm.structures import DerisOutput, ReferringBatch

_PHRASES = ("the person on the left", "a red car behind the tree", "the smaller one of the two in front")


@dataclass(frozen=True)
class Change:
    """The largest differences of the answers about an image of noise, over phrases, queries and rounds."""

    mask_logits: float  # relative to the largest logit
    referring_score: float  # in [0, 1]
    presence: float  # in [0, 1]

    def __str__(self) -> str:
        return (
            f"mask logits by {self.mask_logits:.1e} of the largest, referring scores by {self.referring_score:.1e}, "
            f"presence by {self.presence:.1e}"
        )


QUANTIZED = (
    "the run had its base weights in 4 bits, here they are in full precision: answers are close to those of the run, not equal; "
    "evaluate again"
)


@dataclass(frozen=True)
class Merge:
    """The account of a merge."""

    source: Path
    num_linears: int  # linears with LoRA; 0 = the run had none, or was full already
    by_merging: Change  # in float32
    by_rounding: Change | None  # float32 against what was written; None where that is float32
    was_quantized: bool  # the run had its base weights in 4 bits; they are whole here


def merge_checkpoint(
    folder: str | Path, out: Path, *, dtype: Literal["fp32", "bf16"] = "fp32", overrides: Sequence[str] = ()
) -> Merge:
    """Writes a full checkpoint that gives the answers of another one.

    Everything is computed in float32, one linear layer at a time; base weights in half precision stay in their mapped files
    until then, so that a 7B needs about 5 GB of memory. `training.precision` stays as it is in the config. `data.json`,
    `metrics.json` and the other files that say where the checkpoint comes from are copied. LoRA that was trained on weights
    in 4 bits is added to the full-precision weights: the answers are then close to those of the run, not equal.

    Args:
        folder: any checkpoint, or the folder of a run (`find_checkpoint`).
        out: new folder.
        dtype: of the parameters in the file; buffers, such as a backbone's statistics, keep theirs.
        overrides: `section.field=value` over the run config, such as `cognition.weights=...` where the base weights lie
            elsewhere now; they are written too.

    Raises:
        ValueError: no checkpoint, other base weights, a folder that is not new, or merged weights that are not finite.
    """
    check_new_folder(out)
    folder, allow_module = find_checkpoint(folder, overrides)
    whole = [*overrides, "training.precision=fp32", "cognition.quantization=none"]
    batch = _probe(checkpoint_config(folder, whole), allow_module=allow_module)
    config, model = load_checkpoint(folder, overrides=whole, allow_module=allow_module, linears_as_stored=True)
    lora = {layer.get_base_layer(): layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)}

    def merged(linear: nn.Linear) -> Tensor:
        return merged_weight(linear, lora.get(linear))

    before = _answers(model, batch, lambda linear: linear.weight.float())
    for layer in lora.values():
        layer.enable_adapters(enabled=False)
    after = _answers(model, batch, merged)
    by_rounding = None
    if dtype == "bf16":
        linears = linear_weights(model)
        with torch.no_grad():
            for parameter in set(model.parameters()) - linears.keys():
                parameter.copy_(parameter.bfloat16())
        by_rounding = change_of(after, _answers(model, batch, lambda linear: merged(linear).bfloat16().float()))
    run = load_config(folder / CONFIG_FILE, overrides)
    tensors = _merged_tensors(model, merged, torch.bfloat16 if dtype == "bf16" else torch.float32)
    write_full_checkpoint(out, tensors, _without_lora(run, str(folder)), files_beside_weights(folder, config))
    was_quantized = run.cognition.quantization != "none"
    return Merge(folder, len(lora), change_of(before, after), by_rounding, was_quantized)


def merged_weight(linear: nn.Linear, lora: Any | None) -> Tensor:
    """Returns the weight of a linear layer in float32, with the low-rank update of its LoRA layer added.

    Raises:
        ValueError: it is not finite.
    """
    weight = linear.weight.detach().float()
    if lora is None:
        return weight
    for name in lora.active_adapters:
        weight = weight + lora.get_delta_weight(name).detach()
    if not weight.isfinite().all():
        raise ValueError(
            "LoRA: expected finite weights after merging, got NaNs or infinities; the checkpoint is damaged or its training "
            "diverged: merge an earlier one."
        )
    return weight


def _answers(model: nn.Module, batch: ReferringBatch, weight: Callable[[nn.Linear], Tensor]) -> DerisOutput:
    """Runs a model whose linear layers have other weights, each while it runs: all of them at once need not fit in memory."""
    stored: list[Tensor] = []

    def take(linear: nn.Module, _: object) -> None:
        assert isinstance(linear, nn.Linear)
        stored.append(linear.weight.data)
        linear.weight.data = weight(linear)

    def put_back(linear: nn.Module, _: object, __: object) -> None:
        linear.weight.data = stored.pop()

    linears = linear_weights(model).values()
    hooks = [hook for linear in linears for hook in (
        linear.register_forward_pre_hook(take), linear.register_forward_hook(put_back),
    )]  # fmt: skip
    try:
        with torch.no_grad():
            return model(batch)
    finally:
        for hook in hooks:
            hook.remove()


def _merged_tensors(
    model: nn.Module, weight: Callable[[nn.Linear], Tensor], dtype: torch.dtype
) -> dict[str, TensorToWrite]:
    """Returns what a full checkpoint of a model has once LoRA is merged; parameters get a dtype, buffers keep theirs."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    linears = linear_weights(model)
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if LORA in name:
            continue
        values = partial(weight, linears[tensor]) if tensor in linears else tensor.detach
        tensors[without_base_layer(name)] = TensorToWrite(
            dtype if name in parameters else tensor.dtype, tensor.shape, values
        )
    return tensors


def _without_lora(config: RunConfig, where: str) -> RunConfig:
    """Returns the run config of the merged checkpoint, without LoRA and without the folder that the run started from."""
    lora = dataclasses.replace(config.cognition.lora, r=0, dropout=0.0)
    cognition = dataclasses.replace(config.cognition, lora=lora, quantization="none")
    if isinstance(cognition, Beit3Cognition):
        cognition = dataclasses.replace(cognition, tokenizer="")
    changed = dataclasses.replace(
        config,
        cognition=cognition,
        training=dataclasses.replace(config.training, start_from=""),
    )
    return config_from_dict(config_to_dict(changed), where=f"merged {where}")


def change_of(before: DerisOutput, after: DerisOutput) -> Change:
    """Compares the answers of two models to the same batch."""
    logits = [
        float((theirs.mask_logits - ours.mask_logits).abs().max() / theirs.mask_logits.abs().max())
        for theirs, ours in zip(before.rounds, after.rounds, strict=True)
    ]
    scores = [
        float((theirs.referring_logits.sigmoid() - ours.referring_logits.sigmoid()).abs().max())
        for theirs, ours in zip(before.rounds, after.rounds, strict=True)
    ]
    presence = float((before.presence_logit.sigmoid() - after.presence_logit.sigmoid()).abs().max())
    return Change(max(logits), max(scores), presence)


def _probe(config: RunConfig, *, allow_module: bool) -> ReferringBatch:
    """Makes a batch of one image of noise, the same everywhere, with three phrases."""
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    collator = ReferringCollator(config, build_processor(config, allow_module=allow_module), with_targets=False)
    return collator.batch([Image.fromarray(pixels)], _PHRASES, [0] * len(_PHRASES))
