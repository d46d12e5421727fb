"""What the hub has loads as it was published: every tensor by value, and at full size every name and shape."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from deris_llm.config import RunConfig, config_names, load_config
from deris_llm.models import pretrained as weights_module
from deris_llm.models.cognition import build_processor, resolve_backend
from deris_llm.models.perception import build_perception, check_perception
from deris_llm.models.pretrained import architecture_of
from deris_llm.testing import synthetic_images, tiny_config
from tests.models.published_weights import FAMILIES, HUB_IDS, digest_of, write_published, write_weights

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "hub_layouts.json").read_text())
COGNITION = [family for family in FAMILIES if family != "mask2former"]
PHRASES = ["the small blue square on the left", "star"]


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[list[str], dict[str, str], dict[str, Tensor]]]:
    written: dict[str, Any] = {}

    def source(family: str) -> tuple[list[str], dict[str, str], dict[str, Tensor]]:
        if family not in written:
            written[family] = write_published(family, tmp_path_factory.mktemp(family))
        return written[family]

    return source


@pytest.fixture
def published(sources, tmp_path: Path):
    """Writes a small model in a folder of its own: family, form, what is done to the tensors -> config, names, tensors."""

    def write(
        family: str, form: str = "safetensors", change: Callable[[dict[str, Tensor]], None] = lambda _: None
    ) -> tuple[RunConfig, dict[str, str], dict[str, Tensor]]:
        overrides, names, tensors = sources(family)
        folder = tmp_path / "published"
        shutil.copytree(folder_of(tiny_config(*overrides), family), folder)
        changed = dict(tensors)
        change(changed)
        write_weights(folder, changed, form)
        part = "perception" if family == "mask2former" else "cognition"
        return tiny_config(*overrides, f"{part}.weights={folder}"), names, changed

    return write


def folder_of(config: RunConfig, family: str) -> Path:
    return Path(config.perception.weights if family == "mask2former" else config.cognition.weights)


def check(config: RunConfig, family: str) -> None:
    if family == "mask2former":
        check_perception(config.perception, rounds=3, num_queries=10)
    else:
        resolve_backend(config.cognition.backend).check_weights(config.cognition)


def loaded(config: RunConfig, family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a part of the model holds, by the names of `Family.kind`."""
    if family != "mask2former":
        backend: Any = resolve_backend(config.cognition.backend)
        return dict(backend.build(config.cognition, weights=True, dtype=dtype).model.state_dict())
    perception, decoder = build_perception(config.perception, rounds=3, num_queries=10, weights=True, dtype=dtype)
    renamed = {
        **{f"pixel_level_module.encoder.{name}": tensor for name, tensor in perception.backbone.state_dict().items()},
        **{
            f"pixel_level_module.decoder.{name}": tensor
            for name, tensor in perception.pixel_decoder.state_dict().items()
        },
    }
    for name, tensor in decoder.state_dict().items():
        within = re.sub(r"^norm\.", "decoder.layernorm.", name)
        within = re.sub(r"^mask_embed\.", "decoder.mask_predictor.mask_embedder.", within)
        within = re.sub(r"^query_positions\.", "queries_embedder.", within)
        within = re.sub(r"^layers\.", "decoder.layers.", within)
        renamed[f"transformer_module.{within}"] = tensor
    return renamed


