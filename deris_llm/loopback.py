"""What perception and cognition tell each other, round by round (paper section 3.2).

I images, P phrases, Q queries, L text tokens, C channels, D width of the cognition backend, H W pixels, h w cells.

A round i = 0..N on queries q:

    i >= 1:   q = masked-attention layer i-1 of Mask2Former, on the map of stride 32, 16, 8, 32, ...    (perception)
    masks  = mask_embed(norm(q)) . F_mask,   F_mask = Conv1x1([F_p ; up(F_c)])
    prior  = F_mask pooled under sigmoid(masks)                                                         (eq. 4)
    q_p    = norm(q + SelfAttention(q + prior, q + prior, q))                                           (eq. 5)
    q_c    = text block (q_p; text)  ->  referring score                                                (cognition)
    q      = Linear([q_p ; q_c]), the C1 of eq. 2; not in the last round

The attention mask of a perception layer comes from the masks of the round before, as upstream.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deris_llm.perception import QueryDecoder
from deris_llm.structures import CognitionFeatures, DerisOutput, PerceptionFeatures, RoundOutput

PRIOR_STRIDE = 4  # the mask prior is pooled on a grid this much coarser than the masks (upstream: 24 of 96 cells)
REFERRING_PRIOR = 0.1  # probability every query starts with: about one of ten is the referent


class Loopback(nn.Module):
    """Rounds of perception and cognition on a set of queries."""

    def __init__(
        self, query_decoder: QueryDecoder, *, cognition_dim: int, rounds: int, num_heads: int, dim_feedforward: int
    ) -> None:
        """Makes the fresh parts around the perception layers.

        Args:
            query_decoder: at least `rounds` masked-attention layers and the mask head; it fixes C and Q.
            cognition_dim: D.
            rounds: N.
            num_heads: of the cognition layers.
            dim_feedforward: of the cognition layers.
        """
        super().__init__()
        channels = query_decoder.channels
        self.query_decoder = query_decoder
        self.rounds = rounds
        self.vis_embed = nn.Linear(cognition_dim, channels)
        self.text_embed = nn.Linear(cognition_dim, channels)
        self.initial_queries = nn.Embedding(query_decoder.num_queries, cognition_dim)
        self.initial_embed = nn.Linear(cognition_dim, channels)
        self.mask_feats_fusion = MaskFeatsFusion(channels)
        self.cognition_rounds = nn.ModuleList(
            CognitionRound(channels, num_heads=num_heads, dim_feedforward=dim_feedforward) for _ in range(rounds + 1)
        )
        self.query_fusions = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(rounds))
        self.referring_head = nn.Linear(channels, 1)
        self.presence_head = nn.Linear(channels, 1)
        _init_linears(self.vis_embed, self.text_embed, self.initial_embed, self.query_fusions)
        for head in (self.referring_head, self.presence_head):
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        nn.init.constant_(self.referring_head.bias, -math.log(1 / REFERRING_PRIOR - 1))

    def forward(self, perception: PerceptionFeatures, cognition: CognitionFeatures, image_index: Tensor) -> DerisOutput:
        """Runs all rounds.

        Args:
            perception: of I images.
            cognition: of P phrases.
            image_index: int64 (P,), non-decreasing.
        """
        scales = self.query_decoder.scale_tokens(perception.multi_scale_feats)
        text = self._text(cognition)
        mask_feats = self._mask_feats(perception, cognition, image_index)
        numbers = torch.arange(self.query_decoder.num_queries, device=image_index.device)
        query_feats = self.initial_embed(self.initial_queries(numbers)).expand(len(image_index), -1, -1)

        rounds: list[RoundOutput] = []
        for index, cognition_round in enumerate(self.cognition_rounds):
            if index > 0:
                scale = scales[(index - 1) % len(scales)]
                query_feats = self.query_decoder(index - 1, query_feats, rounds[-1].mask_logits, scale, image_index)
            mask_logits = mask_feats.logits(self.query_decoder.mask_embeddings(query_feats))
            perception_queries, cognition_queries = cognition_round(query_feats, mask_feats.prior(mask_logits), text)
            rounds.append(RoundOutput(mask_logits, self.referring_head(cognition_queries).squeeze(-1)))
            if index < self.rounds:
                query_feats = self.query_fusions[index](torch.cat([perception_queries, cognition_queries], dim=-1))
        presence_logit = self.presence_head(cognition_queries).squeeze(-1).mean(dim=1)  # eq. 1
        return DerisOutput(tuple(rounds), presence_logit)

    def _text(self, cognition: CognitionFeatures) -> TextTokens:
        values = self.text_embed(cognition.text_feats.to(self.text_embed.weight.dtype))
        keys = values + sine_positions(values.shape[1], values.shape[2], device=values.device).to(values.dtype)
        return TextTokens(values=values, keys=keys, is_valid=~cognition.text_padding_mask)

    def _mask_feats(
        self, perception: PerceptionFeatures, cognition: CognitionFeatures, image_index: Tensor
    ) -> MaskFeats:
        """F_mask, one per row of the cognition branch's image features: usually one per image, not per phrase."""
        index = cognition.image_feats_index
        image_of_row = torch.zeros(len(cognition.image_feats), dtype=torch.long, device=index.device)
        image_of_row = image_of_row.scatter(0, index, image_index)
        image_feats = cognition.image_feats.permute(0, 2, 3, 1).to(self.vis_embed.weight.dtype)
        image_feats = self.vis_embed(image_feats).permute(0, 3, 1, 2)
        feats = self.mask_feats_fusion(perception.mask_feats, image_feats, image_of_row)
        return MaskFeats(
            feats=feats,
            pooled_feats=F.avg_pool2d(feats, PRIOR_STRIDE),
            index=index,
            phrases_per_row=torch.bincount(index, minlength=len(feats)).tolist(),
        )


