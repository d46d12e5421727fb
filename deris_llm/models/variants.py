"""What the paper compares with its loopback, and what the public code computes differently.

Forms (Table 7), structures (Fig. 2 and Table 5), presence sources (Table 9), shared cognition weights (Table 10); and
the public code's ways, which its released weights need (parity/NOTES.md; `compat: deris-2025` selects them all).
Letters as in `deris_llm.models.loopback`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from deris_llm.config import RunConfig
from deris_llm.models.loopback import (
    NUM_HEADS,
    CognitionRound,
    Loopback,
    MaskFeats,
    MaskFeatsFusion,
    TextTokens,
    init_heads,
    init_linears,
    phrases_per_row,
    project_maps,
    text_tokens,
)
from deris_llm.models.perception import QueryDecoder
from deris_llm.models.starts import apply_starts
from deris_llm.structures import CognitionFeatures, DerisOutput, MaskUpsampling, PerceptionFeatures, RoundOutput


@dataclass(frozen=True)
class Variation:
    """How a loopback differs from the paper's; the defaults do not."""

    form: Literal["loopback", "p2c", "c2p", "hierarchical"] = "loopback"
    # Table 7. `p2c`: perception's queries pass from layer to layer on their own and inform cognition's; `c2p`: the
    # reverse, without mask prior; `hierarchical`: as `p2c`, with F_c fused into every map of perception through a
    # `SimplePyramid`. F_mask is that of eq. 3 in all of them. The paper only names the forms. That the informed branch
    # has a stream of queries of its own, so that all forms are equally deep, is our reading.
    structure: Literal["integrated", "perception_centric", "cognition_centric"] = "integrated"
    # Table 5. `perception_centric`: F_c is not read; `cognition_centric`: a `SimplePyramid` of F_c replaces the maps of
    # perception, at the strides that F_c's grid gives. The paper describes both as types of other methods.
    cognition_weights: Literal["independent", "shared"] = "independent"  # Table 10; C1 stays each round's own
    presence_source: Literal["query", "image", "cls"] = "query"
    # Table 9: the last cognition queries, the mean of F_c, or the backend's summary vector.

    # The public code:
    prior_attention: Literal["queries", "batch", "self"] = (
        "queries"  # of `CognitionRound`, `BatchPriorRound`, `SelfPriorRound`
    )
    text_positions: Literal["sine", "integer_sine"] = "sine"  # `integer_sine_positions`
    text_padding: Literal["hidden", "minus_100"] = (
        "hidden"  # whether padding is hidden, or has -100 added to its logits
    )
    referring_head: Literal["binary", "two_way"] = "binary"
    # `two_way`: one logit for referred, one for not. The referring logit is their difference, whose BCE is the two-way
    # cross entropy.
    presence_head: Literal["linear", "text_decoder"] = "linear"
    # `text_decoder`: a `PresenceDecoder` on the queries that one more C1 makes of the last round.
    mask_upsampling: MaskUpsampling = (
        "direct"  # how readers of the masks upsample them; the rounds use them as they are
    )


def build_loopback(config: RunConfig, query_decoder: QueryDecoder, *, cognition_dim: int) -> Loopback | LoopbackVariant:
    """Builds the loopback of a run, without perception branch if the structure has none.

    Args:
        config: the run.
        query_decoder: at least `loopback.rounds` masked-attention layers; with `query_feats` if `loopback.queries_start` needs
            them.
        cognition_dim: D.
    """
    options, ways = config.loopback, config.ways
    trains_presence = config.criterion.presence_weight > 0
    variation = Variation(
        form=options.form,
        structure=options.structure,
        cognition_weights=options.cognition_weights,
        presence_source=options.presence_source,
        prior_attention=options.prior_attention,
        text_positions=ways.text_positions,
        text_padding=ways.text_padding,
        referring_head=ways.referring_head,
        presence_head=ways.presence_head if trains_presence else "linear",
        mask_upsampling=ways.mask_upsampling,
    )
    rounds, dim_feedforward = options.rounds, options.dim_feedforward
    if variation == Variation():
        loopback = Loopback(query_decoder, cognition_dim=cognition_dim, rounds=rounds, dim_feedforward=dim_feedforward)
    else:
        loopback = LoopbackVariant(
            query_decoder, variation, cognition_dim=cognition_dim, rounds=rounds, dim_feedforward=dim_feedforward
        )
    apply_starts(loopback, options)
    if not trains_presence:  # predicts 0.5 for every phrase
        nn.init.zeros_(loopback.presence_head.weight)
        loopback.presence_head.requires_grad_(False)
    return loopback


