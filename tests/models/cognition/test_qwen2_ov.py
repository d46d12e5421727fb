import copy
import inspect
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaOnevisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from deris_llm.models.cognition import build_processor, prompts, resolve_backend
from deris_llm.models.cognition.qwen2_ov import Qwen2OneVision, Qwen2OneVisionProcessor
from deris_llm.structures import CognitionFeatures, CognitionInputs
from deris_llm.testing import check_cognition_backend, relative_difference, synthetic_images, tiny_config
from tests.models.padded_rows import with_more_padding

TEXT_FIRST = (
    "cognition.prompt_order=text_first",
    'cognition.prompt="<|im_start|>user\\nWhere is {phrase}?<image>\\n<|im_end|>\\n"',
)
PHRASES = ["the small blue square on the left", "star", "a green ring behind the large triangle"]
INDEX = [0, 0, 1]


def build(config, backend=Qwen2OneVision, *, wake_lora: bool = True) -> Qwen2OneVision:
    torch.manual_seed(0)
    built = backend.build(config.cognition, weights=True, dtype=torch.float32)
    if wake_lora:
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
    return built


@pytest.fixture(scope="module")
def backend(overrides: list[str]) -> Qwen2OneVision:
    return build(tiny_config(*overrides)).eval()


@pytest.fixture(scope="module")
def processor(overrides: list[str]):
    return build_processor(tiny_config(*overrides))


@pytest.fixture(scope="module")
def inputs(processor) -> CognitionInputs:
    return processor(synthetic_images(2), PHRASES, INDEX)


@pytest.mark.parametrize("order", [(), TEXT_FIRST], ids=["image_first", "text_first"])
@pytest.mark.parametrize("text_features", ["phrase_and_after", "phrase", "last"])
def test_contract(overrides: list[str], order: tuple[str, ...], text_features: str):
    config = tiny_config(*overrides, *order, f"cognition.text_features={text_features}")
    # measured worst case 4.4e-7
    check_cognition_backend(build(config), build_processor(config), tolerance=1e-5)


class FlippedPadding(Qwen2OneVision):
    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        features = super().forward(inputs, image_index)
        return replace(features, text_padding_mask=~features.text_padding_mask)


class ReadsTheBatch(Qwen2OneVision):
    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        features = super().forward(inputs, image_index)
        return replace(features, cls_feat=features.cls_feat - features.cls_feat.mean(dim=0))


class ImagesReadTheBatch(Qwen2OneVision):
    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        features = super().forward(inputs, image_index)
        return replace(features, image_feats=features.image_feats - features.image_feats.mean(dim=0))


class TextReadsThePadding(Qwen2OneVision):
    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        features = super().forward(inputs, image_index)
        return replace(features, text_feats=features.text_feats - features.text_feats.mean(dim=1, keepdim=True))


class RightAligned(Qwen2OneVision):
    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        features = super().forward(inputs, image_index)
        text, padding = features.text_feats.flip(1), features.text_padding_mask.flip(1)
        return replace(features, text_feats=text, text_padding_mask=padding)


class TransposedMap(Qwen2OneVision):
    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        features = super().forward(inputs, image_index)
        return replace(features, image_feats=features.image_feats.transpose(2, 3))


class BottomRowFirst(Qwen2OneVision):
    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        features = super().forward(inputs, image_index)
        return replace(features, image_feats=features.image_feats.flip(2))


class ChannelsLast(Qwen2OneVision):
    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        features = super().forward(inputs, image_index)
        return replace(features, image_feats=features.image_feats.permute(0, 2, 3, 1))


class OneMapForAll(Qwen2OneVision):
    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        features = super().forward(inputs, image_index)
        return replace(features, image_feats=features.image_feats[:1], image_feats_index=image_index * 0)


class IdleParameter(Qwen2OneVision):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.idle = nn.Parameter(torch.zeros(2))


class WrongWidth(Qwen2OneVision):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.feature_dim += 1


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (FlippedPadding, "True = padding"),
        (ReadsTheBatch, "cls_feat: the same, whatever shares the batch"),
        (ImagesReadTheBatch, "image_feats: the same, whatever shares the batch"),
        (TextReadsThePadding, "text_feats: the same, whatever shares the batch"),
        (RightAligned, "text_padding_mask: True = padding; tokens are left-aligned"),
        (TransposedMap, "change at the image's lower left shows at the map's upper right"),
        (BottomRowFirst, "top row first, but a change at the image's lower left shows"),
        (ChannelsLast, r"image_feats: \(I or P, feature_dim, h, w\)"),
        (OneMapForAll, "image_feats: one row per image or per phrase"),
        (IdleParameter, "idle does not"),
        (WrongWidth, "feature_dim"),
    ],
)
def test_contract_rejects_broken_plugins(overrides: list[str], broken: type[Qwen2OneVision], rule: str):
    config = tiny_config(*overrides)
    with pytest.raises(AssertionError, match=rule):
        check_cognition_backend(build(config, broken), build_processor(config))


