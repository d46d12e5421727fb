"""What the network computed about an image and its phrases, kept so that answers and views follow without running it again.

    inspection = pipeline.inspect("street.jpg", ["the red car", "the dog"])
    inspection.answers(score_threshold=0.5)  # in milliseconds
    inspection.referring_scores(0)  # round 0: before the branches exchanged anything
    inspection.best_masks(1), inspection.mask_probs(phrase_index=0, round_index=1)

Letters: P phrases, Q queries, S selected queries, R rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from PIL import Image

from deris_llm.common.words import count_of
from deris_llm.config import EvaluationConfig, PresenceUse, Selection
from deris_llm.models.postprocess import answer_masks, upsampled_logits, upsampled_masks
from deris_llm.serving.answers import ImageAnswer, about_image
from deris_llm.structures import DerisOutput, RoundOutput


@dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """The network's output about one image, on the CPU. Nothing in it changes, so threads may share it.

    Rounds are numbered from 0, the initial queries, to `num_rounds - 1`, which the answers come from; -1 is the last one.
    `max_side` limits the longer side of masks in px, for display; None = the size of the image. At the size of the image a
    round of a phrase with ten queries takes 40 bytes per pixel as probabilities.
    """

    image: Image.Image  # RGB
    phrases: tuple[str, ...]  # P
    output: DerisOutput  # of all rounds; 1.4 MB per phrase at Q = 10, R = 4 and 384 px
    evaluation: EvaluationConfig  # of the checkpoint: the rule that is used where no other is given

    def __repr__(self) -> str:
        width, height = self.image.size
        phrases = count_of(len(self.phrases), "phrase")
        rounds = f"rounds 0 to {self.num_rounds - 1}"
        return f"<Inspection: {phrases}, {self.num_queries} queries, {rounds}, image of {width} x {height} px>"

    @property
    def num_rounds(self) -> int:
        """R: all rounds, the initial one included."""
        return len(self.output.rounds)

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.output.final.referring_logits.shape[1]

    @property
    def presence(self) -> np.ndarray:
        """Probabilities that a target exists, float32 (P,)."""
        return self.output.presence_logit.float().sigmoid().numpy()

    def answers(
        self,
        *,
        score_threshold: float | None = None,
        selection: Selection | None = None,
        presence: PresenceUse | None = None,
        max_side: int | None = None,
    ) -> list[ImageAnswer]:
        """Answers the phrases by a rule.

        Without arguments these are the answers of the pipeline; if its model is on a GPU, a pixel on the border of a mask may
        differ, because the GPU rounds differently.

        Args:
            score_threshold: 0..1; None = the checkpoint's.
            selection: see `answer_masks`; None = the checkpoint's.
            presence: see `answer_masks`; None = the checkpoint's.
            max_side: of the masks.

        Returns:
            P answers.

        Raises:
            ValueError: an argument has another value.
        """
        rule = self.evaluation
        score_threshold = rule.score_threshold if score_threshold is None else score_threshold
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold: expected 0 to 1, got {score_threshold}; give a number in this range.")
        selection, presence = selection or rule.selection, presence or rule.presence
        _check_is_one_of("selection", selection, get_args(Selection))
        _check_is_one_of("presence", presence, get_args(PresenceUse))
        answers = answer_masks(
            self.output,
            [self._size_hw(max_side)] * len(self.phrases),
            score_threshold=score_threshold,
            selection=selection,
            presence_use=presence,
        )
        return about_image(answers, self.phrases, self.image)

    def referring_scores(self, round_index: int = -1) -> np.ndarray:
        """Returns the referring score of every query in a round, float32 (P, Q) in [0, 1]."""
        return self._round(round_index).referring_logits.float().sigmoid().numpy()

    def best_queries(self, round_index: int = -1) -> tuple[int, ...]:
        """Returns the query with the highest referring score in a round for each of the P phrases."""
        return tuple(self.referring_scores(round_index).argmax(axis=1).tolist())

    def best_masks(self, round_index: int = -1, *, max_side: int | None = None) -> np.ndarray:
        """Returns the masks of a round's best queries, bool (P, h, w)."""
        self._round(round_index)
        queries = [[query] for query in self.best_queries(round_index)]
        sizes = [self._size_hw(max_side)] * len(queries)
        return np.concatenate(upsampled_masks(self.output, queries, sizes, round_index=round_index))

    def mask_probs(
        self,
        phrase_index: int,
        round_index: int = -1,
        *,
        queries: Sequence[int] | None = None,
        max_side: int | None = None,
    ) -> np.ndarray:
        """Computes mask probabilities of a phrase's queries in a round.

        Args:
            phrase_index: of the phrase.
            round_index: of the round.
            queries: S of them; None = all.
            max_side: see the class.

        Returns:
            float32 (S, h, w); a query's mask is where it is at least 0.5.
        """
        logits = self._round(round_index).mask_logits[phrase_index]
        chosen = logits if queries is None else logits[list(queries)]
        upsampled = upsampled_logits(chosen, self._size_hw(max_side), self.output.mask_upsampling)
        return upsampled.sigmoid_().numpy()

    def display_image(self, max_side: int) -> Image.Image:
        """Returns the image at the size that masks have with this `max_side`."""
        height, width = self._size_hw(max_side)
        return self.image.resize((width, height), Image.Resampling.LANCZOS)

    def _round(self, round_index: int) -> RoundOutput:
        if not -self.num_rounds <= round_index < self.num_rounds:
            raise ValueError(
                f"round_index: expected 0 to {self.num_rounds - 1} (-1 = the last), got {round_index}; this checkpoint has "
                f"{self.num_rounds} rounds, the initial one included."
            )
        return self.output.rounds[round_index]

    def _size_hw(self, max_side: int | None) -> tuple[int, int]:
        height, width = self.image.height, self.image.width
        if max_side is None or max(height, width) <= max_side:
            return height, width
        if max_side < 1:
            raise ValueError(f"max_side: expected at least 1 px, got {max_side}; give a larger one, or None.")
        scale = max_side / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))


def last_round(output: DerisOutput) -> DerisOutput:
    """Returns an output with its last round only, which the answers come from."""
    return dataclasses.replace(output, rounds=(output.final,))


def outputs_by_phrase(output: DerisOutput) -> list[DerisOutput]:
    """Divides the output about P phrases into P outputs about one. They share its memory."""
    return [
        dataclasses.replace(
            output,
            rounds=tuple(
                RoundOutput(one.mask_logits[p : p + 1], one.referring_logits[p : p + 1]) for one in output.rounds
            ),
            presence_logit=output.presence_logit[p : p + 1],
        )
        for p in range(len(output.presence_logit))
    ]


def joined_outputs(outputs: Sequence[DerisOutput]) -> DerisOutput:
    """Joins outputs along the phrases, in memory of their own."""
    return dataclasses.replace(
        outputs[0],
        rounds=tuple(
            RoundOutput(
                torch.cat([one.mask_logits for one in rounds]), torch.cat([one.referring_logits for one in rounds])
            )
            for rounds in zip(*(output.rounds for output in outputs), strict=True)
        ),
        presence_logit=torch.cat([output.presence_logit for output in outputs]),
    )


def _check_is_one_of(name: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        raise ValueError(f"{name}: expected {' or '.join(choices)}, got {given!r}; choose one of these.")