class TextTokens(NamedTuple):
    """The phrase as the cognition layers read it."""

    values: Tensor  # float (P, L, C)
    keys: Tensor  # float (P, L, C), positions added
    is_valid: Tensor  # bool (P, L), False = padding


class MaskFeats(NamedTuple):
    """F_mask of R rows (images, or phrases where the image features depend on the phrase)."""

    feats: Tensor  # float (R, C, H/4, W/4)
    pooled_feats: Tensor  # float (R, C, H/16, W/16)
    index: Tensor  # int64 (P,), non-decreasing: the row of a phrase
    phrases_per_row: list[int]  # R numbers, sum P

    def logits(self, mask_embeddings: Tensor) -> Tensor:
        """Mask logits (P, Q, H/4, W/4) of the vectors (P, Q, C); F_mask is not copied for each phrase."""
        per_row = mask_embeddings.split(self.phrases_per_row)
        return torch.cat([torch.einsum("pqc,chw->pqhw", row, self.feats[r]) for r, row in enumerate(per_row)])

    def prior(self, mask_logits: Tensor) -> Tensor:
        """Pools F_mask under each mask (eq. 4): (P, Q, H/4, W/4) -> (P, Q, C).

        Mean over all cells of a grid of stride 16, as upstream's code does, not over the mask's area: the vector also
        says how large the mask is.
        """
        coarse = F.interpolate(mask_logits, size=self.pooled_feats.shape[-2:], mode="bilinear", align_corners=False)
        products = torch.einsum("pqn,pcn->pqc", coarse.sigmoid().flatten(2), self.pooled_feats.flatten(2)[self.index])
        return products / self.pooled_feats[0, 0].numel()


