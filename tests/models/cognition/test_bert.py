"""BERT as a cognition branch without eyes, at tiny size."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, BertModel

from deris_llm.config import ConfigError, RunConfig, load_config
from deris_llm.models.cognition import build_processor, resolve_backend
from deris_llm.models.cognition.bert import Bert
from deris_llm.models.deris import build_model
from deris_llm.planning.plan import plan_run
from deris_llm.testing import (
    check_cognition_backend,
    relative_difference,
    synthetic_batch,
    synthetic_images,
    tiny_config,
)
from tests.models.tiny_backends import tiny_bert_weights

PHRASES = ["the small blue square on the left", "star", "a green ring behind the large triangle"]
INDEX = [0, 0, 1]
FULL = "cognition.tuning=full"


@pytest.fixture(scope="session")
def bert(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*overrides, *tiny_bert_weights(tmp_path_factory.mktemp("bert"))]


def build(config: RunConfig) -> Bert:
    torch.manual_seed(0)
    built = resolve_backend("bert").build(config.cognition, weights=True, dtype=torch.float32)
    assert isinstance(built, Bert)
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return built


@pytest.mark.parametrize("more", [(), (FULL,)], ids=["lora", "full"])
def test_contract(bert: list[str], more: tuple[str, ...]):
    config = tiny_config(*bert, *more)
    check_cognition_backend(build(config), build_processor(config), tolerance=1e-5)  # measured worst case below 1e-6


def test_features_are_the_hidden_states_of_the_published_model(bert: list[str]):
    config = tiny_config(*bert, "cognition.lora.r=0")
    folder = config.cognition.weights
    published, tokenizer = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = build_processor(config)(synthetic_images(2), PHRASES, INDEX)
    with torch.no_grad():
        features = build(config).eval()(inputs, torch.tensor(INDEX))
        for number, phrase in enumerate(PHRASES):
            hidden = published(**tokenizer(phrase, return_tensors="pt")).last_hidden_state[0]
            length = int((~features.text_padding_mask[number]).sum())
            assert length == len(hidden)
            assert relative_difference(features.text_feats[number, :length], hidden) < 1e-5
            assert relative_difference(features.cls_feat[number], hidden[0]) < 1e-5
    assert features.image_feats.shape == (2, 32, 1, 1)
    assert not features.image_feats.any()
    assert features.image_feats_index.tolist() == INDEX


def test_the_masks_of_the_first_queries_do_not_depend_on_phrase_or_cognition_picture(bert: list[str]):
    config = tiny_config(*bert)
    batch = synthetic_batch(config, num_images=1, phrases_per_image=3)
    torch.manual_seed(0)
    with torch.no_grad():
        masks = build_model(config).eval()(batch).rounds[0].mask_logits
    assert relative_difference(masks[1:], masks[:1].expand_as(masks[1:])) < 1e-6


def test_a_phrase_of_several_images_is_encoded_once(bert: list[str], monkeypatch: pytest.MonkeyPatch):
    """As in a batch of a video's frames; the features equal those of frame by frame."""
    config = tiny_config(*bert)
    model, processor = build(config).eval(), build_processor(config)
    asked, index = [*PHRASES[:2], *PHRASES[:2], PHRASES[2], PHRASES[0]], [0, 0, 1, 1, 1, 2]
    encoded, rows = [], []
    encode, forward = processor.phrases.encode, model.model.forward
    monkeypatch.setattr(processor.phrases, "encode", lambda phrase: encoded.append(phrase) or encode(phrase))
    monkeypatch.setattr(
        model.model, "forward", lambda **given: rows.append(len(given["input_ids"])) or forward(**given)
    )
    inputs = processor(synthetic_images(3), asked, index)
    assert inputs.same_as == (0, 1, 0, 1, 4, 0)
    assert encoded == PHRASES
    with torch.no_grad():
        together = model(inputs, torch.tensor(index))
        for number, phrase in enumerate(asked):
            alone = model(processor(synthetic_images(1), [phrase], [0]), torch.tensor([0]))
            length = alone.text_feats.shape[1]
            assert relative_difference(together.text_feats[number, :length], alone.text_feats[0]) < 1e-5
            assert relative_difference(together.cls_feat[number], alone.cls_feat[0]) < 1e-5
    assert rows == [3, 1, 1, 1, 1, 1, 1]
    model.train()(inputs, torch.tensor(index))  # dropout is drawn for every phrase
    assert rows[-1] == 6


