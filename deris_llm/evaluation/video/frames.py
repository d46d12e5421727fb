"""A model's answers to the frames of videos, scored by J and F.

Every frame is answered as an image of its own (protocol `per-frame`); under `evaluation.video_selection=video` the queries that answer
are chosen for the whole video first (protocol `whole-video`). The unit of the means is the expression, as in MeViS, Ref-YouTube-VOS and
Ref-DAVIS17 B: J and F are averaged over its frames, then over all expressions of all videos.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deris_llm.common import ranks
from deris_llm.config import VideoSelection
from deris_llm.config.protocols import Protocol, Rule
from deris_llm.data.masks import decode_segmentation
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.intervals import intervals
from deris_llm.evaluation.metrics import Ratio
from deris_llm.evaluation.outcomes import best_queries, compared
from deris_llm.evaluation.truth import decoded_referents, merged_truth
from deris_llm.evaluation.video.metrics import frame_statistics
from deris_llm.evaluation.video.protocols import Score, frame_score, mean_score
from deris_llm.models.postprocess import FrameChoice, upsampled_masks
from deris_llm.models.video_slots import FrameQueries, chosen_over_video, frame_queries
from deris_llm.structures import DerisOutput, ReferringRecord


@dataclass(frozen=True)
class FrameProtocol:
    """How the numbers of a video are made of a model's answers to its frames."""

    rule: Rule  # which queries answer
    selection: VideoSelection = "frame"  # `evaluation.video_selection`
    resampling: str = "bilinear"  # of the mask logits, as `Protocol.prediction_resampling`

    @property
    def id(self) -> str:
        return "per-frame" if self.selection == "frame" else "whole-video"

    def fingerprint(self) -> str:
        """Returns eight hex digits over all fields, the same on every machine."""
        return _digest([self.id, *self.rule, *([] if self.resampling == "bilinear" else [self.resampling])])

    def fingerprint_of_images(self, protocol: Protocol) -> str:
        """Returns the fingerprint of numbers of frames as images, which are others if queries are chosen for a whole video."""
        own = protocol.fingerprint()
        return own if self.selection == "frame" else _digest([self.id, own])

    def describe(self) -> str:
        """Returns one paragraph that says how the numbers are made."""
        threshold, selection, presence = self.rule
        upsampled = "" if self.resampling == "bilinear" else f"; mask logits are upsampled by {self.resampling}"
        chosen = {
            "frame": "every frame is answered as an image, without the frames before it",
            "video": "every frame is answered as an image, but the queries that answer are chosen for the whole video, by masks that "
            "overlap from frame to frame and mean scores",
        }[self.selection]
        return (
            f"{self.id}: {chosen}. J and F of the masks at the frame's own "
            "size, averaged over the frames of an expression, then over all expressions of all videos; J&F is the mean of the two. A "
            f"frame where neither answer nor truth has a pixel counts 1. Answer: selection {selection}, score above {threshold}, "
            f"presence {presence}{upsampled}. The paper does not say how its Table 12 was made."
        )


def _digest(fields: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:8]


class FrameAnswer(NamedTuple):
    """The answer to one expression in one frame."""

    answer: Answer
    score: Score
    best_query: Score  # of the queries that fit the referents best

    @property
    def phrase_id(self) -> str:
        return self.answer.phrase_id


def compared_frames(
    output: DerisOutput,
    asked: Sequence[ReferringRecord],
    *,
    protocols: Sequence[Protocol],
    is_generalised: bool,
    chosen: Mapping[str, FrameChoice] | None = None,
) -> list[FrameAnswer]:
    """Answers P phrases about frames and compares their masks by J and F, and as those of images.

    Args:
        output: as of `outcomes.compared`.
        asked: the same.
        protocols: the same.
        is_generalised: the same.
        chosen: by phrase id, queries that were chosen over a video (`choices`); None = frame by frame.
    """
    choices = None if chosen is None else [chosen[record.phrase_id] for record in asked]
    answers = compared(output, asked, protocols=protocols, is_generalised=is_generalised, chosen=choices)
    referents = decoded_referents(asked)
    sizes = [(record.height, record.width) for record in asked]
    best = upsampled_masks(output, best_queries(output, referents), sizes)
    found = []
    for record, answer, masks, queries in zip(asked, answers, referents, best, strict=True):
        truth = np.logical_or.reduce(masks, axis=0)
        mask = decode_segmentation(answer.mask, record.height, record.width)
        score = frame_score(truth, mask)
        found.append(FrameAnswer(answer, score, frame_score(truth, np.logical_or.reduce(queries, axis=0))))
    return found


class AskedQueries(NamedTuple):
    """What the queries say of one expression in one frame."""

    phrase_id: str
    queries: FrameQueries


def queries_of_frames(output: DerisOutput, asked: Sequence[ReferringRecord]) -> list[AskedQueries]:
    """Keeps what is needed to choose the queries of P phrases over a video."""
    return [AskedQueries(record.phrase_id, each) for record, each in zip(asked, frame_queries(output), strict=True)]


def choices(found: Iterable[AskedQueries], records: Iterable[ReferringRecord], rule: Rule) -> dict[str, FrameChoice]:
    """Chooses the queries of every expression over its video (`video_slots`).

    Args:
        found: one per record, in any order.
        records: all frames of some videos.
        rule: which queries answer.

    Returns:
        The queries of each frame, by phrase id.
    """
    queries = {each.phrase_id: each.queries for each in found}
    score_threshold, selection, presence_use = rule
    chosen: dict[str, FrameChoice] = {}
    for frames in by_expression(records).values():
        names = [record.phrase_id for record in frames]
        over_video = chosen_over_video(
            (queries[name] for name in names),
            score_threshold=score_threshold,
            selection=selection,
            presence_use=presence_use,
        )
        chosen |= dict(zip(names, over_video, strict=True))
    return chosen


