"""Masked cross-attention of the query decoder, with keys and values computed once per image.

Letters: P phrases, Q queries, R maps (one per image or one per phrase), S cells of a map, A heads, C channels.

transformers' layer has torch's module, which needs keys for each phrase: it projects the same map once per phrase, and
also averages attention weights that are not used. With seven phrases per image this took half of the loopback's time
(`scripts/bench/perception.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class VisibleCells:
    """Which cells the queries attend to; replaces transformers' attention mask."""

    is_visible: Tensor  # bool (P, Q, S), at least one True per query
    phrases_per_map: Sequence[int]  # R numbers, sum P: phrases are in the order of their maps


class MaskedAttention(nn.Module):
    """Replaces torch's module in a decoder layer, with its weights under the same names."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.dropout = source.dropout
        self.in_proj_weight = source.in_proj_weight
        self.in_proj_bias = source.in_proj_bias
        self.out_proj = source.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: VisibleCells, **_not_needed: object
    ) -> tuple[Tensor, None]:
        """Attends; called by transformers' decoder layer.

        Args:
            query: float (Q, P, C).
            key: float (R, S, C).
            value: float (R, S, C).
            attn_mask: which cells each query attends to.

        Returns:
            float (Q, P, C), and None for the attention weights, which are not used.
        """
        num_queries, num_phrases, channels = query.shape
        weights, biases = self.in_proj_weight.split(channels), self.in_proj_bias.split(channels)
        queries, keys, values = (
            F.linear(tokens, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tokens, weight, bias in zip((query.transpose(0, 1), key, value), weights, biases, strict=True)
        )  # (P, A, Q, d), (R, A, S, d) twice
        counts = attn_mask.phrases_per_map
        attended = []
        rows = (queries.split(counts), keys.split(1), values.split(1), attn_mask.is_visible.split(counts))
        for of_map, key_of_map, value_of_map, is_visible in zip(*rows, strict=True):
            if not len(of_map):
                continue
            read = F.scaled_dot_product_attention(
                of_map.transpose(0, 1).flatten(1, 2)[None],  # (1, A, P' Q, d): one map, the queries of all its phrases
                key_of_map,
                value_of_map,
                attn_mask=is_visible.flatten(0, 1)[None, None],
                dropout_p=self.dropout if self.training else 0.0,
            )
            attended.append(read[0].transpose(0, 1).flatten(1))
        together = torch.cat(attended).view(num_phrases, num_queries, channels)
        return self.out_proj(together).transpose(0, 1), None