class MaskFeatsFusion(nn.Module):
    """F_mask = Conv1x1([F_p ; up(F_c)]), each half projected on its own grid before F_c is upsampled.

    A 1x1 convolution commutes with bilinear upsampling, so this equals the concatenation at 1/4 resolution.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.perception = nn.Conv2d(channels, channels, kernel_size=1)
        self.cognition = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        for parameter in self.perception.parameters():
            nn.init.zeros_(parameter)
        nn.init.dirac_(self.perception.weight)  # start from the F_p that the mask head was trained with
        nn.init.xavier_uniform_(self.cognition.weight, gain=0.1)

    def forward(self, mask_feats: Tensor, image_feats: Tensor, image_of_row: Tensor) -> Tensor:
        """Fuses the two branches' maps.

        Args:
            mask_feats: float (I, C, H/4, W/4), F_p.
            image_feats: float (R, C, h, w), F_c.
            image_of_row: int64 (R,), the image of each row of F_c.

        Returns:
            float (R, C, H/4, W/4).
        """
        coarse = self.cognition(image_feats)
        upsampled = F.interpolate(coarse, size=mask_feats.shape[-2:], mode="bilinear", align_corners=False)
        return self.perception(mask_feats)[image_of_row] + upsampled


class CognitionRound(nn.Module):
    """The cognition half of a round: the masks inform the queries, then the queries read the phrase; post-norm.

    Upstream's mask-prior attention runs over the batch instead of the queries (parity/NOTES.md 2) and its text padding
    is only discouraged; here both are as the paper says.
    """

    def __init__(self, channels: int, *, num_heads: int, dim_feedforward: int) -> None:
        super().__init__()
        self.prior_attention = Attention(channels, num_heads)
        self.prior_norm = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, num_heads)
        self.self_norm = nn.LayerNorm(channels)
        self.text_attention = Attention(channels, num_heads)
        self.text_norm = nn.LayerNorm(channels)
        self.feedforward = nn.Sequential(
            nn.Linear(channels, dim_feedforward), nn.ReLU(), nn.Linear(dim_feedforward, channels)
        )
        self.feedforward_norm = nn.LayerNorm(channels)
        _init_linears(self.feedforward)

    def forward(self, query_feats: Tensor, mask_prior: Tensor, text: TextTokens) -> tuple[Tensor, Tensor]:
        """Runs the two blocks.

        Args:
            query_feats: float (P, Q, C).
            mask_prior: float (P, Q, C), position term of the first attention.
            text: of the P phrases.

        Returns:
            Queries after the mask prior and after the text, float (P, Q, C) each.
        """
        placed = query_feats + mask_prior
        perception_queries = self.prior_norm(query_feats + self.prior_attention(placed, placed, query_feats))
        queries = perception_queries
        queries = self.self_norm(queries + self.self_attention(queries, queries, queries))
        queries = self.text_norm(queries + self.text_attention(queries, text.keys, text.values, text.is_valid))
        return perception_queries, self.feedforward_norm(queries + self.feedforward(queries))


class Attention(nn.Module):
    """Multi-head attention through PyTorch's SDPA."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(
                f"loopback.num_heads: expected a divisor of the perception weights' width {channels}, got {num_heads}; "
                "change it."
            )
        self.num_heads = num_heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        _init_linears(self)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, is_valid: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            queries: float (P, Q, C).
            keys: float (P, K, C).
            values: float (P, K, C).
            is_valid: bool (P, K), False = nobody reads this key.

        Returns:
            float (P, Q, C).
        """
        heads = [
            projection(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, tokens in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        ]
        mask = None if is_valid is None else is_valid[:, None, None, :]
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def sine_positions(length: int, channels: int, *, device: torch.device | None = None) -> Tensor:
    """1-D sine positions, float32 (length, channels): sin and cos of p / 10000^(2i / channels), interleaved.

    Upstream casts the inverse frequencies to integers, so that only i = 0 survives (parity/NOTES.md 3); not so here.
    """
    frequencies = 10000 ** (-torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def _init_linears(*parents: nn.Module) -> None:
    for parent in parents:
        for module in parent.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