@dataclass(frozen=True, eq=False)
class Expression:
    """One expression of a video with the scores of its frames, in the order of the source's list of frames."""

    video: str
    id: str
    phrase: str
    frames: tuple[str, ...]  # phrase ids, whose records name the images
    scores: tuple[Score, ...]
    best_query: tuple[Score, ...]

    @property
    def score(self) -> Score:
        """Means over the frames."""
        return mean_score(self.scores)

    def to_json(self) -> dict[str, Any]:
        """Returns what a folder of an evaluation keeps; numbers in [0, 1]."""
        return {
            "video": self.video,
            "expression": self.id,
            "phrase": self.phrase,
            "frames": self.frames,
            "J": [round(score.j, 5) for score in self.scores],
            "F": [round(score.f, 5) for score in self.scores],
            "best_query_J": [round(score.j, 5) for score in self.best_query],
            "best_query_F": [round(score.f, 5) for score in self.best_query],
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Expression:
        """Reads what `to_json` wrote."""
        pairs = [zip(tree[f"{name}J"], tree[f"{name}F"], strict=True) for name in ("", "best_query_")]
        scores, best = (tuple(Score(j, f) for j, f in found) for found in pairs)
        return cls(tree["video"], tree["expression"], tree["phrase"], tuple(tree["frames"]), scores, best)


def expressions_of(answers: Iterable[FrameAnswer], records: Sequence[ReferringRecord]) -> list[Expression]:
    """Joins the answers to frames by expression, in the order of the records.

    Args:
        answers: one per record, in any order.
        records: frames of videos.
    """
    by_id = {answer.phrase_id: answer for answer in answers}
    found = []
    for (video, expression), frames in by_expression(records).items():
        scored = [by_id[record.phrase_id] for record in frames]
        found.append(
            Expression(
                video,
                expression,
                scored[0].answer.phrase,
                tuple(record.phrase_id for record in frames),
                tuple(each.score for each in scored),
                tuple(each.best_query for each in scored),
            )
        )
    return found


def by_expression(records: Iterable[ReferringRecord]) -> dict[tuple[str, str], list[ReferringRecord]]:
    """Groups records of frames by video and expression; each group is in the order of the source's list of frames."""
    groups: dict[tuple[str, str], list[ReferringRecord]] = {}
    for record in records:
        assert record.video is not None, "a record of a frame"
        assert record.expression is not None, "a record of a frame"
        groups.setdefault((record.video, record.expression), []).append(record)
    for frames in groups.values():
        frames.sort(key=lambda record: record.frame or 0)
    return groups


def first_frame_held(answers: Iterable[Answer], records: Sequence[ReferringRecord]) -> dict[tuple[str, str], Score]:
    """Scores the answer of each expression's first frame as the answer of all its frames: what a still mask gets.

    Every rank scores its share and gets all.

    Args:
        answers: one per record, in any order.
        records: frames of videos, the same on every rank.

    Returns:
        Means over the frames, by video and expression.
    """
    masks = {answer.phrase_id: answer.mask for answer in answers}
    groups = by_expression(records)
    found = {}
    for key, frames in list(groups.items())[ranks.rank() :: ranks.world_size()]:
        height, width = frames[0].height, frames[0].width
        held = decode_segmentation(masks[frames[0].phrase_id], height, width)
        found[key] = mean_score(frame_score(merged_truth(record), held) for record in frames)
    scores = {key: score for part in ranks.gathered(found) for key, score in part.items()}
    return {key: scores[key] for key in groups}


def video_numbers(expressions: Sequence[Expression]) -> dict[str, Any]:
    """Returns the numbers of a split in percent, and what they were counted over.

    Returns:
        J&F, J, F; recall (share of the frames above 0.5) and decay of J and F; best_query_J&F; ``n_videos``, ``n_expressions``,
        ``n_frames`` (answers, frames times expressions); ``intervals`` {metric: [low, high]}, 95 %, by drawing videos.
    """
    means = np.array([each.score for each in expressions])
    total = mean_score(each.score for each in expressions)  # as `deris-llm score` has it, to the last bit
    numbers: dict[str, Any] = {"J&F": 100 * total.jf}
    for column, name in enumerate(("J", "F")):
        statistics = [frame_statistics([score[column] for score in each.scores]) for each in expressions]
        numbers[name] = 100 * total[column]
        numbers[f"{name}_recall"] = 100 * float(np.mean([s.recall for s in statistics]))
        numbers[f"{name}_decay"] = 100 * float(np.mean([s.decay for s in statistics]))
    numbers["best_query_J&F"] = 100 * mean_score(mean_score(each.best_query) for each in expressions).jf
    numbers["n_videos"] = len({each.video for each in expressions})
    numbers["n_expressions"] = len(expressions)
    numbers["n_frames"] = sum(len(each.scores) for each in expressions)
    ones = np.ones(len(expressions))
    ratios = {"J&F": Ratio(means.mean(axis=1), ones), "J": Ratio(means[:, 0], ones), "F": Ratio(means[:, 1], ones)}
    sure = intervals(ratios, [each.video for each in expressions])
    numbers["intervals"] = {name: interval for name, interval in sure.items() if interval is not None}
    return numbers
