"""LoRA folded into the weights beside it: a full checkpoint that needs neither base weights nor network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn

from deris_llm.checkpoints.layout import CONFIG_FILE, find_checkpoint
from deris_llm.checkpoints.load import load_checkpoint
from deris_llm.checkpoints.save import files_beside_weights, save_full_checkpoint
from deris_llm.common.folders import check_new_folder
from deris_llm.config import Beit3Cognition, RunConfig, config_from_dict, config_to_dict, load_config
from deris_llm.data.collate import ReferringCollator
from deris_llm.models.cognition import build_processor
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

    Everything is computed in float32, with all of the model in memory: 4 bytes per parameter, about 33 GB for a 7B.
    `training.precision` stays as it is in the config. `data.json`, `metrics.json` and the other files that say where the
    checkpoint comes from are copied. LoRA that was trained on weights in 4 bits is added to the full-precision weights:
    the answers are then close to those of the run, not equal.

    Args:
        folder: any checkpoint, or the folder of a run (`find_checkpoint`).
        out: new folder.
        dtype: of the parameters in the file; buffers, such as a backbone's statistics, keep theirs.
        overrides: `section.field=value` over the run config, such as `cognition.weights=...` where the base weights lie
            elsewhere now; they are written too.

    Raises:
        ValueError: no checkpoint, other base weights, or a folder that is not new.
    """
    check_new_folder(out)
    folder, allow_module = find_checkpoint(folder, overrides)
    whole = [*overrides, "training.precision=fp32", "cognition.quantization=none"]
    config, model = load_checkpoint(folder, overrides=whole, allow_module=allow_module)
    batch = _probe(config, allow_module=allow_module)
    with torch.inference_mode():
        before: DerisOutput = model(batch)
    num_linears = merge_lora(model)
    with torch.inference_mode():
        merged: DerisOutput = model(batch)
    by_rounding = None
    if dtype == "bf16":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        with torch.inference_mode():
            by_rounding = change_of(merged, model(batch))
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    run = load_config(folder / CONFIG_FILE, overrides)
    save_full_checkpoint(out, model, _without_lora(run, str(folder)), files_beside_weights(folder, config))
    was_quantized = run.cognition.quantization != "none"
    return Merge(folder, num_linears, change_of(before, merged), by_rounding, was_quantized)


def merge_lora(model: nn.Module) -> int:
    """Adds every low-rank update to its linear and removes it, in place.

    Returns:
        the number of updates.
    """
    updated = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in updated:
        module.merge(safe_merge=True)  # refuses what is not finite
        model.set_submodule(name, module.get_base_layer())
    return len(updated)


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
