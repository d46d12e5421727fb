"""The score threshold that a sweep over a val split chose: `calibration.json` in the checkpoint folder.

`deris-llm eval --checkpoint DIR --sweep refcoco/val` writes it. From then on every command that reads the checkpoint gets its
threshold, and where that comes from, by `calibrated`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from deris_llm.common.folders import replace_text
from deris_llm.common.strict_files import json_of
from deris_llm.config import RunConfig, load_config

CALIBRATION_FILE = "calibration.json"
_CONFIG_FILE = "config.yaml"  # of the checkpoint


@dataclass(frozen=True)
class Calibration:
    """A threshold, the rule it belongs to, and how it was chosen."""

    threshold: float
    selection: str  # evaluation.selection of the sweep: the threshold is meaningless under another
    presence: str  # evaluation.presence of the sweep
    split: str  # where it was chosen; numbers on it are slightly optimistic
    metric: str  # that it maximises: mIoU, or gIoU on a generalised dataset
    protocol: str  # id
    fingerprint: str  # of the protocol with this threshold
    n_phrases: int
    date: str  # ISO
    curve: tuple[dict[str, float | None], ...]  # per threshold: {"threshold": ..., metric: percent, ...}, ascending

    @classmethod
    def read(cls, folder: str | Path) -> Self | None:
        """Reads the calibration of a checkpoint folder; None if no sweep was run.

        Raises:
            ValueError: the file holds something else.
        """
        path = Path(folder) / CALIBRATION_FILE
        if not path.is_file():
            return None
        try:
            tree = json_of(path.read_text(encoding="utf-8"))
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
        """Writes the file into a checkpoint folder."""
        path = Path(folder) / CALIBRATION_FILE
        replace_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        return path

    def __str__(self) -> str:
        return (
            f"threshold {self.threshold:g} (selection {self.selection}, presence {self.presence}), chosen on {self.split} by "
            f"{self.metric} of {self.n_phrases:,} phrases under protocol `{self.protocol}` ({self.fingerprint}), {self.date}"
        )


class Calibrated(NamedTuple):
    """A run config with the threshold that is used."""

    config: RunConfig
    source: str  # where the threshold comes from, in words; stands beside every number
    notes: dict[str, list[str]]  # by split: what must be read with its numbers


def calibrated(folder: str | Path, config: RunConfig, overrides: Sequence[str] = ()) -> Calibrated:
    """Returns the run config of a checkpoint with the threshold that a sweep chose for it.

    The config is unchanged if there was no sweep, if the user set the threshold, or if the user set another selection or
    presence rule than the sweep's. A field is set by the user if ``overrides`` name it or if it differs from the checkpoint's
    own ``config.yaml``.

    Args:
        folder: of the checkpoint.
        config: of the checkpoint, with the user's changes.
        overrides: the user's ``section.field=value``, as `load_config` takes them.

    Raises:
        ValueError: the folder's `calibration.json` is unusable.
    """
    found, evaluation = Calibration.read(folder), config.evaluation

    def set_by_user(name: str) -> bool:
        if any(text.partition("=")[0].strip() == f"evaluation.{name}" for text in overrides):
            return True
        saved = Path(folder) / _CONFIG_FILE
        return saved.is_file() and getattr(load_config(saved).evaluation, name) != getattr(evaluation, name)

    if found is None:
        where = "set by the user" if set_by_user("score_threshold") else "of the run config"
        return Calibrated(config, f"threshold {evaluation.score_threshold:g}, {where}, not calibrated", {})
    reason = None
    if evaluation.score_threshold != found.threshold and set_by_user("score_threshold"):
        reason = "set by the user"
    for name in ("selection", "presence"):
        if reason is None and getattr(evaluation, name) != getattr(found, name) and set_by_user(name):
            reason = f"the user set evaluation.{name}={getattr(evaluation, name)}, the sweep had {getattr(found, name)}"
    if reason is not None:
        source = f"threshold {evaluation.score_threshold:g}: {reason}, so not the calibrated {found.threshold:g}"
        return Calibrated(config, source, {})
    used = dataclasses.replace(
        evaluation, score_threshold=found.threshold, selection=found.selection, presence=found.presence
    )
    note = "the threshold was chosen on this split, so its numbers are slightly optimistic"
    return Calibrated(dataclasses.replace(config, evaluation=used), str(found), {found.split: [note]})


def choose(curve: Sequence[Mapping[str, Any]], metric: str, present: float | None = None) -> float:
    """Returns the best threshold; of equally good ones the present one, else the middle one, farthest from a drop."""
    best = max(point[metric] for point in curve)
    tied = [point["threshold"] for point in curve if point[metric] == best]
    if present is not None and present in tied:
        return present
    return tied[(len(tied) - 1) // 2]
