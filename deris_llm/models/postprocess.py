"""Turns the logits of the last round into answers: selected queries, their masks, and the union of these masks.

Letters: P phrases, Q queries, S selected queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deris_llm.config import PresenceUse, Selection
from deris_llm.structures import DerisOutput, MaskUpsampling

GATE = 0.5
"""Under the presence rule `gate`, a phrase is answered if its presence probability is at least this."""

_MOST_PIXELS = 2**26  # upsampled at a time: 256 MiB of float32, five masks of an image with 12 megapixels


@dataclass(frozen=True, eq=False)
class PhraseAnswer:
    """The model's answer to one phrase."""

    mask: np.ndarray  # bool (h, w) at the asked size: union of the instance masks; all False = no target
    instance_masks: np.ndarray  # bool (S, h, w), one per selected query
    query_index: tuple[int, ...]  # S selected queries, best first; those with an empty mask are left out
    referring_scores: np.ndarray  # float32 (Q,) in [0, 1]
    presence: float  # probability that a target exists, in [0, 1]
    score_threshold: float = 0.0  # that the scores were compared with
    is_guess: bool = False  # no selected query is above the threshold: the best one was selected

    @property
    def says_target(self) -> bool:
        """Whether a query answers with a mask, i.e. the phrase names something in the image."""
        return bool(self.query_index)

    @property
    def verdict(self) -> Literal["found", "best guess", "nothing"]:
        """`found` above the threshold, `best guess` below it, `nothing` for an empty mask."""
        if not self.says_target:
            return "nothing"
        return "best guess" if self.is_guess else "found"

    @property
    def score(self) -> float:
        """Highest referring score of all queries, selected or not."""
        return float(self.referring_scores.max())

    @property
    def instance_scores(self) -> tuple[float, ...]:
        """Referring scores of the selected queries, best first."""
        return tuple(float(self.referring_scores[query]) for query in self.query_index)


class AnswerRule(TypedDict):
    """When a query joins an answer: keyword arguments of `answer_masks`, `answering_queries` and `VideoSlots`."""

    score_threshold: float
    selection: Selection
    presence_use: PresenceUse


class FrameChoice(NamedTuple):
    """The queries that answer a phrase in one frame of a video, chosen for the whole video (`video_slots`)."""

    queries: tuple[int, ...]  # best first; empty = nothing
    is_guess: bool  # nothing is above the threshold in this video: the best was chosen


def answer_masks(
    output: DerisOutput,
    sizes_hw: Sequence[tuple[int, int]],
    *,
    score_threshold: float,
    selection: Selection,
    presence_use: PresenceUse = "none",
    chosen: Sequence[FrameChoice] | None = None,
) -> list[PhraseAnswer]:
    """Answers each phrase with the union of the masks of its selected queries.

    Args:
        output: P phrases.
        sizes_hw: P sizes (h, w) in px at which the masks are wanted.
        score_threshold: a query is above it if its referring score is greater.
        selection: `threshold`: queries above the threshold, perhaps none (upstream); `threshold_or_best`: these, or the best
            query if there is none; `best`: only the best query.
        presence_use: `none`: only scores decide (upstream's default); `multiply`: scores times presence are compared with
            the threshold (upstream's `score_weighted`; paper, Table 6); `gate`: presence below 0.5 means no target,
            regardless of scores and selection.
        chosen: the queries of P phrases that were chosen over a video (`video_slots`); None = as the rule says.

    Returns:
        P answers with the model's own scores, not multiplied by presence.
    """
    scores = output.final.referring_logits.float().sigmoid().cpu().numpy()
    presence = output.presence_logit.float().sigmoid().tolist()
    if chosen is None:
        selected = [
            answering_queries(
                row, exists, score_threshold=score_threshold, selection=selection, presence_use=presence_use
            )
            for row, exists in zip(scores, presence, strict=True)
        ]
    else:
        selected = [choice.queries for choice in chosen]
    answers = []
    for phrase, masks in enumerate(upsampled_masks(output, selected, sizes_hw)):
        queries, row, exists = selected[phrase], scores[phrase], presence[phrase]
        is_drawn = [bool(mask.any()) for mask in masks]
        drawn = tuple(query for query, there in zip(queries, is_drawn, strict=True) if there)
        if chosen is None:
            deciding = row * exists if presence_use == "multiply" else row
            is_guess = not any(deciding[query] > score_threshold for query in drawn)
        else:
            is_guess = chosen[phrase].is_guess
        answers.append(
            PhraseAnswer(
                mask=np.logical_or.reduce(masks, axis=0),
                instance_masks=masks[np.array(is_drawn, dtype=bool)],
                query_index=drawn,
                referring_scores=row,
                presence=exists,
                score_threshold=score_threshold,
                is_guess=bool(drawn) and is_guess,
            )
        )
    return answers


