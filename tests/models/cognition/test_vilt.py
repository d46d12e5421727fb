"""ViLT at tiny size, from transformers' own classes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import ViltImageProcessor, ViltModel

from deris_llm.config import ConfigError, RunConfig, load_config
from deris_llm.models.cognition import build_processor, resolve_backend
from deris_llm.models.cognition.vilt import Vilt
from deris_llm.planning.plan import plan_run
from deris_llm.structures import CognitionInputs
from deris_llm.testing import check_cognition_backend, relative_difference, synthetic_images, tiny_config
from tests.models.tiny_backends import tiny_vilt_weights

PHRASES = ["the small blue square on the left", "star", "a green ring behind the large triangle"]
INDEX = [0, 0, 1]
FULL = "cognition.tuning=full"
TUNINGS = pytest.mark.parametrize("more", [(), (FULL,)], ids=["lora", "full"])


@pytest.fixture(scope="session")
def vilt(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*overrides, *tiny_vilt_weights(tmp_path_factory.mktemp("vilt"))]


def build(config: RunConfig) -> Vilt:
    torch.manual_seed(0)
    built = resolve_backend("vilt").build(config.cognition, weights=True, dtype=torch.float32)
    assert isinstance(built, Vilt)
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return built


def pictures() -> list[Image.Image]:
    return [*synthetic_images(1, size=(24, 36)), *synthetic_images(1, seed=1, size=(70, 50))]


def grid_of(inputs: CognitionInputs) -> list[list[int]]:
    return [list(grid) for grid in inputs.image_grids]


@TUNINGS
def test_contract(vilt: list[str], more: tuple[str, ...]):
    config = tiny_config(*vilt, *more)
    check_cognition_backend(build(config), build_processor(config), tolerance=1e-5)  # measured worst case 4e-7


def test_features_are_those_of_the_published_model(vilt: list[str]):
    """transformers' forward from pixels and ids, one phrase at a time; its patches come shuffled and are put back."""
    config = tiny_config(*vilt, "cognition.lora.r=0")
    inputs = build_processor(config)(pictures(), PHRASES, INDEX)
    assert grid_of(inputs) == [[4, 6], [5, 4]]  # both padded to 5 x 6 patches
    with torch.no_grad():
        features = build(config).eval()(inputs, torch.tensor(INDEX))
    published = ViltModel.from_pretrained(config.cognition.weights).eval()
    image_processor = ViltImageProcessor.from_pretrained(config.cognition.weights)
    for number, image in enumerate(INDEX):
        alone = image_processor([pictures()[image]], return_tensors="pt")
        length = int((~inputs.token_padding_mask[number]).sum())
        with torch.no_grad():
            torch.manual_seed(number)
            hidden = published(input_ids=inputs.input_ids[number : number + 1, :length], **alone).last_hidden_state[0]
            torch.manual_seed(number)
            _, _, (places, _) = published.embeddings.visual_embed(**alone, max_image_length=-1)
        rows, columns = grid_of(inputs)[image]
        maps = torch.zeros(32, rows, columns)
        maps[:, places[0, :, 0], places[0, :, 1]] = hidden[length + 1 :].T
        expected = F.interpolate(maps[None], size=(6, 6), mode="bilinear", antialias=True)[0]
        # measured worst case 5e-7
        assert relative_difference(features.image_feats[number], expected) < 1e-5
        assert relative_difference(features.text_feats[number, :length], hidden[:length]) < 1e-5
        assert relative_difference(features.cls_feat[number], hidden[0]) < 1e-5
        assert int((~features.text_padding_mask[number]).sum()) == length


def test_nothing_is_random_and_no_patch_is_left_out(vilt: list[str], tmp_path: Path):
    folder = tmp_path / "sampling"
    shutil.copytree(tiny_config(*vilt).cognition.weights, folder)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"max_image_length": 3}))
    config = tiny_config(*vilt)
    inputs = build_processor(config)(pictures(), PHRASES, INDEX)
    state = torch.get_rng_state()
    sampling = build(tiny_config(*vilt, f"cognition.weights={folder}")).eval()
    plain = build(config).eval()
    torch.set_rng_state(state)
    with torch.no_grad():
        first, second = sampling(inputs, torch.tensor(INDEX)), plain(inputs, torch.tensor(INDEX))
    assert torch.equal(first.image_feats, second.image_feats)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("corner", "cell"), [((0, 1), (0, 5)), ((1, 0), (5, 0)), ((1, 1), (5, 5))])
@pytest.mark.parametrize("size", [(24, 36), (36, 24)], ids=["wide", "tall"])
def test_a_marker_in_a_corner_is_seen_in_that_corner_of_the_map(
    vilt: list[str], size: tuple[int, int], corner: tuple[int, int], cell: tuple[int, int]
):
    config = tiny_config(*vilt, "cognition.lora.r=0")
    plain = np.full((*size, 3), 90, np.uint8)
    marked = plain.copy()
    marked[corner[0] * (size[0] - 6) :, corner[1] * (size[1] - 6) :][:6, :6] = 255
    other = Image.new("RGB", (30, 30))  # the batch is padded
    inputs = build_processor(config)([Image.fromarray(plain), Image.fromarray(marked), other], ["star"] * 3, [0, 1, 2])
    rows, columns = grid_of(inputs)[0]
    assert (rows < columns) == (size[0] < size[1])
    with torch.no_grad():
        maps = build(config).eval()(inputs, torch.tensor([0, 1, 2])).image_feats
    change = (maps[1] - maps[0]).norm(dim=0)
    assert divmod(int(change.argmax()), 6) == cell