class LoopbackVariant(nn.Module):
    """A loopback with a `Variation`; parameters have the same names as in `Loopback`."""

    def __init__(
        self,
        query_decoder: QueryDecoder,
        variation: Variation,
        *,
        cognition_dim: int,
        rounds: int,
        dim_feedforward: int,
    ) -> None:
        """Creates the parameters that the variation has; arguments as of `Loopback`.

        The order decides which random numbers a parameter starts from. The pyramid comes last, so that all other parts
        start the same with and without it.
        """
        super().__init__()
        v = variation
        assert v.structure != "perception_centric" or v.presence_source == "query", "F_c and cls_feat saw the image"
        channels = query_decoder.channels
        self.query_decoder = query_decoder
        self.variation = variation
        self.rounds = rounds
        self.vis_embed = nn.Linear(cognition_dim, channels) if v.structure != "perception_centric" else None
        self.text_embed = nn.Linear(cognition_dim, channels)
        self.initial_queries = nn.Embedding(query_decoder.num_queries, cognition_dim)
        self.initial_embed = nn.Linear(cognition_dim, channels)
        self.mask_feats_fusion = MaskFeatsFusion(channels) if v.structure == "integrated" else None
        round_type = {"queries": CognitionRound, "batch": BatchPriorRound, "self": SelfPriorRound}[v.prior_attention]
        self.cognition_rounds = nn.ModuleList(
            round_type(channels, dim_feedforward=dim_feedforward)
            for _ in range(1 if v.cognition_weights == "shared" else rounds + 1)
        )
        decodes_presence = v.presence_head == "text_decoder"
        self.query_fusions = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(rounds + decodes_presence))
        self.referring_head = nn.Linear(channels, 2 if v.referring_head == "two_way" else 1)
        self.presence_decoder = PresenceDecoder(channels) if decodes_presence else None
        self.presence_head = nn.Linear(cognition_dim if v.presence_source == "cls" else channels, 1)
        embeds = (self.vis_embed, self.text_embed, self.initial_embed)
        init_linears(*(embed for embed in embeds if embed is not None), self.query_fusions)
        init_heads(self.referring_head, self.presence_head)
        has_pyramid = v.form == "hierarchical" or v.structure == "cognition_centric"
        self.image_pyramid = SimplePyramid(channels) if has_pyramid else None
        self.scale_fusions = None
        if v.form == "hierarchical":
            self.scale_fusions = nn.ModuleList(MaskFeatsFusion(channels) for _ in range(SimplePyramid.NUM_SCALES))

    def forward(
        self,
        perception: PerceptionFeatures | None,
        cognition: CognitionFeatures,
        image_index: Tensor,
        phrases_per_image: tuple[int, ...],
    ) -> DerisOutput:
        """Runs all rounds; arguments as of `Loopback`, `perception` is None if the structure is `cognition_centric`."""
        text = self._text(cognition)
        image_feats = None if self.vis_embed is None else project_maps(self.vis_embed, cognition.image_feats)
        scale_maps, mask_maps = self._maps(perception, image_feats, image_index)
        scales = self.query_decoder.scale_tokens(scale_maps)
        phrases_per_map = phrases_per_row(scale_maps[0], phrases_per_image)
        mask_index = image_index if image_feats is None else cognition.image_feats_index
        mask_feats = MaskFeats.of(mask_maps, mask_index, phrases_per_row(mask_maps, phrases_per_image))
        slots = torch.arange(self.query_decoder.num_queries, device=image_index.device)
        queries = self.initial_embed(self.initial_queries(slots)).expand(len(image_index), -1, -1)
        perception_queries = cognition_queries = queries
        has_prior = self.variation.prior_attention != "self" and self.variation.form != "c2p"

        rounds: list[RoundOutput] = []
        for i in range(self.rounds + 1):
            if i > 0:
                queries = self._queries_for_perception(i, queries, perception_queries, cognition_queries)
                scale = scales[(i - 1) % len(scales)]
                queries = self.query_decoder(i - 1, queries, rounds[-1].mask_logits, scale, phrases_per_map)
            mask_logits = mask_feats.logits(self.query_decoder.mask_embeddings(queries))
            perception_queries, cognition_queries = self.cognition_rounds[i % len(self.cognition_rounds)](
                self._queries_for_cognition(i, queries, cognition_queries),
                mask_feats.prior(mask_logits) if has_prior else None,
                text,
            )
            rounds.append(RoundOutput(mask_logits, self._referring_logits(cognition_queries)))
        presence_feats = self._presence_feats(perception_queries, cognition_queries, text, image_feats, cognition)
        presence_logit = self.presence_head(presence_feats).squeeze(-1).mean(dim=1)
        return DerisOutput(tuple(rounds), presence_logit, self.variation.mask_upsampling)

    def _queries_for_perception(
        self, i: int, queries: Tensor, perception_queries: Tensor, cognition_queries: Tensor
    ) -> Tensor:
        """Returns what the perception layer of round i >= 1 starts from; all float (P, Q, C)."""
        if self.variation.form == "loopback":
            return self._fused(i - 1, perception_queries, cognition_queries)
        return self._fused(i - 1, queries, cognition_queries) if self.variation.form == "c2p" else queries

    def _queries_for_cognition(self, i: int, queries: Tensor, cognition_queries: Tensor) -> Tensor:
        """Returns what the cognition layer of round i starts from; all float (P, Q, C)."""
        if i == 0 or self.variation.form == "loopback":
            return queries
        return cognition_queries if self.variation.form == "c2p" else self._fused(i - 1, queries, cognition_queries)

    def _fused(self, i: int, perception_queries: Tensor, cognition_queries: Tensor) -> Tensor:
        return self.query_fusions[i](torch.cat([perception_queries, cognition_queries], dim=-1))

    def _referring_logits(self, cognition_queries: Tensor) -> Tensor:
        logits = self.referring_head(cognition_queries)
        return logits[..., 0] - logits[..., 1] if logits.shape[-1] == 2 else logits.squeeze(-1)

    def _text(self, cognition: CognitionFeatures) -> TextTokens:
        text = text_tokens(self.text_embed, cognition)
        values, mask = text.values, text.mask
        if self.variation.text_positions == "integer_sine":
            positions = integer_sine_positions(values.shape[1], values.shape[2], device=values.device)
            text = text._replace(keys=values + positions.to(values.dtype))
        if self.variation.text_padding == "minus_100":
            text = text._replace(mask=-100.0 * (~mask).to(values.dtype))
        return text

    def _presence_feats(
        self,
        perception_queries: Tensor,
        cognition_queries: Tensor,
        text: TextTokens,
        image_feats: Tensor | None,
        cognition: CognitionFeatures,
    ) -> Tensor:
        """Returns what the presence head reads, float (P, Q or 1, C or D)."""
        if self.variation.presence_source == "image":
            assert image_feats is not None
            return image_feats.flatten(2).mean(dim=2)[cognition.image_feats_index, None]
        if self.variation.presence_source == "cls":
            return cognition.cls_feat[:, None].to(self.presence_head.weight.dtype)
        if self.presence_decoder is not None:
            fused = self._fused(self.rounds, perception_queries, cognition_queries)
            return self.presence_decoder(fused, text.values, cognition.text_padding_mask)
        return cognition_queries

    def _maps(
        self, perception: PerceptionFeatures | None, image_feats: Tensor | None, image_index: Tensor
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Returns the three maps of the perception layers, coarse to fine, and F_mask.

        A map has I rows, or the R rows of F_c if F_c is in it.

        Args:
            perception: of I images.
            image_feats: F_c, float (R, C, h, w).
            image_index: int64 (P,).
        """
        if image_feats is None:
            assert perception is not None
            return perception.multi_scale_feats, perception.mask_feats
        pyramid = None if self.image_pyramid is None else self.image_pyramid(image_feats)
        if perception is None:
            assert pyramid is not None, "without perception, the structure is cognition_centric"
            return pyramid[:-1], pyramid[-1]
        assert self.mask_feats_fusion is not None
        is_per_phrase = len(image_feats) == len(image_index)
        image_of_row = image_index if is_per_phrase else torch.arange(len(image_feats), device=image_index.device)
        scale_maps = perception.multi_scale_feats
        if pyramid is not None:
            assert self.scale_fusions is not None
            pairs = zip(self.scale_fusions, scale_maps, pyramid[:-1], strict=True)
            scale_maps = tuple(fusion(fine, coarse, image_of_row) for fusion, fine, coarse in pairs)
            image_feats = pyramid[-1]
        return scale_maps, self.mask_feats_fusion(perception.mask_feats, image_feats, image_of_row)


class BatchPriorRound(CognitionRound):
    """A query attends to the same query of all phrases in the batch, as in the public code (parity/NOTES.md 2).

    Answers then depend on the batch.
    """

    def exchange_priors(self, query_feats: Tensor, mask_prior: Tensor | None) -> Tensor:
        """See `CognitionRound`."""
        placed = query_feats if mask_prior is None else query_feats + mask_prior
        placed, values = placed.transpose(0, 1), query_feats.transpose(0, 1)
        return self.prior_attention(placed, placed, values).transpose(0, 1)


class SelfPriorRound(CognitionRound):
    """A query attends to itself alone: what the public code computes at batch 1.

    The softmax over one key is 1, so the prior has no effect, and query and key weights are unused and frozen.
    """

    def __init__(self, channels: int, *, dim_feedforward: int) -> None:
        super().__init__(channels, dim_feedforward=dim_feedforward)
        self.prior_attention.q_proj.requires_grad_(False)
        self.prior_attention.k_proj.requires_grad_(False)

    def exchange_priors(self, query_feats: Tensor, mask_prior: Tensor | None) -> Tensor:
        """See `CognitionRound`."""
        return self.prior_attention.out_proj(self.prior_attention.v_proj(query_feats))


def integer_sine_positions(length: int, channels: int, *, device: torch.device | None = None) -> Tensor:
    """Returns `sine_positions` with frequencies cut to integers, as in the public code (parity/NOTES.md 3).

    All frequencies but the first become 0: position p is [sin p, cos p, 0, 1, 0, 1, ...].
    """
    positions = torch.zeros(length, channels, device=device)
    positions[:, 1::2] = 1
    places = torch.arange(length, device=device, dtype=torch.float32)
    positions[:, 0], positions[:, 1] = places.sin(), places.cos()
    return positions


class PresenceDecoder(nn.TransformerDecoder):
    """Three post-norm decoder layers (self-attention, text attention, FFN) and a norm, as in the public code.

    Source: parity/NOTES.md 2, "existence head". No positions; dropout only in attention weights and FFN.
    """

    def __init__(self, channels: int, *, dim_feedforward: int = 512, dropout: float = 0.1) -> None:
        layer = nn.TransformerDecoderLayer(
            channels, NUM_HEADS, dim_feedforward=dim_feedforward, dropout=dropout, batch_first=True
        )
        layer.dropout1.p = layer.dropout2.p = 0.0  # on the outputs of the attentions
        super().__init__(layer, num_layers=3, norm=nn.LayerNorm(channels))
        for parameter in self.parameters():
            if parameter.dim() > 1:  # torch copies the initial weights of one layer to all
                nn.init.xavier_uniform_(parameter)

    def forward(self, query_feats: Tensor, text_values: Tensor, text_padding_mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Runs the layers.

        Args:
            query_feats: float (P, Q, C).
            text_values: float (P, L, C).
            text_padding_mask: bool (P, L), True = padding.

        Returns:
            float (P, Q, C).
        """
        return super().forward(query_feats, text_values, memory_key_padding_mask=text_padding_mask)


class SimplePyramid(nn.Module):
    """Makes four maps of one: at half, equal, twice and four times the resolution.

    Source: the simple feature pyramid of ViTDet (Li et al., 2022), which the paper names for Table 7: max pooling and
    transposed convolutions, then a 1x1 and a 3x3 convolution, each normalised over the channels.
    """

    NUM_SCALES = 3  # maps besides the finest one

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resamplers = nn.ModuleList(
            [
                nn.MaxPool2d(2, ceil_mode=True),
                nn.Identity(),
                nn.ConvTranspose2d(channels, channels, 2, stride=2),
                nn.Sequential(
                    nn.ConvTranspose2d(channels, channels, 2, stride=2),
                    _ChannelNorm(channels),
                    nn.GELU(),
                    nn.ConvTranspose2d(channels, channels, 2, stride=2),
                ),
            ]
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 1, bias=False),
                _ChannelNorm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                _ChannelNorm(channels),
            )
            for _ in self.resamplers
        )

    def forward(self, image_feats: Tensor) -> tuple[Tensor, ...]:
        """Returns maps of h/2, h, 2h and 4h rows (h/2 rounded up; columns likewise) of one map (R, C, h, w)."""
        pairs = zip(self.resamplers, self.outputs, strict=True)
        return tuple(output(resampler(image_feats)) for resampler, output in pairs)


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell of a map."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
