"""Looks into the model at some phrases: its best queries as instance masks, and the winning query's mask by round.

The paper's figures 3 and 10 (instance masks with their referring scores: is it the mask that is wrong, or the choice?)
and what its loopback is about: the mask and the score of one query in every round.

Letters: P phrases, Q queries.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from deris_llm.common.folders import replace_text
from deris_llm.common.strict_files import json_of
from deris_llm.config import RunConfig
from deris_llm.config.protocols import protocols_of
from deris_llm.data.loaders import evaluation_loader
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.evaluation.metrics import overlap
from deris_llm.models.postprocess import answer_masks, upsampled_masks
from deris_llm.structures import DerisOutput, ReferringRecord

if TYPE_CHECKING:
    from deris_llm.evaluation.answers import Answer
    from deris_llm.models.cognition import CognitionProcessor

VIEWS_FILE = "views.json"
NUM_QUERIES = 4
"""Queries that are shown of a phrase, as in the paper's figure 3."""


@dataclass(frozen=True)
class QueryView:
    """What one query says in one round."""

    query: int
    score: float  # referring score, in [0, 1]
    iou: float | None  # percent, with the referent that fits it best, at the original size; None without a referent
    is_selected: bool  # part of the answer
    mask: dict[str, Any]  # COCO RLE at the original size


@dataclass(frozen=True)
class PhraseView:
    """A phrase seen from the inside."""

    phrase_id: str
    split: str
    why: str  # it was chosen: "the choice failed" or "by chance"
    presence: float  # probability that a target exists
    queries: tuple[QueryView, ...]  # of the last round, best score first
    rounds: tuple[QueryView, ...]  # the best query of the last round, in every round from 0 on

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> PhraseView:
        """Reads what `dataclasses.asdict` gives."""
        views = {name: tuple(QueryView(**view) for view in found[name]) for name in ("queries", "rounds")}
        return cls(**{**found, **views})


def choose_phrases(
    answers: Mapping[str, Sequence[Answer]], protocols: Mapping[str, str], *, number: int, seed: int
) -> dict[str, dict[str, str]]:
    """Phrases to look into, in turn from every split: where a query had the mask and another was chosen, and by chance.

    Args:
        answers: by split.
        protocols: split -> the protocol whose IoU decides.
        number: of phrases in all.
        seed: of those by chance.

    Returns:
        Split -> phrase id -> why it was chosen.
    """
    chosen: dict[str, dict[str, str]] = {split: {} for split in answers}
    queues: list[tuple[str, str, list[Answer]]] = []
    for why in ("the choice failed", "by chance"):
        for split, found in answers.items():
            protocol = protocols[split]
            if why == "by chance":
                queue = random.Random(seed).sample(found, len(found))
            else:
                lost = [(a.oracle_iou.get(protocol, 0.0) - a.iou[protocol], a) for a in found if a.has_target]
                queue = [a for loss, a in sorted(lost, key=lambda pair: -pair[0]) if loss > 10]
            queues.append((split, why, queue))
    left = number
    while left > 0 and any(queue for *_, queue in queues):
        for split, why, queue in queues:
            fresh = [a for a in queue if a.phrase_id not in chosen[split]]
            shown = {a.image_id for a in answers[split] if a.phrase_id in chosen[split]}
            answer = next((a for a in fresh if a.image_id not in shown), next(iter(fresh), None))
            queue[:] = [a for a in fresh if a is not answer]
            if answer is not None and left > 0:
                chosen[split][answer.phrase_id] = why
                left -= 1
    return {split: ids for split, ids in chosen.items() if ids}


def compute_views(
    model: nn.Module,
    config: RunConfig,
    records: Mapping[str, Sequence[ReferringRecord]],
    processor: CognitionProcessor,
    *,
    why: Mapping[str, str] | None = None,
    num_queries: int = NUM_QUERIES,
) -> list[PhraseView]:
    """Runs the model on some phrases and keeps what its queries say.

    Args:
        model: a `Deris`; its training mode is restored.
        config: sizes, threshold and selection.
        records: by split.
        processor: the cognition backend's.
        why: phrase id -> why it was chosen.
        num_queries: queries that are kept, those with the highest scores.

    Returns:
        One view a phrase, in the order of the records.
    """
    device = next(model.parameters()).device
    dtype = torch.bfloat16 if config.training.precision == "bf16" else None
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))  # a few phrases
    was_training = model.training
    model.eval()
    views: list[PhraseView] = []
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            for split, asked in records.items():
                by_id = {record.phrase_id: record for record in asked}
                found: dict[str, PhraseView] = {}
                for batch in evaluation_loader(config, asked, processor, with_targets=False):
                    output: DerisOutput = model(batch.to(device, dtype=dtype))
                    of_batch = [by_id[phrase_id] for phrase_id in batch.phrase_ids]
                    for view in _views_of(output, of_batch, split, config, why or {}, num_queries):
                        found[view.phrase_id] = view
                views += [found[record.phrase_id] for record in asked]
    finally:
        model.train(was_training)
    return views


def write_views(views: Sequence[PhraseView], path: Path) -> None:
    """Writes views aside before they take the old ones' place."""
    replace_text(path, json.dumps([dataclasses.asdict(view) for view in views], ensure_ascii=False))


def read_views(path: Path) -> tuple[PhraseView, ...]:
    """Reads what `write_views` wrote.

    Raises:
        ValueError: the file is something else.
    """
    try:
        return tuple(PhraseView.from_json(view) for view in json_of(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected views as `deris-llm report --checkpoint` writes them, got {type(error).__name__}: {error}: "
            "delete the file and call it again"
        ) from error


def _views_of(
    output: DerisOutput,
    records: Sequence[ReferringRecord],
    split: str,
    config: RunConfig,
    why: Mapping[str, str],
    num_queries: int,
) -> list[PhraseView]:
    sizes = [(record.height, record.width) for record in records]
    threshold, selection, presence_use = protocols_of(config)[0].rule  # the predictions' masks are the first protocol's
    answers = answer_masks(output, sizes, score_threshold=threshold, selection=selection, presence_use=presence_use)
    best = [[int(q) for q in np.argsort(-a.referring_scores, kind="stable")[:num_queries]] for a in answers]
    masks_of_best = upsampled_masks(output, best, sizes)
    winners = [queries[:1] for queries in best]
    by_round = [
        (
            round_output.referring_logits.float().sigmoid().cpu().numpy(),
            upsampled_masks(output, winners, sizes, round_index=round_index),
        )
        for round_index, round_output in enumerate(output.rounds)
    ]
    views = []
    for i, (record, answer) in enumerate(zip(records, answers, strict=True)):
        truths = [decode_segmentation(x.segmentation, record.height, record.width) for x in record.instances]
        selected = frozenset(answer.query_index)

        def view_of(
            query: int,
            score: float,
            mask: np.ndarray,
            truths: Sequence[np.ndarray] = truths,
            selected: frozenset[int] = selected,
        ) -> QueryView:
            iou = max((round(100 * overlap(mask, truth).iou, 2) for truth in truths), default=None)
            return QueryView(query, round(float(score), 4), iou, query in selected, encode_mask(mask))

        views.append(
            PhraseView(
                phrase_id=record.phrase_id,
                split=split,
                why=why.get(record.phrase_id, ""),
                presence=round(answer.presence, 4),
                queries=tuple(
                    view_of(q, answer.referring_scores[q], mask)
                    for q, mask in zip(best[i], masks_of_best[i], strict=True)
                ),
                rounds=tuple(view_of(best[i][0], scores[i, best[i][0]], masks[i][0]) for scores, masks in by_round),
            )
        )
    return views
