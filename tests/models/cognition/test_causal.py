"""Rows that share a prefix equal one run per phrase."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import Qwen2Config, Qwen2Model
from transformers.modeling_outputs import BaseModelOutput

from deris_llm.models.cognition import causal
from deris_llm.models.cognition.base import say_once
from deris_llm.models.cognition.causal import attention_kernels, is_visible, read_rows, with_rows
from deris_llm.models.cognition.prompts import padded
from deris_llm.models.deris import build_model
from deris_llm.structures import TokenRows
from deris_llm.testing import relative_difference, tiny_config

TOLERANCE = 2e-6  # measured worst case 2.4e-7 (hidden states of size 1); gradients 3.7e-7 relative
PREFIX, WIDTH = 7, 32
IMAGE, TEXT = 1, 0  # token ids


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


def rows_of(lengths: list[int], image_index: list[int], prefixes: list[int] | None = None) -> TokenRows:
    """Rows of prompts whose own parts have these lengths; the last token of a prefix is the image's only one."""
    prefixes = prefixes or [PREFIX] * (image_index[-1] + 1)
    prompts = [
        ([TEXT] * (prefixes[image] - 1) + [IMAGE] + [TEXT] * length, [False] * prefixes[image] + [True] * length)
        for length, image in zip(lengths, image_index, strict=True)
    ]
    inputs = padded(prompts, TEXT, image_index, torch.empty(0), ((1, 1),) * len(prefixes))
    rows = with_rows(inputs, image_token_id=IMAGE, is_shared=True).rows
    assert rows is not None
    return rows


def _prompts(lengths: list[int], image_index: list[int]) -> tuple[torch.Tensor, TokenRows]:
    """Embeddings (P, L, D) of prompts, equal up to the image for all phrases of one, and their rows."""
    generator = torch.Generator().manual_seed(1)
    prefixes = torch.randn(max(image_index) + 1, PREFIX, WIDTH, generator=generator)
    own = torch.randn(len(lengths), max(lengths), WIDTH, generator=generator)
    return torch.cat([prefixes[image_index], own], dim=1), rows_of(lengths, image_index)


def _run(model: torch.nn.Module, embeddings: torch.Tensor, rows: TokenRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the prefixes (I, S, D) and of the phrases' own tokens (P, O, D)."""
    hidden = read_rows(model, embeddings.flatten(0, 1)[rows.source], rows)
    return hidden[:, :PREFIX], hidden.flatten(0, 1)[rows.text_places]


def _gradients(model: Qwen2Model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_packed_equals_one_by_one_in_values_and_gradients(language_model: Qwen2Model) -> None:
    lengths, image_index = [4, 1, 6, 3, 2], [0, 0, 0, 1, 1]
    embeddings, rows = _prompts(lengths, image_index)
    shared, own = _run(language_model, embeddings, rows)
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
        embeddings, rows = _prompts(lengths, image_index)
        _, own = _run(language_model, embeddings, rows)
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

    config = Qwen2Config()

    def forward(self, inputs_embeds: torch.Tensor, **given: object) -> object:
        self.given = given
        return BaseModelOutput(last_hidden_state=inputs_embeds)


def test_a_phrase_sees_the_prefix_and_itself_at_the_positions_it_has_alone() -> None:
    embeddings, rows = _prompts([2, 3], [0, 0])
    recorder = Recorder()
    shared, own = _run(recorder, embeddings, rows)
    assert recorder.given["position_ids"].tolist() == [[*range(PREFIX), 7, 8, 7, 8, 9]]
    assert torch.equal(shared[0], embeddings[0, :PREFIX])
    assert torch.equal(own[0, :2], embeddings[0, PREFIX : PREFIX + 2])
    assert torch.equal(own[1], embeddings[1, PREFIX:])
    last_of_second = recorder.given["attention_mask"][0, 0, PREFIX + 4] == 0
    assert last_of_second.tolist() == [True] * PREFIX + [False, False, True, True, True]
    assert rows.image_places.tolist() == [PREFIX - 1]
    assert rows.last_places.tolist() == [PREFIX + 1, PREFIX + 4]
    assert rows.text_padding_mask.tolist() == [[False, False, True], [False] * 3]


def test_no_token_sees_the_padding_of_a_shorter_prefix() -> None:
    rows = rows_of([2, 2, 2], [0, 0, 1], prefixes=[3, 1])
    visible = is_visible(rows)
    assert visible[1, 4].tolist() == [True, False, False, True, True, False, False]
    assert visible[0, 6].tolist() == [True] * 3 + [False, False, True, True]
    assert visible.any(dim=-1).all()  # a row of softmax over nothing would be NaN
    assert rows.owner.tolist() == [[0, 0, 0, 1, 1, 2, 2], [0, -1, -1, 3, 3, -1, -1]]
    assert rows.text_places.tolist() == [[3, 4], [5, 6], [10, 11]]


def test_rows_that_share_nothing_are_the_prompts() -> None:
    """Left-aligned, each with its image where it is in the prompt."""
    prompts = [
        ([5, IMAGE, IMAGE, 6], [True, False, False, True]),
        ([5, 5, 5, IMAGE, IMAGE, 6], [True] * 3 + [False] * 3),
    ]
    inputs = padded(prompts, TEXT, [0, 0], torch.empty(0), ((1, 2),))
    rows = with_rows(inputs, image_token_id=IMAGE, is_shared=False).rows
    assert rows is not None
    assert rows.source[0, :4].tolist() == [0, 1, 2, 3]
    assert rows.source[1].tolist() == [6, 7, 8, 9, 10, 11]
    assert rows.owner.tolist() == [[0] * 4 + [-1] * 2, [0] * 6]
    assert rows.image_places.tolist() == [1, 2, 9, 10]
    assert rows.text_places.tolist() == [[0, 3, 3], [6, 7, 8]]
    assert rows.last_places.tolist() == [3, 11]


def test_without_flash_attention_everything_runs_on_sdpa() -> None:
    assert attention_kernels(torch.float32, prompt_order="text_first") == {
        "vision_config": "sdpa",
        "text_config": "sdpa",
    }


@pytest.mark.parametrize(("index", "without"), [([0, 0, 2], 1), ([0, 0, 1], 2), ([1, 1, 2], 0)])
def test_an_image_without_a_phrase_is_refused(index: list[int], without: int) -> None:
    with pytest.raises(ValueError, match=rf"every one of 3 images to have a phrase, got none for image {without} "):
        rows_of([1, 1, 1], index, prefixes=[3, 3, 3])


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
    monkeypatch.setattr(causal, "is_flash_attn_2_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="deris_llm"):
        for _ in range(2):
            kernels = attention_kernels(torch.bfloat16, prompt_order="image_first")
    assert kernels == {"vision_config": "sdpa", "text_config": "sdpa"}
    assert [record.message for record in caplog.records] == [
        "attention: sdpa in the vision tower, sdpa in the language model; flash-attn is not installed (or does not fit "
        "this GPU)"
    ]
