"""Which parameter trains at which rate: globs over names, each trainable parameter in exactly one group."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
from torch import nn

from deris_llm.config import RunConfig
from deris_llm.models.perception.masked_attention import MaskedAttention


@dataclass(frozen=True)
class RateRule:
    """One learning rate and the parameters it is for."""

    name: str  # of the group, in the log
    globs: tuple[str, ...]  # over parameter names
    learning_rate: float
    optional: bool = False  # may match nothing


def rate_rules(config: RunConfig) -> tuple[RateRule, ...]:
    """The rates of a run; a parameter no rule matches has `training.learning_rate`."""
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
    """The group of every trainable parameter.

    Args:
        model: its trainable parameters are those with ``requires_grad``.
        rules: as `rate_rules` gives them.

    Returns:
        parameter name -> group name, in the model's order; ``other`` where no rule matches.

    Raises:
        ValueError: a glob matches no trainable parameter, or a parameter is matched by two rules.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: dict[str, str] = {}
    problems = []
    for rule in rules:
        for glob in rule.globs:
            matches = fnmatch.filter(names, glob)
            if not matches and not rule.optional:
                problems.append(f"group {rule.name!r}: no trainable parameter is called {glob!r}")
            for name in matches:
                if groups.setdefault(name, rule.name) != rule.name:
                    problems.append(f"{name}: in two groups, {groups[name]!r} and {rule.name!r}")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems[:10])
        raise ValueError(
            f"parameter groups: {len(problems)} problem(s); adapt the globs in deris_llm/training/parameters.py "
            f"to the model's names, e.g. {names[:5]}\n{listed}"
        )
    return {name: groups.get(name, "other") for name in names}


def decaying_names(model: nn.Module) -> set[str]:
    """Names of the parameters with weight decay: weights of linears, convolutions and attention projections.

    Biases, norms and embeddings (learned queries, level and position embeddings) have none. Read off the owning
    module, not the shape: under ZeRO-3 a partitioned parameter has no shape to look at.
    """
    convolution = nn.modules.conv._ConvNd  # noqa: SLF001 - torch has no public common base
    kinds = (nn.Linear, convolution, nn.MultiheadAttention, MaskedAttention)
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters(recurse=False)
        if name.endswith("weight")
    }


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, object]]:
    """Optimizer groups: one for each rate and weight decay that occurs.

    Args:
        model: with trainable and frozen parameters set.
        config: its rates and weight decay.

    Returns:
        dicts with ``params``, ``lr``, ``weight_decay`` and ``name`` (``lora``, ``other/no_decay``, ...), never empty.
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
    """The run's Adam or AdamW (torch's own) over `parameter_groups`; fused where there is a GPU."""
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


LORA = ("*.lora_*",)
COGNITION = ("cognition.*",)  # its own weights; what reads its features is in the loopback
CARRIED_OVER = ("perception.pixel_decoder.*", "loopback.query_decoder.*")
BACKBONE = ("perception.backbone.*",)