# -- small models, every tensor by value ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "stored", "dtype"),
    [
        ("safetensors", torch.float32, torch.float32),
        ("3 safetensors", torch.bfloat16, torch.bfloat16),
        ("3 safetensors", torch.float16, torch.float32),
        ("bin", torch.float16, torch.float32),
        ("3 bin", torch.bfloat16, torch.float32),
        ("legacy bin", torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_that_of_the_file(published, family: str, form: str, stored, dtype, caplog):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.to(stored) for name, tensor in tensors.items() if tensor.is_floating_point()}

    config, names, tensors = published(family, form, change)
    with caplog.at_level(logging.WARNING, logger="deris_llm"):
        ours = loaded(config, family, dtype)
    assert [record.message for record in caplog.records if record.name.startswith("deris_llm")] == []
    missing = names.keys() - ours.keys()
    if family == "mask2former":  # layers beyond the rounds of the loopback, queries that are learned anew
        missing = {name for name in missing if ".decoder.layers.3." not in name and "queries_features" not in name}
    assert missing == set()
    assert len(ours) > 20
    for name, tensor in ours.items():
        expected = tensors[names[name]].to(dtype)
        if name == "transformer_module.queries_embedder.weight":
            expected = expected[:10]  # of 12
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_of_tensor_is_refused_by_name_if_it_lacks_or_has_another_shape(published, family: str, monkeypatch):
    config, names, tensors = published(family)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first_of_kind: dict[str, tuple[str, str]] = {}
    for ours, name in names.items():
        first_of_kind.setdefault(re.sub(r"\d+", "#", name), (ours, name))
    kinds = list(first_of_kind.values())
    for ten in (kinds[start : start + 10] for start in range(0, len(kinds), 10)):  # as many as a message lists
        chosen = {name for _, name in ten}
        lacking = {name: shape for name, shape in shapes.items() if name not in chosen}
        renamed = lacking | {f"{name}_": shapes[name] for name in chosen}
        other = shapes | {name: (*shapes[name][:-1], shapes[name][-1] + 1) for name in chosen}
        listed = f"{len(ten)} {{}}: {', '.join(sorted(ours for ours, _ in ten))}"
        for changed, told in (
            (lacking, f"({listed.format('missing')})"),
            (renamed, f"({listed.format('missing')}; {len(ten)} unknown: "),
            (other, f"({listed.format('of another shape')})"),
        ):
            monkeypatch.setattr(weights_module, "_shapes", lambda _, changed=changed: changed)
            with pytest.raises(ValueError, match=re.escape(told)):
                check(config, family)


@pytest.mark.parametrize("form", ["safetensors", "3 safetensors", "bin", "3 bin", "legacy bin"])
@pytest.mark.parametrize("family", ["mask2former", "bert"])
def test_a_lacking_or_renamed_tensor_is_refused_in_every_form(published, family: str, form: str):
    end = "decoder.mask_projection.weight" if family == "mask2former" else "encoder.layer.1.output.dense.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(end))
        tensors[name.replace("dense", "densest").replace("mask_projection", "projection")] = tensors.pop(name)

    config, _, _ = published(family, form, change)
    with pytest.raises(ValueError, match=rf"1 missing: \S*{end}; 1 unknown: "):
        check(config, family)
    with pytest.raises(ValueError, match=rf"1 missing: \S*{end}; 1 unknown: "):
        loaded(config, family, torch.float32)


@pytest.mark.parametrize("form", ["safetensors", "3 safetensors", "bin", "3 bin", "legacy bin"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "pointer", "removed", "a web page"])
def test_a_damaged_weight_file_is_one_message_with_folder_file_and_source(published, form: str, damage: str):
    config, _, _ = published("bert", form)
    folder = Path(config.cognition.weights)
    file = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])[-1]
    whole = file.read_bytes()
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(
            {
                "cut": whole[: len(whole) * 2 // 3],
                "emptied": b"",
                "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 440473133\n",
                "a web page": b"<!doctype html><html>log in</html>",
            }[damage]
        )
    with pytest.raises(ValueError, match=r"expected") as caught:
        check(config, "bert")
    message = str(caught.value)
    assert str(folder) in message
    assert file.name in message
    wanted = file.name if "3" in form or damage != "removed" else "model.safetensors"
    assert f"`hf download google-bert/bert-base-uncased {wanted} --local-dir {folder}`" in message
    assert "weights_only" not in message
    assert "\n" not in message
    with pytest.raises(ValueError, match=re.escape(message[:60])):
        loaded(config, "bert", torch.float32)


def test_an_index_that_names_no_file_of_the_folder_or_is_cut_is_refused(published):
    config, _, _ = published("bert", "3 safetensors")
    index = Path(config.cognition.weights) / "model.safetensors.index.json"
    text = index.read_text()
    for damaged in (text[:100], "{}", text.replace("model-00002-of-00003.safetensors", "../elsewhere.safetensors")):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"expected the list of weight files in .*index.json, got .*hf download"):
            check(config, "bert")
    index.unlink()
    with pytest.raises(ValueError, match=r"got parts without their list, e.g. model-00001-of-00003.safetensors; "):
        check(config, "bert")


def test_a_tensor_that_two_parts_hold_is_refused(published):
    config, _, tensors = published("bert", "3 safetensors")
    folder = Path(config.cognition.weights)
    write_weights(folder, dict(reversed(tensors.items())), "3 safetensors")
    first = next(iter(tensors))
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    with pytest.raises(
        ValueError, match=r"expected every tensor once in .*, got .* again in model-00002-of-00003"
    ) as told:
        check(config, "bert")
    assert first not in str(told.value) or first in tensors


# -- tokenizers and processors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", COGNITION)
def test_published_tokenizers_and_processors_read_the_same(published, family: str):
    """A word that the published vocabulary knows has its number there; the picture has the published normalisation."""
    config, _, _ = published(family)
    folder = Path(config.cognition.weights)
    inputs = build_processor(config)(synthetic_images(2), PHRASES, [0, 1])
    if (folder / "vocab.txt").is_file():
        words = (folder / "vocab.txt").read_text().splitlines()
        expected = [words.index(word) for word in ["[CLS]", "star", "[SEP]"]]
        assert inputs.input_ids[1][~inputs.token_padding_mask[1]].tolist() == expected
    else:
        vocabulary = json.loads((folder / "vocab.json").read_text()) | json.loads(
            (folder / "added_tokens.json").read_text()
        )
        by_number = {number: word for word, number in vocabulary.items()}
        read = "".join(by_number[number] for number in inputs.input_ids[1][inputs.text_feature_mask[1]].tolist())
        assert read.replace("Ġ", " ").startswith((" star?", "star?")), read
        placeholder = "<image>" if family == "qwen2_ov" else "<|image_pad|>"
        assert (inputs.input_ids == vocabulary[placeholder]).any()
    if family == "vilt":
        assert inputs.pixel_values.shape[-1] % 6 == 0
        assert min(inputs.pixel_values.shape[-2:]) == 24


