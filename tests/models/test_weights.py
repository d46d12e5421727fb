import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration, Mask2FormerForUniversalSegmentation

from deris_llm.config import load_config
from deris_llm.models.deris import build_model
from deris_llm.models.pretrained import architecture_of, resolve_weights
from deris_llm.testing import tiny_config, tiny_weights

HUB_7B = "llava-hf/llava-onevision-qwen2-7b-ov-hf"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def changed_mask2former(overrides: list[str], tmp_path: Path):
    """Writes a copy of the tiny Mask2Former after a change of its tensors; returns the overrides for it."""

    def change(how) -> list[str]:
        source = Path(next(text.partition("=")[2] for text in overrides if text.startswith("perception.weights=")))
        shutil.copytree(source, tmp_path / "changed")
        tensors = load_file(source / "model.safetensors")
        how(tensors)
        save_file(tensors, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
        return [*overrides, f"perception.weights={tmp_path / 'changed'}"]

    return change


def count(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_resolve_names(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_weights(str(tmp_path)) == str(tmp_path)
    assert resolve_weights(HUB_7B) == HUB_7B


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("builtin:nothing", "shipped weights"),
        ("./nowhere/at/all", "there is no such folder"),
        ("nowhere", "there is no such folder"),
    ],
)
def test_resolve_tells_what_is_wrong(name: str, told: str):
    with pytest.raises(ValueError, match=told):
        resolve_weights(name)


def test_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="without config.json"):
        resolve_weights(str(tmp_path))


def test_shipped_architectures_have_the_published_sizes():
    seven, half = (
        build_model(load_config(f"deris-{size}-refcoco"), weights=False, device="meta") for size in ("7b", "0.5b")
    )
    assert {parameter.device.type for parameter in seven.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in seven.parameters()} == {torch.bfloat16}

    language_model = seven.cognition.model.language_model
    lora = sum(p.numel() for name, p in seven.named_parameters() if "lora_" in name) / 1e6
    lm_head = architecture_of(HUB_7B).text_config.vocab_size * seven.cognition.feature_dim / 1e6
    assert lora == pytest.approx(5.05, abs=0.005)
    assert count(language_model) - lora == pytest.approx(7070, abs=5)
    assert count(seven.cognition.model.vision_tower) == pytest.approx(398, abs=0.5)
    assert count(seven.cognition.model.multi_modal_projector) == pytest.approx(17, abs=0.5)
    assert count(seven.cognition) - lora + lm_head == pytest.approx(8030, abs=5)
    assert count(seven.perception.backbone) == pytest.approx(86.9, abs=0.05)
    assert count(seven.perception.pixel_decoder) == pytest.approx(5.5, abs=0.05)

    assert half.cognition.feature_dim == 896
    assert count(half.cognition.model.language_model) == pytest.approx(494 + 1.08, abs=0.5)
    assert count(half.perception.backbone) == pytest.approx(48.8, abs=0.05)
    assert count(half.perception.pixel_decoder) == pytest.approx(5.4, abs=0.05)


def test_swin_tiny_architecture_has_the_published_size():
    config = load_config("deris-7b-refcoco", ["perception.weights=facebook/mask2former-swin-tiny-coco-instance",
                                              f"cognition.weights={HUB_7B.replace('7b', '0.5b')}"])  # fmt: skip
    assert count(build_model(config, weights=False, device="meta").perception.backbone) == pytest.approx(27.5, abs=0.05)


def test_loaded_parameters_are_those_of_the_folders(overrides: list[str]):
    config = tiny_config(*overrides)
    model = build_model(config)
    mask2former = Mask2FormerForUniversalSegmentation.from_pretrained(config.perception.weights).model
    transformer = mask2former.transformer_module
    decoder = model.loopback.query_decoder
    pairs = [
        (model.perception.backbone, mask2former.pixel_level_module.encoder),
        (model.perception.pixel_decoder, mask2former.pixel_level_module.decoder),
        (decoder.layers, transformer.decoder.layers[:3]),
        (decoder.norm, transformer.decoder.layernorm),
        (decoder.mask_embed, transformer.decoder.mask_predictor.mask_embedder),
        (decoder.level_embed, transformer.level_embed),
    ]
    llava = LlavaOnevisionForConditionalGeneration.from_pretrained(config.cognition.weights).model
    pairs += [(model.cognition.model.vision_tower, llava.vision_tower)]
    pairs += [(model.cognition.model.multi_modal_projector, llava.multi_modal_projector)]
    for ours, theirs in pairs:
        # The classifier's last norm is taken out: nobody reads it in a backbone.
        expected = {n: t for n, t in theirs.state_dict().items() if not n.startswith("swin.layernorm.")}
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assert torch.equal(decoder.query_positions.weight, transformer.queries_embedder.weight[: decoder.num_queries])
    ours = {name.replace(".base_layer", ""): p for name, p in model.cognition.model.language_model.named_parameters()}
    assert all(torch.equal(ours[name], p) for name, p in llava.language_model.named_parameters())


