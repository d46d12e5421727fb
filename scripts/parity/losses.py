"""Losses, matching and gradients of the parity fixtures, computed by our criterion (their RECIPE.md, section 4).

P phrases (one per picture), T targets, Q queries, R rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.ops
from torch import Tensor

from deris_llm.interop.deris import targets_of
from deris_llm.losses.criterion import Criterion
from deris_llm.losses.losses import mask_bce, mask_dice
from deris_llm.losses.matcher import MatchingWeights, assign_targets, matching_costs
from deris_llm.losses.point_sampling import random_points, sample_points, uncertain_points
from deris_llm.models.deris import Deris
from deris_llm.models.postprocess import readable_logits
from deris_llm.structures import DerisOutput, ReferringTargets, RoundOutput
from scripts.parity.recipe import grid_points

SIZE = 384  # px
RANDOM_SEED = 2024
GIOU_EPS = 1e-6  # what upstream adds to both denominators


class Case(NamedTuple):
    """Ground truth of a case, of the referred instances only."""

    targets: ReferringTargets
    boxes_cxcywh_norm: Tensor  # float32 (T, 4)


class CaseLosses(NamedTuple):
    """What a case gives, in the order final, round 0, 1, 2 where there are several outputs."""

    raw: dict[str, float]  # before weights: loss_class, loss_mask, ..., and with suffix _0, _1, _2
    weighted: dict[str, float]
    total: Tensor
    matching: list[list[list[list[int]]]]  # [output][phrase] -> query indices, target indices
    costs: list[list[np.ndarray]]  # [output][phrase] -> float (Q, targets)


def read_case(arrays: Mapping[str, np.ndarray], case: str, target_index: list[list[int]]) -> Case:
    """Reads masks and boxes of a case out of ``losses.npz``."""
    masks, boxes, phrase_index = [], [], []
    for phrase, chosen in enumerate(target_index):
        packed = arrays[f"{case}_masks_img{phrase}"]
        all_masks = np.unpackbits(packed, axis=-1, count=SIZE).astype(bool)
        masks.append(all_masks[chosen].reshape(-1, SIZE, SIZE))
        boxes.append(arrays[f"{case}_boxes_img{phrase}"].reshape(-1, 4)[chosen].reshape(-1, 4))
        phrase_index += [phrase] * len(chosen)
    xyxy = torch.from_numpy(np.concatenate(boxes)).float() / SIZE
    return Case(
        ReferringTargets(torch.from_numpy(np.concatenate(masks)), torch.tensor(phrase_index, dtype=torch.int64)),
        torchvision.ops.box_convert(xyxy, "xyxy", "cxcywh"),
    )


def grid_losses(criterion: Criterion, output: DerisOutput, boxes: list[Tensor], case: Case) -> CaseLosses:
    """Mode `grid`: our criterion as it is, on the given points.

    Args:
        criterion: of the run config.
        output: of the model, with gradient where it is wanted.
        boxes: R times float (P, Q, 4), cx, cy, w, h in [0, 1], of the public code's box head.
        case: the ground truth.
    """
    points = grid_points()
    breakdown = criterion(output, case.targets, points=points)
    rounds = [_readable(one, output) for one in output.rounds]
    expanded = points.expand(len(output.presence_logit), -1, -1)
    matches = [_match(criterion.matching_weights, one, case.targets, expanded) for one in rounds]
    return _losses(criterion, breakdown.parts, breakdown.total, output, boxes, case, matches)


@torch.no_grad()
def random_losses(criterion: Criterion, output: DerisOutput, boxes: list[Tensor], case: Case) -> CaseLosses:
    """Mode `random`: our functions in the order in which the public code draws its points, from torch's generator."""
    torch.manual_seed(RANDOM_SEED)
    last = len(output.rounds) - 1
    num_targets = len(case.targets.phrase_index)
    parts: dict[str, Tensor] = {}
    matches: dict[int, _Match] = {}
    for index in (last, *range(last)):
        one = _readable(output.rounds[index], output)
        points = torch.cat(
            [random_points(1, criterion.num_points, device=torch.device("cpu")) for _ in output.presence_logit]
        )
        matches[index] = _match(criterion.matching_weights, one, case.targets, points)
        # Upstream lists the pairs of a phrase by query, the order in which its points are drawn.
        order = _by_query(case.targets.phrase_index, matches[index].query_index)
        phrases, queries = case.targets.phrase_index[order], matches[index].query_index[order]
        bce = dice = torch.zeros(())
        if num_targets:
            logits = one.mask_logits[phrases, queries]
            at = uncertain_points(logits, criterion.num_points)
            read = sample_points(logits[:, None], at).squeeze(1)
            truth = sample_points(case.targets.masks[order].float()[:, None], at).squeeze(1)
            bce, dice = mask_bce(read, truth).sum() / num_targets, mask_dice(read, truth).sum() / num_targets
        parts |= {f"mask_bce/round{index}": bce, f"dice/round{index}": dice}
    without_points = criterion(output, case.targets, points=grid_points())
    parts["presence"] = without_points.parts["presence"]
    for index in range(len(output.rounds)):
        parts[f"referring/round{index}"] = _referring(criterion, output.rounds[index], case, matches[index])
    ordered = [matches[i] for i in range(len(output.rounds))]
    return _losses(criterion, parts, criterion.weighted_total(parts), output, boxes, case, ordered)


