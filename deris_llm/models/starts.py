"""What the loopback starts from: the values of `loopback.fusion_start`, `prior_start` and `queries_start`.

They are compared in docs/ablations.md; those that do not win will be deleted. All other parameters start from the same
random numbers, whatever is chosen, so that runs with one seed can be compared in pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deris_llm.config.schema import LoopbackConfig

COGNITION_SCALE = 0.1  # of the cognition half of C1, relative to Xavier's


def apply_starts(loopback: Any, options: LoopbackConfig) -> None:
    """Changes the fresh parameters of a loopback as its options say.

    Args:
        loopback: a `Loopback` or `LoopbackVariant`, just built; for `queries_start=mask2former`, its query decoder has
            `query_feats`.
        options: of the run.
    """
    if options.fusion_start == "identity":
        for fusion in loopback.query_fusions:
            start_as_identity(fusion)
    elif options.fusion_start == "gate":
        loopback.query_fusions = nn.ModuleList(map(GatedFusion, loopback.query_fusions))
    if options.prior_start == "zero":
        for cognition_round in loopback.cognition_rounds:
            nn.init.zeros_(cognition_round.prior_attention.out_proj.weight)  # its bias starts at zero anyway
    if options.queries_start == "mask2former":
        queries = loopback.query_decoder.query_feats
        assert queries is not None, "built without keep_query_feats"
        loopback.initial_queries, loopback.query_decoder.query_feats = queries, None
        loopback.initial_embed = nn.Identity()  # these queries have C channels


def start_as_identity(fusion: nn.Linear) -> None:
    """Makes the perception half of C1's weights the identity, and its cognition half a tenth of Xavier's.

    The masked-attention layers then first read queries like those that they were trained with.
    """
    channels = fusion.out_features
    with torch.no_grad():
        nn.init.eye_(fusion.weight[:, :channels])
        fusion.weight[:, channels:] *= COGNITION_SCALE


class GatedFusion(nn.Module):
    """C1 as a residual: q_p + tanh(g) * Linear([q_p ; q_c]), with one g for each channel, which starts at 0."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.gate = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, pair: Tensor) -> Tensor:
        """Fuses [q_p ; q_c]: float (P, Q, 2C) -> (P, Q, C)."""
        return pair[..., : self.linear.out_features] + self.gate.tanh() * self.linear(pair)
