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

What the paper compares has a switch each: which way the queries go (`form`, Table 7), one cognition layer for all rounds
or one each (`cognition_weights`, Table 10), what presence is read from (`presence_source`, Table 9), one branch instead of
two (`structure`, Table 5). Queries are one stream in the form `loopback`, two in the others: those of perception, q, and
those of cognition, which C1 hands to the branch that is informed.

Where the public code differs from the paper (parity/NOTES.md), a switch computes its way for its released weights; the
preset `compat: deris-2025` of a run config sets them all. Each is named where it bites: `prior_attention`,
`text_positions`, `text_padding`, `referring_head`, `presence_head`, `mask_upsampling`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deris_llm.models.perception import QueryDecoder
from deris_llm.structures import CognitionFeatures, DerisOutput, MaskUpsampling, PerceptionFeatures, RoundOutput

PriorAttention = Literal["queries", "batch", "self"]
Form = Literal["loopback", "p2c", "c2p", "hierarchical"]
PresenceSource = Literal["query", "image", "cls"]
Structure = Literal["integrated", "perception_centric", "cognition_centric"]

PRIOR_STRIDE = 4  # the mask prior is pooled on a grid this much coarser than the masks (upstream: 24 of 96 cells)
NUM_HEADS = 8  # attention heads of the cognition layers
REFERRING_PRIOR = 0.1  # probability every query starts with: about one of ten is the referent


