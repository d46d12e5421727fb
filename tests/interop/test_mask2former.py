"""Mask2Former of detectron2: names, cuts, architecture; the converted folder is the model it came from, bit for bit."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerAttention
from transformers.models.swin.modeling_swin import SwinAttention, SwinPatchMerging

from deris_llm.common.weight_files import WeightFileError
from deris_llm.interop.mask2former import convert, rename, renamed_names, unused_reason
from deris_llm.models.perception import build_perception
from deris_llm.testing import relative_difference, tiny_config, tiny_weights

# transformers' names in memory -> detectron2's, written down on its own; `{}` = q, k, v joined in this order.
TO_DETECTRON2 = (
    (r"model\.pixel_level_module\.encoder\.swin\.embeddings\.patch_embeddings\.projection\.", "backbone.patch_embed.proj."),
    (r"model\.pixel_level_module\.encoder\.swin\.embeddings\.norm\.", "backbone.patch_embed.norm."),
    (r"model\.pixel_level_module\.encoder\.swin\.encoder\.layers\.", "backbone.layers."),
    (r"model\.pixel_level_module\.encoder\.hidden_states_norms\.stage1\.", "backbone.norm0."),
    (r"model\.pixel_level_module\.encoder\.hidden_states_norms\.stage2\.", "backbone.norm1."),
    (r"model\.pixel_level_module\.encoder\.hidden_states_norms\.stage3\.", "backbone.norm2."),
    (r"model\.pixel_level_module\.encoder\.hidden_states_norms\.stage4\.", "backbone.norm3."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.[qkv]_proj\.", ".attn.qkv."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"model\.pixel_level_module\.decoder\.input_projections\.", "sem_seg_head.pixel_decoder.input_proj."),
    (r"model\.pixel_level_module\.decoder\.level_embed", "sem_seg_head.pixel_decoder.transformer.level_embed"),
    (r"model\.pixel_level_module\.decoder\.mask_projection\.", "sem_seg_head.pixel_decoder.mask_features."),
    (r"model\.pixel_level_module\.decoder\.(adapter_1|layer_1)\.0\.", r"sem_seg_head.pixel_decoder.\1."),
    (r"model\.pixel_level_module\.decoder\.(adapter_1|layer_1)\.1\.", r"sem_seg_head.pixel_decoder.\1.norm."),
    (r"model\.pixel_level_module\.decoder\.encoder\.layers\.(\d+)\.self_attn_layer_norm\.",
     r"sem_seg_head.pixel_decoder.transformer.encoder.layers.\1.norm1."),
    (r"model\.pixel_level_module\.decoder\.encoder\.layers\.(\d+)\.final_layer_norm\.",
     r"sem_seg_head.pixel_decoder.transformer.encoder.layers.\1.norm2."),
    (r"model\.pixel_level_module\.decoder\.encoder\.layers\.(\d+)\.fc",
     r"sem_seg_head.pixel_decoder.transformer.encoder.layers.\1.linear"),
    (r"model\.pixel_level_module\.decoder\.encoder\.", "sem_seg_head.pixel_decoder.transformer.encoder."),
    (r"model\.transformer_module\.decoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.",
     r"sem_seg_head.predictor.transformer_self_attention_layers.\1.self_attn.in_proj_"),
    (r"model\.transformer_module\.decoder\.layers\.(\d+)\.self_attn\.",
     r"sem_seg_head.predictor.transformer_self_attention_layers.\1.self_attn."),
    (r"model\.transformer_module\.decoder\.layers\.(\d+)\.self_attn_layer_norm\.",
     r"sem_seg_head.predictor.transformer_self_attention_layers.\1.norm."),
    (r"model\.transformer_module\.decoder\.layers\.(\d+)\.cross_attn\.",
     r"sem_seg_head.predictor.transformer_cross_attention_layers.\1.multihead_attn."),
    (r"model\.transformer_module\.decoder\.layers\.(\d+)\.cross_attn_layer_norm\.",
     r"sem_seg_head.predictor.transformer_cross_attention_layers.\1.norm."),
    (r"model\.transformer_module\.decoder\.layers\.(\d+)\.fc",
     r"sem_seg_head.predictor.transformer_ffn_layers.\1.linear"),
    (r"model\.transformer_module\.decoder\.layers\.(\d+)\.final_layer_norm\.",
     r"sem_seg_head.predictor.transformer_ffn_layers.\1.norm."),
    (r"model\.transformer_module\.decoder\.layernorm\.", "sem_seg_head.predictor.decoder_norm."),
    (r"model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.",
     r"sem_seg_head.predictor.mask_embed.layers.\1."),
    (r"model\.transformer_module\.queries_features\.", "sem_seg_head.predictor.query_feat."),
    (r"model\.transformer_module\.queries_embedder\.", "sem_seg_head.predictor.query_embed."),
    (r"model\.transformer_module\.level_embed\.", "sem_seg_head.predictor.level_embed."),
    (r"class_predictor\.", "sem_seg_head.predictor.class_embed."),
)  # fmt: skip
QKV = ("q_proj", "k_proj", "v_proj")


def detectron2_tensors(model: Mask2FormerForUniversalSegmentation) -> dict[str, torch.Tensor]:
    """The state dict that detectron2 would hold of this model."""
    renamed: dict[str, list[torch.Tensor]] = {}
    state = model.state_dict()
    joined = re.compile(r".*\.[kv]_proj\.(weight|bias)")  # with that of q
    names = [name for name in state if ".swin.layernorm." not in name and not joined.fullmatch(name)]
    for name in names:
        parts = [state[name.replace("q_proj", part)] for part in QKV] if "q_proj" in name else [state[name]]
        target = name
        for pattern, replacement in TO_DETECTRON2:
            target = re.sub(pattern, replacement, target)
        renamed[target] = parts
    tensors = {name: torch.cat(parts) for name, parts in renamed.items()}
    for name in [name for name in tensors if name.endswith("relative_position_bias_table")]:
        tensors[name.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.int64)
    return tensors


def write_pickle(path: Path, tensors: dict[str, torch.Tensor], *, protocol: int = 4) -> Path:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    content = {"model": arrays, "__author__": "third_party", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mask2Former in Hugging Face form, no two of its tensors alike."""
    folder = tmp_path_factory.mktemp("weights")
    tiny_weights(folder)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder / "mask2former")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "mask2former")
    return folder / "mask2former"


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return detectron2_tensors(Mask2FormerForUniversalSegmentation.from_pretrained(folder))


