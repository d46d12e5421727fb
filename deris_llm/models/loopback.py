"""Loopback synergy: perception and cognition exchange queries for N rounds (paper section 3.2).

Letters: I images, P phrases, Q queries, L text tokens, R rows of F_c (one per image, or one per phrase if the cognition
backend fuses the phrase into its image features), C channels, D channels of the cognition backend, H W pixels, h w cells.

Round i = 0..N, on queries q:

    i >= 1:   q = masked-attention layer i-1 of Mask2Former, on the map of stride 32, 16, 8, 32, ...    (perception layer)
    masks  = mask_embed(norm(q)) . F_mask,   F_mask = Conv1x1([F_p ; up(F_c)])                          (eq. 3)
    prior  = F_mask pooled under sigmoid(masks)                                                         (eq. 4)
    q_p    = norm(q + SelfAttention(q + prior, q + prior, q))                                           (eq. 5)
    q_c    = text block(q_p; text)  ->  referring logit of each query                                   (cognition layer)
    q      = Linear([q_p ; q_c])                                                                        (C1, eq. 2)

The presence logit is the mean over the queries of Linear(q_c of the last round) (eq. 1). A perception layer attends
within the masks of the round before, as in the public code.

`deris_llm.models.variants` has what the paper compares with this and what the public code computes differently.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deris_llm.models.perception import QueryDecoder
from deris_llm.structures import CognitionFeatures, DerisOutput, PerceptionFeatures, RoundOutput

NUM_HEADS = 8  # attention heads of the cognition layers
PRIOR_STRIDE = 4  # eq. 4 pools on a grid this much coarser than the masks (public code: 24 of 96 cells)
REFERRING_PRIOR = 0.1  # initial referring probability of a query: about one in ten is the referent


class Loopback(nn.Module):
    """The rounds, with the parameters around the perception layers."""

    def __init__(self, query_decoder: QueryDecoder, *, cognition_dim: int, rounds: int, dim_feedforward: int) -> None:
        """Creates the new parameters.

        Args:
            query_decoder: mask head and at least `rounds` masked-attention layers of a Mask2Former; determines C and Q.
            cognition_dim: D.
            rounds: N.
            dim_feedforward: hidden width of the cognition layers' FFN.
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
            CognitionRound(channels, dim_feedforward=dim_feedforward) for _ in range(rounds + 1)
        )
        self.query_fusions = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(rounds))
        self.referring_head = nn.Linear(channels, 1)
        self.presence_head = nn.Linear(channels, 1)
        init_linears(self.vis_embed, self.text_embed, self.initial_embed, self.query_fusions)
        init_heads(self.referring_head, self.presence_head)

    def forward(
        self,
        perception: PerceptionFeatures,
        cognition: CognitionFeatures,
        image_index: Tensor,
        phrases_per_image: tuple[int, ...],
    ) -> DerisOutput:
        """Runs all rounds.

        Args:
            perception: of I images.
            cognition: of P phrases.
            image_index: int64 (P,), non-decreasing: the image of each phrase.
            phrases_per_image: I numbers, the counts in `image_index`, known to the host.
        """
        text = text_tokens(self.text_embed, cognition)
        image_feats = project_maps(self.vis_embed, cognition.image_feats)  # F_c
        image_of_row = image_index if len(image_feats) == len(image_index) else None
        mask_feats = MaskFeats.of(
            self.mask_feats_fusion(perception.mask_feats, image_feats, image_of_row),
            cognition.image_feats_index,
            phrases_per_row(image_feats, phrases_per_image),
        )
        scales = self.query_decoder.scale_tokens(perception.multi_scale_feats)
        slots = torch.arange(self.query_decoder.num_queries, device=image_index.device)
        queries = self.initial_embed(self.initial_queries(slots)).expand(len(image_index), -1, -1)
        perception_queries = cognition_queries = queries

        rounds: list[RoundOutput] = []
        for i, cognition_round in enumerate(self.cognition_rounds):
            if i > 0:
                queries = self.query_fusions[i - 1](torch.cat([perception_queries, cognition_queries], dim=-1))  # eq. 2
                scale = scales[(i - 1) % len(scales)]
                queries = self.query_decoder(i - 1, queries, rounds[-1].mask_logits, scale, phrases_per_image)
            mask_logits = mask_feats.logits(self.query_decoder.mask_embeddings(queries))
            prior = mask_feats.prior(mask_logits)
            perception_queries, cognition_queries = cognition_round(queries, prior, text)
            rounds.append(RoundOutput(mask_logits, self.referring_head(cognition_queries).squeeze(-1)))
        presence_logit = self.presence_head(cognition_queries).squeeze(-1).mean(dim=1)  # eq. 1
        return DerisOutput(tuple(rounds), presence_logit)


