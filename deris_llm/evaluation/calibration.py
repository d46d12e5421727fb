"""The score threshold that a sweep over a val split chose: `calibration.json` in the checkpoint folder.

`deris-llm eval --checkpoint DIR --sweep refcoco/val` writes it; from then on everybody who reads the checkpoint asks
`calibrated_config` for its run config, and says with `threshold_source` where the threshold comes from.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from deris_llm.config import RunConfig, load_config

logger = logging.getLogger(__name__)

CALIBRATION_FILE = "calibration.json"
_CONFIG_FILE = "config.yaml"  # of the checkpoint
_RULE = ("selection", "presence")  # what the threshold belongs to


@dataclass(frozen=True)
class Calibration:
    """A threshold, what it is for and what it was chosen by."""

    threshold: float
    selection: str  # evaluation.selection of the sweep: the threshold means nothing under another
    presence: str  # evaluation.presence of the sweep
    split: str  # where it was chosen; numbers on it are a little flattered
    metric: str  # whose maximum it is: mIoU, or gIoU on a generalised dataset
    protocol: str  # id
    fingerprint: str  # of the protocol with this threshold
    n_phrases: int
    date: str  # ISO
    curve: tuple[dict[str, float | None], ...]  # per threshold: {"threshold": ..., metric: percent, ...}, ascending

    @classmethod
    def read(cls, folder: str | Path) -> Self | None:
        """The calibration of a checkpoint folder, None where nobody swept.

        Raises:
            ValueError: the file is there and is none.
        """
        path = Path(folder) / CALIBRATION_FILE
        if not path.is_file():
            return None
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            found = cls(**{**tree, "curve": tuple(tree["curve"])})
            fits = isinstance(found.threshold, float) and 0 < found.threshold < 1
        except (ValueError, TypeError, KeyError) as error:
            tree, fits = f"{type(error).__name__}: {error}", False
        if not fits:
            raise ValueError(
                f"{path}: expected what `deris-llm eval --sweep` writes, got {str(tree)[:200]}: delete the file, or sweep again"
            )
        return found

    def write(self, folder: str | Path) -> Path:
        """Writes it into a checkpoint folder: aside, then renamed."""
        path = Path(folder) / CALIBRATION_FILE
        aside = path.with_name(f"{path.name}.part")
        aside.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
        return path

    def __str__(self) -> str:
        return (
            f"threshold {self.threshold:g} (selection {self.selection}, presence {self.presence}), chosen on {self.split} by "
            f"{self.metric} of {self.n_phrases:,} phrases under protocol `{self.protocol}` ({self.fingerprint}), {self.date}"
        )


def calibrated_config(folder: str | Path, config: RunConfig, overrides: Sequence[str] = ()) -> RunConfig:
    """The run config of a checkpoint with the threshold that a sweep chose for it.

    Unchanged where nobody swept, where the user set the threshold, and where the user set another selection or use of
    presence than that of the sweep. Set by the user is what ``overrides`` name and what differs from the checkpoint's own
    ``config.yaml``.

    Args:
        folder: of the checkpoint.
        config: of the checkpoint, with the user's changes.
        overrides: the user's ``section.field=value``, as `load_config` takes them.

    Raises:
        ValueError: the folder's `calibration.json` is unusable.
    """
    found = Calibration.read(folder)
    return config if found is None or _not_used(found, folder, config, overrides) else _applied(found, config)


def threshold_source(folder: str | Path, config: RunConfig, overrides: Sequence[str] = ()) -> str:
    """Where the threshold of `calibrated_config` comes from, as a sentence part that stands with every number.

    Args:
        folder: of the checkpoint.
        config: the same as for `calibrated_config`, or what that gave.
        overrides: the same.
    """
    found = Calibration.read(folder)
    evaluation = config.evaluation
    if found is None:
        where = "set by the user" if _set_by_user("score_threshold", folder, config, overrides) else "of the run config"
        return f"threshold {evaluation.score_threshold:g}, {where}, not calibrated"
    reason = _not_used(found, folder, config, overrides)
    return (
        f"threshold {evaluation.score_threshold:g}: {reason}, so not the calibrated {found.threshold:g}"
        if reason
        else str(found)
    )


def calibration_notes(folder: str | Path, config: RunConfig, overrides: Sequence[str] = ()) -> dict[str, list[str]]:
    """What must be read with the numbers of the swept split, by split; empty where the calibration is not used.

    Args:
        folder: of the checkpoint.
        config: as for `calibrated_config`.
        overrides: the same.
    """
    found = Calibration.read(folder)
    if found is None or _not_used(found, folder, config, overrides):
        return {}
    return {found.split: ["the threshold was chosen on this split, which flatters it a little"]}


def _applied(found: Calibration, config: RunConfig) -> RunConfig:
    changes = {"score_threshold": found.threshold, "selection": found.selection, "presence": found.presence}
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **changes))


def _not_used(found: Calibration, folder: str | Path, config: RunConfig, overrides: Sequence[str]) -> str | None:
    """Why the user's wishes leave no place for the calibration; None = it applies."""
    evaluation = config.evaluation
    if evaluation.score_threshold != found.threshold and _set_by_user("score_threshold", folder, config, overrides):
        return "set by the user"
    for name in _RULE:
        if getattr(evaluation, name) != getattr(found, name) and _set_by_user(name, folder, config, overrides):
            return f"the user set evaluation.{name}={getattr(evaluation, name)}, the sweep had {getattr(found, name)}"
    return None


def _set_by_user(name: str, folder: str | Path, config: RunConfig, overrides: Sequence[str]) -> bool:
    if any(text.partition("=")[0].strip() == f"evaluation.{name}" for text in overrides):
        return True
    saved = Path(folder) / _CONFIG_FILE
    return saved.is_file() and getattr(load_config(saved).evaluation, name) != getattr(config.evaluation, name)


def choose(curve: Sequence[Mapping[str, Any]], metric: str, present: float | None = None) -> float:
    """The threshold of the best value; of several equal ones the present one, else the middle one, farthest from a drop."""
    best = max(point[metric] for point in curve)
    tied = [point["threshold"] for point in curve if point[metric] == best]
    if present is not None and present in tied:
        return present
    return tied[(len(tied) - 1) // 2]
