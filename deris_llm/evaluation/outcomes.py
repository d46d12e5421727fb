"""A model's output against the ground truth, under all protocols of a run in one pass.

Letters: P phrases, Q queries, R referents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from deris_llm.config.protocols import Protocol, Rule
from deris_llm.data.masks import encode_mask
from deris_llm.evaluation.answers import Answer, outcome_fields
from deris_llm.evaluation.boxes import Box, boxes_f1, boxes_of_masks
from deris_llm.evaluation.metrics import Outcome, overlap
from deris_llm.evaluation.truth import decoded_referents, merged_truths, resampled_truth, without_ignored
from deris_llm.models.postprocess import FrameChoice, PhraseAnswer, answer_masks, upsampled_masks
from deris_llm.structures import DerisOutput, ReferringRecord

_NUM_TOP_SCORES = 3


def compared(
    output: DerisOutput,
    asked: Sequence[ReferringRecord],
    *,
    protocols: Sequence[Protocol],
    is_generalised: bool,
    chosen: Sequence[FrameChoice] | None = None,
) -> list[Answer]:
    """Answers P phrases and compares the masks under every protocol.

    Args:
        output: the model's, of these P phrases.
        asked: P records with the ground truth.
        protocols: those of one run; the first one's rule chooses `Answer.mask`.
        is_generalised: phrases may name nothing, or several objects: boxes are compared too.
        chosen: queries of P phrases that were chosen over a video; None = as each protocol's rule says.

    Returns:
        P answers.
    """
    referents = decoded_referents(asked)
    sizes = [(record.height, record.width) for record in asked]
    drawn = {
        rule: _answers(output, rule, sizes, chosen) for rule in dict.fromkeys(protocol.rule for protocol in protocols)
    }  # at the images' own sizes
    boxes = {
        rule: [_boxes(answer.instance_masks) if is_generalised else None for answer in answers]
        for rule, answers in drawn.items()
    }
    true_boxes = [boxes_of_masks(masks) if is_generalised else None for masks in referents]
    truths = {"left_out": [np.logical_or.reduce(masks, axis=0) for masks in referents]}
    if any(protocol.crowds == "taken" for protocol in protocols):
        truths["taken"] = merged_truths(asked, "taken")
    fitting = best_queries(output, referents)
    outcomes: list[dict[str, Outcome]] = [{} for _ in asked]
    others: list[dict[str, Answer]] = [{} for _ in asked]
    first = protocols[0]
    for protocol in protocols:
        drawn_sizes = [protocol.drawn_size_hw(*size) for size in sizes]
        answers = drawn[protocol.rule]
        if drawn_sizes != sizes:
            answers = _answers(output, protocol.rule, drawn_sizes, chosen)
        is_other_mask = protocol.rule != first.rule or not protocol.compares_finished_masks
        oracles = upsampled_masks(output, fitting, drawn_sizes)
        for i, answer in enumerate(answers):
            mask, oracle = answer.mask, np.logical_or.reduce(oracles[i], axis=0)
            if protocol.resizes_finished_masks:
                mask, oracle = resampled_truth(protocol, mask), resampled_truth(protocol, oracle)
            truth = resampled_truth(protocol, truths[protocol.crowds][i])
            mask, oracle, truth = (without_ignored(protocol, asked[i], each) for each in (mask, oracle, truth))
            found, expected = boxes[protocol.rule][i], true_boxes[i]
            outcomes[i][protocol.id] = Outcome(
                overlap(mask, truth),
                has_target=not asked[i].is_no_target,
                says_target=answer.says_target,
                oracle=overlap(oracle, truth),
                boxes_match=None if found is None or expected is None else boxes_f1(found, expected) == 1,
                truth_px=int(np.count_nonzero(truth)),
                image_px=truth.size,
                ref_id=asked[i].ref_id,
            )
            if is_other_mask:
                others[i][protocol.id] = Answer(mask=encode_mask(mask), says_target=answer.says_target, boxes=found)
    return [
        _answer(record, answer)._replace(
            has_target=not record.is_no_target,
            boxes=around,
            answers=other,
            truth_px=int(np.count_nonzero(truth)),
            **outcome_fields(outcome),
        )
        for record, answer, around, other, truth, outcome in zip(
            asked, drawn[first.rule], boxes[first.rule], others, truths[first.crowds], outcomes, strict=True
        )
    ]


def answered(
    output: DerisOutput,
    asked: Sequence[ReferringRecord],
    *,
    rule: Rule,
    chosen: Mapping[str, FrameChoice] | None = None,
) -> list[Answer]:
    """Answers P phrases whose truth is not known; nothing is compared.

    Args:
        output: the model's, of these P phrases.
        asked: P records.
        rule: which queries answer.
        chosen: by phrase id, queries that were chosen over a video; None = as the rule says.
    """
    choices = None if chosen is None else [chosen[record.phrase_id] for record in asked]
    answers = _answers(output, rule, [(record.height, record.width) for record in asked], choices)
    return [_answer(record, answer) for record, answer in zip(asked, answers, strict=True)]


def _answer(record: ReferringRecord, answer: PhraseAnswer) -> Answer:
    return Answer(
        phrase_id=record.phrase_id,
        image=Path(record.image_path).name,
        image_id=record.image_id,
        phrase=record.phrase,
        mask=encode_mask(answer.mask),
        top_scores=tuple(float(s) for s in np.sort(answer.referring_scores)[::-1][:_NUM_TOP_SCORES]),
        presence=answer.presence,
        says_target=answer.says_target,
    )


def _answers(
    output: DerisOutput, rule: Rule, sizes_hw: Sequence[tuple[int, int]], chosen: Sequence[FrameChoice] | None
) -> list[PhraseAnswer]:
    score_threshold, selection, presence_use = rule
    return answer_masks(
        output,
        sizes_hw,
        score_threshold=score_threshold,
        selection=selection,
        presence_use=presence_use,
        chosen=chosen,
    )


def _boxes(masks: np.ndarray) -> tuple[Box, ...]:
    """Returns boxes around instance masks, bool (N, h, w), as plain numbers; empty masks have none."""
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in boxes_of_masks(masks).tolist())


def best_queries(output: DerisOutput, referents: Sequence[np.ndarray]) -> list[list[int]]:
    """Returns for each of P phrases the queries that fit a referent best.

    They are compared at the resolution of the logits; the truth is averaged down to it.

    Args:
        output: the model's, of these P phrases.
        referents: P arrays, bool (R, H, W), as `truth.decoded_referents` gives them.
    """
    masks = (output.final.mask_logits >= 0).float().cpu()
    size = (masks.shape[2], masks.shape[3])
    best: list[list[int]] = []
    for phrase_masks, truths in zip(masks, referents, strict=True):
        if not len(truths):
            best.append([])
            continue
        soft = functional.adaptive_avg_pool2d(torch.from_numpy(truths).float(), size)
        intersection = torch.einsum("qhw,rhw->rq", phrase_masks, soft)
        union = phrase_masks.sum((1, 2)) + soft.sum((1, 2))[:, None] - intersection
        best.append(sorted(set((intersection / union.clamp(min=1e-6)).argmax(dim=1).tolist())))
    return best
