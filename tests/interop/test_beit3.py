"""BEiT-3's files: the folder gives the same features; heads are listed; tokenizer and sizes are checked first."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deris_llm.common.weight_files import WeightFileError
from deris_llm.interop import beit3
from deris_llm.models.cognition import build_processor
from deris_llm.models.cognition.beit3 import TOKENIZER_FILE, Beit3, Beit3Model, resized_positions
from deris_llm.models.pretrained import architecture_of
from deris_llm.testing import synthetic_images, tiny_config
from tests.models.tiny_backends import tiny_beit3

HEADS = {
    "beit3.vision_embed.mask_token": torch.ones(1, 1, 4),
    "mlm_head.weight": torch.ones(3, 4),
    "language_head.weight": torch.ones(4, 4),
    "logit_scale": torch.tensor(1.0),
    "something.else": torch.ones(2),
}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_beit3(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def folder(overrides: list[str]) -> Path:
    return Path(tiny_config(*overrides).cognition.weights)


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, Tensor]:
    model = Beit3Model.from_pretrained(folder)
    return {f"beit3.{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.fixture(autouse=True)
def _tiny_is_a_size(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The number of heads is in no shape, so only known sizes are converted; the tests' is made known."""
    config = architecture_of(str(folder))
    size = (config.hidden_size, config.num_hidden_layers)
    monkeypatch.setitem(beit3._SIZES, size, ("tiny", config.num_attention_heads))


def convert(tensors: dict[str, Tensor], folder: Path, words: Path, **options):
    torch.save({"model": tensors}, folder / "beit3.zip")
    return beit3.convert(folder / "beit3.zip", folder / "out", tokenizer=words / TOKENIZER_FILE, **options)


def test_converted_folder_gives_the_same_features(overrides, folder: Path, tensors: dict[str, Tensor], tmp_path: Path):
    conversion = convert({**tensors, **HEADS}, tmp_path, folder)
    assert sum(conversion.loaded.values()) == len(tensors)
    assert sorted(name for names in conversion.left.values() for name in names) == sorted(HEADS)
    assert all(reason for reason in conversion.left)
    assert json.loads((tmp_path / "out/conversion.json").read_text())["source"] == "beit3.zip"

    features = []
    for weights in (folder, tmp_path / "out"):
        config = tiny_config(*overrides, f"cognition.weights={weights}")
        inputs = build_processor(config)(synthetic_images(2), ["red circle", "the small blue square"], [0, 1])
        backend = Beit3.build(config.cognition, weights=True, dtype=torch.float32).eval()
        with torch.no_grad():
            features.append(backend(inputs, torch.arange(2)))
    assert torch.equal(features[0].image_feats, features[1].image_feats)
    assert torch.equal(features[0].text_feats, features[1].text_feats)
    assert torch.equal(features[0].cls_feat, features[1].cls_feat)


def test_distributed_training_and_half_precision(folder: Path, tensors: dict[str, Tensor], tmp_path: Path):
    half = {f"module.{name}": tensor.half() for name, tensor in tensors.items()}
    with pytest.raises(
        WeightFileError, match=f"got {len(half)} of {len(half)} tensors in half precision.*--allow-half"
    ):
        convert(half, tmp_path, folder)
    conversion = convert(half, tmp_path, folder, allow_half=True)
    assert conversion.num_half == len(half)
    model = Beit3Model.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert torch.equal(model.text_embed.weight, tensors["beit3.text_embed.weight"].half().float())


def test_position_table_is_resized_for_another_image_size(folder: Path, tensors: dict[str, Tensor], tmp_path: Path):
    config = architecture_of(str(folder))
    image_size = config.image_size + 2 * config.patch_size
    conversion = convert(tensors, tmp_path, folder, image_size=image_size)
    assert f"{image_size} px" in conversion.architecture
    model = Beit3Model.from_pretrained(tmp_path / "out")
    assert model.config.image_size == image_size
    expected = resized_positions(tensors["beit3.encoder.embed_positions.A.weight"], image_size // config.patch_size)
    assert torch.equal(model.encoder.embed_positions["A"].weight, expected)


@pytest.mark.parametrize("size", ["base", "large"])
def test_published_sizes_are_read_off_the_shapes(size: str):
    config = architecture_of(f"beit3-{size}-patch16-224")
    with torch.device("meta"):
        tensors = Beit3Model(config).state_dict()
    found = beit3.architecture_from(Path("beit3.zip"), tensors)
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size",
              "patch_size", "max_text_positions", "layer_norm_eps")  # fmt: skip
    assert {name: getattr(found, name) for name in fields} == {name: getattr(config, name) for name in fields}
    assert beit3.described(found) == f"BEiT-3 {size}, 224 px, patches of 16 px, 64,010 words"


def test_what_cannot_be_converted_is_told_and_nothing_is_written(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def told(changed: dict[str, Tensor], **options) -> str:
        with pytest.raises(ValueError) as error:
            convert(changed, tmp_path, folder, **options)
        assert [entry.name for entry in tmp_path.iterdir()] == ["beit3.zip"]
        return str(error.value)

    some = "beit3.encoder.layers.0.ffn.B.fc2.bias"
    assert "1 missing: encoder.layers.0.ffn.B.fc2.bias" in told({k: v for k, v in tensors.items() if k != some})
    fewer = {**tensors, "beit3.text_embed.weight": tensors["beit3.text_embed.weight"][:10]}
    assert "expected at most 10 words, for which" in told(fewer)
    assert "1 unknown: more" in told({**tensors, "beit3.more": torch.ones(1)})
    assert "for released DeRIS and Mask2Former files there are" in told({"perception_branch.x": torch.ones(1)})
    assert "4 missing" in told({"beit3.text_embed.weight": torch.ones(1, 1)})
    assert "1 of another shape" in told({**tensors, some: torch.ones(3)})
    uneven = {**tensors, "beit3.encoder.embed_positions.A.weight": torch.ones(8, 48)}
    assert "expected positions of a square grid of patches, got 5" in told(uneven)
    assert "--image-size 50: expected a positive multiple" in told(tensors, image_size=50)
    monkeypatch.undo()
    assert "base (width 768, 12 layers) or large (width 1024, 24 layers), got width" in told(tensors)


def test_a_missing_or_wrong_tokenizer_is_told_first(folder: Path, tensors: dict[str, Tensor], tmp_path: Path):
    for tokenizer in (None, tmp_path / "absent.spm", folder / "config.json"):
        with pytest.raises(ValueError, match=r"--tokenizer.*beit3\.spm, published beside BEiT-3's checkpoints"):
            beit3.convert(tmp_path / "never-read.zip", tmp_path / "out", tokenizer=tokenizer)
