"""Mask2Former as detectron2 writes it: names and tensors brought to transformers' Mask2Former.

Released DeRIS files keep detectron2's names for these parts, so the same map reads both. The names on the right are
those of a `Mask2FormerForUniversalSegmentation` in memory without its leading `model.`; `Perception` and `QueryDecoder`
take their parts from there. Names on disk differ from names in memory in transformers 5: build the model, load these
tensors, `save_pretrained`.

Nothing but names changes, but for two kinds of tensor that are cut into equal parts along their first axis: Swin's
`qkv` and `in_proj` of the decoder's self-attention, both in the order query, key, value. Swin's patch merging joins the
four neighbours (row, column) in the order (0,0) (1,0) (0,1) (1,1) on both sides, and its bias table is indexed alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Renamed(NamedTuple):
    """A state dict under new names, with what was not taken."""

    tensors: dict[str, Tensor]  # transformers' name -> tensor (views of what was given)
    unused: dict[str, str]  # given name -> why no tensor of the model corresponds to it
    unknown: list[str]  # given names that are in no table


_Table = tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]


def _table(*rows: tuple[str, *tuple[str, ...]]) -> _Table:
    return tuple((re.compile(pattern), targets) for pattern, *targets in rows)  # pyright: ignore[reportReturnType]


_QKV = ("q_proj", "k_proj", "v_proj")

_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."
_BLOCK_TO = r"swin.encoder.layers.\1.blocks.\2."
_SWIN = _table(
    (r"patch_embed\.proj\.(weight|bias)", r"swin.embeddings.patch_embeddings.projection.\1"),
    (r"patch_embed\.norm\.(weight|bias)", r"swin.embeddings.norm.\1"),
    (rf"{_BLOCK}norm1\.(weight|bias)", rf"{_BLOCK_TO}layernorm_before.\3"),
    (rf"{_BLOCK}attn\.relative_position_bias_table",
     rf"{_BLOCK_TO}attention.relative_position_bias.relative_position_bias_table"),
    (rf"{_BLOCK}attn\.qkv\.(weight|bias)", *(rf"{_BLOCK_TO}attention.{part}.\3" for part in _QKV)),
    (rf"{_BLOCK}attn\.proj\.(weight|bias)", rf"{_BLOCK_TO}attention.o_proj.\3"),
    (rf"{_BLOCK}norm2\.(weight|bias)", rf"{_BLOCK_TO}layernorm_after.\3"),
    (rf"{_BLOCK}mlp\.(fc[12])\.(weight|bias)", rf"{_BLOCK_TO}mlp.\3.\4"),
    (r"layers\.(\d+)\.downsample\.(reduction\.weight|norm\.weight|norm\.bias)",
     r"swin.encoder.layers.\1.downsample.\2"),
    *((rf"norm{i}\.(weight|bias)", rf"hidden_states_norms.stage{i + 1}.\1") for i in range(4)),
)  # fmt: skip

_ENCODER_LAYER = r"transformer\.encoder\.layers\.(\d+)\."
_PIXEL_DECODER = _table(
    (r"input_proj\.(\d+)\.([01])\.(weight|bias)", r"input_projections.\1.\2.\3"),
    (r"transformer\.level_embed", "level_embed"),
    (rf"{_ENCODER_LAYER}self_attn\.(sampling_offsets|attention_weights|value_proj|output_proj)\.(weight|bias)",
     r"encoder.layers.\1.self_attn.\2.\3"),
    (rf"{_ENCODER_LAYER}norm1\.(weight|bias)", r"encoder.layers.\1.self_attn_layer_norm.\2"),
    (rf"{_ENCODER_LAYER}linear([12])\.(weight|bias)", r"encoder.layers.\1.fc\2.\3"),
    (rf"{_ENCODER_LAYER}norm2\.(weight|bias)", r"encoder.layers.\1.final_layer_norm.\2"),
    (r"mask_features\.(weight|bias)", r"mask_projection.\1"),
    # The finest step: a Conv2d of detectron2 with its norm inside, or DeRIS' sequence of convolution and norm, whose
    # convolutions have biases (`perception.pixel_decoder: deris-2025`).
    (r"(adapter_1|layer_1)\.weight", r"\1.0.weight"),
    (r"(adapter_1|layer_1)\.norm\.(weight|bias)", r"\1.1.\2"),
    (r"(adapter_1|layer_1)\.([01])\.(weight|bias)", r"\1.\2.\3"),
)  # fmt: skip

_LAYER_TO = r"decoder.layers.\1."
_PREDICTOR = _table(
    (r"transformer_self_attention_layers\.(\d+)\.self_attn\.in_proj_(weight|bias)",
     *(rf"{_LAYER_TO}self_attn.{part}.\2" for part in _QKV)),
    (r"transformer_self_attention_layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)",
     rf"{_LAYER_TO}self_attn.out_proj.\2"),
    (r"transformer_self_attention_layers\.(\d+)\.norm\.(weight|bias)", rf"{_LAYER_TO}self_attn_layer_norm.\2"),
    (r"transformer_cross_attention_layers\.(\d+)\.multihead_attn\."
     r"(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)", rf"{_LAYER_TO}cross_attn.\2"),
    (r"transformer_cross_attention_layers\.(\d+)\.norm\.(weight|bias)", rf"{_LAYER_TO}cross_attn_layer_norm.\2"),
    (r"transformer_ffn_layers\.(\d+)\.linear([12])\.(weight|bias)", rf"{_LAYER_TO}fc\2.\3"),
    (r"transformer_ffn_layers\.(\d+)\.norm\.(weight|bias)", rf"{_LAYER_TO}final_layer_norm.\2"),
    (r"decoder_norm\.(weight|bias)", r"decoder.layernorm.\1"),
    (r"(?:query_feat|static_query)\.weight", "queries_features.weight"),  # static_query: files of 2021
    (r"query_embed\.weight", "queries_embedder.weight"),
    (r"level_embed\.weight", "level_embed.weight"),
    (r"mask_embed\.layers\.(\d+)\.(weight|bias)", r"decoder.mask_predictor.mask_embedder.\1.0.\2"),
    (r"input_proj\.(\d+)\.(weight|bias)", r"input_projections.\1.\2"),
)  # fmt: skip

_HEADS = _table(
    (r"sem_seg_head\.predictor\.class_embed\.(weight|bias)", r"class_predictor.\1"),
    (r"criterion\.empty_weight", "criterion.empty_weight"),
)

_BACKBONE_TO, _PIXEL_DECODER_TO, _PREDICTOR_TO = (
    "pixel_level_module.encoder.",
    "pixel_level_module.decoder.",
    "transformer_module.",
)
_PARTS: dict[str, tuple[_Table, str]] = {
    "backbone.": (_SWIN, _BACKBONE_TO),
    "sem_seg_head.pixel_decoder.": (_PIXEL_DECODER, _PIXEL_DECODER_TO),
    "sem_seg_head.predictor.": (_PREDICTOR, _PREDICTOR_TO),
    "perception_branch.hier_vision_encoder.": (_SWIN, _BACKBONE_TO),
    "perception_branch.pixel_decoder.": (_PIXEL_DECODER, _PIXEL_DECODER_TO),
    "perception_branch.predictor.": (_PREDICTOR, _PREDICTOR_TO),
}

_UNUSED = (
    (re.compile(r".*\.attn\.relative_position_index"), "follows from the window size; transformers computes it"),
    (re.compile(r"pixel_(mean|std)"), "image normalisation, set in the run config"),
)


def renamed_names(name: str) -> tuple[str, ...]:
    """Translates one name.

    Args:
        name: of detectron2's Mask2Former (`backbone.*`, `sem_seg_head.pixel_decoder.*`, `sem_seg_head.predictor.*`,
            `criterion.empty_weight`) or of the same parts in a released DeRIS (`perception_branch.hier_vision_encoder.*`,
            `perception_branch.pixel_decoder.*`, `perception_branch.predictor.*`).

    Returns:
        the names in memory in transformers; several where the tensor is cut into as many equal parts along its first
        axis; none for a name that is in no table (see `unused_reason`), such as the heads that DeRIS adds.
    """
    for pattern, targets in _HEADS:
        if match := pattern.fullmatch(name):
            return tuple(match.expand(target) for target in targets)
    for prefix, (table, prefix_to) in _PARTS.items():
        if name.startswith(prefix):
            for pattern, targets in table:
                if match := pattern.fullmatch(name, len(prefix)):
                    return tuple(prefix_to + match.expand(target) for target in targets)
    return ()


def unused_reason(name: str) -> str | None:
    """Says why a known name has no counterpart in transformers; None for all others."""
    return next((reason for pattern, reason in _UNUSED if pattern.fullmatch(name)), None)


def rename(tensors: Mapping[str, Tensor]) -> Renamed:
    """Translates a state dict; see `renamed_names` for the names it knows.

    Args:
        tensors: by detectron2's or DeRIS' names, in any order.

    Raises:
        ValueError: a tensor cannot be cut into equal parts, or two names lead to one.
    """
    renamed: dict[str, Tensor] = {}
    unused: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        targets = renamed_names(name)
        if not targets:
            reason = unused_reason(name)
            if reason is None:
                unknown.append(name)
            else:
                unused[name] = reason
            continue
        if tensor.ndim == 0 or tensor.shape[0] % len(targets):
            raise ValueError(
                f"{name}: expected a first axis that {len(targets)} equal parts fill, got shape {tuple(tensor.shape)}; "
                "the file is no Mask2Former, or damaged: download it again."
            )
        for target, part in zip(targets, tensor.chunk(len(targets)), strict=True):
            if target in renamed:
                raise ValueError(
                    f"{name}: expected one tensor for {target}, got a second one (old and new names are mixed); "
                    "take the file as it was published."
                )
            renamed[target] = part
    return Renamed(renamed, unused, unknown)
