"""Released DeRIS weights (`DeRIS-{B,L}-{refcoco,grefcoco}.pth`): their names and tensors brought to ours.

Every name of a file is accounted for: it leads to tensors of our model, or it is unused and the reason is said. What is
unused has no part in the public code's masks, scores or presence (parity/NOTES.md 2). The run configs of these weights
have `compat: deris-2025`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deris_llm.checkpoints.save import save_full_checkpoint
from deris_llm.common.weight_files import WeightFileError, read_weight_file
from deris_llm.config import RunConfig, load_config
from deris_llm.interop import mask2former
from deris_llm.interop.mask2former import Renamed
from deris_llm.models.cognition.beit3 import TOKENIZER_FILE
from deris_llm.models.deris import Deris, build_model

_EMPTY_WEIGHT = "head.criterion.empty_weight"


class Targets(NamedTuple):
    """Where a released tensor goes."""

    names: tuple[str, ...]  # of our parameters; several where it is cut into as many equal parts
    axis: int = 0  # along which it is cut


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    names: tuple[str, ...]
    axis: int = 0


def _rule(pattern: str, *names: str, axis: int = 0) -> _Rule:
    return _Rule(re.compile(pattern), names, axis)


_U, _P, _ROUND = r"understanding_branch\.", r"perception_branch\.predictor\.", r"loopback.cognition_rounds.\1."
_PRESENCE = rf"{_U}roialigner\.TextCorrelation\."
_PRESENCE_LAYER, _PRESENCE_LAYER_TO = rf"{_PRESENCE}layers\.(\d+)\.", r"loopback.presence_decoder.layers.\1."
_PRESENCE_ATTENTION = r"attn\.(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
_QKV = ("q_proj", "k_proj", "v_proj")
_END = r"\.(weight|bias)"

_RULES = (
    _rule(rf"{_U}vis_enc\.beit3\.(?!vision_embed\.mask_token)(.+)", r"cognition.model.\1"),
    _rule(rf"{_U}(vis_embed|text_embed){_END}", r"loopback.\1.\2"),
    _rule(rf"{_U}perception_embed{_END}", r"loopback.initial_embed.\1"),
    _rule(rf"{_U}init_query\.weight", "loopback.initial_queries.weight"),
    _rule(rf"{_PRESENCE_LAYER}attentions\.0\.{_PRESENCE_ATTENTION}", rf"{_PRESENCE_LAYER_TO}self_attn.\2"),
    _rule(rf"{_PRESENCE_LAYER}attentions\.1\.{_PRESENCE_ATTENTION}", rf"{_PRESENCE_LAYER_TO}multihead_attn.\2"),
    _rule(rf"{_PRESENCE_LAYER}ffns\.0\.layers\.0\.0{_END}", rf"{_PRESENCE_LAYER_TO}linear1.\2"),
    _rule(rf"{_PRESENCE_LAYER}ffns\.0\.layers\.1{_END}", rf"{_PRESENCE_LAYER_TO}linear2.\2"),
    *(_rule(rf"{_PRESENCE_LAYER}norms\.{i}{_END}", rf"{_PRESENCE_LAYER_TO}norm{i + 1}.\2") for i in range(3)),
    _rule(rf"{_PRESENCE}post_norm_layer{_END}", r"loopback.presence_decoder.norm.\1"),
    _rule(rf"{_U}nt_embed{_END}", r"loopback.presence_head.\1"),
    _rule(
        rf"{_P}query_SA\.(\d+)\.self_attn\.in_proj_(weight|bias)",
        *(rf"{_ROUND}prior_attention.{part}.\2" for part in _QKV),
    ),
    _rule(rf"{_P}query_SA\.(\d+)\.self_attn\.out_proj{_END}", rf"{_ROUND}prior_attention.out_proj.\2"),
    _rule(rf"{_P}query_SA\.(\d+)\.norm{_END}", rf"{_ROUND}prior_norm.\2"),
    _rule(
        rf"{_P}Q2TCA\.(\d+)\.self_attn\.in_proj_(weight|bias)",
        *(rf"{_ROUND}self_attention.{part}.\2" for part in _QKV),
    ),
    _rule(rf"{_P}Q2TCA\.(\d+)\.self_attn\.out_proj{_END}", rf"{_ROUND}self_attention.out_proj.\2"),
    _rule(rf"{_P}Q2TCA\.(\d+)\.cross_attn\.([qkv]){_END}", rf"{_ROUND}text_attention.\2_proj.\3"),
    _rule(rf"{_P}Q2TCA\.(\d+)\.cross_attn\.proj{_END}", rf"{_ROUND}text_attention.out_proj.\2"),
    _rule(rf"{_P}Q2TCA\.(\d+)\.norm1{_END}", rf"{_ROUND}text_norm.\2"),
    _rule(rf"{_P}Q2TCA\.(\d+)\.norm2{_END}", rf"{_ROUND}self_norm.\2"),
    _rule(rf"{_P}Q2TCA\.(\d+)\.norm3{_END}", rf"{_ROUND}feedforward_norm.\2"),
    _rule(rf"{_P}Q2TCA\.(\d+)\.linear1{_END}", rf"{_ROUND}feedforward.0.\2"),
    _rule(rf"{_P}Q2TCA\.(\d+)\.linear2{_END}", rf"{_ROUND}feedforward.2.\2"),
    _rule(rf"{_P}refer_proj\.(\d+){_END}", r"loopback.query_fusions.\1.\2"),
    _rule(rf"{_P}SEG_cls{_END}", r"loopback.referring_head.\1"),
    _rule(
        rf"{_P}channel_proj_conv\.weight",
        "loopback.mask_feats_fusion.perception.weight",
        "loopback.mask_feats_fusion.cognition.weight",
        axis=1,
    ),
    _rule(rf"{_P}channel_proj_conv\.bias", "loopback.mask_feats_fusion.perception.bias"),
)
_OUR_PLACES = (
    ("pixel_level_module.encoder.", "perception.backbone."),
    ("pixel_level_module.decoder.", "perception.pixel_decoder."),
    ("transformer_module.queries_embedder.", "loopback.query_decoder.query_positions."),
    ("transformer_module.level_embed.", "loopback.query_decoder.level_embed."),
    ("transformer_module.decoder.layers.", "loopback.query_decoder.layers."),
    ("transformer_module.decoder.layernorm.", "loopback.query_decoder.norm."),
    ("transformer_module.decoder.mask_predictor.mask_embedder.", "loopback.query_decoder.mask_embed."),
)
_UNUSED = (
    (rf"{_U}vis_enc\.beit3\.vision_embed\.mask_token", "of BEiT-3's pre-training; never read"),
    (rf"{_U}logit_embed{_END}", "its output is computed and dropped"),
    (r"perception_branch\.nt_embed" + _END, "never used in the forward"),
    (r"perception_branch\.perception_query_embed\.weight", "never used in the forward"),
    (rf"{_P}box_embed\..+", "boxes: loss weight 0, so untrained; ours are those of the masks"),
    (rf"{_P}cls_embed{_END}", "perception classes: in no loss and no result"),
    (rf"{_P}SEG_proj\..+", "never used in the forward"),
    (rf"{_P}Q2TCA\.\d+\.cross_attn\.mapmlp\..+", "never used in the forward"),
    (re.escape(_EMPTY_WEIGHT), "class weights of the loss: criterion.referring_negative_weight"),
)


def targets_of(name: str) -> Targets | None:
    """Says which parameters of ours a released tensor holds; None for an unused or unknown name."""
    for rule in _RULES:
        if match := rule.pattern.fullmatch(name):
            return Targets(tuple(match.expand(target) for target in rule.names), rule.axis)
    if name.startswith("perception_branch."):
        names = mask2former.renamed_names(name)
        if names:
            return Targets(tuple(_our_place(target) for target in names))
    return None


def _our_place(name: str) -> str:
    """A parameter's name in our model, from its name in transformers' Mask2Former."""
    for theirs, ours in _OUR_PLACES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def unused_reason(name: str) -> str | None:
    """Says why a released name has no counterpart in our model; None for all others."""
    for pattern, reason in _UNUSED:
        if re.fullmatch(pattern, name):
            return reason
    return mask2former.unused_reason(name)


def rename(tensors: Mapping[str, Tensor]) -> Renamed:
    """Brings a released state dict to our names.

    Args:
        tensors: by the public code's names (`understanding_branch.*`, `perception_branch.*`, `head.*`).

    Returns:
        our tensors (views of those given), the unused names with the reason, and the unknown ones.
    """
    ours: dict[str, Tensor] = {}
    unused: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        targets = targets_of(name)
        if targets is not None and tensor.ndim > targets.axis and tensor.shape[targets.axis] % len(targets.names) == 0:
            ours.update(zip(targets.names, tensor.chunk(len(targets.names), dim=targets.axis), strict=True))
        elif reason := unused_reason(name):
            unused[name] = reason
        else:
            unknown.append(name)
    return Renamed(ours, unused, unknown)


class Converted(NamedTuple):
    """What `convert` did."""

    config: RunConfig
    loaded: dict[str, int]  # part of our model -> number of tensors
    unused: dict[str, str]  # name in the file -> reason
    ignored: tuple[str, ...]  # entries of the file beside the state dict: optimizer, metrics, ...


def convert(
    path: str | Path,
    out: str | Path,
    *,
    config: str | RunConfig | None = None,
    tokenizer: str | Path | None = None,
    allow_half: bool = False,
) -> Converted:
    """Writes a released file as a full checkpoint, which `deris-llm eval --checkpoint` and `training.start_from` read.

    Args:
        path: `DeRIS-*.pth`.
        out: folder of the checkpoint; written aside and renamed when whole.
        config: name or path of the run config whose model the file holds, or the config; None = `deris-{b,l}-{refcoco,
            grefcoco}`, by the size of BEiT-3 and the number of queries in the file.
        tokenizer: `beit3.spm`, copied into the folder.
        allow_half: take a file in half precision, as float32.

    Raises:
        WeightFileError: the file is unreadable, of another size than the config's model, or its names differ.
        ValueError: `tokenizer` is no file.
    """
    path, out = Path(path), Path(out)
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise ValueError(
            f"--tokenizer {tokenizer}: expected the sentencepiece model {TOKENIZER_FILE}, got no such file; it is published "
            "beside BEiT-3's checkpoints (microsoft/unilm, beit3)."
        )
    file = read_weight_file(path, allow_half=allow_half)
    size = _size(path, file.tensors)
    if not isinstance(config, RunConfig):
        config = load_config(config or size.run_config)
    model = build_model(config, weights=False, device="meta")
    renamed = rename(file.tensors)
    _check(path, renamed, model, size, config)
    _check_class_weights(path, file.tensors, config)
    model.load_state_dict(renamed.tensors, assign=True)
    save_full_checkpoint(out, model, config, {TOKENIZER_FILE: Path(tokenizer)} if tokenizer is not None else None)
    loaded: dict[str, int] = {}
    for name in renamed.tensors:
        part = ".".join(name.split(".")[:2])
        loaded[part] = loaded.get(part, 0) + 1
    return Converted(config, loaded, renamed.unused, file.ignored)


_BEIT3 = {768: "BEiT-3 base", 1024: "BEiT-3 large"}  # by width


class _Size(NamedTuple):
    width: int  # of BEiT-3
    layers: int
    swin: int  # channels of the finest map
    queries: int

    def __str__(self) -> str:
        beit3 = _BEIT3.get(self.width, f"a BEiT-3 of width {self.width}")
        swin = {96: "Swin-T or Swin-S", 128: "Swin-B", 192: "Swin-L"}.get(self.swin, f"a Swin of {self.swin} channels")
        return f"{beit3} ({self.layers} layers), {swin}, {self.queries} queries"

    @property
    def run_config(self) -> str:
        return f"deris-{'l' if self.width > 768 else 'b'}-{'refcoco' if self.queries <= 10 else 'grefcoco'}"


def _size(path: Path, tensors: Mapping[str, Tensor]) -> _Size:
    """Reads the size of the model off a released state dict."""
    layer = re.compile(rf"{_U}vis_enc\.beit3\.encoder\.layers\.(\d+)\..+")
    queries = tensors.get("understanding_branch.init_query.weight")
    swin = tensors.get("perception_branch.hier_vision_encoder.patch_embed.proj.bias")
    layers = {match[1] for name in tensors if (match := layer.fullmatch(name))}
    if queries is None or queries.ndim != 2 or swin is None or swin.ndim != 1 or not layers:
        raise WeightFileError(
            f"{path}: expected the weights of a released DeRIS (names understanding_branch.*, perception_branch.*), got "
            f"{len(tensors):,} other names, e.g. {', '.join(sorted(tensors)[:3])}; for BEiT-3 and Mask2Former files there are "
            "`deris-llm convert beit3` and `convert mask2former`."
        )
    return _Size(queries.shape[1], len(layers), len(swin), len(queries))


def _check(path: Path, renamed: Renamed, model: Deris, size: _Size, config: RunConfig) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in renamed.tensors.items()}
    missing = sorted(wanted.keys() - got.keys())
    unknown = sorted([*renamed.unknown, *(got.keys() - wanted.keys())])
    other = sorted(
        f"{name} {got[name]} instead of {wanted[name]}"
        for name in got.keys() & wanted.keys()
        if got[name] != wanted[name]
    )
    lists = (("missing", missing), ("unknown", unknown), ("of another shape", other))
    problems = [f"{len(names)} {what}: {', '.join(names[:10])}" for what, names in lists if names]
    if not problems:
        return
    ours = _Size(
        wanted["loopback.initial_queries.weight"][1],
        len({name.split(".")[4] for name in wanted if name.startswith("cognition.model.encoder.layers.")}),
        wanted.get("perception.backbone.swin.embeddings.norm.weight", (0,))[0],
        wanted["loopback.initial_queries.weight"][0],
    )
    if size != ours:
        found = f"one of {size}"
        hint = f"give --config {size.run_config}" if size.width in _BEIT3 else "give the run config it was trained with"
    else:
        found = "; ".join(problems)
        hint = "download it again, or take the file as it was published"
    raise WeightFileError(
        f"{path}: expected the weights of run config {config.name} ({ours}), got {found}. Nothing was written; {hint}."
    )


def _check_class_weights(path: Path, tensors: Mapping[str, Tensor], config: RunConfig) -> None:
    weights = tensors.get(_EMPTY_WEIGHT)
    ours = torch.tensor([1.0, config.criterion.referring_negative_weight])
    if weights is not None and (weights.shape != ours.shape or not torch.allclose(weights.float(), ours, rtol=1e-3)):
        raise WeightFileError(
            f"{path}: expected {_EMPTY_WEIGHT} = [1.0, {ours[1]:.3g}] as the run config {config.name} has it, got "
            f"{[round(w, 4) for w in weights.flatten().tolist()]}; set criterion.referring_negative_weight to the second number."
        )