class Loopback(nn.Module):
    """Rounds of perception and cognition on a set of queries."""

    def __init__(
        self,
        query_decoder: QueryDecoder,
        *,
        cognition_dim: int,
        rounds: int,
        dim_feedforward: int,
        prior_attention: PriorAttention = "queries",
        text_positions: Literal["sine", "integer_sine"] = "sine",
        text_padding: Literal["hidden", "minus_100"] = "hidden",
        referring_head: Literal["binary", "two_way"] = "binary",
        presence_head: Literal["linear", "text_decoder"] = "linear",
        mask_upsampling: MaskUpsampling = "direct",
        form: Form = "loopback",
        cognition_weights: Literal["independent", "shared"] = "independent",
        presence_source: PresenceSource = "query",
        trains_presence: bool = True,
        structure: Structure = "integrated",
    ) -> None:
        """Makes the fresh parts around the perception layers; what an option does not use does not exist.

        Args:
            query_decoder: at least `rounds` masked-attention layers and the mask head; it fixes C and Q.
            cognition_dim: D.
            rounds: N.
            dim_feedforward: of the cognition layers.
            prior_attention: see `CognitionRound`.
            text_positions: see `sine_positions`.
            text_padding: whether the text attention of a round hides padded tokens, or adds -100 to their logits.
            referring_head: `two_way` has a logit for referred and one for not; their difference is the referring logit,
                and its BCE is the two-way cross entropy.
            presence_head: `linear` reads the last cognition queries (paper eq. 1), `text_decoder` is a
                `PresenceDecoder` on the queries that one more fusion makes of the last round.
            mask_upsampling: how whoever reads the masks upsamples them; the rounds themselves read them as they are.
            form: which way the queries go (paper 4.4.1, Table 7). `loopback`: both. `p2c`: perception's go from layer to layer
                on their own and inform cognition's. `c2p`: the reverse, without mask prior. `hierarchical`: as `p2c`, and
                F_c is fused into every map of perception through a `SimplePyramid`. The others have F_mask as in eq. 3:
                compared is the way of the queries. The paper names the forms and says little more; that the branch which
                is informed has a stream of its own over the rounds, so that all forms are equally deep, is our reading.
            cognition_weights: `shared`: one cognition layer for all rounds (paper, Table 10); C1 stays each round's own.
            presence_source: what the presence is read from (paper, Table 9): the last cognition queries, the mean of F_c, or
                the backend's summary vector.
            trains_presence: False: nobody trains the presence head, so it is frozen at 0 and says 0.5 of every phrase; a
                `PresenceDecoder` is not made.
            structure: which branches see the picture (paper, Fig. 2 and Table 5). `integrated`: both.
                `perception_centric`: perception alone, F_c is not read. `cognition_centric`: the backend alone; a
                `SimplePyramid` of F_c stands for all maps of perception, at strides that F_c's own grid gives. The paper
                shows both as types of other methods, and leaves open how its own numbers were made.
        """
        super().__init__()
        channels = query_decoder.channels
        self.query_decoder = query_decoder
        self.rounds = rounds
        self.prior_attention: PriorAttention = prior_attention
        self.text_positions = text_positions
        self.text_padding = text_padding
        self.mask_upsampling: MaskUpsampling = mask_upsampling
        assert structure != "perception_centric" or presence_source == "query", "F_c and summary have seen the picture"
        self.form: Form = form
        self.structure: Structure = structure
        self.presence_source: PresenceSource = presence_source
        self.vis_embed = nn.Linear(cognition_dim, channels) if structure != "perception_centric" else None
        self.text_embed = nn.Linear(cognition_dim, channels)
        self.initial_queries = nn.Embedding(query_decoder.num_queries, cognition_dim)
        self.initial_embed = nn.Linear(cognition_dim, channels)
        self.mask_feats_fusion = MaskFeatsFusion(channels) if structure == "integrated" else None
        self.cognition_rounds = nn.ModuleList(
            CognitionRound(channels, dim_feedforward=dim_feedforward, prior_attention=prior_attention)
            for _ in range(1 if cognition_weights == "shared" else rounds + 1)
        )
        decodes_presence = presence_head == "text_decoder" and trains_presence
        num_fusions = rounds + decodes_presence
        self.query_fusions = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(num_fusions))
        self.referring_head = nn.Linear(channels, 2 if referring_head == "two_way" else 1)
        self.presence_decoder = PresenceDecoder(channels) if decodes_presence else None
        self.presence_head = nn.Linear(cognition_dim if presence_source == "cls" else channels, 1)
        embeds = (self.vis_embed, self.text_embed, self.initial_embed)
        _init_linears(*(embed for embed in embeds if embed is not None), self.query_fusions)
        for head in (self.referring_head, self.presence_head):
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        with torch.no_grad():
            self.referring_head.bias[0] = -math.log(1 / REFERRING_PRIOR - 1)
        if not trains_presence:
            nn.init.zeros_(self.presence_head.weight)
            self.presence_head.requires_grad_(False)
        # Last, so that with another form all other parts start from the same random numbers.
        has_pyramid = form == "hierarchical" or structure == "cognition_centric"
        self.image_pyramid = SimplePyramid(channels) if has_pyramid else None
        self.scale_fusions = (
            nn.ModuleList(MaskFeatsFusion(channels) for _ in range(SimplePyramid.NUM_SCALES))
            if form == "hierarchical"
            else None
        )

    def forward(
        self,
        perception: PerceptionFeatures | None,
        cognition: CognitionFeatures,
        image_index: Tensor,
        phrases_per_image: list[int] | None = None,
    ) -> DerisOutput:
        """Runs all rounds.

        Args:
            perception: of I images; None where the structure is `cognition_centric`.
            cognition: of P phrases.
            image_index: int64 (P,), non-decreasing.
            phrases_per_image: I numbers, what `image_index` says, where the host knows them already; None = it reads them.
        """
        text = self._text(cognition)
        image_feats = self._image_feats(cognition)
        scale_maps, scale_index, mask_maps, mask_index = self._maps(
            perception, image_feats, cognition.image_feats_index, image_index
        )

        def phrases_per_row(index: Tensor, num_rows: int) -> list[int]:
            if index is image_index and phrases_per_image is not None:
                return phrases_per_image
            if num_rows == len(index):  # as many rows as phrases: a row each
                return [1] * num_rows
            return torch.bincount(index, minlength=num_rows).tolist()  # on a GPU the host waits for it

        scales = self.query_decoder.scale_tokens(scale_maps)
        phrases_per_map = phrases_per_row(scale_index, len(scale_maps[0]))
        mask_feats = MaskFeats(
            feats=mask_maps,
            pooled_feats=F.avg_pool2d(mask_maps, PRIOR_STRIDE),
            index=mask_index,
            phrases_per_row=phrases_per_row(mask_index, len(mask_maps)),
        )
        numbers = torch.arange(self.query_decoder.num_queries, device=image_index.device)
        query_feats = self.initial_embed(self.initial_queries(numbers)).expand(len(image_index), -1, -1)
        perception_queries = cognition_queries = query_feats

        rounds: list[RoundOutput] = []
        for index in range(self.rounds + 1):
            if index > 0:
                query_feats = self._queries_for_perception(index, query_feats, perception_queries, cognition_queries)
                masks, scale = rounds[-1].mask_logits, scales[(index - 1) % len(scales)]
                query_feats = self.query_decoder(index - 1, query_feats, masks, scale, phrases_per_map)
            mask_logits = mask_feats.logits(self.query_decoder.mask_embeddings(query_feats))
            has_prior = self.prior_attention != "self" and self.form != "c2p"
            perception_queries, cognition_queries = self.cognition_rounds[index % len(self.cognition_rounds)](
                self._queries_for_cognition(index, query_feats, cognition_queries),
                mask_feats.prior(mask_logits) if has_prior else None,
                text,
            )
            rounds.append(RoundOutput(mask_logits, self._referring_logits(cognition_queries)))
        if self.presence_source == "image":
            assert image_feats is not None
            presence_feats = image_feats.flatten(2).mean(dim=2)[cognition.image_feats_index, None]
        elif self.presence_source == "cls":
            presence_feats = cognition.cls_feat[:, None].to(self.presence_head.weight.dtype)
        elif self.presence_decoder is not None:
            fused = self._fused(self.rounds, perception_queries, cognition_queries)
            presence_feats = self.presence_decoder(fused, text.values, cognition.text_padding_mask)
        else:
            presence_feats = cognition_queries
        presence_logit = self.presence_head(presence_feats).squeeze(-1).mean(dim=1)  # eq. 1
        return DerisOutput(tuple(rounds), presence_logit, self.mask_upsampling)

    def _queries_for_perception(
        self, index: int, query_feats: Tensor, perception_queries: Tensor, cognition_queries: Tensor
    ) -> Tensor:
        """What the perception layer of a round >= 1 starts from; all float (P, Q, C)."""
        if self.form == "loopback":
            return self._fused(index - 1, perception_queries, cognition_queries)
        return self._fused(index - 1, query_feats, cognition_queries) if self.form == "c2p" else query_feats

    def _queries_for_cognition(self, index: int, query_feats: Tensor, cognition_queries: Tensor) -> Tensor:
        """What the cognition layer of a round starts from; all float (P, Q, C)."""
        if index == 0 or self.form == "loopback":
            return query_feats
        return cognition_queries if self.form == "c2p" else self._fused(index - 1, query_feats, cognition_queries)

    def _fused(self, index: int, perception_queries: Tensor, cognition_queries: Tensor) -> Tensor:
        return self.query_fusions[index](torch.cat([perception_queries, cognition_queries], dim=-1))

    def _referring_logits(self, cognition_queries: Tensor) -> Tensor:
        logits = self.referring_head(cognition_queries)
        return logits[..., 0] - logits[..., 1] if logits.shape[-1] == 2 else logits.squeeze(-1)

    def _text(self, cognition: CognitionFeatures) -> TextTokens:
        values = self.text_embed(cognition.text_feats.to(self.text_embed.weight.dtype))
        positions = sine_positions(
            values.shape[1], values.shape[2], device=values.device, integer_frequencies=self.text_positions != "sine"
        )
        mask = ~cognition.text_padding_mask
        if self.text_padding == "minus_100":
            mask = -100.0 * cognition.text_padding_mask.to(values.dtype)
        return TextTokens(values=values, keys=values + positions.to(values.dtype), mask=mask)

    def _image_feats(self, cognition: CognitionFeatures) -> Tensor | None:
        """F_c (R, C, h, w), one per row of the cognition branch's image features; None where it is not read."""
        if self.vis_embed is None:
            return None
        image_feats = cognition.image_feats.permute(0, 2, 3, 1).to(self.vis_embed.weight.dtype)
        return self.vis_embed(image_feats).permute(0, 3, 1, 2)

    def _maps(
        self, perception: PerceptionFeatures | None, image_feats: Tensor | None, row_index: Tensor, image_index: Tensor
    ) -> tuple[Sequence[Tensor], Tensor, Tensor, Tensor]:
        """The maps that the queries read and F_mask: of images or, where F_c is in them, of its rows.

        Args:
            perception: of I images.
            image_feats: F_c, float (R, C, h, w): usually one per image, not per phrase.
            row_index: int64 (P,), the row of F_c of a phrase.
            image_index: int64 (P,).

        Returns:
            Three maps, coarse to fine; int64 (P,), their row of a phrase: I rows, or R where F_c is in them; F_mask, float
            (I or R, C, H/4, W/4), I under `perception_centric`; int64 (P,), its row of a phrase.
        """
        if image_feats is None:
            assert perception is not None
            return perception.multi_scale_feats, image_index, perception.mask_feats, image_index
        pyramid = None if self.image_pyramid is None else self.image_pyramid(image_feats)
        if perception is None:
            assert pyramid is not None, "without perception, the structure is cognition_centric"
            return pyramid[:-1], row_index, pyramid[-1], row_index
        assert self.mask_feats_fusion is not None
        image_of_row = torch.zeros(len(image_feats), dtype=torch.long, device=row_index.device)
        image_of_row = image_of_row.scatter(0, row_index, image_index)
        scale_maps, scale_index = perception.multi_scale_feats, image_index
        if pyramid is not None:
            assert self.scale_fusions is not None
            pairs = zip(self.scale_fusions, scale_maps, pyramid[:-1], strict=True)
            scale_maps = tuple(fusion(fine, coarse, image_of_row) for fusion, fine, coarse in pairs)
            scale_index, image_feats = row_index, pyramid[-1]
        mask_feats = self.mask_feats_fusion(perception.mask_feats, image_feats, image_of_row)
        return scale_maps, scale_index, mask_feats, row_index


