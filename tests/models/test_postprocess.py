"""Selection of queries and masks at the asked sizes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deris_llm.models.postprocess import answer_masks, select_queries, upsampled_masks
from deris_llm.structures import DerisOutput, RoundOutput

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "upstream_losses.json").read_text())
SCORES = np.array([0.2, 0.95, 0.69, 0.71], dtype=np.float32)


def _output(num_phrases: int = 3, num_queries: int = 4) -> DerisOutput:
    generator = torch.Generator().manual_seed(0)
    last = RoundOutput(
        torch.randn(num_phrases, num_queries, 6, 6, generator=generator),
        torch.logit(torch.tensor(SCORES)).expand(num_phrases, -1),
    )
    first = RoundOutput(torch.zeros(num_phrases, num_queries, 6, 6), torch.zeros(num_phrases, num_queries))
    return DerisOutput((first, last), torch.tensor([0.0, 2.0, -2.0]))


@pytest.mark.parametrize(
    ("selection", "threshold", "expected"),
    [
        ("threshold", 0.7, (1, 3)),
        ("threshold", 0.97, ()),
        ("threshold_or_best", 0.7, (1, 3)),
        ("threshold_or_best", 0.97, (1,)),
        ("best", 0.1, (1,)),
    ],
)
def test_selection(selection: str, threshold: float, expected: tuple[int, ...]) -> None:
    assert select_queries(SCORES, score_threshold=threshold, selection=selection) == expected


def test_upstreams_scores_and_selection() -> None:
    two_logits = torch.tensor(GOLDEN["refer_logits"][3])
    output = DerisOutput(
        (RoundOutput(torch.zeros(2, 10, 4, 4), two_logits[..., 0] - two_logits[..., 1]),), torch.zeros(2)
    )
    for threshold, kept in GOLDEN["kept"].items():
        answers = answer_masks(output, [(4, 4)] * 2, score_threshold=float(threshold), selection="threshold")
        assert [len(answer.query_index) for answer in answers] == kept
        np.testing.assert_allclose([a.referring_scores for a in answers], GOLDEN["scores"], atol=2e-6)


def test_answer_is_the_union_of_the_selected_masks_of_the_last_round() -> None:
    output, sizes = _output(), [(20, 31), (9, 7), (20, 31)]
    answers = answer_masks(output, sizes, score_threshold=0.7, selection="threshold")
    for phrase, (answer, size) in enumerate(zip(answers, sizes, strict=True)):
        logits = torch.nn.functional.interpolate(output.final.mask_logits[[phrase]], size=size, mode="bilinear")[
            0, [1, 3]
        ]
        np.testing.assert_array_equal(answer.instance_masks, (logits.sigmoid() >= 0.5).numpy())
        np.testing.assert_array_equal(answer.mask, answer.instance_masks[0] | answer.instance_masks[1])
        assert answer.query_index == (1, 3)
    assert [a.presence for a in answers] == pytest.approx([0.5, 0.8808, 0.1192], abs=1e-4)


def test_no_selected_query_gives_an_empty_mask_of_the_asked_size() -> None:
    answers = answer_masks(_output(), [(5, 8), (5, 8), (3, 2)], score_threshold=0.99, selection="threshold")
    assert [a.mask.shape for a in answers] == [(5, 8), (5, 8), (3, 2)]
    assert not any(a.mask.any() for a in answers)
    assert answers[2].instance_masks.shape == (0, 3, 2)


def test_masks_by_size_equal_masks_one_by_one() -> None:
    output = _output()
    queries, sizes = [[0, 2], [], [3]], [(8, 8), (8, 8), (8, 8)]
    together = upsampled_masks(output, queries, sizes)
    for phrase in range(3):
        final = RoundOutput(output.final.mask_logits[[phrase]], output.final.referring_logits[[phrase]])
        one = DerisOutput((final,), output.presence_logit[[phrase]])
        alone = upsampled_masks(one, [queries[phrase]], [sizes[phrase]])[0]
        np.testing.assert_array_equal(together[phrase], alone)


def test_bf16_logits_are_upsampled_in_float32() -> None:
    final = _output().final
    half = DerisOutput((RoundOutput(final.mask_logits.bfloat16(), final.referring_logits),), torch.zeros(3))
    full = DerisOutput((RoundOutput(half.final.mask_logits.float(), final.referring_logits),), torch.zeros(3))
    queries, sizes = [[0]] * 3, [(12, 12)] * 3
    np.testing.assert_array_equal(upsampled_masks(half, queries, sizes), upsampled_masks(full, queries, sizes))


def test_released_weights_are_read_after_aligned_upsampling() -> None:
    """At x4 the masks are upstream's; elsewhere they are interpolated from there."""
    output = _output()
    height, width = output.final.mask_logits.shape[2:]
    released = replace(output, mask_upsampling="x4_align_corners")
    x4 = torch.nn.functional.interpolate(output.final.mask_logits, scale_factor=4, mode="bilinear", align_corners=True)
    drawn = upsampled_masks(released, [[1]] * 3, [(4 * height, 4 * width)] * 3)
    np.testing.assert_array_equal(np.stack(drawn)[:, 0], x4[:, 1].numpy() >= 0)
    direct = upsampled_masks(output, [[1]] * 3, [(4 * height, 4 * width)] * 3)
    assert (np.stack(drawn) != np.stack(direct)).any()