@pytest.mark.parametrize("family", COGNITION)
def test_a_folder_without_a_tokenizer_is_refused(published, family: str):
    config, _, _ = published(family)
    folder = Path(config.cognition.weights)
    for file in ("tokenizer.json", "vocab.txt", "vocab.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(
        ValueError, match=r"expected tokenizer.json or vocab.txt or vocab.json with merges.txt in"
    ) as told:
        build_processor(config)
    assert f"--local-dir {folder}`" in str(told.value)


@pytest.mark.parametrize("file", ["vocab.txt", "preprocessor_config.json", "config.json", "tokenizer_config.json"])
def test_a_small_file_that_lacks_or_is_a_pointer_or_is_cut_is_named(published, file: str):
    config, _, _ = published("vilt")
    path = Path(config.cognition.weights) / file
    whole = path.read_text()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 231508\n")
    with pytest.raises(
        ValueError, match=rf"expected {file} in {path.parent}, got a git-lfs pointer.*hf download dande|OWNER"
    ):
        build_processor(config)
    if file.endswith(".json"):
        path.write_text(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"weights .*{path.parent}, got .*hf download"):
            build_processor(config)
    path.unlink()
    if file == "tokenizer_config.json":
        return  # may lack
    with pytest.raises(ValueError, match=rf"{path.parent}.*{file}|{file} in {path.parent}"):
        build_processor(config)


def test_a_vocabulary_that_is_cut_is_said(published, caplog):
    config, _, _ = published("bert")
    path = Path(config.cognition.weights) / "vocab.txt"
    words = path.read_text().splitlines(keepends=True)
    path.write_text("".join(words[: len(words) // 2]))
    with caplog.at_level(logging.WARNING, logger="deris_llm"):
        build_processor(config)
    assert f"the tokenizer of {config.cognition.weights} has {len(words) // 2} tokens" in caplog.text


@pytest.mark.parametrize("family", COGNITION)
def test_special_tokens_in_a_phrase_are_refused_by_their_ids(published, family: str):
    config, _, _ = published(family)
    processor = build_processor(config)
    token = {"bert": "[MASK]", "vilt": "[MASK]", "qwen2_ov": "<video>"}.get(family, "<|video_pad|>")
    with pytest.raises(ValueError, match=rf"phrase 'a {re.escape(token)} b': .*special token '{re.escape(token)}'"):
        processor(synthetic_images(1), [f"a {token} b"], [0])
    assert processor(synthetic_images(1), ["a b"], [0]).input_ids.numel()


# -- full size --------------------------------------------------------------------------------------------------------


def test_the_ids_here_are_those_of_the_run_configs():
    named = set()
    for path in Path(str(resources.files("deris_llm.config"))).glob("*.yaml"):
        run = load_config(path.stem)
        named |= {run.cognition.weights, run.perception.weights}
        assert yaml.safe_load(path.read_text())
    on_hub = {name for name in named if not name.startswith(("builtin:", "weights/"))}
    assert on_hub <= HUB_IDS.keys()
    assert HUB_IDS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", HUB_IDS)
def test_names_and_shapes_at_full_size_are_the_published_ones(name: str, monkeypatch: pytest.MonkeyPatch):
    family = FAMILIES[HUB_IDS[name]]
    _, shapes = family.shapes(architecture_of(name))
    assert (len(shapes), digest_of(shapes)) == (PUBLISHED[name]["tensors"], PUBLISHED[name]["sha256"])

    # The product takes exactly these: nothing missing, nothing unknown; one more or less is refused.
    monkeypatch.setattr(weights_module, "_shapes", lambda _: shapes)
    monkeypatch.setattr(weights_module, "_read_small_files", lambda *_: architecture_of(name))
    part = "perception" if HUB_IDS[name] == "mask2former" else "cognition"
    run = next(
        run for run in RUNS if getattr(run, part).weights == name or "tiny-coco" in name and part == "perception"
    )
    config = load_config(run.name, [f"{part}.weights={name}"])
    check(config, HUB_IDS[name])
    monkeypatch.setattr(weights_module, "_shapes", lambda _: {**shapes, "model.surprise.weight": (1,)})
    with pytest.raises(ValueError, match=r"\(1 unknown: .*surprise.weight\)"):
        check(config, HUB_IDS[name])


RUNS = [load_config(name) for name in config_names()]