class TextTokens(NamedTuple):
    """The phrase as the cognition layers read it."""

    values: Tensor  # float (P, L, C)
    keys: Tensor  # float (P, L, C), positions added
    mask: Tensor  # (P, L): bool, False = padding that nobody reads; or float, added to the attention's logits


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


class SimplePyramid(nn.Module):
    """Four maps out of one: half as fine, as fine, twice and four times as fine.

    Source: the simple feature pyramid of ViTDet (Li et al., 2022), which the paper names for Table 7: max pooling and
    transposed convolutions, then a 1x1 and a 3x3 convolution, all normalised over the channels.
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
        """Makes the maps.

        Args:
            image_feats: float (R, C, h, w).

        Returns:
            float (R, C, h/2 rounded up, w/2 rounded up), (R, C, h, w), (R, C, 2h, 2w), (R, C, 4h, 4w).
        """
        pairs = zip(self.resamplers, self.outputs, strict=True)
        return tuple(output(resampler(image_feats)) for resampler, output in pairs)


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell of a map."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CognitionRound(nn.Module):
    """The cognition half of a round: the masks inform the queries, then the queries read the phrase; post-norm."""

    def __init__(self, channels: int, *, dim_feedforward: int, prior_attention: PriorAttention = "queries") -> None:
        """Makes a round's own weights.

        Args:
            channels: C.
            dim_feedforward: width of the FFN.
            prior_attention: whom a query attends to in the attention that the mask prior is a position term of.
                `queries`: the queries of its phrase (paper eq. 5). `batch`: the queries of the same slot of all phrases in
                the batch, what the public code does (parity/NOTES.md 2): answers then depend on the batch. `self`:
                itself, what the public code computes at batch 1: the prior has no effect, and query and key weights are
                unused and frozen.
        """
        super().__init__()
        self.prior_attention_over: PriorAttention = prior_attention
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
        _init_linears(self.feedforward)
        if prior_attention == "self":
            self.prior_attention.q_proj.requires_grad_(False)
            self.prior_attention.k_proj.requires_grad_(False)

    def forward(self, query_feats: Tensor, mask_prior: Tensor | None, text: TextTokens) -> tuple[Tensor, Tensor]:
        """Runs the two blocks.

        Args:
            query_feats: float (P, Q, C).
            mask_prior: float (P, Q, C), position term of the first attention; None where it has no effect or there is none.
            text: of the P phrases.

        Returns:
            Queries after the mask prior and after the text, float (P, Q, C) each.
        """
        perception_queries = self.prior_norm(query_feats + self._exchange_priors(query_feats, mask_prior))
        queries = perception_queries
        queries = self.self_norm(queries + self.self_attention(queries, queries, queries))
        queries = self.text_norm(queries + self.text_attention(queries, text.keys, text.values, text.mask))
        return perception_queries, self.feedforward_norm(queries + self.feedforward(queries))

    def _exchange_priors(self, query_feats: Tensor, mask_prior: Tensor | None) -> Tensor:
        if self.prior_attention_over == "self":  # the softmax over one key is 1
            return self.prior_attention.out_proj(self.prior_attention.v_proj(query_feats))
        placed = query_feats if mask_prior is None else query_feats + mask_prior
        if self.prior_attention_over == "batch":
            placed, values = placed.transpose(0, 1), query_feats.transpose(0, 1)
            return self.prior_attention(placed, placed, values).transpose(0, 1)
        return self.prior_attention(placed, placed, query_feats)


class PresenceDecoder(nn.TransformerDecoder):
    """Three post-norm decoder layers (queries among themselves, text, FFN) and a norm, as the public code has.

    Source: parity/NOTES.md 2, "existence head"; no positions anywhere, dropout in attention weights and FFN alone.
    """

    def __init__(self, channels: int, *, dim_feedforward: int = 512, dropout: float = 0.1) -> None:
        layer = nn.TransformerDecoderLayer(
            channels, NUM_HEADS, dim_feedforward=dim_feedforward, dropout=dropout, batch_first=True
        )
        layer.dropout1.p = layer.dropout2.p = 0.0  # on the attentions' outputs
        super().__init__(layer, num_layers=3, norm=nn.LayerNorm(channels))
        for parameter in self.parameters():
            if parameter.dim() > 1:  # torch copies one layer's initial weights to all
                nn.init.xavier_uniform_(parameter)

    def forward(self, query_feats: Tensor, text_values: Tensor, text_padding_mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Lets the queries read the phrase.

        Args:
            query_feats: float (P, Q, C).
            text_values: float (P, L, C).
            text_padding_mask: bool (P, L), True = padding.

        Returns:
            float (P, Q, C).
        """
        return super().forward(query_feats, text_values, memory_key_padding_mask=text_padding_mask)


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
        _init_linears(self)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            queries: float (P, Q, C).
            keys: float (P, K, C).
            values: float (P, K, C).
            mask: (P, K): bool, False = nobody reads this key; or float, added to the logits of this key.

        Returns:
            float (P, Q, C).
        """
        heads = [
            projection(tokens).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
            for projection, tokens in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        ]
        attended = F.scaled_dot_product_attention(*heads, attn_mask=None if mask is None else mask[:, None, None, :])
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def sine_positions(
    length: int, channels: int, *, device: torch.device | None = None, integer_frequencies: bool = False
) -> Tensor:
    """1-D sine positions, float32 (length, channels): sin and cos of p / 10000^(2i / channels), interleaved.

    Args:
        length: number of positions, from 0.
        channels: even.
        device: where they are made.
        integer_frequencies: cut the inverse frequencies to integers, as the public code does (parity/NOTES.md 3): all but
            the first become 0, and position p is [sin p, cos p, 0, 1, 0, 1, ...].
    """
    frequencies = 10000 ** (-torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels)
    if integer_frequencies:
        frequencies = frequencies.trunc()
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def _init_linears(*parents: nn.Module) -> None:
    for parent in parents:
        for module in parent.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
