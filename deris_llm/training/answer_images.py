"""Images of fixed phrases for TensorBoard, so that a person sees the model learn: truth, mask and score at each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.overlays import Case, tile_of
from deris_llm.structures import ReferringRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_NUM_PHRASES = 6


def add_answer_images(
    writer: SummaryWriter, answers: Sequence[Answer], records: Sequence[ReferringRecord], *, step: int
) -> None:
    """Adds an image for each of six evenly spaced phrases; the same ones at every evaluation.

    Args:
        writer: of the run.
        answers: of the evaluation, in the order of the records.
        records: of `eval_split`.
        step: of the training.
    """
    number = min(_NUM_PHRASES, len(answers))
    for i in (k * len(answers) // number for k in range(number)):
        answer = answers[i]
        score = f"score {max(answer.top_scores, default=0.0):.2f}"
        about = score if answer.presence is None else f"{score}, presence {answer.presence:.2f}"
        tile = tile_of(Case(about, answer, records[i]), next(iter(answer.iou)))
        writer.add_image(f"answers/{answer.phrase_id}", np.asarray(tile), step, dataformats="HWC")
