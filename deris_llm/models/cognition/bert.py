"""BERT: the text alone, without a look at the image (the first row of the paper's Table 3).

The paper says no more about that row than the names of the models. BERT has no image features, so F_c is a map of zeros
(I, D, 1, 1) without parameters: F_mask is then a convolution of F_p and, through the biases of the projections that read
F_c, the same constant everywhere. The phrase and the image meet in the loopback only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BertConfig, BertModel

from deris_llm.config.schema import BertCognition
from deris_llm.models.cognition.base import PlannedInputs
from deris_llm.models.cognition.prompts import (
    PhraseTokenizer,
    check_max_phrase_tokens,
    encoder_inputs,
    load_phrase_tokenizer,
    planned_phrases,
)
from deris_llm.models.cognition.transformers_backend import (
    BERT_LORA_PATHS,
    TransformersBackend,
    padding_attention_mask,
)
from deris_llm.structures import CognitionFeatures, CognitionInputs


class BertProcessor:
    """Tokenizes phrases; of the images only their number is kept."""

    def __init__(self, phrases: PhraseTokenizer) -> None:
        self.phrases = phrases

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """See `CognitionProcessor`; `pixel_values` is (I, 3, 0, 0)."""
        return self.phrases.inputs(phrases, image_index, torch.zeros(len(images), 3, 0, 0))

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """See `InputChecker`."""
        return self.phrases.refused(phrases)


class BertWithoutPooler(BertModel):
    """transformers' `BertModel` without the pooler, whose parameters would take part in nothing."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)


class Bert(TransformersBackend):
    """`BertWithoutPooler`."""

    models = {"bert": BertWithoutPooler}
    expects = "a BERT"
    advice = "take e.g. google-bert/bert-base-uncased"
    lora_paths = BERT_LORA_PATHS
    left_in_file = (
        "pooler.dense.*",
        "cls.predictions.*",
        "cls.seq_relationship.*",
    )  # pooler, heads of its pre-training

    @classmethod
    def architecture(cls, config: BertCognition, *, weights: bool) -> Any:
        architecture = super().architecture(config, weights=weights)
        check_max_phrase_tokens(config, architecture.max_position_embeddings)
        return architecture

    @classmethod
    def build_processor(cls, config: BertCognition) -> BertProcessor:
        return BertProcessor(load_phrase_tokenizer(config, cls.architecture(config, weights=True)))

    @classmethod
    def plan_inputs(cls, config: BertCognition, phrase: str, image_index: Sequence[int]) -> PlannedInputs:
        """See `CognitionBackend`; the length of the phrase is estimated, its tokenizer may be absent."""
        cls.architecture(config, weights=False)
        pixel_values = torch.empty(max(image_index) + 1, 3, 0, 0, device="meta")
        inputs = encoder_inputs(planned_phrases(config, phrase, image_index), 0, image_index, pixel_values)
        return PlannedInputs(inputs, tokens_per_phrase=inputs.input_ids.shape[1], shared_tokens=0)

    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        """See `CognitionBackend`; outside training, phrases of the same text are encoded once, as those of a video's frames."""
        with self.grad_if_trained():
            hidden = self._hidden(inputs)
        return CognitionFeatures(
            image_feats=hidden.new_zeros(len(inputs.pixel_values), self.feature_dim, 1, 1),
            image_feats_index=image_index,
            text_feats=hidden,
            text_padding_mask=inputs.token_padding_mask,
            cls_feat=hidden[:, 0],
        )

    def _hidden(self, inputs: CognitionInputs) -> Tensor:
        """Returns hidden states (P, L, D)."""
        ids, mask = inputs.input_ids, padding_attention_mask(inputs, self.model.dtype)
        place = {row: number for number, row in enumerate(dict.fromkeys(inputs.same_as))}
        if self.training or len(place) == len(inputs.same_as):  # in training, dropout differs between equal phrases
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        first = torch.tensor(list(place), device=ids.device)
        again = torch.tensor([place[row] for row in inputs.same_as], device=ids.device)
        mask = None if mask is None else mask[first]
        return self.model(input_ids=ids[first], attention_mask=mask).last_hidden_state[again]