@pytest.fixture(scope="module")
def converted(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert(write_pickle(folder / "model_final.pkl", tensors), folder / "out")
    return folder / "out"


def test_converted_folder_gives_every_output_bit_for_bit(folder: Path, converted: Path):
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    outputs = []
    for path in (folder, converted):
        model, info = Mask2FormerForUniversalSegmentation.from_pretrained(path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            found = model.eval()(image, output_hidden_states=True, output_auxiliary_logits=True)
        outputs.append(
            [
                *found.encoder_hidden_states,
                *found.pixel_decoder_hidden_states,
                found.pixel_decoder_last_hidden_state,
                found.class_queries_logits,
                found.masks_queries_logits,
                *(
                    logits
                    for auxiliary in found.auxiliary_logits
                    for logits in auxiliary.values()
                    if logits is not None
                ),
            ]
        )
    assert len(outputs[0]) > 12
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*outputs, strict=True))


def test_perception_is_the_same_from_either_folder(folder: Path, converted: Path):
    states = []
    for path in (folder, converted):
        config = tiny_config(f"perception.weights={path}", "perception.image_size=64").perception
        perception, decoder = build_perception(config, rounds=3, num_queries=5, weights=True, dtype=torch.float32)
        states.append({**perception.state_dict(), **{f"decoder.{k}": v for k, v in decoder.state_dict().items()}})
    unread = {"backbone.swin.layernorm.weight", "backbone.swin.layernorm.bias"}
    assert set(states[0]) == set(states[1])
    assert [
        name for name in states[0] if not torch.equal(states[0][name], states[1][name]) and name not in unread
    ] == []


def test_account_names_every_entry_of_the_file(tensors: dict[str, torch.Tensor], converted: Path):
    account = json.loads((converted / "conversion.json").read_text())
    left = [name for names in account["left"].values() for name in names]
    cut = sum(len(renamed_names(name)) - 1 for name in tensors if renamed_names(name))
    assert len([name for name in left if name in tensors]) + sum(account["loaded"].values()) - cut == len(tensors)
    assert set(left) - set(tensors) == {"__author__", "matching_heuristics"}
    assert account["source"] == "model_final.pkl"
    assert account["architecture"].startswith("Mask2Former with Swin of width 16, depths 1-1-1-1 (window 4), 3 layers")
    assert not any(str(converted.parent) in str(value) for value in account.values())  # no path of a machine


