"""The criterion: which losses are computed, of which masks, with which weights.

`losses`, `matcher` and `point_sampling` have the formulas.

Letters: P phrases, T targets, R rounds, Q queries, K points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deris_llm.config import RunConfig
from deris_llm.losses.losses import mask_bce, mask_dice, presence_bce, referring_bce
from deris_llm.losses.matcher import MatchingWeights, NonFiniteOutputError, match
from deris_llm.losses.point_sampling import random_points, sample_points, uncertain_points
from deris_llm.models.postprocess import readable_logits
from deris_llm.structures import DerisOutput, MaskUpsampling, ReferringTargets, RoundOutput

__all__ = ["Criterion", "LossBreakdown", "NonFiniteOutputError", "build_criterion"]


@dataclass(frozen=True)
class LossBreakdown:
    """The loss and its parts."""

    total: Tensor  # float scalar with gradient
    parts: dict[str, Tensor]
    # Detached float scalars before weighting: "mask_bce/round0", "dice/round3", "referring/round1", "presence".


class Criterion:
    """Sum of the losses of all rounds (paper eq. 7 and 8; weights as in the public code, parity/NOTES.md section 6).

    Per round: Hungarian matching, then mask BCE and Dice of the matched pairs at sampled points, and the referring
    classification of all queries. Rounds before the last are weighted by `aux_weight`. Presence counts once.
    """

    def __init__(
        self,
        *,
        mask_bce_weight: float = 5.0,
        dice_weight: float = 5.0,
        referring_weight: float = 2.0,
        referring_negative_weight: float = 0.1,
        presence_weight: float = 1.0,
        aux_weight: float = 0.2,
        num_points: int = 12544,
    ) -> None:
        self.weights = {
            "mask_bce": mask_bce_weight,
            "dice": dice_weight,
            "referring": referring_weight,
            "presence": presence_weight,
        }
        self.matching_weights = MatchingWeights(mask_bce=mask_bce_weight, dice=dice_weight, referring=referring_weight)
        self.referring_negative_weight = referring_negative_weight
        self.aux_weight = aux_weight
        self.num_points = num_points

    def __call__(
        self,
        output: DerisOutput,
        targets: ReferringTargets,
        *,
        num_targets: Tensor | float | None = None,
        generator: torch.Generator | None = None,
        points: Tensor | None = None,
    ) -> LossBreakdown:
        """Computes the loss of a batch.

        Args:
            output: P phrases, R rounds, logits of any floating type (computed in float32).
            targets: T referents; a phrase without one has no target.
            num_targets: divisor of the summed mask losses, at least 1; None = T. Ranks pass the mean of their T, so that a
                referent has the same weight on every rank.
            generator: source of the sampled points.
            points: float (K, 2), (x, y) in [0, 1]: used for matching and loss instead of sampled points.

        Returns:
            The loss; every output gets a gradient even if the batch has no target.

        Raises:
            NonFiniteOutputError: an output holds NaN or infinity.
        """
        with torch.autocast(output.presence_logit.device.type, enabled=False):
            output = DerisOutput(
                rounds=tuple(_readable(r.to(dtype=torch.float32), output.mask_upsampling) for r in output.rounds),
                presence_logit=output.presence_logit.float(),
            )
            matching_points = self._matching_points(output, points, generator)
            query_index = match(output, targets, matching_points, self.matching_weights)
            divisor = float(targets.phrase_index.shape[0]) if num_targets is None else num_targets
            divisor = divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1.0)
            parts = (
                self._mask_parts(output, targets, query_index, divisor, generator, points)
                | self._referring_parts(output, targets, query_index)
                | {"presence": presence_bce(output.presence_logit, _has_target(output, targets))}
            )
            return LossBreakdown(self.weighted_total(parts), {name: value.detach() for name, value in parts.items()})

    def weighted_total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns the sum of the parts times their weights, with `aux_weight` on all rounds but the last (paper eq. 8).

        Args:
            parts: named as in `LossBreakdown.parts`.

        Returns:
            float scalar.
        """
        last_round = max(int(name.rpartition("round")[2]) for name in parts if "/round" in name)
        terms = []
        for name, value in parts.items():
            kind, _, round_name = name.partition("/")
            is_aux = bool(round_name) and round_name != f"round{last_round}"
            terms.append(self.weights[kind] * (self.aux_weight if is_aux else 1.0) * value)
        return torch.stack(terms).sum()

    def _matching_points(self, output: DerisOutput, points: Tensor | None, generator: torch.Generator | None) -> Tensor:
        num_phrases = output.presence_logit.shape[0]
        if points is not None:
            return points.expand(num_phrases, -1, -1)
        return random_points(num_phrases, self.num_points, device=output.presence_logit.device, generator=generator)

    def _mask_parts(
        self,
        output: DerisOutput,
        targets: ReferringTargets,
        query_index: Tensor,
        divisor: Tensor | float,
        generator: torch.Generator | None,
        points: Tensor | None,
    ) -> dict[str, Tensor]:
        num_targets, num_rounds = query_index.shape
        if num_targets == 0:  # masks stay in the graph: ranks must agree on which parameters have a gradient
            zeros = [r.mask_logits.sum() * 0 for r in output.rounds]
            return {f"{kind}/round{i}": zero for kind in ("mask_bce", "dice") for i, zero in enumerate(zeros)}
        is_matched = (query_index >= 0).float()  # (T, R)
        queries = query_index.clamp(min=0)
        per_round = [r.mask_logits[targets.phrase_index, queries[:, i]] for i, r in enumerate(output.rounds)]
        mask_logits = torch.stack(per_round, dim=1).flatten(0, 1)  # (T R, h, w)
        if points is None:
            at = uncertain_points(mask_logits.detach(), self.num_points, generator=generator)
        else:
            at = points.expand(num_targets * num_rounds, -1, -1)
        logits = sample_points(mask_logits.unsqueeze(1), at).view(num_targets, num_rounds, -1)
        with torch.no_grad():  # each target is read once, at the points of all rounds
            masks = targets.masks.float().unsqueeze(1)
            values = sample_points(masks, at.reshape(num_targets, -1, 2)).view(num_targets, num_rounds, -1)
        bce = (mask_bce(logits, values) * is_matched).sum(dim=0) / divisor
        dice = (mask_dice(logits, values) * is_matched).sum(dim=0) / divisor
        return {
            f"{kind}/round{i}": value
            for kind, values_R in (("mask_bce", bce), ("dice", dice))
            for i, value in enumerate(values_R)
        }

    def _referring_parts(
        self, output: DerisOutput, targets: ReferringTargets, query_index: Tensor
    ) -> dict[str, Tensor]:
        logits = torch.stack([r.referring_logits for r in output.rounds])  # (R, P, Q)
        rounds = torch.arange(len(logits), device=logits.device)
        is_referent = torch.zeros_like(logits, dtype=torch.int32)
        is_referent.index_put_(
            (rounds, targets.phrase_index[:, None], query_index.clamp(min=0)),
            (query_index >= 0).to(torch.int32),
            accumulate=True,
        )  # accumulate, because an unmatched target (clamped to query 0) must not erase a matched one
        losses = referring_bce(logits, is_referent > 0, negative_weight=self.referring_negative_weight)
        return {f"referring/round{i}": loss for i, loss in enumerate(losses)}


def _readable(output: RoundOutput, upsampling: MaskUpsampling) -> RoundOutput:
    return RoundOutput(readable_logits(output.mask_logits, upsampling), output.referring_logits)


def _has_target(output: DerisOutput, targets: ReferringTargets) -> Tensor:
    has_target = torch.zeros_like(output.presence_logit, dtype=torch.bool)
    has_target[targets.phrase_index] = True
    return has_target


def build_criterion(config: RunConfig) -> Criterion:
    """Builds the criterion of a run."""
    c = config.criterion
    return Criterion(
        mask_bce_weight=c.mask_bce_weight,
        dice_weight=c.dice_weight,
        referring_weight=c.referring_weight,
        referring_negative_weight=c.referring_negative_weight,
        presence_weight=c.presence_weight,
        aux_weight=c.aux_weight,
        num_points=c.num_points,
    )
