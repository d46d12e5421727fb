"""The answer to a phrase as it is kept: made from a model's output or read from anybody's file, one JSON object per line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from deris_llm.common.words import shortened
from deris_llm.evaluation.boxes import Box
from deris_llm.evaluation.metrics import Outcome, Overlap

Rle = dict[str, Any]
"""COCO's run-length encoding: ``{"size": [h, w], "counts": ...}``."""


_NOTHING: Mapping[str, Any] = {}  # read-only


class Answer(NamedTuple):
    """The answer to one phrase and how it compares with the truth.

    A tuple, because a frozen dataclass of this size takes ten times as long to make, and files have 100,000 lines.

    The first fields are the keys of a line of a predictions file; what is unknown is left out there. Percentages and
    ``oracle_px`` are by protocol id.
    """

    phrase_id: str = ""
    image: str = ""  # file name
    image_id: str = ""  # equal for phrases of one image
    phrase: str = ""  # as it was asked: the swapped one in a control run
    # of all referents, at the image's own size, under the first protocol. Of a file that somebody handed in: unchecked,
    # COCO RLE, polygons, the path of a PNG, or None for no answer (`submissions.rle_of`)
    mask: Any = None
    iou: Mapping[str, float] = _NOTHING  # percent, by quadrant (`metrics`)
    oracle_iou: Mapping[str, float] = _NOTHING  # percent, of the best query of each referent
    top_scores: tuple[float, ...] = ()  # the highest referring scores, descending
    presence: float | None = None  # probability that a target exists
    has_target: bool = True  # the truth
    says_target: bool | None = True  # a query was selected; None in a file that leaves it to the mask
    oracle_px: Mapping[str, Overlap] = _NOTHING  # of the best query of each referent
    boxes: tuple[Box, ...] | None = None  # around each selected query's mask; None where phrases always have a target
    answers: Mapping[str, Answer] = _NOTHING  # under protocols that compare another mask than `mask`

    outcomes: Mapping[str, Outcome] = _NOTHING  # against the truth by protocol id; not in files
    truth_px: int = 0  # area of the referents together, px of the original image; not in files
    where: str = ""  # line or file that it was read from, for messages

    def says_target_under(self, protocol: str) -> bool:
        """Returns whether there is an answer under a protocol."""
        return bool(self.answers.get(protocol, self).says_target)

    def to_json(self) -> dict[str, Any]:
        """Returns one line of the predictions file of an evaluation; `score` makes the same numbers of it again."""
        line = {
            "phrase_id": self.phrase_id,
            "image": self.image,
            "image_id": self.image_id,
            "phrase": self.phrase,
            "mask": self.mask,
            "iou": {name: round(value, 3) for name, value in self.iou.items()},
            "oracle_iou": {name: round(value, 3) for name, value in self.oracle_iou.items()},
            "top_scores": [round(score, 4) for score in self.top_scores],
            "presence": None if self.presence is None else round(self.presence, 4),
            "has_target": self.has_target,
            "says_target": self.says_target,
            "oracle_px": {name: [o.intersection, o.union] for name, o in self.oracle_px.items()},
        }
        if self.boxes is not None:
            line["boxes"] = self.boxes
        if self.answers:
            line["answers"] = {
                name: {"mask": other.mask, "says_target": other.says_target}
                | ({} if other.boxes is None else {"boxes": other.boxes})
                for name, other in self.answers.items()
            }
        return line

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], where: str = "") -> Answer:
        """Reads a line: `to_json`'s, that of `deris-llm predict`, or anybody's; other keys are ignored.

        The mask is taken as it is (`submissions.rle_of` checks it), and so are the names of phrase and image, which
        `submissions` looks up.

        Args:
            tree: the line's JSON object.
            where: line or file, for messages.

        Raises:
            ValueError: a key with a value of another kind.
        """
        if "mask" not in tree:
            raise ValueError("expected a mask (null for no answer), got none")
        score, listed = _number(tree, "score"), tree.get("top_scores")
        top_scores = tuple(_numbers(listed, "top_scores")) if listed else ()
        answers, oracle = tree.get("answers") or {}, tree.get("oracle_px") or {}
        if not isinstance(answers, dict) or not all(isinstance(value, dict) for value in answers.values()):
            raise ValueError(f"answers: expected {{protocol: {{mask, says_target}}}}, got {shortened(answers)}")
        if not isinstance(oracle, dict):
            raise ValueError(f"oracle_px: expected {{protocol: [intersection, union]}}, got {shortened(oracle)}")
        image = str(tree.get("image", ""))
        return cls(
            phrase_id=str(tree.get("phrase_id", "")),
            image=image,
            image_id=str(tree.get("image_id", image)),
            phrase=str(tree.get("phrase", "")),
            mask=tree["mask"],
            iou=_percents(tree.get("iou")),
            oracle_iou=_percents(tree.get("oracle_iou")),
            top_scores=top_scores or (() if score is None else (score,)),
            presence=_number(tree, "presence"),
            has_target=tree.get("has_target") is not False,
            says_target=_says_target(tree),
            oracle_px={name: _overlap(value) for name, value in oracle.items()},
            boxes=_boxes(tree),
            answers={
                name: cls(
                    mask=value.get("mask"),
                    says_target=_says_target(value),
                    boxes=_boxes(value),
                    where=f"{where}, answers.{name}",
                )
                for name, value in answers.items()
            },
            where=where,
        )


def outcome_fields(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Returns the fields of an `Answer` that say how it compares with the truth under each protocol."""
    oracles = {name: outcome.oracle for name, outcome in outcomes.items() if outcome.oracle is not None}
    return {
        "iou": {name: 100 * outcome.iou for name, outcome in outcomes.items()},
        "oracle_iou": {name: 100 * found.iou for name, found in oracles.items()},
        "oracle_px": oracles,
        "outcomes": outcomes,
    }


def _says_target(tree: Mapping[str, Any]) -> bool | None:
    value = tree.get("says_target")
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"says_target: expected true or false, got {shortened(value)}")
    return value


def _number(tree: Mapping[str, Any], key: str) -> float | None:
    value = tree.get(key)
    return None if value is None else _numbers([value], key)[0]


def _numbers(values: object, key: str) -> list[float]:
    if not isinstance(values, list) or not all(_is_number(value) for value in values):
        raise ValueError(f"{key}: expected finite numbers, got {shortened(values)}")
    return [float(value) for value in values]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _percents(tree: object) -> dict[str, float]:
    """Numbers by protocol id; of a file that means something else by this key, none."""
    if not isinstance(tree, dict) or not all(_is_number(value) for value in tree.values()):
        return {}
    return {name: float(value) for name, value in tree.items()}


def _boxes(tree: Mapping[str, Any]) -> tuple[Box, ...] | None:
    boxes = tree.get("boxes")
    if boxes is None:
        return None
    if not isinstance(boxes, list) or not all(isinstance(box, list) and len(box) == 4 for box in boxes):
        raise ValueError(f"boxes: expected [[x0, y0, x1, y1], ...] in px, got {shortened(boxes)}")
    found = [_numbers(box, "boxes") for box in boxes]
    if any(x0 > x1 or y0 > y1 for x0, y0, x1, y1 in found):
        raise ValueError(f"boxes: expected x0 <= x1 and y0 <= y1, got {shortened(boxes)}")
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in found)


def _overlap(value: object) -> Overlap:
    match value:
        case [int(intersection), int(union)] if 0 <= intersection <= union:
            return Overlap(intersection, union)
    raise ValueError(f"oracle_px: expected [intersection, union] in px, got {shortened(value)}")
