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

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from deris_llm.common.weight_files import WeightFileError, read_weight_file
from deris_llm.interop.conversion import (
    Conversion,
    by_reason,
    check_new_folder,
    check_same,
    counted,
    file_sha256,
    new_folder,
    raise_differences,
)


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
    # convolutions have biases (`compat: deris-2025`).
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


def rename(path: Path, tensors: Mapping[str, Tensor]) -> Renamed:
    """Translates a state dict; see `renamed_names` for the names it knows.

    Args:
        path: of the file, for messages.
        tensors: by detectron2's or DeRIS' names, in any order.

    Raises:
        WeightFileError: a tensor cannot be cut into equal parts, or two names lead to one.
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
            raise WeightFileError(
                f"{path}: {name}: expected a first axis that {len(targets)} equal parts fill, got shape {tuple(tensor.shape)}; "
                "the file is no Mask2Former, or damaged: download it again."
            )
        for target, part in zip(targets, tensor.chunk(len(targets)), strict=True):
            if target in renamed:
                raise WeightFileError(
                    f"{path}: {name}: expected one tensor for {target}, got a second one (old and new names are mixed); "
                    "take the file as it was published."
                )
            renamed[target] = part
    return Renamed(renamed, unused, unknown)


# -- conversion to a folder -------------------------------------------------------------------------------------------

_SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "Swin-T",
    (96, (2, 2, 18, 2)): "Swin-S",
    (128, (2, 2, 18, 2)): "Swin-B",
    (192, (2, 2, 18, 2)): "Swin-L",
}
_NUM_LEVELS, _NUM_POINTS = 3, 4  # maps and points a query of the pixel decoder samples; the same in every Mask2Former
_NO_OBJECT_WEIGHT = 0.1
_COUNTED = {
    _BACKBONE_TO: "backbone (Swin)",
    _PIXEL_DECODER_TO: "pixel decoder",
    _PREDICTOR_TO: "query decoder",
    "class_predictor.": "class head",
    "criterion.": "class weights of the loss",
}


def convert(path: str | Path, out: str | Path, *, allow_half: bool = False) -> Conversion:
    """Turns a Mask2Former of detectron2 with a Swin into a folder that `perception.weights` and transformers load.

    The architecture is read off the shapes.

    Args:
        path: e.g. `model_final_1e7f22.pkl` (Swin-S), `model_final_f6e0f6.pkl` (Swin-B); also a .pth of one's own
            training with detectron2. See `read_weight_file`.
        out: new folder.
        allow_half: take half precision, as float32.

    Raises:
        ValueError: `out` is there already, the file cannot be read, or is no whole Mask2Former with a Swin; nothing is
            written.
    """
    path, out = Path(path), Path(out)
    check_new_folder(out)
    file = read_weight_file(path, allow_half=allow_half)
    renamed = rename(path, file.tensors)
    config = architecture_from(path, file.tensors)
    title = described(config)
    raise_differences(path, title, unknown=renamed.unknown)
    tensors = {_memory_name(name): tensor.float() for name, tensor in renamed.tensors.items()}

    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    fresh = _fresh(expected)
    fresh = {name: value for name, value in fresh.items() if name not in tensors}
    check_same(path, title, expected, {**tensors, **fresh})
    model.load_state_dict({**tensors, **fresh}, assign=True)

    conversion = Conversion(
        source=path.name,
        sha256=file_sha256(path),
        architecture=title,
        loaded=counted(renamed.tensors, _COUNTED),
        left=by_reason({**renamed.unused, **dict.fromkeys(file.ignored, "no weights")}),
        fresh={"takes no part in a forward pass": sorted(fresh)} if fresh else {},
        num_half=file.num_half,
    )
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        conversion.save(folder)
    return conversion


def architecture_from(path: Path, tensors: Mapping[str, Tensor]) -> Mask2FormerConfig:
    """Reads transformers' config off detectron2's tensors.

    Args:
        path: for messages.
        tensors: by detectron2's names.

    Raises:
        WeightFileError: no Mask2Former, or one with another backbone than Swin, or a size that no Mask2Former has.
    """
    if "backbone.patch_embed.proj.weight" not in tensors:
        resnet = " (its backbone is a ResNet)" if "backbone.stem.conv1.weight" in tensors else ""
        raise WeightFileError(
            f"{path}: expected a Mask2Former with a Swin, got tensors like {', '.join(sorted(tensors)[:3])}{resnet}; give "
            "e.g. model_final_1e7f22.pkl (Swin-S) or model_final_f6e0f6.pkl (Swin-B), COCO instance segmentation; for released "
            "DeRIS and BEiT-3 files there are `deris-llm convert deris` and `convert beit3`."
        )

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise_differences(path, "a Mask2Former with a Swin", missing=[name])
        return tuple(tensors[name].shape)

    def count(pattern: str) -> int:
        found = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
        return max(found, default=-1) + 1

    def bias_table(stage: int) -> tuple[int, ...]:
        return shape(f"backbone.layers.{stage}.blocks.0.attn.relative_position_bias_table")

    stages = count(r"backbone\.layers\.(\d+)\.")
    embed_dim, num_channels, patch_size, _ = shape("backbone.patch_embed.proj.weight")
    num_relative, _ = bias_table(0)
    window_size = (math.isqrt(num_relative) + 1) // 2
    samples, feature_size = shape(
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.attention_weights.weight"
    )
    heads = samples // (_NUM_LEVELS * _NUM_POINTS)
    if (2 * window_size - 1) ** 2 != num_relative or stages != 4 or heads * _NUM_LEVELS * _NUM_POINTS != samples:
        raise WeightFileError(
            f"{path}: expected a Mask2Former with a Swin of 4 stages and square windows, {_NUM_LEVELS} maps and "
            f"{_NUM_POINTS} points, got {stages} stages, a bias table of {num_relative} rows and {samples} samples a "
            "query; give one of the published Mask2Formers."
        )
    num_queries, hidden_dim = shape("sem_seg_head.predictor.query_embed.weight")
    backbone = SwinConfig(
        embed_dim=embed_dim,
        num_channels=num_channels,
        patch_size=patch_size,
        image_size=384 if window_size == 12 else 224,  # of Swin's own training; maps of any size are taken
        depths=[count(rf"backbone\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        num_heads=[bias_table(stage)[1] for stage in range(stages)],
        window_size=window_size,
        mlp_ratio=shape("backbone.layers.0.blocks.0.mlp.fc1.weight")[0] / embed_dim,
        qkv_bias="backbone.layers.0.blocks.0.attn.qkv.bias" in tensors,
        drop_path_rate=0.3,
    )
    backbone.out_features = [f"stage{stage + 1}" for stage in range(stages)]
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=feature_size,
        mask_feature_size=shape("sem_seg_head.pixel_decoder.mask_features.weight")[0],
        hidden_dim=hidden_dim,
        encoder_feedforward_dim=shape("sem_seg_head.pixel_decoder.transformer.encoder.layers.0.linear1.weight")[0],
        encoder_layers=count(r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\."),
        # transformers counts the prediction from the initial queries as a layer
        decoder_layers=count(r"sem_seg_head\.predictor\.transformer_ffn_layers\.(\d+)\.") + 1,
        num_attention_heads=heads,
        dim_feedforward=shape("sem_seg_head.predictor.transformer_ffn_layers.0.linear1.weight")[0],
        num_queries=num_queries,
        enforce_input_projection="sem_seg_head.predictor.input_proj.0.weight" in tensors,
    )
    config.num_labels = shape("sem_seg_head.predictor.class_embed.weight")[0] - 1
    return config


def described(config: Mask2FormerConfig) -> str:
    """An architecture in words: Mask2Former with Swin-S (window 7), 9 layers, 100 queries, 80 classes."""
    swin = config.backbone_config
    assert isinstance(swin, SwinConfig)
    depths = tuple(swin.depths)
    size = _SWINS.get((swin.embed_dim, depths), f"Swin of width {swin.embed_dim}, depths {'-'.join(map(str, depths))}")
    return (
        f"Mask2Former with {size} (window {swin.window_size}), {config.decoder_layers - 1} layers, "
        f"{config.num_queries} queries, {config.num_labels} classes"
    )


def _memory_name(name: str) -> str:
    return name if name.startswith(("class_predictor.", "criterion.")) else f"model.{name}"


def _fresh(expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What transformers' model has and detectron2's has not, or not always; none of it takes part in a forward pass."""
    norm = (
        "model.pixel_level_module.encoder.swin.layernorm"  # Swin's own last norm; each stage has one behind it instead
    )
    weights = torch.ones(expected["criterion.empty_weight"])
    weights[-1] = _NO_OBJECT_WEIGHT
    return {
        f"{norm}.weight": torch.ones(expected[f"{norm}.weight"]),
        f"{norm}.bias": torch.zeros(expected[f"{norm}.bias"]),
        "criterion.empty_weight": weights,
    }