@pytest.mark.parametrize(("width", "height"), [(700, 28), (28, 700)])
def test_too_thin_pictures_are_told(vilt: list[str], width: int, height: int):
    processor = build_processor(tiny_config(*vilt))
    with pytest.raises(ValueError, match=rf"image of {width} x {height} px: expected at least one patch \(6 px\)"):
        processor([Image.new("RGB", (width, height))], ["star"], [0])
    thin = [Image.new("L", (140, 20)), Image.new("RGB", (20, 140))]  # 6 px is just enough
    assert grid_of(processor(thin, ["star", "star"], [0, 1])) == [[1, 6], [6, 1]]


def test_what_trains_and_is_in_train_mode(vilt: list[str]):
    whole = build(tiny_config(*vilt, FULL)).train()
    assert all(parameter.requires_grad for parameter in whole.parameters())
    assert not any("pooler" in name for name, _ in whole.named_parameters())
    tuned = build(tiny_config(*vilt)).train()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 2
    assert all(".lora_" in name for name in trained)
    frozen = build(tiny_config(*vilt, "cognition.lora.r=0")).train()
    assert not any(module.training for module in frozen.model.modules())


@TUNINGS
def test_checkpointing_changes_no_gradient(vilt: list[str], more: tuple[str, ...]):
    config = tiny_config(*vilt, *more)
    inputs = build_processor(config)(pictures(), PHRASES, INDEX)

    def gradients(*, checkpointing: bool) -> dict[str, torch.Tensor]:
        model = build(config).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        features = model(inputs, torch.tensor(INDEX))
        (features.image_feats.square().mean() + features.text_feats.square().mean()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(checkpointing=False), gradients(checkpointing=True)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_unknown_lora_targets_are_told(vilt: list[str]):
    with pytest.raises(ValueError, match="expected names among q_proj, .*got quatsch"):
        build(tiny_config(*vilt, "cognition.lora.targets=[quatsch]"))


def test_weights_of_another_architecture_are_told(overrides: list[str]):
    with pytest.raises(ValueError, match="expected the weights of a ViLT, got a llava_onevision"):
        build(tiny_config(*overrides, "cognition.backend=vilt"))


def test_more_tokens_than_positions_are_told(vilt: list[str]):
    with pytest.raises(ValueError, match="expected 1 to 22, .* got 23"):
        build(tiny_config(*vilt, "cognition.max_phrase_tokens=23"))


def test_an_image_processor_of_other_patches_is_refused(vilt: list[str], tmp_path: Path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_config(*vilt).cognition.weights, folder)
    tree = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(tree | {"size_divisor": 8}))
    with pytest.raises(ValueError, match="size_divisor is a multiple of the model's patches of 6 px, got 8"):
        build_processor(tiny_config(*vilt, f"cognition.weights={folder}"))


@pytest.mark.parametrize(("phrase", "told"), [(" ", "empty"), ("a [SEP]", r"special token '\[SEP\]'")])
def test_unusable_phrases_are_told(vilt: list[str], phrase: str, told: str):
    with pytest.raises(ValueError, match=told):
        build_processor(tiny_config(*vilt))(synthetic_images(1), [phrase], [0])


@pytest.mark.parametrize(
    "override", ["cognition.text_features=last", "cognition.image_size=64", "cognition.min_pixels=9"]
)
def test_fields_it_does_not_read_are_contradictions(vilt: list[str], override: str):
    with pytest.raises(ConfigError, match="cannot take effect with cognition.backend=vilt"):
        tiny_config(*vilt, override)


def test_it_builds_on_meta_without_weights(vilt: list[str]):
    with torch.device("meta"):
        model = Vilt.build(tiny_config(*vilt).cognition, weights=False, dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("name", ["deris-vilt-refcoco", "deris-vilt-grefcoco"])
def test_the_shipped_runs_are_planned_without_weights(name: str):
    plan = plan_run(load_config(name), stages=("2",))
    cognition = [part for part in plan.parts if part.name.startswith("cognition.")]
    words = (30_522 + 40 + 2 + 2) * 768  # word pieces, positions, types, norm
    patches = (3 * 32**2 + 1 + 1 + 145) * 768  # convolution with bias, class token, positions
    layers = 12 * (4 * (768**2 + 768) + 2 * 768 * 3_072 + 3_072 + 768 + 4 * 768)
    assert sum(part.trainable for part in cognition) == words + patches + 2 * 768 + layers + 2 * 768
    assert plan.tokens_per_phrase == 11 + 1 + 12 * 16
    assert plan.shared_tokens == 0


@TUNINGS
def test_the_whole_model_learns_eight_pictures(vilt: list[str], more: tuple[str, ...], overfit: Callable[..., Any]):
    learned = overfit([*vilt, *more])
    assert learned.losses[1] < 0.5 * learned.losses[0]  # measured 0.19 to 0.24; mIoU 0.12-0.18 before, 0.95 after
    assert learned.mean_ious[1] > learned.mean_ious[0] + 0.3
