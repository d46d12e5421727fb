"""Chooses the queries that answer a phrase for a whole video instead of frame by frame (`evaluation.video_selection=video`).

A *slot* follows one object: in each frame it takes one query, by the overlap of masks with the last mask that it saw. Its score is
the mean referring score of its queries over all frames, and the slots that are above the threshold answer in every frame. There
are no weights to train.

Frames are added one at a time. What is kept of a frame and phrase is two bytes per query; a frame's masks are needed until the
next one only.

Letters: P phrases, Q queries and as many slots, h w cells of a mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from deris_llm.config import PresenceUse, Selection
from deris_llm.models.postprocess import GATE, FrameChoice, select_queries
from deris_llm.structures import DerisOutput

_SAME_QUERY = 1e-3
"""Added to the overlap of a slot with the query that it had in the frame before: decides where masks do not overlap at all."""


@dataclass(frozen=True, eq=False)
class FrameQueries:
    """What the queries say of one phrase in one frame: 11.6 kB at Q = 10 and 96 x 96 cells."""

    masks: np.ndarray  # uint8 (Q, h * w / 8), rounded up: bits of the masks at the network's resolution
    scores: np.ndarray  # float32 (Q,): referring scores in [0, 1]
    presence: float  # probability that a target exists, in [0, 1]


def frame_queries(output: DerisOutput) -> list[FrameQueries]:
    """Returns what the last round of an output says, for each of its P phrases."""
    inside = (output.final.mask_logits > 0).flatten(2).cpu().numpy()
    scores = output.final.referring_logits.float().sigmoid().cpu().numpy()
    presence = output.presence_logit.float().sigmoid().tolist()
    return [
        FrameQueries(bits, row, exists)
        for bits, row, exists in zip(np.packbits(inside, axis=-1), scores, presence, strict=True)
    ]


def chosen_over_video(
    frames: Iterable[FrameQueries], *, score_threshold: float, selection: Selection, presence_use: PresenceUse = "none"
) -> list[FrameChoice]:
    """Chooses the queries that answer one phrase in each frame of a video; see `VideoSlots`.

    Args:
        frames: of the phrase, in order; read once.
        score_threshold: see `VideoSlots`.
        selection: see `VideoSlots`.
        presence_use: see `VideoSlots`.
    """
    slots = VideoSlots(score_threshold=score_threshold, selection=selection, presence_use=presence_use)
    for frame in frames:
        slots.add(frame)
    return slots.choices()


class VideoSlots:
    """Follows the queries of one phrase through a video.

    Queries are assigned to slots so that the sum of mask IoU is largest (Hungarian); a slot remembers the last mask that
    overlapped, so that an object that was hidden is found again where it left. An answering slot is silent in frames where the
    presence rule `gate` says no-target, and in frames where its mask overlaps nothing of the last one and its query is not above
    the threshold by itself: its object has left.

    Args:
        score_threshold: a slot is above it if its mean score is greater.
        selection: which slots answer, by their mean scores; see `answer_masks`.
        presence_use: `multiply`: scores times presence are averaged; `gate`: decides frame by frame; see `answer_masks`.
    """

    def __init__(self, *, score_threshold: float, selection: Selection, presence_use: PresenceUse = "none") -> None:
        self._score_threshold = score_threshold
        self._selection: Selection = selection
        self._presence_use = presence_use
        self._masks = np.zeros((0, 0), dtype=np.uint8)  # the last mask of each slot, as bits
        self._order = np.zeros(0, dtype=np.int64)  # the query of each slot in the last frame
        self._score_sums = np.zeros(0)
        self._queries: list[np.ndarray] = []  # per frame, int16 (Q,): the query of each slot, -1 = the slot is silent

    def add(self, frame: FrameQueries) -> None:
        """Assigns the queries of the next frame."""
        from scipy.optimize import linear_sum_assignment  # commands without videos start without it

        if not self._queries:
            self._masks = np.zeros_like(frame.masks)
            self._order = np.arange(len(frame.scores))
            self._score_sums = np.zeros(len(frame.scores))
        overlap = mask_ious(self._masks, frame.masks)
        wish = overlap.copy()
        wish[np.arange(len(wish)), self._order] += _SAME_QUERY
        _, self._order = linear_sum_assignment(wish, maximize=True)
        is_followed = (overlap[np.arange(len(overlap)), self._order] > 0) | ~self._masks.any(axis=1)
        self._masks[is_followed] = frame.masks[self._order[is_followed]]
        weight = frame.presence if self._presence_use == "multiply" else 1.0
        scores = frame.scores[self._order] * weight
        self._score_sums += scores
        answers = is_followed | (scores > self._score_threshold)
        if self._presence_use == "gate" and frame.presence < GATE:
            answers[:] = False
        self._queries.append(np.where(answers, self._order, -1).astype(np.int16))

    def choices(self) -> list[FrameChoice]:
        """Returns the queries that answer in each of the frames that were added."""
        if not self._queries:
            return []
        means = self._score_sums / len(self._queries)
        slots = select_queries(means, score_threshold=self._score_threshold, selection=self._selection)
        is_guess = not any(means[slot] > self._score_threshold for slot in slots)
        return [
            FrameChoice(tuple(int(queries[slot]) for slot in slots if queries[slot] >= 0), is_guess)
            for queries in self._queries
        ]


def mask_ious(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Computes the IoU of each mask with each other one; 0 if both are empty.

    Args:
        ours: uint8 (M, n), packed bits.
        theirs: uint8 (N, n).

    Returns:
        float64 (M, N).
    """
    both = np.bitwise_count(ours[:, None] & theirs[None]).sum(axis=-1, dtype=np.int64)
    either = np.bitwise_count(ours[:, None] | theirs[None]).sum(axis=-1, dtype=np.int64)
    return both / np.maximum(either, 1)