class CognitionRound(nn.Module):
    """The cognition layer of a round: instance-instance relation, then instance-text relation; post-norm."""

    def __init__(self, channels: int, *, dim_feedforward: int) -> None:
        super().__init__()
        self.prior_attention = Attention(channels)
        self.prior_norm = nn.LayerNorm(channels)
        self.self_attention = Attention(channels)
        self.self_norm = nn.LayerNorm(channels)
        self.text_attention = Attention(channels)
        self.text_norm = nn.LayerNorm(channels)
        self.feedforward = nn.Sequential(
            nn.Linear(channels, dim_feedforward), nn.ReLU(), nn.Linear(dim_feedforward, channels)
        )
        self.feedforward_norm = nn.LayerNorm(channels)
        init_linears(self.feedforward)

    def forward(self, query_feats: Tensor, mask_prior: Tensor | None, text: TextTokens) -> tuple[Tensor, Tensor]:
        """Runs both relations.

        Args:
            query_feats: float (P, Q, C).
            mask_prior: float (P, Q, C); None = the queries carry no position.
            text: of the P phrases.

        Returns:
            q_p and q_c, float (P, Q, C) each.
        """
        perception_queries = self.prior_norm(query_feats + self.exchange_priors(query_feats, mask_prior))
        queries = perception_queries
        queries = self.self_norm(queries + self.self_attention(queries, queries, queries))
        queries = self.text_norm(queries + self.text_attention(queries, text.keys, text.values, text.mask))
        return perception_queries, self.feedforward_norm(queries + self.feedforward(queries))

    def exchange_priors(self, query_feats: Tensor, mask_prior: Tensor | None) -> Tensor:
        """Attends among the queries of a phrase, with the mask prior as position (eq. 5)."""
        placed = query_feats if mask_prior is None else query_feats + mask_prior
        return self.prior_attention(placed, placed, query_feats)


class MaskFeats(NamedTuple):
    """F_mask of R rows."""

    feats: Tensor  # float (R, C, H/4, W/4)
    pooled_feats: Tensor  # float (R, C, H/16, W/16)
    index: Tensor  # int64 (P,), non-decreasing: the row of each phrase
    phrases_per_row: tuple[int, ...]  # R numbers, sum P

    @classmethod
    def of(cls, feats: Tensor, index: Tensor, phrases_per_row: tuple[int, ...]) -> MaskFeats:
        """Pools the features once for the priors of all rounds."""
        return cls(feats, F.avg_pool2d(feats, PRIOR_STRIDE), index, phrases_per_row)

    def logits(self, mask_embeddings: Tensor) -> Tensor:
        """Computes mask logits (P, Q, H/4, W/4) from vectors (P, Q, C), without a copy of F_mask per phrase."""
        per_row = zip(mask_embeddings.split(self.phrases_per_row), self.feats, strict=True)
        return torch.cat([torch.einsum("pqc,chw->pqhw", embeddings, feats) for embeddings, feats in per_row])

    def prior(self, mask_logits: Tensor) -> Tensor:
        """Pools F_mask under each mask (eq. 4): (P, Q, H/4, W/4) -> (P, Q, C).

        The sum is divided by the number of cells, not by the area of the mask, as in the public code: the vector then
        also tells how large the mask is.
        """
        coarse = F.interpolate(mask_logits, size=self.pooled_feats.shape[-2:], mode="bilinear", align_corners=False)
        products = torch.einsum("pqn,pcn->pqc", coarse.sigmoid().flatten(2), self.pooled_feats.flatten(2)[self.index])
        return products / self.pooled_feats[0, 0].numel()