def test_contract_rejects_a_processor_that_takes_empty_phrases(overrides: list[str], processor):
    class Lenient(type(processor)):
        def encode(self, phrase: str) -> tuple[list[int], list[bool]]:
            return super().encode(phrase.strip() or "star")

    globals()["Lenient"] = Lenient
    Lenient.__qualname__ = "Lenient"
    lenient = Lenient.__new__(Lenient)
    lenient.__dict__.update(processor.__dict__)
    with pytest.raises(AssertionError, match="expected a ValueError of the processor for the phrase ''"):
        check_cognition_backend(build(tiny_config(*overrides)), lenient)


class InvertedPadding(Qwen2OneVisionProcessor):
    def __call__(self, *args) -> CognitionInputs:
        inputs = super().__call__(*args)
        return replace(inputs, token_padding_mask=~inputs.token_padding_mask)


def test_contract_rejects_a_processor_with_attention_for_padding(overrides: list[str], processor):
    inverted = InvertedPadding.__new__(InvertedPadding)
    inverted.__dict__.update(processor.__dict__)
    with pytest.raises(AssertionError, match="token_padding_mask: True = padding"):
        check_cognition_backend(build(tiny_config(*overrides)), inverted)


def test_prompt_is_tokenised_as_a_whole(processor, overrides: list[str]):
    prompt = tiny_config(*overrides).cognition.prompt
    for phrase in (*PHRASES, "chién, à gauche!", "?"):
        ids, is_text = processor.encode(phrase)
        assert ids.count(processor.prompts.image_token_id) == processor.num_image_tokens == 16
        first = ids.index(processor.prompts.image_token_id)
        without_repeats = ids[:first] + ids[first + 15 :]
        assert without_repeats == processor.prompts.tokenizer(prompt.replace("{phrase}", phrase))["input_ids"]
        text = processor.prompts.tokenizer.decode([token for token, chosen in zip(ids, is_text, strict=True) if chosen])
        assert text.lstrip(" ") == f"{phrase}?<|im_end|>\n<|im_start|>assistant\n"  # " a" may be one token or two


def test_which_tokens_become_text_features(overrides: list[str]):
    def chosen(*more: str) -> str:
        processor = build_processor(tiny_config(*overrides, *more))
        ids, is_text = processor.encode("the red circle")
        return processor.prompts.tokenizer.decode([token for token, choice in zip(ids, is_text, strict=True) if choice])

    assert chosen("cognition.text_features=phrase") == " the red circle"  # tokens bring their space along
    assert chosen("cognition.text_features=last") == "\n"
    assert chosen(*TEXT_FIRST) == " the red circle?\n<|im_end|>\n"  # no image tokens


def test_long_phrases_are_cut_with_one_warning(overrides: list[str], caplog: pytest.LogCaptureFixture):
    processor = build_processor(
        tiny_config(*overrides, "cognition.text_features=phrase", "cognition.max_phrase_tokens=5")
    )
    long = "the red circle on the left behind the yellow star"
    with caplog.at_level(logging.WARNING, logger="deris_llm"):
        cut = [processor.encode(text) for text in (long, "star", long)]
    assert [sum(is_text) for _, is_text in cut] == [5, sum(cut[1][1]), 5]
    kept = processor.prompts.tokenizer.decode([t for t, choice in zip(*cut[0], strict=True) if choice]).strip()
    assert long.startswith(kept)
    assert kept
    assert caplog.text.count("is cut to cognition.max_phrase_tokens=5") == 1
    assert processor.prompts.num_cut == 2


@pytest.mark.parametrize(
    ("phrase", "told"), [("", "empty"), (" \n", "empty"), ("a <image> b", "special token '<image>'")]
)
def test_unusable_phrases_are_told(processor, phrase: str, told: str):
    with pytest.raises(ValueError, match=told):
        processor(synthetic_images(1), ["star", phrase], [0, 0])


def test_a_prompt_beyond_the_context_is_told(processor):
    short = copy.deepcopy(processor)
    short.prompts.num_positions = len(processor.encode("star")[0])
    short.encode("star")
    told = r"phrase 'the red circle': expected at most \d+ tokens in its prompt, .* got \d+, 16 of them its image's"
    with pytest.raises(ValueError, match=told):
        short.encode("the red circle")


