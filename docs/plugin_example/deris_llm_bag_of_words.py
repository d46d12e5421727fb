"""A cognition backend in its own package: every word has a learned vector; the image is not used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from deris_llm.config import CognitionConfig
from deris_llm.models.cognition import CognitionBackend
from deris_llm.structures import CognitionFeatures, CognitionInputs

PADDING, UNKNOWN = 0, 1


class WordProcessor:
    """Turns phrases into word numbers; all words that are not in the list share one number."""

    def __init__(self, words: Sequence[str], max_phrase_tokens: int) -> None:
        self.numbers = {word: number for number, word in enumerate(words, start=UNKNOWN + 1)}
        self.max_phrase_tokens = max_phrase_tokens

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """See `deris_llm.models.cognition.CognitionProcessor`."""
        split = [phrase.lower().split()[: self.max_phrase_tokens] for phrase in phrases]
        if not all(split):
            raise ValueError(f"phrase {phrases[split.index([])]!r}: expected some words, got none; correct or drop it.")
        ids = torch.full((len(split), max(map(len, split))), PADDING)
        for row, words in enumerate(split):
            ids[row, : len(words)] = torch.tensor([self.numbers.get(word, UNKNOWN) for word in words])
        return CognitionInputs(torch.zeros(len(images), 3, 0, 0), ids, ids == PADDING, ids != PADDING)


class BagOfWords(CognitionBackend):
    """Text features are the vectors of the words in reading order; `cls_feat` is their mean."""

    def __init__(self, num_words: int, width: int) -> None:
        super().__init__()
        self.feature_dim = width
        self.table = nn.Embedding(num_words, width)

    @classmethod
    def build(cls, config: CognitionConfig, *, weights: bool, dtype: torch.dtype) -> Self:
        """Needs `cognition.tuning=full`, because no layer could get LoRA. The table starts from random values."""
        if config.tuning != "full":
            raise ValueError(f"cognition.tuning: expected full for bag_of_words, got {config.tuning}; set it to full.")
        word_list = _word_list(config)
        return cls(UNKNOWN + 1 + len(word_list["words"]), word_list["width"]).to(dtype)

    @classmethod
    def build_processor(cls, config: CognitionConfig) -> WordProcessor:
        """Reads the same list of words."""
        return WordProcessor(_word_list(config)["words"], config.max_phrase_tokens)

    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        """Returns a map of zeros as image features."""
        text = self.table(inputs.input_ids)
        is_word = ~inputs.token_padding_mask[..., None]
        return CognitionFeatures(
            image_feats=text.new_zeros(len(inputs.pixel_values), self.feature_dim, 1, 1),
            image_feats_index=image_index,
            text_feats=text,
            text_padding_mask=inputs.token_padding_mask,
            cls_feat=(text * is_word).sum(dim=1) / is_word.sum(dim=1),
        )

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Does nothing: a table has no activations to recompute."""


def _word_list(config: CognitionConfig) -> dict[str, Any]:
    return json.loads((Path(config.weights) / "config.json").read_text(encoding="utf-8"))
