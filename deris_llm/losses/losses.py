"""The losses as plain functions. The criterion sums and weights them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def mask_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of masks, mean over the points.

    Args:
        logits: float (..., K), > 0 = inside.
        targets: float (..., K) in [0, 1].

    Returns:
        float (...), one value per mask.
    """
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=-1)


def mask_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss with smoothing 1: 1 - (2 p.y + 1) / (sum p + sum y + 1).

    Args:
        logits: float (..., K), > 0 = inside.
        targets: float (..., K) in [0, 1].

    Returns:
        float (...) in [0, 1), one value per mask.
    """
    probs = logits.sigmoid()
    overlap = (probs * targets).sum(dim=-1)
    return 1 - (2 * overlap + 1) / (probs.sum(dim=-1) + targets.sum(dim=-1) + 1)


def pairwise_mask_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """`mask_bce` of every query with a target, for the matching; not differentiable.

    Args:
        logits: float (T, Q, K): the queries that may take each target.
        targets: float (T, K) in [0, 1].

    Returns:
        float (T, Q).
    """
    # y softplus(-x) + (1 - y) softplus(x) = softplus(x) - x y: one product instead of two.
    # softplus(x) = (x + |x|) / 2 + log(1 + exp(-|x|)): six times faster on a CPU than torch's, which uses log1p, with an
    # error of at most 6e-8.
    size = logits.abs()
    softplus = (logits.sum(dim=-1) + size.sum(dim=-1)) / 2
    softplus = softplus + size.neg_().exp_().add_(1).log_().sum(dim=-1)
    return (softplus - torch.einsum("tqk,tk->tq", logits, targets)) / logits.shape[-1]


def pairwise_mask_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """`mask_dice` of every query with a target, for the matching.

    Args:
        logits: float (T, Q, K).
        targets: float (T, K) in [0, 1].

    Returns:
        float (T, Q).
    """
    probs = logits.sigmoid()
    overlap = torch.einsum("tqk,tk->tq", probs, targets)
    return 1 - (2 * overlap + 1) / (probs.sum(dim=-1) + targets.sum(dim=-1, keepdim=True) + 1)


def referring_bce(logits: Tensor, is_referent: Tensor, *, negative_weight: float) -> Tensor:
    """Referring classification: weighted BCE over the queries of a batch, divided by the sum of the weights.

    With logit = l0 - l1 this is upstream's two-way cross entropy over (referent, no object) with class weights
    (1, negative_weight), whose mean PyTorch normalises the same way.

    Args:
        logits: float (..., P, Q), > 0 = referent.
        is_referent: bool, the same shape.
        negative_weight: weight of a query that is not a referent; a referent has 1.

    Returns:
        float (...), one value per batch, e.g. per round.
    """
    target = is_referent.to(logits.dtype)
    weight = target + negative_weight * (1 - target)
    loss = functional.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none")
    return loss.sum(dim=(-2, -1)) / weight.sum(dim=(-2, -1))


def presence_bce(logits: Tensor, has_target: Tensor) -> Tensor:
    """Presence: mean BCE (paper section 3.4).

    Args:
        logits: float (P,), > 0 = a target exists.
        has_target: bool (P,).

    Returns:
        float scalar.
    """
    return functional.binary_cross_entropy_with_logits(logits, has_target.to(logits.dtype))
