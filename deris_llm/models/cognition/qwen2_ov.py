"""LLaVA-OneVision with Qwen2 ("Qwen2-OV"): SigLIP, a projector and a causal language model with LoRA, or trained whole.

I images, P phrases, L tokens of a prompt, N image tokens (27 x 27 at 384 px), D width of the language model.

One base crop per image, no tiles. The vision tower and the projector are frozen and run once per image. The language
model reads `... <image> x N ... phrase ...`; its hidden states at the image tokens are the image features, those at the
phrase and the tokens after it the text features. No lm_head, no generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaOnevisionModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_flash_attn_2_available

from deris_llm.config import Qwen2OvCognition
from deris_llm.models.cognition.base import CognitionBackend, PlannedInputs, TokenCount, say_once
from deris_llm.models.cognition.lora import add_lora
from deris_llm.models.cognition.prompts import LeftAlignment, PromptTokenizer, padded
from deris_llm.models.cognition.shared_prefix import PackedPrompts, check_prefix, pack_prompts, run_packed
from deris_llm.models.pretrained import architecture_of, check_names, load_pretrained, load_tokenizer
from deris_llm.structures import CognitionFeatures, CognitionInputs

IMAGE_TOKEN = "<image>"
_LEFT_IN_FILE = ("lm_head.weight", "language_model.lm_head.weight")  # as transformers 5 and 4 write it
PLANNED_TEXT_TOKENS = 30  # of prompt and phrase, besides the image's, where no tokenizer is at hand


class Qwen2OneVisionProcessor:
    """Pictures warped to the tower's square; phrases put into the prompt and tokenised whole."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_size: int,
        num_image_tokens: int,
        prompt: str,
        text_features: Literal["phrase_and_after", "phrase", "last"],
        max_phrase_tokens: int,
        num_positions: int,
    ) -> None:
        """Keeps what is needed to prepare batches.

        Args:
            tokenizer: see `PromptTokenizer`; with the token `<image>`.
            image_size: px, side of the vision tower's input.
            num_image_tokens: N.
            prompt: holds `{phrase}` and `<image>` once each.
            text_features: which tokens become text features.
            max_phrase_tokens: longer phrases are cut at the end of this many tokens.
            num_positions: tokens that the language model has positions for.
        """
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.prompts = PromptTokenizer(
            tokenizer,
            prompt=prompt,
            image_token=IMAGE_TOKEN,
            text_features=text_features,
            max_phrase_tokens=max_phrase_tokens,
            num_positions=num_positions,
        )

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """See `CognitionProcessor`. Prompts are padded on the right."""
        input_ids, padding_mask, text_feature_mask = padded(
            [self.encode(phrase) for phrase in phrases], self.prompts.pad_token_id
        )
        return CognitionInputs(
            pixel_values=torch.stack([self.pixels(image) for image in images]),
            input_ids=input_ids,
            token_padding_mask=padding_mask,
            text_feature_mask=text_feature_mask,
        )

    def pixels(self, image: Image.Image) -> Tensor:
        """Warps a picture to the square and normalises it: float (3, s, s) in [-1, 1]."""
        square = image.convert("RGB").resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1).contiguous() / 127.5 - 1

    def encode(self, phrase: str) -> tuple[list[int], list[bool]]:
        """Token ids of the prompt with a phrase, and for each whether it is a text feature."""
        return self.prompts.encode(phrase, self.num_image_tokens)

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """See `InputChecker`."""
        return self.prompts.refused(phrases, [self.num_image_tokens] * len(sizes))

    def count_tokens(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[TokenCount]:
        """See `TokenCounter`."""
        return self.prompts.count_tokens(phrases, [self.num_image_tokens] * len(sizes))


class Qwen2OneVision(CognitionBackend):
    """transformers' `LlavaOnevisionModel`, frozen but for LoRA in its language model, or but for the language model."""

    def __init__(
        self,
        model: LlavaOnevisionModel,
        *,
        tuning: Literal["lora", "full"] = "lora",
        lora_r: int,
        lora_alpha: int,
        lora_dropout: float,
        lora_targets: Sequence[str],
        prompt_order: Literal["image_first", "text_first"],
    ) -> None:
        """Freezes the model and puts LoRA into its language model, or lets the language model train.

        Args:
            model: loaded, or on the meta device.
            tuning: full: the language model with its embeddings trains, LoRA options are ignored; the vision tower and
                the projector stay frozen in both cases.
            lora_r: rank; 0 = none, the language model stays frozen.
            lora_alpha: the update is scaled by alpha / r.
            lora_dropout: before the update.
            lora_targets: names of the linears that get it.
            prompt_order: image_first: image tokens cannot see the phrase, so their features are the image's alone.
        """
        super().__init__()
        self.model = model.requires_grad_(False)
        self.prompt_order = prompt_order
        self.shares_images = prompt_order == "image_first"
        self.is_trained = tuning == "full" or lora_r > 0
        architecture: Any = model.config
        self.feature_dim = architecture.text_config.hidden_size
        if tuning == "full":
            model.language_model.requires_grad_(True)
        elif lora_r > 0:
            add_lora(
                model.language_model, lora_targets, r=lora_r, alpha=lora_alpha, dropout=lora_dropout, dtype=model.dtype
            )
        self.train(self.training)

    @classmethod
    def build(cls, config: Qwen2OvCognition, *, weights: bool, dtype: torch.dtype) -> Self:
        """See `CognitionBackend`."""
        architecture = _architecture(config.weights, weights=weights)
        model = load_pretrained(
            LlavaOnevisionModel,
            config.weights,
            architecture,
            weights=weights,
            dtype=dtype,
            left_in_file=_LEFT_IN_FILE,
            attention=attention_kernels(dtype, prompt_order=config.prompt_order),
            in_4_bits_except=("vision_tower", "multi_modal_projector") if config.quantization == "nf4" else None,
        )
        return cls(
            model,
            tuning=config.tuning,
            lora_r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            lora_targets=config.lora.targets,
            prompt_order=config.prompt_order,
        )

    @classmethod
    def check_weights(cls, config: Qwen2OvCognition) -> None:
        """See `CognitionBackend`."""
        architecture = _architecture(config.weights, weights=True)
        check_names(LlavaOnevisionModel, config.weights, architecture, left_in_file=_LEFT_IN_FILE)

    @classmethod
    def build_processor(cls, config: Qwen2OvCognition) -> Qwen2OneVisionProcessor:
        """See `CognitionBackend`."""
        architecture = _architecture(config.weights, weights=True)
        tokenizer = load_tokenizer(config.weights)
        image_token_id = tokenizer.get_vocab().get(IMAGE_TOKEN)
        if image_token_id != architecture.image_token_index or not tokenizer.is_fast:
            raise ValueError(
                f"cognition.weights={config.weights}: expected a fast tokenizer whose {IMAGE_TOKEN} is token "
                f"{architecture.image_token_index} as the model's config says, got "
                f"{image_token_id} from a {type(tokenizer).__name__}; "
                "take tokenizer and model from the same folder."
            )
        vision = architecture.vision_config
        return Qwen2OneVisionProcessor(
            tokenizer,
            image_size=vision.image_size,
            num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
            prompt=config.prompt,
            text_features=config.text_features,
            max_phrase_tokens=config.max_phrase_tokens,
            num_positions=architecture.text_config.max_position_embeddings,
        )

    @classmethod
    def plan_inputs(cls, config: Qwen2OvCognition, phrase: str, image_index: Sequence[int]) -> PlannedInputs:
        """See `CognitionBackend`; without weights at hand the architecture suffices, as shipped for the run configs."""
        name = config.weights
        if name.startswith("builtin:") or Path(name).is_dir():
            inputs = super().plan_inputs(config, phrase, image_index).inputs
        else:
            architecture = _architecture(name, weights=False)
            vision = architecture.vision_config
            num_image_tokens = (vision.image_size // vision.patch_size) ** 2
            input_ids = torch.zeros(len(image_index), num_image_tokens + PLANNED_TEXT_TOKENS, dtype=torch.long)
            input_ids[:, PLANNED_TEXT_TOKENS // 2 :][:, :num_image_tokens] = architecture.image_token_index
            text_features = torch.zeros_like(input_ids, dtype=torch.bool)
            text_features[:, -PLANNED_TEXT_TOKENS // 2 :] = True
            pixels = torch.empty(max(image_index) + 1, 3, vision.image_size, vision.image_size, device="meta")
            inputs = CognitionInputs(pixels, input_ids, torch.zeros_like(text_features), text_features)
        prompt = inputs.input_ids[0]
        is_image = prompt == prompt.mode().values  # by far the most frequent token
        shared = int(is_image.nonzero().max()) + 1 if config.prompt_order == "image_first" else 0
        return PlannedInputs(inputs, tokens_per_phrase=len(prompt), shared_tokens=shared)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        """Sets the mode; the frozen parts stay in eval."""
        super().train(mode)
        self.model.eval()
        self.model.language_model.train(mode and self.is_trained)
        return self

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes the language model's layers in the backward pass; the towers run without gradient anyway."""
        language_model = self.model.language_model
        older_name = language_model.gradient_checkpointing_enable  # before transformers 5.2x
        enable = getattr(language_model, "activation_checkpointing_enable", older_name)
        enable(activation_checkpointing_kwargs or {"use_reentrant": False})

    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        """See `CognitionBackend`. What the host reads of the inputs, it reads before anything heavy is queued."""
        is_image_PL = inputs.input_ids == self.model.config.image_token_id
        is_valid_PL, text_mask_PL = ~inputs.token_padding_mask, inputs.text_feature_mask
        is_shared = self.prompt_order == "image_first"  # image tokens cannot see the phrase: run them once per image
        packed, prefix = self._packed(inputs, is_image_PL, image_index) if is_shared else (None, 0)
        own_valid_PO = is_valid_PL[:, prefix:]
        text = LeftAlignment.of(text_mask_PL[:, prefix:])

        embeddings_PLD = self.model.get_input_embeddings()(inputs.input_ids)
        image_tokens_IND = self._image_tokens(inputs).to(embeddings_PLD.dtype)
        embeddings_PLD = embeddings_PLD.masked_scatter(is_image_PL[..., None], image_tokens_IND[image_index])
        num_image_tokens = image_tokens_IND.shape[1]
        side = int(num_image_tokens**0.5)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
            if packed is not None:
                shared_ISD, hidden_POD = run_packed(self.model.language_model, embeddings_PLD, packed, image_index)
                image_hidden, image_feats_index = shared_ISD[:, -num_image_tokens:], image_index
            else:
                hidden_POD = self._run_prompts(embeddings_PLD, is_valid_PL)
                first = is_image_PL.long().argmax(dim=1, keepdim=True)
                places_PN = first + torch.arange(num_image_tokens, device=first.device)
                image_hidden = hidden_POD.gather(1, places_PN[..., None].expand(-1, -1, self.feature_dim))
                image_feats_index = torch.arange(len(image_index), device=image_index.device)
        positions = torch.arange(hidden_POD.shape[1], device=hidden_POD.device)
        last = (own_valid_PO * positions).argmax(dim=1)
        return CognitionFeatures(
            image_feats=image_hidden.unflatten(1, (side, side)).permute(0, 3, 1, 2),
            image_feats_index=image_feats_index,
            text_feats=text.aligned(hidden_POD),
            text_padding_mask=text.padding_mask,
            cls_feat=hidden_POD[torch.arange(len(last), device=last.device), last],
        )

    def _packed(self, inputs: CognitionInputs, is_image: Tensor, image_index: Tensor) -> tuple[PackedPrompts, int]:
        """How the phrases lie behind their images, and how many tokens come before a phrase."""
        assert not inputs.token_padding_mask[:, 0].any(), "a shared prefix needs prompts padded on the right"
        prefix, num_images = int(is_image[0].nonzero().max()) + 1, len(inputs.pixel_values)
        check_prefix(inputs.input_ids[:, :prefix], image_index, num_images)
        is_prefix = torch.ones(num_images, prefix, dtype=torch.bool, device=image_index.device)
        return pack_prompts(~inputs.token_padding_mask[:, prefix:], is_prefix, image_index), prefix

    @torch.no_grad()
    def _image_tokens(self, inputs: CognitionInputs) -> Tensor:
        """Vision tower and projector, once per image: (I, N, D), row-major, top row first."""
        tower = self.model.vision_tower
        states = tower(inputs.pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
        return self.model.multi_modal_projector(states[self.model.config.vision_feature_layer])

    def _run_prompts(self, embeddings: Tensor, is_valid: Tensor) -> Tensor:
        """Runs the language model over whole prompts, each by itself: (P, L, D) -> (P, L, D)."""
        positions = (is_valid.long().cumsum(dim=1) - 1).clamp(min=0)
        outputs = self.model.language_model(
            inputs_embeds=embeddings, attention_mask=is_valid.long(), position_ids=positions, use_cache=False
        )
        return outputs.last_hidden_state


def attention_kernels(dtype: torch.dtype, *, prompt_order: Literal["image_first", "text_first"]) -> dict[str, str]:
    """FlashAttention 2 where it is installed and can be used, else PyTorch's SDPA; the log says it once.

    Phrases packed behind one image need a mask of their own, which FlashAttention 2 does not take: with the image first
    it serves the vision tower only.

    Returns:
        transformers' `attn_implementation` for the vision tower and the language model.
    """
    wants_flash = torch.cuda.is_available() and dtype is torch.bfloat16
    has_flash = wants_flash and is_flash_attn_2_available()
    vision = "flash_attention_2" if has_flash else "sdpa"
    text = "flash_attention_2" if has_flash and prompt_order == "text_first" else "sdpa"
    missing = "; flash-attn is not installed (or does not fit this GPU)" if wants_flash and not has_flash else ""
    say_once(f"attention: {vision} in the vision tower, {text} in the language model{missing}")
    return {"vision_config": vision, "text_config": text}


def _architecture(name: str, *, weights: bool) -> Any:
    """The config of a LLaVA-OneVision with Qwen2 (Any: transformers types its sub-configs as dicts)."""
    architecture: Any = architecture_of(name, weights=weights)
    if architecture.model_type != "llava_onevision" or architecture.text_config.model_type != "qwen2":
        raise ValueError(
            f"cognition.weights={name}: expected the weights of a LLaVA-OneVision with Qwen2, got a "
            f"{architecture.model_type}; take e.g. llava-hf/llava-onevision-qwen2-7b-ov-hf or another backend."
        )
    return architecture
