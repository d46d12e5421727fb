"""Hungarian matching of queries and referents, per phrase and round (Mask2Former, paper section 3.4).

Costs of all phrases and rounds are computed on the device and moved to the host once per step.

Letters: P phrases, T targets, R rounds, Q queries, K points.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deris_llm.losses.losses import pairwise_mask_bce, pairwise_mask_dice
from deris_llm.losses.point_sampling import sample_points
from deris_llm.structures import DerisOutput, ReferringTargets, RoundOutput


class NonFiniteOutputError(FloatingPointError):
    """The model's output holds NaN or infinity.

    Attributes:
        rows: the phrases concerned, by row of the batch.
    """

    def __init__(self, rows: list[int], num_phrases: int) -> None:
        self.rows = rows
        super().__init__(
            f"criterion: expected finite mask, referring and presence logits, got NaN or infinity for phrase "
            f"rows {rows} of {num_phrases}: the run has diverged or its input is broken; go back to the last "
            f"checkpoint, lower the learning rate, or check these phrases' images"
        )


@dataclass(frozen=True)
class MatchingWeights:
    """Weights of the matching costs."""

    mask_bce: float = 5.0
    dice: float = 5.0
    referring: float = 2.0


@torch.no_grad()
def matching_costs(
    rounds: Sequence[RoundOutput], phrase_index: Tensor, target_values: Tensor, points: Tensor, weights: MatchingWeights
) -> Tensor:
    """Returns the cost of assigning each target to each query of its phrase, in all rounds.

    Args:
        rounds: R rounds, P phrases.
        phrase_index: int64 (T,), the phrase of each target.
        target_values: float (T, K) in [0, 1], the target masks at the points.
        points: float (T, K, 2), (x, y) in [0, 1], the same for all targets of a phrase.
        weights: of the three terms.

    Returns:
        float32 (T, R, Q).
    """
    costs = []
    for one in rounds:  # all rounds at once take four times the memory, and are slower on a CPU, whose cache holds one
        logits = sample_points(one.mask_logits.float()[phrase_index], points)
        scores = one.referring_logits.float().sigmoid()[phrase_index]
        costs.append(
            weights.mask_bce * pairwise_mask_bce(logits, target_values)
            + weights.dice * pairwise_mask_dice(logits, target_values)
            - weights.referring * scores
        )
    return torch.stack(costs, dim=1)


def assign_targets(costs: np.ndarray, phrase_index: np.ndarray) -> np.ndarray:
    """Finds the cheapest assignment, separately for every phrase and round.

    Args:
        costs: float (T, R, Q), finite.
        phrase_index: int (T,), non-decreasing.

    Returns:
        int64 (T, R): the query of each target; -1 if no query is left because a phrase has more targets than queries.
    """
    num_targets, num_rounds, _ = costs.shape
    query_index = np.full((num_targets, num_rounds), -1, dtype=np.int64)
    bounds = [*np.flatnonzero(np.diff(phrase_index, prepend=-1)), num_targets]
    for start, stop in itertools.pairwise(bounds):
        for round_number in range(num_rounds):
            rows, queries = linear_sum_assignment(costs[start:stop, round_number])
            query_index[start + rows, round_number] = queries
    return query_index


@torch.no_grad()
def match(output: DerisOutput, targets: ReferringTargets, points: Tensor, weights: MatchingWeights) -> Tensor:
    """Matches all phrases in all rounds with one transfer to the host.

    Args:
        output: R rounds, P phrases.
        targets: T target instances.
        points: float (P, K, 2): where the masks of a phrase are compared, in every round.
        weights: of the three terms.

    Returns:
        int64 (T, R) on the output's device: the query of each target in each round; -1 = no query was left.

    Raises:
        NonFiniteOutputError: an output holds NaN or infinity (any round, phrases without target included).
    """
    index = targets.phrase_index
    num_targets, num_phrases = index.shape[0], output.presence_logit.shape[0]
    extremes = [output.presence_logit]  # NaN and infinity come through
    for round_output in output.rounds:
        for logits in (round_output.mask_logits, round_output.referring_logits):
            extremes += logits.flatten(1).aminmax(dim=1)
    finite = torch.stack(extremes).isfinite().all(dim=0)
    target_points = points[index]
    target_values = sample_points(targets.masks.float().unsqueeze(1), target_points).squeeze(1)
    costs = matching_costs(output.rounds, index, target_values, target_points, weights)

    packed = torch.cat([finite.float(), index.float(), costs.flatten()]).cpu().numpy()  # the one transfer
    finite_rows, phrase_index, flat_costs = np.split(packed, [num_phrases, num_phrases + num_targets])
    if not finite_rows.all():
        raise NonFiniteOutputError(np.flatnonzero(finite_rows == 0).tolist(), num_phrases)
    assert (np.diff(phrase_index) >= 0).all(), "ReferringTargets.phrase_index must be non-decreasing"
    query_index = assign_targets(flat_costs.reshape(costs.shape), phrase_index.astype(np.int64))
    return torch.from_numpy(query_index).to(index.device)