@pytest.mark.parametrize(
    ("use", "selection", "selected"),
    [
        ("none", "threshold", [(1, 3), (1, 3), (1, 3)]),
        ("multiply", "threshold", [(), (1,), ()]),  # times 0.5, 0.88, 0.12: only 0.95 * 0.88 is above 0.7
        ("multiply", "threshold_or_best", [(1,), (1,), (1,)]),
        ("gate", "threshold", [(1, 3), (1, 3), ()]),  # 0.5 is still a target
        ("gate", "best", [(1,), (1,), ()]),  # the gate decides before the selection
    ],
)
def test_presence_at_test(use: str, selection: str, selected: list[tuple[int, ...]]) -> None:
    answers = answer_masks(_output(), [(4, 4)] * 3, score_threshold=0.7, selection=selection, presence_use=use)
    assert [a.query_index for a in answers] == selected
    assert [a.mask.any() for a in answers] == [a.instance_masks.any() for a in answers]
    for answer in answers:
        np.testing.assert_allclose(answer.referring_scores, SCORES, rtol=1e-6)


def test_a_query_with_an_empty_mask_answers_nothing() -> None:
    """Selected or not: no index, no mask of its own, no target."""
    output = _output()
    logits = output.final.mask_logits.clone()
    logits[0, 1] = -1  # phrase 0: its best query is empty, the other is not
    logits[1] = -1  # phrase 1: all are
    output = replace(output, rounds=(replace(output.final, mask_logits=logits),))
    answers = answer_masks(output, [(6, 5)] * 3, score_threshold=0.7, selection="threshold_or_best")
    assert [a.query_index for a in answers] == [(3,), (), (1, 3)]
    assert [a.instance_masks.shape for a in answers] == [(1, 6, 5), (0, 6, 5), (2, 6, 5)]
    assert [a.says_target for a in answers] == [True, False, True]
    assert [a.verdict for a in answers] == ["found", "nothing", "found"]
    assert not answers[1].mask.any()


@pytest.mark.parametrize(
    ("threshold", "selection", "use", "verdicts"),
    [
        (0.7, "threshold_or_best", "none", ["found"] * 3),
        (0.97, "threshold_or_best", "none", ["best guess"] * 3),
        (0.97, "best", "none", ["best guess"] * 3),
        (0.97, "threshold", "none", ["nothing"] * 3),
        (0.7, "threshold_or_best", "multiply", ["best guess", "found", "best guess"]),  # 0.95 times 0.5, 0.88, 0.12
        (0.97, "threshold_or_best", "gate", ["best guess", "best guess", "nothing"]),
    ],
)
def test_a_best_query_below_the_threshold_is_a_guess(
    threshold: float, selection: str, use: str, verdicts: list[str]
) -> None:
    answers = answer_masks(_output(), [(4, 4)] * 3, score_threshold=threshold, selection=selection, presence_use=use)
    assert [a.verdict for a in answers] == verdicts
    assert [a.score_threshold for a in answers] == [threshold] * 3