class MaskFeatsFusion(nn.Module):
    """F_mask = Conv1x1([F_p ; up(F_c)]) (eq. 3), with each half projected on its own grid before F_c is upsampled.

    A 1x1 convolution commutes with bilinear upsampling, so this equals the concatenation at 1/4 resolution.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.perception = nn.Conv2d(channels, channels, kernel_size=1)
        self.cognition = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        for parameter in self.perception.parameters():
            nn.init.zeros_(parameter)
        nn.init.dirac_(self.perception.weight)  # training starts from the F_p that the mask head was trained with
        nn.init.xavier_uniform_(self.cognition.weight, gain=0.1)

    def forward(self, mask_feats: Tensor, image_feats: Tensor, image_of_row: Tensor | None) -> Tensor:
        """Fuses the maps of the two branches.

        Args:
            mask_feats: F_p, float (I, C, H/4, W/4).
            image_feats: F_c, float (R, C, h, w).
            image_of_row: int64 (R,), the image of each row; None = R is I.

        Returns:
            float (R, C, H/4, W/4).
        """
        coarse = self.cognition(image_feats)
        upsampled = F.interpolate(coarse, size=mask_feats.shape[-2:], mode="bilinear", align_corners=False)
        projected = self.perception(mask_feats)
        return (projected if image_of_row is None else projected[image_of_row]) + upsampled


class Attention(nn.Module):
    """Multi-head attention through PyTorch's SDPA."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % NUM_HEADS:
            raise ValueError(
                f"perception.weights: expected a hidden_dim that is a multiple of {NUM_HEADS}, the attention heads of "
                f"the cognition layers, got {channels}; use other weights."
            )
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        init_linears(self)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            queries: float (P, Q, C).
            keys: float (P, K, C).
            values: float (P, K, C).
            mask: (P, K); bool: False hides this key; float: added to the logits of this key.

        Returns:
            float (P, Q, C).
        """
        heads = [
            projection(tokens).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
            for projection, tokens in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        ]
        attended = F.scaled_dot_product_attention(*heads, attn_mask=None if mask is None else mask[:, None, None, :])
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class TextTokens(NamedTuple):
    """The phrases as the cognition layers read them."""

    values: Tensor  # float (P, L, C)
    keys: Tensor  # float (P, L, C), with positions
    mask: Tensor  # (P, L), mask of `Attention`


def text_tokens(text_embed: nn.Linear, cognition: CognitionFeatures) -> TextTokens:
    """Projects the text features to C channels and adds 1-D sine positions to the keys."""
    values = text_embed(cognition.text_feats.to(text_embed.weight.dtype))
    positions = sine_positions(values.shape[1], values.shape[2], device=values.device)
    return TextTokens(values, values + positions.to(values.dtype), mask=~cognition.text_padding_mask)


def sine_positions(length: int, channels: int, *, device: torch.device | None = None) -> Tensor:
    """Returns sin and cos of p / 10000^(2i / channels), interleaved: float32 (length, channels)."""
    frequencies = 10000 ** (-torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def project_maps(embed: nn.Linear, maps: Tensor) -> Tensor:
    """Applies a linear layer to the channels of maps: (R, D, h, w) -> (R, C, h, w)."""
    return embed(maps.permute(0, 2, 3, 1).to(embed.weight.dtype)).permute(0, 3, 1, 2)


def phrases_per_row(rows: Tensor, phrases_per_image: tuple[int, ...]) -> tuple[int, ...]:
    """Returns how many phrases read each of R rows: rows are of images, or of phrases."""
    return phrases_per_image if len(rows) == len(phrases_per_image) else (1,) * len(rows)


def init_linears(*parents: nn.Module) -> None:
    """Draws the weights of all linear layers inside from Xavier's uniform distribution; biases are 0."""
    for parent in parents:
        for module in parent.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)


def init_heads(referring_head: nn.Linear, presence_head: nn.Linear) -> None:
    """Initialises the heads; every query starts with a referring probability of about `REFERRING_PRIOR`."""
    for head in (referring_head, presence_head):
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
    with torch.no_grad():
        referring_head.bias[0] = -math.log(1 / REFERRING_PRIOR - 1)