def test_prompts_of_different_lengths_are_padded_on_the_right() -> None:
    found = prompts.padded([([1, 2, 3], [False, True, True]), ([4], [True])], 9, [0, 1], torch.empty(0))
    assert (found.prompt_lengths, found.phrase_images, found.has_padding) == ((3, 1), (0, 1), True)
    tensors = (found.input_ids, found.token_padding_mask, found.text_feature_mask)
    assert [tensor.tolist() for tensor in tensors] == [
        [[1, 2, 3], [4, 9, 9]],
        [[False, False, False], [False, True, True]],
        [[False, True, True], [True, False, False]],
    ]
    assert [tensor.dtype for tensor in tensors] == [torch.int64, torch.bool, torch.bool]


def test_phrases_of_an_image_have_one_prefix(processor):
    """Whatever the phrase: nothing that precedes it is tokenized together with it."""
    inputs = processor(synthetic_images(1), [*PHRASES, "chién, à gauche!", "?"], [0] * 5)
    length = processor.count_tokens(["star"], [(60, 80)])[0].shared
    assert (inputs.input_ids[:, :length] == inputs.input_ids[0, :length]).all()


def test_pictures_are_warped_and_normalised(processor):
    picture = Image.fromarray(np.dstack([np.full((30, 70), value, np.uint8) for value in (0, 255, 51)]))
    pixels = processor.pixels(picture)
    assert pixels.shape == (3, 48, 48)
    assert torch.allclose(pixels.mean(dim=(1, 2)), torch.tensor([-1.0, 1.0, -0.6]), atol=1e-6)
    assert processor.pixels(picture.convert("L")).shape == (3, 48, 48)


def test_features_are_the_hidden_states_of_the_published_forward(backend: Qwen2OneVision, inputs: CognitionInputs):
    with torch.no_grad():
        features = backend(inputs, torch.tensor(INDEX))
        tower = backend.model.vision_tower(inputs.pixel_values[INDEX], output_hidden_states=True).hidden_states[-1]
        tokens = backend.model.multi_modal_projector(tower)
        attention_mask = (~inputs.token_padding_mask).long()
        if "mm_encoder_outputs" in inspect.getsource(LlavaOnevisionModel.forward):  # transformers 5.17 would drop it
            hidden = backend.model(
                input_ids=inputs.input_ids,
                attention_mask=attention_mask,
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(tokens))},
                use_cache=False,
            ).last_hidden_state
        else:
            embeddings = backend.model.get_input_embeddings()(inputs.input_ids)
            is_image = inputs.input_ids == backend.model.config.image_token_id
            hidden = backend.model.language_model(
                inputs_embeds=embeddings.masked_scatter(is_image[..., None], tokens),
                attention_mask=attention_mask,
                use_cache=False,
            ).last_hidden_state
    for number in range(3):
        is_image = inputs.input_ids[number] == backend.model.config.image_token_id
        maps = hidden[number, is_image].view(4, 4, 32).permute(2, 0, 1)  # row-major
        assert relative_difference(features.image_feats[features.image_feats_index[number]], maps) < 1e-5
        text = hidden[number, inputs.text_feature_mask[number]]
        assert relative_difference(features.text_feats[number, : len(text)], text) < 1e-5
        assert int((~features.text_padding_mask[number]).sum()) == len(text)
        last = int((~inputs.token_padding_mask[number]).sum()) - 1
        assert relative_difference(features.cls_feat[number], hidden[number, last]) < 1e-5


@pytest.mark.parametrize("order", [(), TEXT_FIRST], ids=["image_first", "text_first"])
def test_padding_changes_nothing(overrides: list[str], order: tuple[str, ...]):
    config, index = tiny_config(*overrides, *order), torch.tensor(INDEX)
    model = build(config).eval()
    inputs = build_processor(config)(synthetic_images(2), PHRASES, INDEX)
    with torch.no_grad():
        ours, reference = model(with_more_padding(inputs, 9), index), model(inputs, index)
    valid, width = ~reference.text_padding_mask, reference.text_padding_mask.shape[1]
    assert torch.equal(ours.text_padding_mask[:, :width], reference.text_padding_mask)
    assert ours.text_padding_mask[:, width:].all()
    for name in ("image_feats", "cls_feat"):
        assert relative_difference(getattr(ours, name), getattr(reference, name)) < 1e-5
    assert relative_difference(ours.text_feats[:, :width][valid], reference.text_feats[valid]) < 1e-5


