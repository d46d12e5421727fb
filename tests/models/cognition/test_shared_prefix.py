"""The packed language model equals one run per phrase."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import Qwen2Config, Qwen2Model
from transformers.modeling_outputs import BaseModelOutput

from deris_llm.models.cognition import qwen2_ov
from deris_llm.models.cognition.base import say_once
from deris_llm.models.cognition.qwen2_ov import attention_kernels
from deris_llm.models.cognition.shared_prefix import check_prefix, pack_prompts, run_packed
from deris_llm.models.deris import build_model
from deris_llm.testing import relative_difference, tiny_config

TOLERANCE = 2e-6  # measured worst case 2.4e-7 (hidden states of size 1); gradients 3.7e-7 relative
PREFIX, WIDTH = 7, 32


@pytest.fixture(params=["sdpa", "eager"])
def language_model(request: pytest.FixtureRequest) -> Qwen2Model:
    return _tiny_qwen2(request.param)


def _tiny_qwen2(attention: str) -> Qwen2Model:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention,
    )  # fmt: skip
    model = Qwen2Model(config).requires_grad_(False)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, model)
    return model


def _prompts(lengths: list[int], image_index: list[int], padding: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    prefixes = torch.randn(max(image_index) + 1, PREFIX, WIDTH, generator=generator)
    own = torch.randn(len(lengths), max(lengths) + padding, WIDTH, generator=generator)
    embeddings = torch.cat([prefixes[image_index], own], dim=1)
    is_valid = torch.arange(embeddings.shape[1]) < (PREFIX + torch.tensor(lengths))[:, None]
    return embeddings, is_valid, torch.tensor(image_index)


def _run(
    model: torch.nn.Module, embeddings: torch.Tensor, is_valid: torch.Tensor, image_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    is_prefix = torch.ones(int(image_index.max()) + 1, PREFIX, dtype=torch.bool)
    return run_packed(model, embeddings, pack_prompts(is_valid[:, PREFIX:], is_prefix, image_index), image_index)


def _gradients(model: Qwen2Model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("padding", [0, 3])
def test_packed_equals_one_by_one_in_values_and_gradients(language_model: Qwen2Model, padding: int) -> None:
    lengths = [4, 1, 6, 3, 2]
    embeddings, is_valid, image_index = _prompts(lengths, [0, 0, 0, 1, 1], padding)
    shared, own = _run(language_model, embeddings, is_valid, image_index)
    weight = torch.linspace(-1, 1, WIDTH)
    sum((own[p, :n] * weight).sum() for p, n in enumerate(lengths)).backward()
    packed_gradients = _gradients(language_model)
    for p, n in enumerate(lengths):
        alone = language_model(inputs_embeds=embeddings[p : p + 1, : PREFIX + n]).last_hidden_state[0]
        assert torch.allclose(shared[image_index[p]], alone[:PREFIX], atol=TOLERANCE)
        assert torch.allclose(own[p, :n], alone[PREFIX:], atol=TOLERANCE)
        (alone[PREFIX:] * weight).sum().backward()
    for name, gradient in _gradients(language_model).items():
        assert torch.allclose(packed_gradients[name], gradient, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_any_number_of_phrases_equals_one_by_one(is_checkpointed: bool) -> None:
    """Images with 1 to 12 phrases of 1 to 9 tokens, alone and beside others, recomputed in the backward pass or not."""
    language_model = _tiny_qwen2("sdpa").train()
    if is_checkpointed:
        language_model.gradient_checkpointing_enable({"use_reentrant": False})
    assert language_model.is_gradient_checkpointing == is_checkpointed
    generator = torch.Generator().manual_seed(3)
    weight = torch.linspace(-1, 1, WIDTH)
    for phrases_of_images in ([1], [2], [12], [7, 1, 4]):
        image_index = [image for image, number in enumerate(phrases_of_images) for _ in range(number)]
        lengths = torch.randint(1, 10, (len(image_index),), generator=generator).tolist()
        embeddings, is_valid, index = _prompts(lengths, image_index, padding=2)
        _, own = _run(language_model, embeddings, is_valid, index)
        torch.stack([(own[p, :n] * weight).sum() for p, n in enumerate(lengths)]).sum().backward()
        packed = _gradients(language_model)
        for p, n in enumerate(lengths):
            alone = language_model(inputs_embeds=embeddings[p : p + 1, : PREFIX + n], use_cache=False)
            assert torch.allclose(own[p, :n], alone.last_hidden_state[0, PREFIX:], atol=TOLERANCE)
            (alone.last_hidden_state[0, PREFIX:] * weight).sum().backward()
        for name, gradient in _gradients(language_model).items():
            assert relative_difference(packed[name], gradient) < 1e-5, name  # measured 5.4e-7


class Recorder(torch.nn.Module):
    """Keeps what a language model is given."""

    def forward(self, inputs_embeds: torch.Tensor, **given: object) -> object:
        self.given = given
        return BaseModelOutput(last_hidden_state=inputs_embeds)


def test_a_phrase_sees_the_prefix_and_itself_at_the_positions_it_has_alone() -> None:
    embeddings, is_valid, image_index = _prompts([2, 3], [0, 0])
    recorder = Recorder()
    shared, own = _run(recorder, embeddings, is_valid, image_index)
    assert recorder.given["position_ids"].tolist() == [[*range(PREFIX), 7, 8, 7, 8, 9]]
    assert torch.equal(shared[0], embeddings[0, :PREFIX])
    assert torch.equal(own[0, :2], embeddings[0, PREFIX : PREFIX + 2])
    assert torch.equal(own[1], embeddings[1, PREFIX:])
    last_of_second = recorder.given["attention_mask"][0, 0, PREFIX + 4] == 0
    assert last_of_second.tolist() == [True] * PREFIX + [False, False, True, True, True]


def test_nobody_sees_the_padding_of_a_shorter_prefix() -> None:
    is_prefix = torch.tensor([[True, True, True], [True, False, False]])
    packed = pack_prompts(torch.ones(3, 2, dtype=torch.bool), is_prefix, torch.tensor([0, 0, 1]))
    assert packed.is_visible_ITT[1, 4].tolist() == [True, False, False, True, True, False, False]
    assert packed.is_visible_ITT[0, 6].tolist() == [True] * 3 + [False, False, True, True]
    assert packed.is_visible_ITT.any(dim=-1).all()  # a row of softmax over nothing would be NaN
    numbers = torch.tensor([[1, 2], [3, 4], [5, 6]])
    assert packed.laid_out(10 * is_prefix, numbers).tolist() == [[10, 10, 10, 1, 2, 3, 4], [10, 0, 0, 5, 6, 0, 0]]
    assert torch.equal(packed.own(packed.laid_out(10 * is_prefix, numbers)), numbers)


def test_without_flash_attention_everything_runs_on_sdpa() -> None:
    assert attention_kernels(torch.float32, prompt_order="text_first") == {
        "vision_config": "sdpa",
        "text_config": "sdpa",
    }


def test_what_cannot_be_packed_is_told() -> None:
    prefixes = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 4]])
    check_prefix(prefixes, torch.tensor([0, 0, 1]), 2)
    with pytest.raises(ValueError, match=r"phrase 2 of the batch: expected the same prompt .* image 0, got other"):
        check_prefix(prefixes, torch.tensor([0, 0, 0]), 1)
    for index, num_images, without in (([0, 0, 2], 3, 1), ([0, 0, 1], 3, 2), ([1, 1, 2], 3, 0)):
        with pytest.raises(ValueError, match=rf"every one of 3 images to have a phrase, got none for image {without} "):
            check_prefix(prefixes, torch.tensor(index), num_images)


def test_a_backend_that_cannot_share_says_so_once(overrides: list[str], caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    order = "cognition.prompt_order=text_first"
    prompt = 'cognition.prompt="Where is {phrase}?<image>"'
    with caplog.at_level(logging.INFO, logger="deris_llm"):
        for options in ([], [order, prompt], [order, prompt]):
            build_model(tiny_config(*overrides, *options))
    said = [record.message for record in caplog.records if "once per phrase" in record.message]
    assert said == [
        "cognition.backend=qwen2_ov does not share an image between its phrases and runs once per phrase: "
        "cognition.prompt_order=text_first"
    ]


def test_a_missing_kernel_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(qwen2_ov, "is_flash_attn_2_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="deris_llm"):
        for _ in range(2):
            kernels = attention_kernels(torch.bfloat16, prompt_order="image_first")
    assert kernels == {"vision_config": "sdpa", "text_config": "sdpa"}
    assert [record.message for record in caplog.records] == [
        "attention: sdpa in the vision tower, sdpa in the language model; flash-attn is not installed (or does not fit "
        "this GPU)"
    ]