def test_pth_of_own_training_and_old_names_are_read(tensors: dict[str, torch.Tensor], converted: Path, tmp_path: Path):
    old = {name.replace("predictor.query_feat", "predictor.static_query"): tensor for name, tensor in tensors.items()}
    torch.save({"model": old, "iteration": 7, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "m.pth")
    conversion = convert(tmp_path / "m.pth", tmp_path / "out")
    assert conversion.left["no weights"] == ["iteration", "optimizer"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


def published_shapes(embed_dim: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int):
    backbone = SwinConfig(embed_dim=embed_dim, depths=list(depths), num_heads=list(heads), window_size=window)
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(backbone_config=backbone, num_queries=100)
    config.num_labels = 80
    with torch.device("meta"):
        return detectron2_tensors(Mask2FormerForUniversalSegmentation(config)), config


@pytest.mark.parametrize(
    ("size", "embed_dim", "depths", "heads", "window"),
    [
        ("Swin-T", 96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
        ("Swin-S", 96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
        ("Swin-B", 128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
        ("Swin-L", 192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
    ],
)
def test_architecture_of_published_sizes_is_read_off_the_shapes(size, embed_dim, depths, heads, window):
    from deris_llm.interop.mask2former import architecture_from, described

    tensors, config = published_shapes(embed_dim, depths, heads, window)
    found = architecture_from(Path("model.pkl"), tensors)
    assert described(found) == f"Mask2Former with {size} (window {window}), 9 layers, 100 queries, 80 classes"
    with torch.device("meta"):
        again = Mask2FormerForUniversalSegmentation(found).state_dict()
        expected = Mask2FormerForUniversalSegmentation(config).state_dict()
    assert {name: tensor.shape for name, tensor in again.items()} == {name: t.shape for name, t in expected.items()}
    assert found.num_attention_heads == 8
    assert found.backbone_config.num_heads == list(heads)


# -- the cuts and orders, against computations of their own -----------------------------------------------------------


def test_patch_merging_joins_neighbours_in_the_order_of_the_original_swin():
    merging = SwinPatchMerging(1)
    merging.norm = nn.Identity()
    merging.reduction = nn.Identity()
    cells = torch.arange(16.0)  # a 4 x 4 map: value = 4 * row + column
    merged = merging(cells.reshape(1, 16, 1), (4, 4))
    corners = [0, 2, 8, 10]
    assert merged[0].tolist() == [[c, c + 4, c + 1, c + 5] for c in corners]  # (0,0) (1,0) (0,1) (1,1)


def test_swin_attention_after_the_cut_is_that_of_the_joined_weights():
    """Window attention as Swin's authors define it, with its own index into the bias table."""
    window, width, heads = 3, 8, 2
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    prefix = "backbone.layers.0.blocks.0.attn."
    joined = {
        f"{prefix}qkv.weight": random(3 * width, width), f"{prefix}qkv.bias": random(3 * width),
        f"{prefix}proj.weight": random(width, width), f"{prefix}proj.bias": random(width),
        f"{prefix}relative_position_bias_table": random((2 * window - 1) ** 2, heads),
    }  # fmt: skip
    renamed = {
        name.split(".attention.")[1]: tensor for name, tensor in rename(Path("model.pkl"), joined).tensors.items()
    }
    config = SwinConfig(attn_implementation="eager")
    attention = SwinAttention(config, width, heads, window)
    attention.load_state_dict(renamed)
    tokens = random(1, window**2, width)
    with torch.no_grad():
        found, _ = attention.eval()(tokens)

    qkv = F.linear(tokens[0], joined[f"{prefix}qkv.weight"], joined[f"{prefix}qkv.bias"])
    query, key, value = qkv.reshape(window**2, 3, heads, width // heads).unbind(1)
    expected = torch.zeros(window**2, heads, width // heads)
    table = joined[f"{prefix}relative_position_bias_table"].reshape(2 * window - 1, 2 * window - 1, heads)
    for head in range(heads):
        for i in range(window**2):
            scores = key[:, head] @ query[i, head] * (width // heads) ** -0.5
            for j in range(window**2):
                down, right = i // window - j // window, i % window - j % window
                scores[j] += table[down + window - 1, right + window - 1, head]
            expected[i, head] = scores.softmax(0) @ value[:, head]
    expected = F.linear(expected.flatten(1), joined[f"{prefix}proj.weight"], joined[f"{prefix}proj.bias"])
    assert relative_difference(found[0], expected) < 5e-6  # measured: 4.8e-7 on AVX2 cores


def test_decoder_self_attention_after_the_cut_is_torchs_own():
    width, heads = 16, 4
    torch.manual_seed(0)
    original = nn.MultiheadAttention(width, heads)
    nn.init.normal_(original.in_proj_bias)
    prefix = "sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn."
    joined = {prefix + name: tensor for name, tensor in original.state_dict().items()}
    renamed = rename(Path("model.pkl"), joined)
    attention = Mask2FormerAttention(width, heads)
    attention.load_state_dict({name.split(".self_attn.")[1]: tensor for name, tensor in renamed.tensors.items()})
    queries, positions = torch.randn(5, 2, width), torch.randn(5, 2, width)
    with torch.no_grad():
        expected, _ = original(queries + positions, queries + positions, queries)
        found = attention(queries, position_embeddings=positions)[0]
    assert relative_difference(found, expected) < 5e-6  # measured: 2e-7 (AVX-512), 0 (AVX2)


# -- every name of released files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("backbone.layers.2.blocks.17.attn.qkv.bias",
         [f"pixel_level_module.encoder.swin.encoder.layers.2.blocks.17.attention.{p}.bias" for p in QKV]),
        ("backbone.norm3.weight", ["pixel_level_module.encoder.hidden_states_norms.stage4.weight"]),
        ("perception_branch.hier_vision_encoder.layers.0.downsample.reduction.weight",
         ["pixel_level_module.encoder.swin.encoder.layers.0.downsample.reduction.weight"]),
        ("sem_seg_head.pixel_decoder.adapter_1.weight", ["pixel_level_module.decoder.adapter_1.0.weight"]),
        ("sem_seg_head.pixel_decoder.layer_1.norm.bias", ["pixel_level_module.decoder.layer_1.1.bias"]),
        ("perception_branch.pixel_decoder.adapter_1.0.bias", ["pixel_level_module.decoder.adapter_1.0.bias"]),
        ("perception_branch.pixel_decoder.layer_1.1.weight", ["pixel_level_module.decoder.layer_1.1.weight"]),
        ("perception_branch.predictor.transformer_ffn_layers.2.linear2.weight",
         ["transformer_module.decoder.layers.2.fc2.weight"]),
        ("sem_seg_head.predictor.static_query.weight", ["transformer_module.queries_features.weight"]),
        ("perception_branch.predictor.mask_embed.layers.2.bias",
         ["transformer_module.decoder.mask_predictor.mask_embedder.2.0.bias"]),
        ("perception_branch.predictor.Q2TCA.0.norm1.weight", []),
        ("perception_branch.predictor.box_embed.layers.0.weight", []),
        ("understanding_branch.vis_embed.weight", []),
    ],
)  # fmt: skip
def test_names(name: str, expected: list[str]):
    assert list(renamed_names(name)) == expected


def test_reason_is_given_only_for_what_follows_from_elsewhere():
    assert unused_reason("perception_branch.hier_vision_encoder.layers.0.blocks.0.attn.relative_position_index")
    assert unused_reason("pixel_mean")
    assert unused_reason("perception_branch.predictor.SEG_cls.weight") is None


# -- what cannot be converted ----------------------------------------------------------------------------------------


def refused(tensors: dict[str, torch.Tensor], folder: Path) -> str:
    path = write_pickle(folder / "model.pkl", tensors)
    with pytest.raises(WeightFileError) as error:
        convert(path, folder / "out")
    assert sorted(entry.name for entry in folder.iterdir()) == ["model.pkl"]  # nothing was written
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


def test_missing_and_unknown_tensors_are_listed(tensors: dict[str, torch.Tensor], tmp_path: Path):
    without = {name: tensor for name, tensor in tensors.items() if ".transformer_ffn_layers.1." not in name}
    message = refused(without, tmp_path)
    assert "6 missing: model.transformer_module.decoder.layers.1.fc1.bias" in message
    message = refused({**tensors, "sem_seg_head.predictor.extra.weight": torch.ones(2)}, tmp_path)
    assert "1 unknown: sem_seg_head.predictor.extra.weight" in message


def test_other_shapes_are_listed(tensors: dict[str, torch.Tensor], tmp_path: Path):
    message = refused({**tensors, "sem_seg_head.predictor.decoder_norm.weight": torch.ones(48)}, tmp_path)
    assert "1 of another shape: model.transformer_module.decoder.layernorm.weight (48,) instead of (32,)" in message


def test_other_models_are_named(tensors: dict[str, torch.Tensor], tmp_path: Path):
    message = refused({"backbone.stem.conv1.weight": torch.ones(2)}, tmp_path)
    assert "its backbone is a ResNet" in message
    assert "expected a Mask2Former with a Swin" in refused({"beit3.text_embed.weight": torch.ones(2)}, tmp_path)
    uncut = {**tensors, "backbone.layers.0.blocks.0.attn.qkv.weight": torch.ones(47, 16)}
    assert "expected a first axis that 3 equal parts fill" in refused(uncut, tmp_path)


def test_existing_folder_is_not_touched(tensors: dict[str, torch.Tensor], tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a new folder, got one that is not empty"):
        convert(write_pickle(tmp_path / "model.pkl", tensors), tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_an_array_larger_than_its_bytes_is_refused_before_it_is_made(tmp_path: Path):
    content = pickle.dumps({"model": {"a": np.zeros((3, 5), np.float32)}}, 4)
    huge = content.replace(b"K\x03K\x05\x86", b"J\xff\xff\xff\x7fK\x05\x86")  # 2**31 - 1 rows
    assert huge != content
    (tmp_path / "huge.pkl").write_bytes(huge)
    with pytest.raises(ValueError, match=r"a numpy array of shape \(2147483647, 5\)"):
        convert(tmp_path / "huge.pkl", tmp_path / "out")