def test_published_files_of_older_names_load(bert: list[str], tmp_path: Path):
    """google-bert's files say gamma and beta, hold position ids, a pooler and pre-training heads."""
    config = tiny_config(*bert)
    folder = tmp_path / "hub"
    shutil.copytree(config.cognition.weights, folder)
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("cls.") for name in tensors)
    assert any("pooler" in name for name in tensors)
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    } | {"bert.embeddings.position_ids": torch.arange(64)[None]}
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = build(config), build(tiny_config(*bert, f"cognition.weights={folder}"))
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        (["q_proj", "v_proj"], {"self.query", "self.value"}),
        (["o_proj"], {"attention.output.dense"}),
        (["down_proj"], {"output.dense"}),
        (["up_proj"], {"intermediate.dense"}),
    ],
)
def test_lora_targets_have_the_names_of_language_models(bert: list[str], targets: list[str], ends: set[str]):
    model = build(tiny_config(*bert, f"cognition.lora.targets=[{', '.join(targets)}]"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * len(targets)
    found = {name.split(".lora_")[0].partition("encoder.layer.")[2].partition(".")[2] for name in trained}
    assert {end for path in found for end in ends if path.endswith(end)} == ends
    assert len(found) == len(targets)


def test_unknown_lora_targets_are_told(bert: list[str]):
    with pytest.raises(ValueError, match="expected names among q_proj, .*got query"):
        build(tiny_config(*bert, "cognition.lora.targets=[query]"))


def test_what_trains_and_is_in_train_mode(bert: list[str]):
    whole = build(tiny_config(*bert, FULL)).train()
    assert all(parameter.requires_grad for parameter in whole.parameters())
    assert not any("pooler" in name for name, _ in whole.named_parameters())
    assert all(module.training for module in whole.modules())
    frozen = build(tiny_config(*bert, "cognition.lora.r=0")).train()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(module.training for module in frozen.model.modules())


@pytest.mark.parametrize("more", [(), (FULL,)], ids=["lora", "full"])
def test_checkpointing_changes_no_gradient(bert: list[str], more: tuple[str, ...]):
    config = tiny_config(*bert, *more)
    inputs = build_processor(config)(synthetic_images(2), PHRASES, INDEX)

    def gradients(*, checkpointing: bool) -> dict[str, torch.Tensor]:
        model = build(config).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)  # dropout
        model(inputs, torch.tensor(INDEX)).text_feats.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(checkpointing=False), gradients(checkpointing=True)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_long_phrases_are_cut_with_one_warning(bert: list[str], caplog: pytest.LogCaptureFixture):
    processor = build_processor(tiny_config(*bert, "cognition.max_phrase_tokens=4"))
    long = "the red circle on the left behind the yellow star"
    with caplog.at_level(logging.WARNING, logger="deris_llm"):
        inputs = processor(synthetic_images(1), [long, "star", long], [0, 0, 0])
    assert (~inputs.token_padding_mask).sum(dim=1).tolist() == [6, 3, 6]
    assert caplog.text.count("is cut to cognition.max_phrase_tokens=4") == 1


@pytest.mark.parametrize(
    ("phrase", "told"), [(" ", "empty"), ("a [MASK]", r"special token '\[MASK\]'"), ("\u200b\u0000", "drops")]
)
def test_unusable_phrases_are_told(bert: list[str], phrase: str, told: str):
    with pytest.raises(ValueError, match=told):
        build_processor(tiny_config(*bert))(synthetic_images(1), [phrase], [0])


def test_weights_of_another_architecture_are_told(overrides: list[str]):
    config = tiny_config(*overrides, "cognition.backend=bert")
    with pytest.raises(ValueError, match="expected the weights of a BERT, got a llava_onevision"):
        build(config)


@pytest.mark.parametrize(("tokens", "told"), [(0, "expected more than 0, got 0"), (63, "expected 1 to 62, .* got 63")])
def test_a_number_of_tokens_that_positions_do_not_hold_is_told(bert: list[str], tokens: int, told: str):
    with pytest.raises(ValueError, match=told):
        build(tiny_config(*bert, f"cognition.max_phrase_tokens={tokens}"))


def test_a_tokenizer_that_does_not_fit_is_refused(bert: list[str], overrides: list[str], tmp_path: Path):
    folder = tmp_path / "small"
    shutil.copytree(tiny_config(*bert).cognition.weights, folder)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"vocab_size": 20}))
    with pytest.raises(ValueError, match="expected a tokenizer with cls, sep and pad tokens and at most 20 tokens"):
        build_processor(tiny_config(*bert, f"cognition.weights={folder}"))
    causal = tmp_path / "causal"
    shutil.copytree(tiny_config(*overrides).cognition.weights, causal)  # its tokenizer frames nothing
    shutil.copy(Path(tiny_config(*bert).cognition.weights) / "config.json", causal / "config.json")
    with pytest.raises(ValueError, match="without cls, sep"):
        build_processor(tiny_config(*bert, f"cognition.weights={causal}"))


@pytest.mark.parametrize(
    "override",
    ["cognition.prompt='<image> {phrase}?'", "cognition.text_features=last", "cognition.grid=3", "cognition.image_size=64",
     "cognition.min_pixels=9"],
)  # fmt: skip
def test_fields_it_does_not_read_are_contradictions(bert: list[str], override: str):
    with pytest.raises(ConfigError, match="cannot take effect with cognition.backend=bert"):
        tiny_config(*bert, override)


def test_it_builds_on_meta_without_weights(bert: list[str]):
    with torch.device("meta"):
        model = Bert.build(tiny_config(*bert).cognition, weights=False, dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("name", ["deris-bert-refcoco", "deris-bert-grefcoco"])
def test_the_shipped_runs_are_planned_without_weights(name: str):
    """BERT-base has 109,482,240 parameters, 590,592 of them in the pooler that is left out."""
    plan = plan_run(load_config(name), stages=("2",))
    cognition = [part for part in plan.parts if part.name.startswith("cognition.")]
    assert sum(part.total for part in cognition) == sum(part.trainable for part in cognition) == 109_482_240 - 590_592
    assert plan.tokens_per_phrase < 20
    assert plan.shared_tokens == 0


@pytest.mark.parametrize("more", [(), (FULL,)], ids=["lora", "full"])
def test_the_whole_model_learns_eight_pictures(bert: list[str], more: tuple[str, ...], overfit: Callable[..., Any]):
    learned = overfit([*bert, *more])
    assert learned.losses[1] < 0.5 * learned.losses[0]  # measured 0.18; mIoU 0.12 before, 0.96 after
    assert learned.mean_ious[1] > learned.mean_ious[0] + 0.3
