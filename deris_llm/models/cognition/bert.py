"""BERT: the text alone, without a look at the picture (the first row of the paper's Table 3).

I images, P phrases, L tokens of a phrase, D width.

The paper says no more of that row than the names of the models. BERT has no image features, so F_c is a map of zeros
(I, D, 1, 1) without parameters: F_mask is then a convolution of F_p and, through the biases of the projections that read
F_c, the same constant everywhere. What the phrase means is compared with the picture in the loopback only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import BertConfig, BertModel

from deris_llm.config import CognitionConfig
from deris_llm.models.cognition.base import CognitionBackend, PlannedInputs
from deris_llm.models.cognition.lora import BERT_PATHS, add_lora
from deris_llm.models.cognition.prompts import (
    PhraseTokenizer,
    check_max_phrase_tokens,
    load_phrase_tokenizer,
    padded,
    planned_phrases,
)
from deris_llm.models.pretrained import architecture_of, check_names, load_pretrained
from deris_llm.structures import CognitionFeatures, CognitionInputs

_LEFT_IN_FILE = (
    "pooler.dense.*",
    "cls.predictions.*",
    "cls.seq_relationship.*",
)  # pooler and heads of its pre-training


class BertProcessor:
    """Phrases cut into word pieces; of the pictures only their number is kept."""

    def __init__(self, phrases: PhraseTokenizer) -> None:
        self.phrases = phrases

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """See `CognitionProcessor`. `pixel_values` is (I, 3, 0, 0)."""
        input_ids, padding_mask, text_feature_mask = padded(
            [self.phrases.encode(phrase) for phrase in phrases], self.phrases.pad_token_id
        )
        return CognitionInputs(torch.zeros(len(images), 3, 0, 0), input_ids, padding_mask, text_feature_mask)

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """See `InputChecker`."""
        return self.phrases.refused(phrases)


class Bert(CognitionBackend):
    """transformers' `BertModel` without its pooler, trained whole or with LoRA."""

    def __init__(
        self,
        model: BertModel,
        *,
        tuning: Literal["lora", "full"],
        lora_r: int,
        lora_alpha: int,
        lora_dropout: float,
        lora_targets: Sequence[str],
    ) -> None:
        """Sets what trains.

        Args:
            model: loaded, or on the meta device.
            tuning: full: all of it, LoRA options are ignored; lora: nothing of it but LoRA.
            lora_r: rank; 0 = none, the model stays frozen.
            lora_alpha: the update is scaled by alpha / r.
            lora_dropout: before the update.
            lora_targets: names of `BERT_PATHS`.
        """
        super().__init__()
        self.feature_dim = model.config.hidden_size
        self.is_trained = tuning == "full" or lora_r > 0
        self.model = model.requires_grad_(tuning == "full")
        if tuning == "lora" and lora_r > 0:
            add_lora(
                model,
                lora_targets,
                r=lora_r,
                alpha=lora_alpha,
                dropout=lora_dropout,
                dtype=model.dtype,
                paths=BERT_PATHS,
            )
        self.train(self.training)

    @classmethod
    def build(cls, config: CognitionConfig, *, weights: bool, dtype: torch.dtype) -> Self:
        """See `CognitionBackend`."""
        model = load_pretrained(
            _BertWithoutPooler,
            config.weights,
            _architecture(config, weights=weights),
            weights=weights,
            dtype=dtype,
            left_in_file=_LEFT_IN_FILE,
        )
        return cls(
            model,
            tuning=config.tuning,
            lora_r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            lora_targets=config.lora.targets,
        )

    @classmethod
    def check_weights(cls, config: CognitionConfig) -> None:
        """See `CognitionBackend`."""
        architecture = _architecture(config, weights=True)
        check_names(_BertWithoutPooler, config.weights, architecture, left_in_file=_LEFT_IN_FILE)

    @classmethod
    def build_processor(cls, config: CognitionConfig) -> BertProcessor:
        """See `CognitionBackend`."""
        architecture = _architecture(config, weights=True)
        return BertProcessor(
            load_phrase_tokenizer(
                config, vocab_size=architecture.vocab_size, num_positions=architecture.max_position_embeddings
            )
        )

    @classmethod
    def plan_inputs(cls, config: CognitionConfig, phrase: str, image_index: Sequence[int]) -> PlannedInputs:
        """See `CognitionBackend`; the length of the phrase is estimated, the tokenizer may be absent."""
        _architecture(config, weights=False)
        input_ids, padding_mask = planned_phrases(config, phrase, len(image_index))
        pixels = torch.empty(max(image_index) + 1, 3, 0, 0, device="meta")
        inputs = CognitionInputs(pixels, input_ids, padding_mask, ~padding_mask)
        return PlannedInputs(inputs, tokens_per_phrase=input_ids.shape[1], shared_tokens=0)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        """Sets the mode; a frozen model stays in eval, without dropout."""
        super().train(mode)
        self.model.train(mode and self.is_trained)
        return self

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes the layers in the backward pass."""
        older_name = self.model.gradient_checkpointing_enable  # before transformers 5.2x
        enable = getattr(self.model, "activation_checkpointing_enable", older_name)
        enable(activation_checkpointing_kwargs or {"use_reentrant": False})

    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        """See `CognitionBackend`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
            hidden = self.model(
                input_ids=inputs.input_ids, attention_mask=(~inputs.token_padding_mask).long()
            ).last_hidden_state
        return CognitionFeatures(
            image_feats=hidden.new_zeros(len(inputs.pixel_values), self.feature_dim, 1, 1),
            image_feats_index=image_index,
            text_feats=hidden,
            text_padding_mask=inputs.token_padding_mask,
            cls_feat=hidden[:, 0],
        )


class _BertWithoutPooler(BertModel):
    """The pooler would be a parameter that takes part in nothing."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)


def _architecture(config: CognitionConfig, *, weights: bool) -> BertConfig:
    architecture = architecture_of(config.weights, weights=weights)
    if not isinstance(architecture, BertConfig) or architecture.model_type != "bert":
        raise ValueError(
            f"cognition.weights={config.weights}: expected the weights of a BERT, got a {architecture.model_type}; take "
            "e.g. google-bert/bert-base-uncased or another cognition.backend."
        )
    check_max_phrase_tokens(config, architecture.max_position_embeddings)
    return architecture
