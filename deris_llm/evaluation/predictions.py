"""Answers to phrases with how good they are, and the numbers of a split that they add up to.

Whoever answers, a model (`evaluator`) or somebody's file (`score`), gives `PhrasePrediction`; from there on everything is
the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deris_llm.config.protocols import Protocol
from deris_llm.evaluation.boxes import boxes_of_masks
from deris_llm.evaluation.gres_metrics import GrecMetrics, GrecOutcome, GresMetrics, GresOutcome, baseline_outcomes
from deris_llm.evaluation.metrics import Overlap, RisMetrics

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in px of the original picture."""


@dataclass(frozen=True)
class OtherAnswer:
    """The answer under a protocol that compares another mask: of another size, or chosen by another rule."""

    mask: dict[str, Any]  # COCO RLE at the protocol's size
    says_target: bool
    instance_boxes: (
        tuple[Box, ...] | None
    )  # around the selected queries' masks; None where phrases always have a target


@dataclass(frozen=True)
class PhrasePrediction:
    """The answer to one phrase and how good it is."""

    phrase_id: str
    image: str  # file name of the picture
    image_id: str
    phrase: str  # as it was asked (in the control run: the swapped one)
    mask: dict[str, Any]  # COCO RLE of the merged mask at the original size, under the first protocol
    overlaps: dict[str, Overlap]  # by protocol id
    # of the queries that fit the referents best, one each, by protocol id; empty where a file does not say
    oracle_overlaps: dict[str, Overlap]
    top_scores: tuple[float, ...]  # the highest referring scores, descending
    presence: float | None  # probability that a target exists; None where a file does not say
    has_target: bool = True
    says_target: bool = True  # some query was selected
    areas: dict[str, tuple[int, int]] = dataclasses.field(
        default_factory=dict
    )  # px of truth, of picture, by protocol id
    boxes: dict[str, GrecOutcome] = dataclasses.field(default_factory=dict)  # by protocol id; empty as instance_boxes
    instance_boxes: tuple[Box, ...] | None = None  # as in `OtherAnswer`
    other_answers: dict[str, OtherAnswer] = dataclasses.field(default_factory=dict)  # by protocol id, where not `mask`
    truth_px: int = 0  # area of the referents together, px of the original picture

    def outcome(self, protocol: str) -> GresOutcome:
        """What the phrase adds to the metrics of a generalised dataset; its ``iou`` holds for every dataset."""
        return GresOutcome(
            self.overlaps[protocol], has_target=self.has_target, says_target=self.says_target_under(protocol)
        )

    def oracle_outcome(self, protocol: str) -> GresOutcome:
        """The same of the queries that fit best, which know whether there is a target."""
        return GresOutcome(self.oracle_overlaps[protocol], has_target=self.has_target, says_target=self.has_target)

    def says_target_under(self, protocol: str) -> bool:
        """Whether there is an answer under a protocol's rule."""
        other = self.other_answers.get(protocol)
        return self.says_target if other is None else other.says_target

    def to_json(self) -> dict[str, Any]:
        """One line of the predictions file; `score` makes the same numbers of it again."""
        line = {
            "phrase_id": self.phrase_id,
            "image": self.image,
            "image_id": self.image_id,
            "phrase": self.phrase,
            "mask": self.mask,
            "iou": {name: round(100 * self.outcome(name).iou, 3) for name in self.overlaps},
            "oracle_iou": {name: round(100 * found.iou, 3) for name, found in self.oracle_overlaps.items()},
            "top_scores": [round(score, 4) for score in self.top_scores],
            "presence": None if self.presence is None else round(self.presence, 4),
            "has_target": self.has_target,
            "says_target": self.says_target,
            "oracle_px": {name: [o.intersection, o.union] for name, o in self.oracle_overlaps.items()},
        }
        if self.instance_boxes is not None:
            line["boxes"] = self.instance_boxes
        if self.other_answers:
            line["answers"] = {
                name: {"mask": other.mask, "says_target": other.says_target}
                | ({} if other.instance_boxes is None else {"boxes": other.instance_boxes})
                for name, other in self.other_answers.items()
            }
        return line


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers in percent by protocol id, and the predictions they come from, in the order of the records."""

    # protocol id -> metric -> percent or count. RefCOCO: mIoU, oIoU, Pr@0.5 ... Pr@0.9, oracle_mIoU; gRefCOCO: gIoU,
    # cIoU, N-acc, T-acc, Pr@0.7 ... Pr@0.9, F1, oracle_gIoU, {always,never}_empty_{gIoU,cIoU}, n_no_target; None where
    # there is nothing to take a number of. Both: n_phrases, n_images, and n_dropped where the protocol drops misses.
    numbers: dict[str, dict[str, float | None]]
    predictions: list[PhrasePrediction]
    notes: tuple[str, ...] = ()  # why a number is None, or not of all phrases
    is_generalised: bool = False

    @classmethod
    def of(
        cls, predictions: list[PhrasePrediction], protocols: Sequence[Protocol], *, is_generalised: bool = False
    ) -> EvaluationResult:
        """Summarises the predictions of a whole split with the metrics of its dataset."""
        counts = {"n_phrases": len(predictions), "n_images": len({p.image_id for p in predictions})}
        numbers: dict[str, dict[str, float | None]] = {}
        notes: dict[str, None] = {}
        for protocol in protocols:
            name, counted = protocol.id, counted_under(protocol, predictions)
            if is_generalised:
                metrics = GresMetrics.of([p.outcome(name) for p in counted])
                numbers[name] = metrics.named() | _gres_extras(counted, name)
                notes |= dict.fromkeys(metrics.notes)
            else:
                numbers[name] = _ris_numbers(counted, name)
            numbers[name] |= counts
            if protocol.miss == "dropped":
                numbers[name]["n_dropped"] = dropped = len(predictions) - len(counted)
                notes[f"{name}: {dropped:,} of {len(predictions):,} phrases without an answer are DROPPED"] = None
        return cls(numbers, predictions, tuple(notes), is_generalised)

    def write_jsonl(self, path: str | Path) -> None:
        """One JSON object a line; masks are COCO RLE at the original size."""
        with Path(path).open("w", encoding="utf-8", errors="backslashreplace") as file:
            for prediction in self.predictions:
                file.write(json.dumps(prediction.to_json(), ensure_ascii=False) + "\n")


def counted_under(protocol: Protocol, predictions: Sequence[PhrasePrediction]) -> Sequence[PhrasePrediction]:
    """The phrases that a protocol takes its numbers of: all, or those with an answer."""
    if protocol.miss == "empty_mask":
        return predictions
    return [p for p in predictions if p.says_target_under(protocol.id)]


def check_misses(protocols: Sequence[Protocol], where: str, *, is_generalised: bool) -> None:
    """Refuses to drop "no target" where it is an answer like any other.

    Raises:
        ValueError: a protocol drops misses on a generalised dataset.
    """
    dropping = [protocol.id for protocol in protocols if protocol.miss == "dropped"]
    if is_generalised and dropping:
        raise ValueError(
            f"protocol {', '.join(dropping)} on {where}: expected miss=empty_mask on a dataset whose phrases may name nothing, got "
            "dropped: there no answer is an answer. Take another protocol"
        )


def boxes_around(masks: np.ndarray) -> tuple[Box, ...]:
    """Boxes around instance masks, bool (N, h, w), as plain numbers; empty masks have none."""
    return tuple((box[0], box[1], box[2], box[3]) for box in boxes_of_masks(masks).tolist())


def box_array(boxes: Sequence[Box] | None) -> np.ndarray:
    """float64 (N, 4), as `GrecOutcome.of` takes them."""
    return np.array(boxes or (), dtype=np.float64).reshape(-1, 4)


def _ris_numbers(predictions: Sequence[PhrasePrediction], protocol: str) -> dict[str, float | None]:
    if not predictions:
        return dict.fromkeys([*RisMetrics.of([]).named(), "oracle_mIoU"])
    numbers: dict[str, float | None] = dict(RisMetrics.of([p.overlaps[protocol] for p in predictions]).named())
    if has_oracle(predictions, protocol):
        numbers["oracle_mIoU"] = RisMetrics.of([p.oracle_overlaps[protocol] for p in predictions]).mean_iou
    return numbers


def has_oracle(predictions: Sequence[PhrasePrediction], protocol: str) -> bool:
    """Whether the best queries are known of every phrase: of a file of predictions often not."""
    return bool(predictions) and all(protocol in p.oracle_overlaps for p in predictions)


def _gres_extras(predictions: Sequence[PhrasePrediction], protocol: str) -> dict[str, float | None]:
    """What stands beside the metrics of a generalised split: boxes, oracle, and what answers without looking get."""
    found: dict[str, float | None] = {}
    if all(protocol in p.boxes for p in predictions):
        found["F1"] = GrecMetrics.of([p.boxes[protocol] for p in predictions]).f1
    if has_oracle(predictions, protocol):
        found["oracle_gIoU"] = GresMetrics.of([p.oracle_outcome(protocol) for p in predictions]).giou
    for name, outcomes in baseline_outcomes([p.areas[protocol] for p in predictions]).items():
        baseline = GresMetrics.of(outcomes)
        key = name.replace(" ", "_")
        found |= {f"{key}_gIoU": baseline.giou, f"{key}_cIoU": baseline.ciou}
    return found | {"n_no_target": sum(not p.has_target for p in predictions)}
