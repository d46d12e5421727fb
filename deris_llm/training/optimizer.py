"""Which parameter trains at which rate, and how rates change over epochs.

Globs over parameter names put each trainable parameter into exactly one group.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from deris_llm.config import RunConfig
from deris_llm.models.perception.masked_attention import MaskedAttention

LORA = ("*.lora_*",)
COGNITION = ("cognition.*",)
CARRIED_OVER = ("perception.pixel_decoder.*", "loopback.query_decoder.*")
BACKBONE = ("perception.backbone.*",)

DECAY = 0.1
"""Factor on the rates after each of `training.decay_epochs`."""


@dataclass(frozen=True)
class RateRule:
    """A learning rate and its parameters."""

    name: str  # of the group in logs
    globs: tuple[str, ...]  # over parameter names
    learning_rate: float
    optional: bool = False  # whether a glob may match nothing


def rate_rules(config: RunConfig) -> tuple[RateRule, ...]:
    """Returns the rates of a run. A parameter that no rule matches has `training.learning_rate`."""
    training = config.training
    tunes_all = config.cognition.tuning == "full"
    has_perception = config.loopback.structure != "cognition_centric"
    return (
        RateRule("cognition", COGNITION, training.cognition_learning_rate)
        if tunes_all
        else RateRule("lora", LORA, training.lora_learning_rate, optional=config.cognition.lora.r == 0),
        RateRule(
            "pixel_decoder",
            CARRIED_OVER if has_perception else CARRIED_OVER[1:],  # the query decoder alone
            training.pixel_decoder_learning_rate,
        ),
        RateRule(
            "backbone",
            BACKBONE,
            training.pixel_decoder_learning_rate,
            optional=config.perception.freeze_backbone or not has_perception,
        ),
    )


def group_names(model: nn.Module, rules: tuple[RateRule, ...]) -> dict[str, str]:
    """Returns group names by parameter name, in the model's order; ``other`` if no rule matches.

    Raises:
        ValueError: a glob matches no trainable parameter, or two rules match the same parameter.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: dict[str, str] = {}
    problems = []
    for rule in rules:
        for glob in rule.globs:
            matches = fnmatch.filter(names, glob)
            if not matches and not rule.optional:
                problems.append(f"group {rule.name!r}: no trainable parameter matches {glob!r}")
            for name in matches:
                if groups.setdefault(name, rule.name) != rule.name:
                    problems.append(f"{name}: in two groups, {groups[name]!r} and {rule.name!r}")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems[:10])
        raise ValueError(
            f"parameter groups: {len(problems)} problem(s); adapt the globs in deris_llm/training/optimizer.py "
            f"to the model's names, e.g. {names[:5]}\n{listed}"
        )
    return {name: groups.get(name, "other") for name in names}


def decaying_names(model: nn.Module) -> set[str]:
    """Returns the names of the parameters with weight decay: weights of linears, convolutions and attention projections.

    Biases, norms and embeddings (learned queries, level and position embeddings) have none. The type of the module decides,
    not the parameter's shape: under ZeRO-3 a partitioned parameter has no shape.
    """
    convolution = nn.modules.conv._ConvNd  # torch has no public common base
    kinds = (nn.Linear, convolution, nn.MultiheadAttention, MaskedAttention)
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters(recurse=False)
        if name.endswith("weight")
    }


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, object]]:
    """Returns the optimizer's groups, one for each rate and weight decay that occurs.

    Each has ``params``, ``lr``, ``weight_decay`` and ``name`` (``lora``, ``other/no_decay``, ...).
    """
    rules = rate_rules(config)
    rates = {rule.name: rule.learning_rate for rule in rules} | {"other": config.training.learning_rate}
    parameters = dict(model.named_parameters())
    decaying = decaying_names(model)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, group in group_names(model, rules).items():
        groups.setdefault((group, name in decaying), []).append(parameters[name])
    return [
        {
            "params": members,
            "lr": rates[group],
            "weight_decay": config.training.weight_decay if decays else 0.0,
            "name": group if decays else f"{group}/no_decay",
        }
        for (group, decays), members in sorted(groups.items())
    ]


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Adam:
    """Builds torch's Adam or AdamW over `parameter_groups`, fused if there is a GPU."""
    training = config.training
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[training.optimizer]
    first, second = training.betas
    return kind(
        parameter_groups(model, config),
        lr=training.learning_rate,
        betas=(first, second),
        eps=training.eps,
        amsgrad=training.amsgrad,
        fused=torch.cuda.is_available(),
    )


def epoch_factor(epoch: int, *, decay_epochs: Sequence[int], first_epoch_factor: float) -> float:
    """Returns the factor on every rate in an epoch.

    Source: the public DeRIS code (`first_epoch_factor` 0.5; `decay_epochs` 14 and 18 of 20, for GRES 5 of 6). The paper
    says epochs 15 and 19, which are the first ones at the lower rate.

    Args:
        epoch: from 0.
        decay_epochs: numbers of epochs after which the rates fall to a tenth.
        first_epoch_factor: factor in epoch 0.
    """
    falls = sum(epoch >= number for number in decay_epochs)
    return DECAY**falls * (first_epoch_factor if epoch == 0 else 1.0)


def by_epochs(
    optimizer: torch.optim.Optimizer, *, steps_per_epoch: int, decay_epochs: Sequence[int], first_epoch_factor: float
) -> LambdaLR:
    """Builds the schedule of `training.schedule=epochs`: `epoch_factor` times the rates of the optimizer's groups."""

    def factor(step: int) -> float:
        return epoch_factor(step // steps_per_epoch, decay_epochs=decay_epochs, first_epoch_factor=first_epoch_factor)

    return LambdaLR(optimizer, factor)
