"""ViLT: one encoder over the words and the patches of an image, without a vision tower (paper, Table 3).

I images, P phrases, L tokens of a phrase, N patches of the largest image, D width.

Words and patches read each other in every layer, so the image features depend on the phrase and everything runs once per
phrase. Images keep their aspect: the shorter side becomes the image processor's size, a patch is 32 x 32 px, and each
image has its own grid of patches, resampled to `cognition.grid` rows and columns at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ViltConfig, ViltImageProcessor, ViltModel

from deris_llm.config.schema import ViltCognition
from deris_llm.models.cognition.base import TYPICAL_SIZE, PlannedInputs
from deris_llm.models.cognition.maps import resampled_maps
from deris_llm.models.cognition.prompts import (
    PhraseTokenizer,
    check_max_phrase_tokens,
    encoder_inputs,
    load_phrase_tokenizer,
    planned_phrases,
    raised_messages,
)
from deris_llm.models.cognition.transformers_backend import BERT_LORA_PATHS, TransformersBackend, additive_mask
from deris_llm.models.pretrained import load_image_processor
from deris_llm.structures import CognitionFeatures, CognitionInputs

LONGEST_ASPECT = 1333 / 800  # the image processor reduces an image whose longer side would be longer than this


class ViltProcessor:
    """Resizes images with their aspect and tokenizes phrases."""

    def __init__(self, phrases: PhraseTokenizer, image_processor: ViltImageProcessor, *, patch_size: int) -> None:
        self.phrases = phrases
        self.image_processor = image_processor
        self.patch_size = patch_size  # px

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """See `CognitionProcessor`; `pixel_values` is padded at the right and the bottom.

        Raises:
            ValueError: an image is too thin.
        """
        for image in images:
            self._check_aspect(image.height, image.width)
        pixels = self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")
        is_image = pixels["pixel_mask"]
        sizes = torch.stack([is_image[:, :, 0].sum(dim=1), is_image[:, 0].sum(dim=1)], dim=1)
        grids = tuple((rows, columns) for rows, columns in (sizes // self.patch_size).tolist())
        return self.phrases.inputs(phrases, image_index, pixels["pixel_values"], grids)

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """See `InputChecker`; images may be too thin."""
        too_thin = raised_messages(range(len(sizes)), lambda i: self._check_aspect(*sizes[i]))
        return self.phrases.refused(phrases) | too_thin

    def _check_aspect(self, height: int, width: int) -> None:
        shorter = self.image_processor.size["shortest_edge"]
        reduced = int(LONGEST_ASPECT * shorter) * min(height, width) / max(height, width)
        side = int(min(shorter, reduced) + 0.5)
        if side < self.image_processor.size_divisor:
            raise ValueError(
                f"image of {width} x {height} px: expected at least one patch ({self.image_processor.size_divisor} px) "
                f"along its shorter side, which would become {side} px, got a thinner image; crop or pad it, or drop it."
            )


class OrderedVilt(ViltModel):
    """`ViltModel` with every patch in its place, and without the pooler, which would take part in nothing.

    transformers' own patch embedding shuffles an image's patches, samples them if `max_image_length` is set, and fills
    the smaller images of a batch with random patches that nobody sees. Here all patches are taken in row-major order and
    nothing is random; what the encoder computes for each patch is the same.
    """

    def __init__(self, config: ViltConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.post_init()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, padding_mask: Tensor | None, pixel_values: Tensor, grids: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Encodes P phrases, each with its image.

        Args:
            input_ids: int64 (P, L).
            padding_mask: bool (P, L), True = padding; None = no phrase is padded.
            pixel_values: float (P, 3, h_px, w_px), padded at the right and the bottom.
            grids: P pairs: rows and columns of patches.

        Returns:
            float (P, L + 1 + N, D): text, class token, patches row-major, padding.
        """
        text = self.embeddings.text_embeddings(input_ids=input_ids)
        image = self._embedded(pixel_values, grids)
        kind = self.embeddings.token_type_embeddings
        image_kind = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        tokens = torch.cat([text + kind(torch.zeros_like(input_ids)), image + kind(image_kind)], dim=1)
        return self.layernorm(self.encoder(tokens, attention_mask=self._mask(padding_mask, tokens, grids))[0])

    def _mask(self, padding_mask: Tensor | None, tokens: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor | None:
        """Attention mask (P, 1, L + 1 + N, L + 1 + N); None if nothing is padded."""
        lengths = [1 + math.prod(grid) for grid in grids]
        if padding_mask is None and min(lengths) == max(lengths):
            return None
        is_image = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        is_image = is_image.to(tokens.device, non_blocking=True)
        is_text = (
            is_image.new_ones(len(lengths), tokens.shape[1] - max(lengths)) if padding_mask is None else ~padding_mask
        )
        is_token = torch.cat([is_text, is_image], dim=1)[:, None, None, :]
        return additive_mask(is_token.expand(-1, -1, tokens.shape[1], -1), tokens.dtype)

    def _embedded(self, pixel_values: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Class token and patches with their positions: float (P, 1 + N, D)."""
        table = self.embeddings.position_embeddings
        side = round((table.shape[1] - 1) ** 0.5)
        position_map = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        first = (self.embeddings.cls_token + table[:, :1])[0]
        tokens = []
        for patches, (rows, columns) in zip(self.embeddings.patch_embeddings(pixel_values), grids, strict=True):
            positions = F.interpolate(position_map, size=(rows, columns), mode="bilinear", align_corners=True)[0]
            placed = patches[:, :rows, :columns] + positions.to(patches.dtype)
            tokens.append(torch.cat([first, placed.flatten(1).T]))
        return self.embeddings.dropout(pad_sequence(tokens, batch_first=True))


class Vilt(TransformersBackend):
    """`OrderedVilt`. Image features depend on the phrase: P rows."""

    models = {"vilt": OrderedVilt}
    expects = "a ViLT"
    advice = "take e.g. dandelin/vilt-b32-mlm"
    lora_paths = BERT_LORA_PATHS
    left_in_file = (
        "pooler.dense.*", "mlm_score.*", "classifier.*", "rank_output.*",  # pooler and heads of the published ViLTs
        "embeddings.text_embeddings.token_type_ids",  # a constant
    )  # fmt: skip

    def __init__(self, model: PreTrainedModel, config: ViltCognition) -> None:
        super().__init__(model, config)
        self.grid = config.grid

    @classmethod
    def architecture(cls, config: ViltCognition, *, weights: bool) -> Any:
        architecture = super().architecture(config, weights=weights)
        check_max_phrase_tokens(config, architecture.max_position_embeddings)
        return architecture

    @classmethod
    def build_processor(cls, config: ViltCognition) -> ViltProcessor:
        architecture = cls.architecture(config, weights=True)
        phrases = load_phrase_tokenizer(config, architecture)
        image_processor = load_image_processor(ViltImageProcessor, config.weights)
        patch_size = _side(architecture.patch_size)
        if not image_processor.size_divisor or image_processor.size_divisor % patch_size:
            raise ValueError(
                f"cognition.weights={config.weights}: expected an image processor whose size_divisor is a multiple of the "
                f"model's patches of {patch_size} px, got {image_processor.size_divisor}; take preprocessor_config.json "
                "and model from the same folder."
            )
        return ViltProcessor(phrases, image_processor, patch_size=patch_size)

    @classmethod
    def plan_inputs(cls, config: ViltCognition, phrase: str, image_index: Sequence[int]) -> PlannedInputs:
        """See `CognitionBackend`; the length of the phrase is estimated, its tokenizer may be absent."""
        architecture = cls.architecture(config, weights=False)
        patch_size = _side(architecture.patch_size)
        rows = _side(architecture.image_size) // patch_size
        columns = rows * TYPICAL_SIZE[1] // TYPICAL_SIZE[0]
        num_images = max(image_index) + 1
        pixel_values = torch.empty(num_images, 3, rows * patch_size, columns * patch_size, device="meta")
        ids = planned_phrases(config, phrase, image_index)
        inputs = encoder_inputs(ids, 0, image_index, pixel_values, ((rows, columns),) * num_images)
        return PlannedInputs(inputs, len(ids[0]) + 1 + rows * columns, shared_tokens=0)

    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        grids = [inputs.image_grids[image] for image in inputs.phrase_images]
        pixel_values = inputs.pixel_values[image_index]
        with self.grad_if_trained():
            padding_mask = inputs.token_padding_mask if inputs.has_padding else None
            hidden = self.model(inputs.input_ids, padding_mask, pixel_values, grids)
        text_end = inputs.input_ids.shape[1]
        maps = [row[: math.prod(grid)] for row, grid in zip(hidden[:, text_end + 1 :], grids, strict=True)]
        return CognitionFeatures(
            image_feats=resampled_maps(maps, grids, self.grid),
            image_feats_index=torch.arange(len(image_index), device=image_index.device),
            text_feats=hidden[:, :text_end],
            text_padding_mask=inputs.token_padding_mask,
            cls_feat=hidden[:, 0],
        )


def _side(size: int | list[int] | tuple[int, int]) -> int:
    """The side of a square that transformers writes as one number or two."""
    return size if isinstance(size, int) else size[0]
