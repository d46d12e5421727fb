"""Losses against a slow numpy re-write and against upstream's formula."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from deris_llm.losses.losses import (
    mask_bce,
    mask_dice,
    pairwise_mask_bce,
    pairwise_mask_dice,
    presence_bce,
    referring_bce,
)


def _numpy_bce(logit: float, target: float) -> float:
    prob = 1 / (1 + np.exp(-logit))
    return -(target * np.log(prob) + (1 - target) * np.log(1 - prob))


@pytest.fixture
def points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 5, 17, generator=generator) * 3, torch.rand(4, 17, generator=generator)


def test_mask_losses_equal_numpy(points: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = points[0][:, 0], points[1]
    for x, y, bce, dice in zip(
        logits.double().numpy(), targets.numpy(), mask_bce(logits, targets), mask_dice(logits, targets), strict=True
    ):
        prob = 1 / (1 + np.exp(-x))
        assert bce.item() == pytest.approx(np.mean([_numpy_bce(a, b) for a, b in zip(x, y, strict=True)]), rel=1e-5)
        assert dice.item() == pytest.approx(1 - (2 * (prob * y).sum() + 1) / (prob.sum() + y.sum() + 1), rel=1e-5)


def test_pairwise_costs_equal_the_losses(points: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = points
    expanded = targets.unsqueeze(1).expand_as(logits)
    torch.testing.assert_close(pairwise_mask_bce(logits, targets), mask_bce(logits, expanded))
    torch.testing.assert_close(pairwise_mask_dice(logits, targets), mask_dice(logits, expanded))


def test_mask_bce_is_finite_for_extreme_logits() -> None:
    logits = torch.tensor([[[-1e4, 1e4]]])
    targets = torch.tensor([[1.0, 0.0]])
    assert pairwise_mask_bce(logits, targets).item() == pytest.approx(1e4)
    assert mask_bce(logits[:, 0], targets).item() == pytest.approx(1e4)


def test_dice_of_empty_mask_and_empty_prediction_is_zero() -> None:
    assert mask_dice(torch.full((1, 9), -50.0), torch.zeros(1, 9)).item() == pytest.approx(0.0, abs=1e-6)


def test_referring_bce_is_upstreams_two_way_cross_entropy() -> None:
    two_logits = torch.randn(6, 10, 2, generator=torch.Generator().manual_seed(0))
    is_referent = torch.zeros(6, 10, dtype=torch.bool)
    is_referent[[0, 0, 2, 5], [1, 7, 3, 9]] = True
    label = (~is_referent).long()  # upstream: 0 = referred, 1 = no object
    upstream = functional.cross_entropy(two_logits.transpose(1, 2), label, weight=torch.tensor([1.0, 0.1]))
    ours = referring_bce(two_logits[..., 0] - two_logits[..., 1], is_referent, negative_weight=0.1)
    torch.testing.assert_close(ours, upstream)


def test_presence_is_one_where_a_target_exists() -> None:
    sure = torch.tensor([20.0, -20.0])
    assert presence_bce(sure, torch.tensor([True, False])).item() < 1e-6
    assert presence_bce(sure, torch.tensor([False, True])).item() == pytest.approx(20.0)