def test_image_first_image_features_are_the_images_own(backend: Qwen2OneVision, processor):
    image = synthetic_images(1)
    with torch.no_grad():
        one, other = (backend(processor(image, [phrase], [0]), torch.tensor([0])) for phrase in PHRASES[:2])
        both = backend(processor(image, PHRASES[:2], [0, 0]), torch.tensor([0, 0]))
    assert len(both.image_feats) == 1
    assert relative_difference(one.image_feats, other.image_feats) < 1e-5
    assert relative_difference(one.text_feats[:, -1], other.text_feats[:, -1]) > 1e-2


def test_text_first_image_features_read_the_phrase(overrides: list[str]):
    config = tiny_config(*overrides, *TEXT_FIRST)
    inputs = build_processor(config)(synthetic_images(1), PHRASES[:2], [0, 0])
    with torch.no_grad():
        features = build(config).eval()(inputs, torch.tensor([0, 0]))
    assert features.image_feats_index.tolist() == [0, 1]
    assert relative_difference(features.image_feats[0], features.image_feats[1]) > 1e-2


def test_lora_at_the_start_is_the_base_model(overrides: list[str], inputs: CognitionInputs):
    with_lora = build(tiny_config(*overrides), wake_lora=False).eval()
    base = build(tiny_config(*overrides, "cognition.lora.r=0")).eval()
    with torch.no_grad():
        ours, reference = (model(inputs, torch.tensor(INDEX)) for model in (with_lora, base))
    for name in ("image_feats", "text_feats", "cls_feat"):
        assert torch.equal(getattr(ours, name), getattr(reference, name))


def test_without_lora_nothing_trains(overrides: list[str], inputs: CognitionInputs):
    model = build(tiny_config(*overrides, "cognition.lora.r=0")).train()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.model.modules())
    assert not model(inputs, torch.tensor(INDEX)).text_feats.requires_grad


def test_with_lora_only_the_language_model_is_in_train_mode(backend: Qwen2OneVision):
    backend.train()
    assert all(module.training for module in backend.model.language_model.modules())
    assert not any(module.training for module in backend.model.vision_tower.modules())
    assert not any(module.training for module in backend.model.multi_modal_projector.modules())
    backend.eval()
    assert not any(module.training for module in backend.modules())


def test_lora_dropout_and_scale_take_effect(overrides: list[str], inputs: CognitionInputs):
    index = torch.tensor(INDEX)
    dropping = build(tiny_config(*overrides, "cognition.lora.dropout=0.5")).train()
    stronger = build(tiny_config(*overrides, "cognition.lora.alpha=64")).eval()
    plain = build(tiny_config(*overrides)).eval()
    with torch.no_grad():
        reference = plain(inputs, index).cls_feat
        assert torch.equal(dropping.eval()(inputs, index).cls_feat, reference)
        assert relative_difference(dropping.train()(inputs, index).cls_feat, reference) > 1e-3
        assert relative_difference(stronger(inputs, index).cls_feat, reference) > 1e-3


def test_lora_targets_are_checked(overrides: list[str]):
    config = tiny_config(*overrides, "cognition.lora.targets=[q_proj, quatsch]")
    with pytest.raises(ValueError, match=r"expected names among .*q_proj.*got quatsch"):
        build(config)
    chosen = build(tiny_config(*overrides, "cognition.lora.targets=[down_proj]"), wake_lora=False)
    assert {n.split(".")[-4] for n, p in chosen.named_parameters() if p.requires_grad} == {"down_proj"}


def test_backend_of_a_tokenizer_without_the_image_token_is_refused(overrides: list[str], tmp_path: Path):
    folder = tmp_path / "llava"
    shutil.copytree(tiny_config(*overrides).cognition.weights, folder)
    architecture = json.loads((folder / "config.json").read_text())
    architecture["image_token_index"] += 1
    (folder / "config.json").write_text(json.dumps(architecture))
    with pytest.raises(ValueError, match="fast tokenizer whose <image> is token"):
        build_processor(tiny_config(*overrides, f"cognition.weights={folder}"))


def test_resolved_backend_builds_on_meta_without_weights(overrides: list[str]):
    config = tiny_config(*overrides).cognition
    with torch.device("meta"):
        model = resolve_backend(config.backend).build(config, weights=False, dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("order", [(), TEXT_FIRST], ids=["image_first", "text_first"])
def test_tuned_whole_the_language_model_trains_and_the_towers_do_not(overrides: list[str], order: tuple[str, ...]):
    config = tiny_config(*overrides, *order, "cognition.tuning=full")
    model = build(config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("model.language_model.")}
    assert not any("lora_" in name for name in trained)
    check_cognition_backend(model, build_processor(config), tolerance=1e-5)
