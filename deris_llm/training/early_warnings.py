"""Says in plain words, once each, what looks wrong while a run trains: from the numbers that are logged anyway."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deris_llm.config import RunConfig
from deris_llm.training.inputs_sheet import INPUTS_FILE

logger = logging.getLogger(__name__)

_RECENT = 5  # log lines that count as now
_MIN_STEPS = 100  # before this, a new loopback may do anything
_RISING = 1.5  # times the lowest loss so far
_NOT_FALLEN = 0.95  # of the loss of the first log lines
_EXPLODED = 20.0  # times the usual gradient norm
_EMPTY, _EVERYTHING = 0.0005, 0.95  # share of the image


@dataclass(frozen=True)
class LogLine:
    """Numbers of the steps since the last log line, means over all ranks."""

    step: int
    loss: float
    gradient_norm: float | None
    says_target: float  # share of phrases
    no_target: float  # share of phrases that have no target
    mask_area: float  # share of the image that the mask of the best query covers, of phrases with a target


def warnings_of(lines: Sequence[LogLine], config: RunConfig) -> dict[str, str]:
    """Returns what looks wrong, by name.

    Args:
        lines: all since the start of training, at least one.
        config: of the run.
    """
    checks: dict[str, Callable[[Sequence[LogLine], RunConfig], str | None]] = {
        "rising": _rising,
        "gradient": _gradient,
        "flat": _flat,
        "presence": _presence,
        "masks": _masks,
    }
    found = {name: text for name, check in checks.items() if (text := check(lines, config)) is not None}
    if "rising" in found:
        found.pop("flat", None)  # the same observation
    return found


def _rising(lines: Sequence[LogLine], config: RunConfig) -> str | None:
    if len(lines) < 2 * _RECENT:
        return None
    means = [fmean(line.loss for line in lines[i : i + _RECENT]) for i in range(len(lines) - _RECENT + 1)]
    now, lowest = means[-1], min(means)
    if now < _RISING * lowest:
        return None
    return (
        f"the loss rises: {lowest:.3g} at its lowest, {now:.3g} now. The learning rate is probably too high; try --set "
        f"training.learning_rate={config.training.learning_rate / 3:.1e} (the other learning rates in proportion)"
    )


def _gradient(lines: Sequence[LogLine], config: RunConfig) -> str | None:
    norms = [line.gradient_norm for line in lines if line.gradient_norm is not None]
    if len(norms) < 2 * _RECENT:
        return None
    usual, now = median(norms[:-_RECENT]), median(norms[-_RECENT:])
    if now < _EXPLODED * max(usual, config.training.max_grad_norm):
        return None
    return (
        f"the gradient norm explodes: {usual:.3g} before, {now:.3g} now (it is clipped to training.max_grad_norm="
        f"{config.training.max_grad_norm:g}). Try a learning rate of {config.training.learning_rate / 3:.1e} or a longer "
        "training.warmup_ratio"
    )


def _flat(lines: Sequence[LogLine], config: RunConfig) -> str | None:
    if config.training.start_from or not _is_late(lines):  # a trained model has little left to lose
        return None
    first, now = (fmean(line.loss for line in part) for part in (lines[:_RECENT], lines[-_RECENT:]))
    if now < _NOT_FALLEN * first:
        return None
    return (
        f"the loss has not fallen: {first:.3g} at first, {now:.3g} at step {lines[-1].step}. Look at {INPUTS_FILE} in the run's "
        "folder; if masks and phrases belong together there, try --overfit 8, and a learning rate three times as high"
    )


def _presence(lines: Sequence[LogLine], config: RunConfig) -> str | None:
    recent = lines[-_RECENT:]
    share = fmean(line.no_target for line in recent)
    if not _is_late(lines) or share < 0.02 or min(line.says_target for line in recent) < 0.999:
        return None
    return (
        f"the model says of every phrase that it has a target, although {share:.0%} of the training phrases have none. Try a higher "
        "criterion.presence_weight, or more phrases without a target (data.conversion.rate)"
    )


def _masks(lines: Sequence[LogLine], config: RunConfig) -> str | None:
    area = fmean(line.mask_area for line in lines[-_RECENT:])
    if not _is_late(lines) or _EMPTY <= area <= _EVERYTHING:
        return None
    what = "are empty" if area < _EMPTY else "cover the whole image"
    return (
        f"the predicted masks {what} ({area:.2%} of the image on average). Look at {INPUTS_FILE} in the run's folder: do the masks "
        "lie on the objects there? Then try --overfit 8 and a lower learning rate"
    )


def _is_late(lines: Sequence[LogLine]) -> bool:
    return len(lines) >= 2 * _RECENT and lines[-1].step - lines[0].step >= _MIN_STEPS


class EarlyWarnings(TrainerCallback):
    """Logs each warning of `warnings_of` once per start of a run.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._lines: list[LogLine] = []
        self._said: set[str] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Looks at the newest numbers."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        shares = [logs[f"predicted/{name}"] for name in ("says_target", "no_target", "mask_area")]
        self._lines.append(LogLine(state.global_step, logs["loss"], logs.get("grad_norm"), *shares))
        for name, text in warnings_of(self._lines, self.config).items():
            if name not in self._said:
                self._said.add(name)
                logger.warning("step %d: %s", state.global_step, text)