def answering_queries(
    scores: np.ndarray, presence: float, *, score_threshold: float, selection: Selection, presence_use: PresenceUse
) -> tuple[int, ...]:
    """Selects the queries that answer one phrase, best first; none if there is no target.

    Args:
        scores: float (Q,), referring scores.
        presence: probability that a target exists.
        score_threshold: see `answer_masks`.
        selection: see `answer_masks`.
        presence_use: see `answer_masks`.
    """
    if presence_use == "gate" and presence < GATE:
        return ()
    weighted = scores * presence if presence_use == "multiply" else scores
    return select_queries(weighted, score_threshold=score_threshold, selection=selection)


def select_queries(scores: np.ndarray, *, score_threshold: float, selection: Selection) -> tuple[int, ...]:
    """Selects queries by score, best first.

    Args:
        scores: float (Q,), referring scores of one phrase.
        score_threshold: see `answer_masks`.
        selection: see `answer_masks`.

    Returns:
        Indices of the selected queries; empty only with `threshold`.
    """
    by_score = np.argsort(-scores, kind="stable")
    above = tuple(int(q) for q in by_score if scores[q] > score_threshold)
    if selection == "best" or (selection == "threshold_or_best" and not above):
        return (int(by_score[0]),)
    return above


def readable_logits(mask_logits: Tensor, upsampling: MaskUpsampling) -> Tensor:
    """Prepares mask logits for readers, who interpolate bilinearly with align_corners=False.

    Args:
        mask_logits: float (N, M, h, w).
        upsampling: `direct` returns them unchanged; `x4_align_corners` upsamples them, as the released weights need.

    Returns:
        float (N, M, h, w) or (N, M, 4h, 4w).
    """
    if upsampling == "direct":
        return mask_logits
    return functional.interpolate(mask_logits, scale_factor=4, mode="bilinear", align_corners=True)


def upsampled_masks(
    output: DerisOutput,
    queries: Sequence[Sequence[int]],
    sizes_hw: Sequence[tuple[int, int]],
    *,
    round_index: int = -1,
) -> list[np.ndarray]:
    """Computes masks of some queries of a round: sigmoid >= 0.5 after bilinear upsampling of the logits.

    Only these masks are upsampled; those of equal size together.

    Args:
        output: P phrases.
        queries: P lists of queries.
        sizes_hw: P sizes (h, w) in px.
        round_index: of the round; -1 is the last one.

    Returns:
        P arrays, bool (S, h, w).
    """
    mask_logits = output.rounds[round_index].mask_logits
    wanted: dict[tuple[int, int], list[int]] = defaultdict(list)
    for phrase, size in enumerate(sizes_hw):
        wanted[size].append(phrase)
    masks: list[np.ndarray] = [np.zeros((0, 0, 0), dtype=bool)] * len(sizes_hw)
    for size, phrases in wanted.items():
        rows = torch.tensor([p for p in phrases for _ in queries[p]], dtype=torch.int64, device=mask_logits.device)
        columns = torch.tensor([q for p in phrases for q in queries[p]], dtype=torch.int64, device=mask_logits.device)
        if len(rows) == 0:
            drawn = np.zeros((0, *size), dtype=bool)
        else:
            at_once = max(1, _MOST_PIXELS // (size[0] * size[1]))  # masks of a large image that fit in memory
            drawn = np.concatenate(
                [
                    (upsampled_logits(mask_logits[some_rows, some_columns], size, output.mask_upsampling) >= 0)
                    .cpu()
                    .numpy()
                    for some_rows, some_columns in zip(rows.split(at_once), columns.split(at_once), strict=True)
                ]
            )
        ends = np.cumsum([len(queries[p]) for p in phrases])
        for phrase, part in zip(phrases, np.split(drawn, ends[:-1]), strict=True):
            masks[phrase] = part
    return masks


def upsampled_logits(mask_logits: Tensor, size_hw: tuple[int, int], upsampling: MaskUpsampling) -> Tensor:
    """Upsamples mask logits to a size.

    Args:
        mask_logits: float (S, h', w').
        size_hw: (h, w) in px.
        upsampling: how to read the logits, see `readable_logits`.

    Returns:
        float32 (S, h, w), >= 0 = inside the mask.
    """
    logits = readable_logits(mask_logits.float().unsqueeze(1), upsampling)
    return functional.interpolate(logits, size=size_hw, mode="bilinear", align_corners=False).squeeze(1)
