"""Reads a DeepSpeed JSON, which configures ZeRO only: whatever the run config decides is "auto" there."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from deris_llm.common.strict_files import parse_json, read_text
from deris_llm.config import RunConfig

DEFAULT_FILE = Path(__file__).parent / "ds_configs" / "zero2.json"
_KNOWN = ("bf16", "fp16", "zero_optimization", "zero_force_ds_cpu_optimizer", "gradient_clipping", "train_batch_size")
_OBJECTS = (("bf16",), ("fp16",), ("zero_optimization",), ("zero_optimization", "offload_optimizer"))


def read_deepspeed_config(path: Path, config: RunConfig, *, num_ranks: int) -> dict[str, Any]:
    """Reads a DeepSpeed JSON and checks that it does not contradict the run config.

    Raises:
        ValueError: no such file, not JSON, or contradictions; lists all of them with both values.
    """
    if not path.is_file():
        folder = path.parent if any(path.parent.glob("*.json")) else DEFAULT_FILE.parent
        raise ValueError(
            f"--deepspeed {path}: expected a JSON file, found none there; {folder} has "
            f"{', '.join(sorted(p.name for p in folder.glob('*.json')))}"
        )
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(
            f"--deepspeed {path}: expected JSON, got {error}; compare it with ds_configs/zero2.json"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"--deepspeed {path}: expected a JSON object, got {type(content).__name__}; compare it with ds_configs/zero2.json"
        )
    problems = _misshapen(content) or contradictions(content, config, num_ranks=num_ranks)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(
            f"--deepspeed {path} and run config {config.name!r}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n{listed}"
        )
    return content


def _misshapen(content: dict[str, Any]) -> list[str]:
    """Lists misspelt keys, which DeepSpeed would ignore, and sections that are not objects."""
    found: list[str] = []
    for key in content.keys() - set(_KNOWN):
        if near := difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.85):
            found.append(f'"{key}": unknown; did you mean "{near[0]}"?')
    for path in _OBJECTS:
        value: Any = content
        for key in path:
            value = value.get(key, {}) if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            found.append(f'"{".".join(path)}": expected an object {{...}}, got {value!r}')
    return found


def contradictions(content: dict[str, Any], config: RunConfig, *, num_ranks: int) -> list[str]:
    """Lists where a DeepSpeed config contradicts the run config, with both values."""
    training = config.training
    found = [
        f'"{section}": the run config decides it ({fields}); remove the section from the JSON'
        for section, fields in (
            (
                "optimizer",
                f"{training.optimizer} with training.betas, eps, amsgrad, weight_decay and the rates training.*learning_rate",
            ),
            ("scheduler", "training.schedule, warmup_ratio, decay_epochs, first_epoch_factor"),
            ("amp", "training.precision"),
        )
        if section in content
    ]
    images_per_step = training.images_per_device * training.accumulation * num_ranks
    for key, value, names in (
        ("train_micro_batch_size_per_gpu", training.images_per_device, "training.images_per_device"),
        ("gradient_accumulation_steps", training.accumulation, "training.accumulation"),
        (
            "train_batch_size",
            images_per_step,
            f"training.images_per_device x training.accumulation x {num_ranks} ranks",
        ),
        ("gradient_clipping", training.max_grad_norm, "training.max_grad_norm"),
    ):
        if content.get(key, "auto") not in ("auto", value):
            found.append(f'"{key}": {content[key]} in the JSON, but {names} is {value}; write "auto"')
    for section, is_on in (("bf16", training.precision == "bf16"), ("fp16", False)):
        enabled = content.get(section, {}).get("enabled", "auto" if section == "bf16" else False)
        if enabled not in ("auto", is_on):
            found.append(
                f'"{section}.enabled": {enabled} in the JSON, but training.precision is {training.precision}; write "auto"'
            )
    if training.precision == "bf16" and "bf16" not in content:
        found.append('"bf16": missing in the JSON, but training.precision is bf16; add {"enabled": "auto"}')
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        found.append(f'"zero_optimization.stage": expected 0, 1, 2 or 3, got {stage!r}')
    if stage == 3 and config.cognition.quantization != "none":
        found.append(
            f'"zero_optimization.stage": 3 in the JSON, but cognition.quantization is {config.cognition.quantization}, whose packed '
            "weights cannot be partitioned; use ds_configs/zero2.json"
        )
    if stage == 0 and training.precision == "bf16":
        found.append(
            '"zero_optimization.stage": 0 in the JSON, but training.precision is bf16, for which DeepSpeed without ZeRO takes '
            "a wrong first step; use stage 1, or no --deepspeed"
        )
    offloads = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if offloads and content.get("zero_force_ds_cpu_optimizer", True):
        found.append(
            '"zero_optimization.offload_optimizer": DeepSpeed would compile its own Adam, but ours is torch\'s; '
            'add "zero_force_ds_cpu_optimizer": false'
        )
    return found