class _Match(NamedTuple):
    query_index: Tensor  # int64 (T,)
    costs: Tensor  # float (T, Q)


def _readable(one: RoundOutput, output: DerisOutput) -> RoundOutput:
    return RoundOutput(readable_logits(one.mask_logits, output.mask_upsampling), one.referring_logits)


@torch.no_grad()
def _match(weights: MatchingWeights, one: RoundOutput, targets: ReferringTargets, points: Tensor) -> _Match:
    at = points[targets.phrase_index]
    truth = sample_points(targets.masks.float()[:, None], at).squeeze(1)
    costs = matching_costs([one], targets.phrase_index, truth, at, weights)
    query_index = assign_targets(costs.numpy(), targets.phrase_index.numpy())[:, 0]
    return _Match(torch.from_numpy(query_index), costs[:, 0])


def _by_query(phrase_index: Tensor, query_index: Tensor) -> Tensor:
    return torch.from_numpy(np.lexsort((query_index.numpy(), phrase_index.numpy())))


def _referring(criterion: Criterion, one: RoundOutput, case: Case, match: _Match) -> Tensor:
    """Two-way cross entropy written out: referred has weight 1, not referred `referring_negative_weight`."""
    is_referent = torch.zeros_like(one.referring_logits, dtype=torch.bool)
    is_referent[case.targets.phrase_index, match.query_index] = True
    two_way = torch.stack([one.referring_logits, torch.zeros_like(one.referring_logits)], dim=-1)
    weight = torch.tensor([1.0, criterion.referring_negative_weight])
    return torch.nn.functional.cross_entropy(two_way.flatten(0, 1), (~is_referent).long().flatten(), weight=weight)


def _losses(
    criterion: Criterion,
    parts: Mapping[str, Tensor],
    total: Tensor,
    output: DerisOutput,
    boxes: list[Tensor],
    case: Case,
    matches: list[_Match],
) -> CaseLosses:
    last = len(output.rounds) - 1
    order = [last, *range(last)]
    raw: dict[str, float] = {}
    for index in order:
        suffix = "" if index == last else f"_{index}"
        for ours, theirs in (("referring", "class"), ("mask_bce", "mask"), ("dice", "dice")):
            raw[f"loss_{theirs}{suffix}"] = float(parts[f"{ours}/round{index}"])
        l1, giou = _box_losses(boxes[index], case, matches[index])
        raw |= {f"loss_bbox{suffix}": l1, f"loss_giou{suffix}": giou}
    only = {kind: {k: v for k, v in parts.items() if k.startswith(kind)} for kind in ("referring", "mask_bce", "dice")}
    weighted = {
        "loss_class": float(criterion.weighted_total(only["referring"])),
        "loss_mask": float(criterion.weighted_total(only["mask_bce"]) + criterion.weighted_total(only["dice"])),
        "loss_det": 0.0,  # upstream multiplies its box losses with 0
        "loss_label_nt": criterion.weights["presence"] * float(parts["presence"]),
        "loss_perp": 0.0,
    }
    return CaseLosses(
        raw=raw,
        weighted=weighted,
        total=total,
        matching=[_pairs(case.targets.phrase_index, matches[i].query_index, len(output.presence_logit)) for i in order],
        costs=[_costs(case.targets.phrase_index, matches[i].costs, len(output.presence_logit)) for i in order],
    )


def _box_losses(boxes: Tensor, case: Case, match: _Match) -> tuple[float, float]:
    num_targets = len(match.query_index)
    if not num_targets:
        return 0.0, 0.0
    predicted = boxes[case.targets.phrase_index, match.query_index]
    l1 = (predicted - case.boxes_cxcywh_norm).abs().sum() / num_targets
    ours, theirs = (torchvision.ops.box_convert(b, "cxcywh", "xyxy") for b in (predicted, case.boxes_cxcywh_norm))
    giou = torchvision.ops.generalized_box_iou_loss(ours, theirs, reduction="sum", eps=GIOU_EPS) / num_targets
    return float(l1), float(giou)


def _pairs(phrase_index: Tensor, query_index: Tensor, num_phrases: int) -> list[list[list[int]]]:
    pairs = []
    for phrase in range(num_phrases):
        queries = query_index[phrase_index == phrase]
        order = queries.argsort()
        pairs.append([queries[order].tolist(), order.tolist()])
    return pairs


def _costs(phrase_index: Tensor, costs: Tensor, num_phrases: int) -> list[np.ndarray]:
    return [costs[phrase_index == phrase].T.numpy() for phrase in range(num_phrases)]


def gradient_norms(model: Deris, total: Tensor, names: Mapping[str, Any]) -> tuple[dict[str, float | None], float]:
    """L2 norms of the gradients of a loss, by the public code's names, and the norm of all.

    Args:
        model: whose trainable parameters the loss depends on.
        total: the loss; its graph is kept.
        names: of the public code's trainable parameters.

    Returns:
        for each name its norm, None where our model has no such parameter; and the norm over all our parameters.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, materialize_grads=True)
    squares = {name: float(g.double().square().sum()) for name, g in zip(parameters, gradients, strict=True)}
    norms: dict[str, float | None] = {}
    for name in names:
        targets = targets_of(name)
        norms[name] = None if targets is None else sum(squares[target] for target in targets.names) ** 0.5
    return norms, sum(squares.values()) ** 0.5
