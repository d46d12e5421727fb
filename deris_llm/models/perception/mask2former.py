"""The parts of a Mask2Former that DeRIS uses: backbone, pixel decoder, first decoder layers and mask head.

Letters: I images, P phrases, Q queries, R maps of one stride (one per image or one per phrase), S cells of all maps,
C channels, H W pixels, h w cells of a map.

The modules are transformers', loaded by its own loading (names on disk differ from names in memory). Not used: decoder
layers beyond the rounds of the loopback, the content queries (the loopback learns its own, paper section 3.2, unless
`loopback.queries_start` says otherwise) and the class head.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Mask2FormerConfig, PreTrainedConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderLayer,
    Mask2FormerPixelLevelModule,
    Mask2FormerPreTrainedModel,
    Mask2FormerSinePositionEmbedding,
    Mask2FormerTransformerModule,
)

from deris_llm.config import PerceptionConfig
from deris_llm.models.perception.deformable_attention import DeformableAttention, Formulation
from deris_llm.models.perception.masked_attention import MaskedAttention, VisibleCells
from deris_llm.models.perception.timm_backbone import TimmBackbone, timm_channels
from deris_llm.models.pretrained import architecture_of, check_names, load_pretrained
from deris_llm.structures import PerceptionFeatures

TIMM_PREFIX = "timm:"
_HEADS_IN_FILE = (
    "class_predictor.weight",
    "class_predictor.bias",
    "criterion.empty_weight",  # a buffer of the loss
)
_SWIN_IN_FILE = (
    # Computed from the window size; transformers 4 wrote the published files and stored it.
    "pixel_level_module.encoder.*encoder.layers.*.blocks.*.attention.self.relative_position_index",
    # A classifier's last norm, unused in a backbone: transformers 5 stores it, transformers 4 does not have it.
    "pixel_level_module.encoder.swin.layernorm.weight",
    "pixel_level_module.encoder.swin.layernorm.bias",
)


class Perception(nn.Module):
    """Backbone and pixel decoder: image -> F_p at 1/4 and three maps at strides 32, 16, 8."""

    def __init__(
        self, backbone: nn.Module, pixel_decoder: PixelDecoder, *, freeze_backbone: bool, checkpointing: bool
    ) -> None:
        """Joins the two.

        Args:
            backbone: image -> `feature_maps`, four maps at strides 4, 8, 16, 32.
            pixel_decoder: built for the backbone's channels.
            freeze_backbone: no gradient, and always eval mode (its drop path would be active in training mode).
            checkpointing: recompute the pixel decoder in the backward pass.
        """
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.freeze_backbone = freeze_backbone
        self.checkpointing = checkpointing
        self.backbone.requires_grad_(not freeze_backbone)
        self.train(self.training)

    def train(self, mode: bool = True) -> Perception:  # noqa: FBT001, FBT002 (torch's signature)
        """Sets the mode; a frozen backbone stays in eval mode.

        The pixel decoder's layers do too, unless they have dropout: all that transformers' training mode adds is a check
        for infinity in every layer, for which the host waits on a GPU. The criterion checks the outputs.
        """
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        for layer in self.pixel_decoder.encoder.layers:
            assert isinstance(layer, Mask2FormerPixelDecoderEncoderLayer)
            if layer.dropout == 0 and layer.activation_dropout == 0:
                layer.eval()
        return self

    def forward(self, image: Tensor) -> PerceptionFeatures:
        """Computes the features of images.

        Args:
            image: float (I, 3, H, W), ImageNet-normalised RGB, H and W multiples of 32.
        """
        image = image.to(next(self.backbone.parameters()).dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            pyramid = tuple(self.backbone(image).feature_maps)
        if self.checkpointing and self.training:
            mask_feats, *maps = checkpoint(self.pixel_decoder, pyramid, use_reentrant=False)  # pyright: ignore[reportGeneralTypeIssues]
        else:
            mask_feats, *maps = self.pixel_decoder(pyramid)
        return PerceptionFeatures(mask_feats, tuple(maps))


class PixelDecoder(nn.Module):
    """Mask2Former's pixel decoder, with the modules of transformers' under the same names.

    transformers' own `forward` computes masks and ratios for padded images, which we do not have, and makes the host wait
    for the device.
    """

    def __init__(self, source: Mask2FormerPixelDecoder, *, formulation: Formulation) -> None:
        """Takes over the modules.

        Args:
            source: of transformers, with one FPN level.
            formulation: of the deformable attention.
        """
        super().__init__()
        self.position_embedding = source.position_embedding
        self.level_embed = source.level_embed
        self.input_projections = source.input_projections
        self.encoder = source.encoder
        self.mask_projection = source.mask_projection
        self.adapter_1 = cast(nn.Sequential, source.adapter_1)
        self.layer_1 = cast(nn.Sequential, source.layer_1)
        for layer in self.encoder.layers:
            assert isinstance(layer, Mask2FormerPixelDecoderEncoderLayer)
            layer.add_module("self_attn", DeformableAttention(layer.self_attn, formulation=formulation))

    def forward(self, pyramid: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Lets the cells of strides 32, 16 and 8 attend to each other; an FPN step adds stride 4.

        Args:
            pyramid: four maps (I, c, H / stride, W / stride), strides 4, 8, 16, 32.

        Returns:
            F_p, then the maps of strides 32, 16 and 8. A tuple, not a dataclass: ZeRO-3 hooks a module's outputs to gather
            the parameters of its own (`level_embed`) in the backward pass, and finds tensors in tuples only.
        """
        coarse_first = pyramid[:0:-1]
        projected, positions = [], []
        for level, feats in enumerate(coarse_first):
            projected.append(self.input_projections[level](feats))
            positions.append(self.position_embedding(feats.shape, feats.device, feats.dtype))
        sizes = [(feats.shape[2], feats.shape[3]) for feats in projected]
        hidden = torch.cat([feats.flatten(2).transpose(1, 2) for feats in projected], dim=1)
        position_embeddings = torch.cat(
            [each.flatten(2).transpose(1, 2) + self.level_embed[i].view(1, 1, -1) for i, each in enumerate(positions)],
            dim=1,
        )
        centres = cell_centres(sizes, hidden.device)
        for layer in self.encoder.layers:
            (hidden,) = layer(
                hidden,
                attention_mask=None,
                position_embeddings=position_embeddings,
                reference_points=centres,
                spatial_shapes_list=sizes,
            )
        tokens = hidden.split([h * w for h, w in sizes], dim=1)
        maps = [each.transpose(1, 2).view(len(hidden), -1, *size) for each, size in zip(tokens, sizes, strict=True)]
        lateral = self.adapter_1(pyramid[0])
        finest = lateral + F.interpolate(maps[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_projection(self.layer_1(finest)), *maps


def cell_centres(sizes_hw: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Returns the centre (x, y) in [0, 1] of each cell, for each of V levels: float32 (1, S, V, 2).

    float32 whatever the model's precision: in bf16, centres are up to 0.06 cells off in a map that is 48 cells wide.
    """
    centres = []
    for height, width in sizes_hw:
        y = torch.linspace(0.5, height - 0.5, height, device=device) / height
        x = torch.linspace(0.5, width - 0.5, width, device=device) / width
        centres.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1))
    return torch.cat(centres)[None, :, None].expand(-1, -1, len(sizes_hw), -1)


class ScaleTokens(NamedTuple):
    """A map as the query decoder reads it."""

    values: Tensor  # float (R, h*w, C), level embedding added
    positions: Tensor  # float (1, h*w, C), 2-D sine
    size: tuple[int, int]  # h, w


class QueryDecoder(nn.Module):
    """The masked-attention layers and the mask head of a Mask2Former, one layer per round of the loopback."""

    def __init__(
        self, transformer: Mask2FormerTransformerModule, *, num_queries: int, keep_query_feats: bool = False
    ) -> None:
        """Takes over the modules of transformers' decoder.

        Args:
            transformer: with as many layers as the loopback has rounds.
            num_queries: Q; the first Q rows of the table of query positions are used.
            keep_query_feats: keep the first Q content queries as `query_feats`, for `models.starts`.
        """
        super().__init__()
        self.num_queries = num_queries
        self.query_positions = _first_rows(transformer.queries_embedder, num_queries)
        self.query_feats = _first_rows(transformer.queries_features, num_queries) if keep_query_feats else None
        self.level_embed = transformer.level_embed
        self.input_projections = transformer.input_projections
        self.layers = transformer.decoder.layers
        for layer in self.layers:
            assert isinstance(layer, Mask2FormerMaskedAttentionDecoderLayer)
            layer.add_module("cross_attn", MaskedAttention(layer.cross_attn))
        self.norm = transformer.decoder.layernorm
        self.mask_embed = transformer.decoder.mask_predictor.mask_embedder

    @property
    def channels(self) -> int:
        """C, the width of queries and maps."""
        return self.level_embed.embedding_dim

    def scale_tokens(self, multi_scale_feats: Sequence[Tensor]) -> tuple[ScaleTokens, ...]:
        """Prepares the maps once for all rounds.

        Args:
            multi_scale_feats: three maps (R, C, h, w), strides 32, 16, 8.
        """
        sine = Mask2FormerSinePositionEmbedding(num_position_features=self.channels // 2, normalize=True)
        # Embeddings are called, not read: under ZeRO-3 a parameter is whole only while its own module runs.
        levels = self.level_embed(torch.arange(len(multi_scale_feats), device=multi_scale_feats[0].device))
        scales = []
        for level, feats in enumerate(multi_scale_feats):
            projected = self.input_projections[level](feats)
            positions = sine(projected[:1].shape, feats.device, torch.float32).to(feats.dtype)
            scales.append(
                ScaleTokens(
                    values=projected.flatten(2).transpose(1, 2) + levels[level],
                    positions=positions.flatten(2).transpose(1, 2),
                    size=(feats.shape[-2], feats.shape[-1]),
                )
            )
        return tuple(scales)

    def mask_embeddings(self, query_feats: Tensor) -> Tensor:
        """Returns the vectors (P, Q, C) whose product with F_mask is the mask logits of queries (P, Q, C)."""
        return self.mask_embed(self.norm(query_feats))

    def outside(self, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns which cells of a map lie outside each query's mask: bool (P, Q, h*w), without gradient.

        Args:
            mask_logits: float (P, Q, H/4, W/4).
            size: h, w of the map.
        """
        coarse_masks = F.interpolate(mask_logits.detach(), size=size, mode="bilinear", align_corners=False)
        return coarse_masks.flatten(2).sigmoid() < 0.5  # not `< 0`: the sigmoid of -1e-8 is 0.5

    def forward(
        self, index: int, query_feats: Tensor, mask_logits: Tensor, scale: ScaleTokens, phrases_per_map: Sequence[int]
    ) -> Tensor:
        """Runs one layer: masked cross-attention to a map, self-attention among queries, FFN; post-norm.

        Args:
            index: of the layer.
            query_feats: float (P, Q, C).
            mask_logits: float (P, Q, H/4, W/4), of the round before: a query attends to the cells inside its mask, or to
                all cells if the mask is empty. No gradient flows through them.
            scale: the maps to attend to.
            phrases_per_map: R numbers, sum P: phrases are in the order of their maps.

        Returns:
            float (P, Q, C).
        """
        outside = self.outside(mask_logits, scale.size)
        outside &= ~outside.all(dim=-1, keepdim=True)
        positions = self.query_positions(torch.arange(self.num_queries, device=query_feats.device))
        positions = positions[:, None].expand(-1, query_feats.shape[0], -1)
        (updated,) = self.layers[index](
            query_feats.transpose(0, 1),
            0,
            None,
            [scale.positions],
            positions,
            [scale.values],
            encoder_attention_mask=VisibleCells(~outside, phrases_per_map),
        )
        return updated.transpose(0, 1)


def build_perception(
    config: PerceptionConfig,
    *,
    rounds: int,
    num_queries: int,
    weights: bool,
    dtype: torch.dtype,
    fpn: Literal["mask2former", "deris-2025"] = "mask2former",
    keep_query_feats: bool = False,
) -> tuple[Perception, QueryDecoder]:
    """Builds the two parts of the perception branch from a Mask2Former.

    Args:
        config: which weights, which backbone, what is frozen.
        rounds: N, the number of decoder layers; layers that the weights lack start fresh, with a line in the log.
        num_queries: Q.
        weights: False builds the architecture alone.
        dtype: of all parameters.
        fpn: the finest step of the pixel decoder; `deris-2025` has biases and one more ReLU, as released DeRIS weights.
        keep_query_feats: see `QueryDecoder`.

    Raises:
        ValueError: the weights are of another model, or too small for Q.
    """
    plan = _loading_plan(config, rounds=rounds, num_queries=num_queries, weights=weights)
    parts: Any = load_pretrained(**plan, weights=weights, dtype=dtype)
    if config.backbone == "mask2former":
        backbone: nn.Module = parts.pixel_level_module.encoder
    else:
        name = config.backbone.removeprefix(TIMM_PREFIX)
        backbone = TimmBackbone(name, image_size=config.image_size, pretrained=weights).to(dtype)
    pixel_decoder = PixelDecoder(parts.pixel_level_module.decoder, formulation=config.deformable_attention)
    if fpn == "deris-2025":
        _add_fpn_biases_and_relu(pixel_decoder)
    perception = Perception(
        backbone,
        pixel_decoder,
        freeze_backbone=config.freeze_backbone,
        checkpointing=config.activation_checkpointing,
    )
    decoder = QueryDecoder(parts.transformer_module, num_queries=num_queries, keep_query_feats=keep_query_feats)
    return perception, decoder


def check_perception(config: PerceptionConfig, *, rounds: int, num_queries: int) -> None:
    """Checks the config and the names of the weights, reading headers only; arguments and errors as `build_perception`."""
    check_names(**_loading_plan(config, rounds=rounds, num_queries=num_queries, weights=True))


def _loading_plan(config: PerceptionConfig, *, rounds: int, num_queries: int, weights: bool) -> dict[str, Any]:
    """Returns the arguments of `load_pretrained` and `check_names`."""
    # Both build the model, which warns if C / heads is no power of 2: advice for a CUDA kernel that is not used here.
    warnings.filterwarnings("ignore", "You'd better set embed_dim")
    source = architecture_of(config.weights, weights=weights)
    _check_architecture(config.weights, source, num_queries)
    assert isinstance(source, Mask2FormerConfig)
    architecture = copy.deepcopy(source)
    architecture.decoder_layers = rounds + 1  # transformers counts the prediction of the initial queries as a layer
    plan = {"cls": _Mask2FormerParts, "name": config.weights, "config": architecture}
    in_file = source.decoder_layers - 1
    may_be_fresh = tuple(f"transformer_module.decoder.layers.{i}.*" for i in range(in_file, rounds))
    beyond = tuple(f"transformer_module.decoder.layers.{i}.*" for i in range(rounds, in_file))
    if config.backbone == "mask2former":
        return {**plan, "may_be_fresh": may_be_fresh, "left_in_file": (*beyond, *_HEADS_IN_FILE, *_SWIN_IN_FILE)}
    if not config.backbone.startswith(TIMM_PREFIX):
        raise ValueError(
            f"perception.backbone: expected `mask2former` or `timm:NAME`, got {config.backbone!r}; "
            "for timm's Swin-S, write timm:swin_small_patch4_window7_224."
        )
    name = config.backbone.removeprefix(TIMM_PREFIX)
    architecture.backbone_channels = timm_channels(name, image_size=config.image_size)
    of_channels = ("pixel_level_module.decoder.input_projections.*", "pixel_level_module.decoder.adapter_*")
    return {
        **plan,
        "cls": _Mask2FormerDecoders,
        "may_be_fresh": (*may_be_fresh, *of_channels),
        "left_in_file": (*beyond, *_HEADS_IN_FILE, "pixel_level_module.encoder.*"),
    }


def _first_rows(table: nn.Embedding, num_rows: int) -> nn.Embedding:
    """Copies the first rows of a table, which ZeRO-3 may have partitioned."""
    gathered = contextlib.nullcontext()
    if hasattr(table.weight, "ds_id"):
        import deepspeed  # slow, and not needed elsewhere

        gathered = deepspeed.zero.GatheredParameters(table.weight)
    with gathered:
        return nn.Embedding.from_pretrained(table.weight[:num_rows].detach().clone(), freeze=False)


def _add_fpn_biases_and_relu(decoder: PixelDecoder) -> None:
    """Makes the FPN step that of the public DeRIS code (parity/NOTES.md 4).

    Both convolutions get a bias, 0 until it is trained or loaded, and the lateral branch a ReLU after its norm.
    """
    for convolution in (decoder.adapter_1[0], decoder.layer_1[0]):
        assert isinstance(convolution, nn.Conv2d)
        convolution.bias = nn.Parameter(convolution.weight.new_zeros(convolution.out_channels))
    decoder.adapter_1.append(nn.ReLU())


def _check_architecture(name: str, source: PreTrainedConfig, num_queries: int) -> None:
    if not isinstance(source, Mask2FormerConfig):
        raise ValueError(
            f"perception.weights={name}: expected the weights of a Mask2Former, got a {source.model_type}; "
            "use e.g. facebook/mask2former-swin-base-coco-instance."
        )
    if source.num_queries < num_queries:
        raise ValueError(
            f"perception.weights={name}: expected at least loopback.num_queries={num_queries} query positions, "
            f"got {source.num_queries}; lower loopback.num_queries or use other weights."
        )
    if source.mask_feature_size != source.hidden_dim or source.pre_norm:
        raise ValueError(
            f"perception.weights={name}: expected a post-norm Mask2Former with mask_feature_size = hidden_dim, got "
            f"{source.mask_feature_size}, {source.hidden_dim}, pre_norm={source.pre_norm}; use other weights."
        )


class _Mask2FormerParts(Mask2FormerPreTrainedModel):
    """A Mask2Former without its heads, for loading; its parts are taken out afterwards."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.pixel_level_module = Mask2FormerPixelLevelModule(config)
        swin = getattr(self.pixel_level_module.encoder, "swin", None)
        if swin is not None:
            swin.layernorm = nn.Identity()  # see `_SWIN_IN_FILE`
        self.transformer_module = Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
        self.post_init()


class _PixelDecoderOnly(nn.Module):
    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.decoder = Mask2FormerPixelDecoder(config, feature_channels=config.backbone_channels)


class _Mask2FormerDecoders(Mask2FormerPreTrainedModel):
    """The same without the backbone; `config.backbone_channels` are the channels of the maps that replace its own."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.pixel_level_module = _PixelDecoderOnly(config)
        self.transformer_module = Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
        self.post_init()
