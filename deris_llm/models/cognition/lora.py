"""LoRA in a part of an image-text model, through peft."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

BERT_PATHS = {
    "q_proj": r"attention\.(self|attention)\.query",
    "k_proj": r"attention\.(self|attention)\.key",
    "v_proj": r"attention\.(self|attention)\.value",
    "o_proj": r"attention\.output\.dense",
    "up_proj": r"layer\.\d+\.intermediate\.dense",
    "down_proj": r"layer\.\d+\.output\.dense",
}
"""The linears of BERT's layers, and of ViLT's, under the names that language models have."""


def add_lora(
    part: nn.Module,
    targets: Sequence[str],
    *,
    r: int,
    alpha: int,
    dropout: float,
    dtype: torch.dtype,
    paths: Mapping[str, str] | None = None,
) -> None:
    """Puts trainable low-rank updates beside the linears that the targets mean, in place.

    Args:
        part: frozen; on any device.
        targets: `cognition.lora.targets`.
        r: rank.
        alpha: the update is scaled by alpha / r.
        dropout: before the update.
        dtype: of the updates.
        paths: target -> regular expression that the full names of its linears end in; None = a target is the last part
            of the names.

    Raises:
        ValueError: no target, or one that means no linear of this model.
    """
    if any(type(module).__name__ == "Linear4bit" for module in part.modules()):
        part.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks the part, transformers tells the whole only
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=_linears(part, targets, paths=paths)
    )
    inject_adapter_in_model(config, part)
    for name, module in part.named_modules():
        if "lora_" in name:
            module.to(dtype)  # peft does so itself, but not on the meta device


def _linears(part: nn.Module, targets: Sequence[str], *, paths: Mapping[str, str] | None) -> list[str]:
    """Full names of the linears that the targets mean."""
    names = [name for name, module in part.named_modules() if isinstance(module, nn.Linear)]
    paths = paths or {kind: kind for kind in sorted({name.rsplit(".", 1)[-1] for name in names})}
    found = {target: [name for name in names if re.search(rf"(^|\.){path}$", name)] for target, path in paths.items()}
    if not targets or (unknown := set(targets) - set(found)):
        raise ValueError(
            f"cognition.lora.targets: expected names among {', '.join(paths)}, got "
            f"{', '.join(sorted(unknown)) if targets else 'none'}; correct them, or set cognition.lora.r=0 for no LoRA."
        )
    return [name for target in sorted(set(targets)) for name in found[target]]