def in_published_layout(tensors: dict[str, torch.Tensor]) -> None:
    """Renames as transformers 4 wrote: without the backbone's last norm, with indices of windows and the loss's buffer."""
    for name in [name for name in tensors if ".encoder.swin." in name]:
        published = name.replace(".encoder.swin.", ".encoder.")
        if published.startswith("model.pixel_level_module.encoder.layernorm."):
            del tensors[name]
            continue
        tensors[published] = tensors.pop(name)
        if published.endswith(".relative_position_bias_table"):
            tensors[published.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    tensors["criterion.empty_weight"] = torch.ones(4)


def test_published_layout_of_mask2former_loads_without_a_warning(
    overrides: list[str], changed_mask2former, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        published = build_model(tiny_config(*changed_mask2former(in_published_layout))).perception.state_dict()
    assert caplog.text == ""
    expected = build_model(tiny_config(*overrides)).perception.state_dict()
    assert published.keys() == expected.keys()
    assert all(torch.equal(tensor, published[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "name",
    [
        "criterion.surprise",
        "model.pixel_level_module.encoder.layernorm.running_mean",
        "model.pixel_level_module.decoder.relative_position_index",
        "model.transformer_module.relative_position_index",
    ],
)
def test_names_like_the_accepted_ones_are_still_refused(changed_mask2former, name: str):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        in_published_layout(tensors)
        tensors[name] = torch.zeros(2)

    with pytest.raises(ValueError, match="1 unknown: "):
        build_model(tiny_config(*changed_mask2former(change)))


def test_missing_parameters_are_named(changed_mask2former):
    name = "model.pixel_level_module.decoder.mask_projection.weight"
    changed = changed_mask2former(lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=r"1 missing: pixel_level_module.decoder.mask_projection.weight"):
        build_model(tiny_config(*changed))


def test_unknown_parameters_are_named(changed_mask2former):
    changed = changed_mask2former(lambda tensors: tensors.update(surprise=torch.zeros(2)))
    with pytest.raises(ValueError, match="1 unknown: surprise"):
        build_model(tiny_config(*changed))


def test_other_shapes_are_named(changed_mask2former):
    name = "model.transformer_module.level_embed.weight"
    changed = changed_mask2former(lambda tensors: tensors.update({name: torch.zeros(3, 16)}))
    with pytest.raises(ValueError, match="of another shape: transformer_module.level_embed.weight"):
        build_model(tiny_config(*changed))


def test_more_rounds_than_layers_start_fresh_and_say_so(overrides: list[str], caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="deris_llm"):
        model = build_model(tiny_config(*overrides, "loopback.rounds=4"))
    assert len(model.loopback.query_decoder.layers) == 4
    assert "transformer_module.decoder.layers.3" in caplog.text
    assert "layers.2" not in caplog.text
    assert all(parameter.isfinite().all() for parameter in model.loopback.query_decoder.layers[3].parameters())


def test_weights_of_another_model_are_refused(overrides: list[str]):
    llava, mask2former = (text.partition("=")[2] for text in overrides[:2])
    with pytest.raises(ValueError, match="expected the weights of a Mask2Former"):
        build_model(tiny_config(*overrides, f"perception.weights={llava}"))
    with pytest.raises(ValueError, match="expected the weights of a LLaVA-OneVision"):
        build_model(tiny_config(*overrides, f"cognition.weights={mask2former}"))


def test_too_many_queries_for_the_weights_are_refused(overrides: list[str]):
    with pytest.raises(ValueError, match="at least loopback.num_queries=11"):
        build_model(tiny_config(*overrides, "loopback.num_queries=11"))


def test_a_folder_that_was_not_converted_yet_is_no_hub_id():
    with pytest.raises(
        ValueError, match=r"a folder that `deris-llm convert` wrote, .* --out weights/beit3-base-patch16-224"
    ):
        resolve_weights("weights/beit3-base-patch16-224")
