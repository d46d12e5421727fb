"""ViLT: one encoder over the words and the patches of a picture, without a vision tower (paper, Table 3).

I images, P phrases, T tokens of a phrase, N patches of the picture with most, h w rows and columns of a picture's
patches, D width.

Words and patches read each other in every layer, so the image features depend on the phrase and everything runs once per
phrase. Pictures keep their aspect: the shorter side becomes the image processor's size, a patch is 32 x 32 px, and each
picture has its own grid of patches, resampled to `cognition.grid` rows and columns at the end.

transformers' own patch embedding shuffles a picture's patches, samples of them where `max_image_length` is set, and fills
shorter pictures of a batch with random patches that nobody sees. Here all patches are taken in row-major order and nothing
is random; what the encoder computes of each patch is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import ViltConfig, ViltImageProcessor, ViltModel
from transformers.models.vilt.modeling_vilt import ViltEmbeddings

from deris_llm.config import ViltCognition
from deris_llm.models.cognition.base import CognitionBackend, PlannedInputs
from deris_llm.models.cognition.lora import BERT_PATHS, add_lora
from deris_llm.models.cognition.maps import resampled_maps
from deris_llm.models.cognition.prompts import (
    PhraseTokenizer,
    check_max_phrase_tokens,
    load_phrase_tokenizer,
    padded,
    planned_phrases,
    raised_messages,
)
from deris_llm.models.pretrained import architecture_of, check_names, load_image_processor, load_pretrained
from deris_llm.structures import CognitionFeatures, CognitionInputs

LONGEST_ASPECT = 1333 / 800  # the image processor reduces a picture whose longer side would be longer than this
PLANNED_ASPECT = 640 / 480  # a usual picture of COCO
_LEFT_IN_FILE = (  # globs: the pooler and the heads of the published ViLTs
    "pooler.dense.*", "mlm_score.*", "classifier.*", "rank_output.*",
    "embeddings.text_embeddings.token_type_ids",  # a constant
)  # fmt: skip


class ViltProcessor:
    """Pictures resized with their aspect; phrases cut into word pieces."""

    def __init__(self, phrases: PhraseTokenizer, image_processor: ViltImageProcessor, *, patch_size: int) -> None:
        """Keeps what is needed to prepare batches.

        Args:
            phrases: of the weights.
            image_processor: of the weights.
            patch_size: px, side of a patch.
        """
        self.phrases = phrases
        self.image_processor = image_processor
        self.patch_size = patch_size

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """See `CognitionProcessor`. `pixel_values` is padded at the right and the bottom; `image_grid` has the patches.

        Raises:
            ValueError: a picture is too thin.
        """
        for image in images:
            self._check_aspect(image.height, image.width)
        pixels = self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")
        is_picture = pixels["pixel_mask"]
        sizes = torch.stack([is_picture[:, :, 0].sum(dim=1), is_picture[:, 0].sum(dim=1)], dim=1)
        input_ids, padding_mask, text_feature_mask = padded(
            [self.phrases.encode(phrase) for phrase in phrases], self.phrases.pad_token_id
        )
        return CognitionInputs(
            pixel_values=pixels["pixel_values"],
            input_ids=input_ids,
            token_padding_mask=padding_mask,
            text_feature_mask=text_feature_mask,
            image_grid=sizes // self.patch_size,
        )

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """See `InputChecker`; pictures may be too thin."""
        return self.phrases.refused(phrases) | raised_messages(
            range(len(sizes)), lambda i: self._check_aspect(*sizes[i])
        )

    def _check_aspect(self, height: int, width: int) -> None:
        shorter = self.image_processor.size["shortest_edge"]
        reduced = int(LONGEST_ASPECT * shorter) * min(height, width) / max(height, width)
        side = int(min(shorter, reduced) + 0.5)
        if side < self.image_processor.size_divisor:
            raise ValueError(
                f"picture of {width} x {height} px: expected at least one patch "
                f"({self.image_processor.size_divisor} px) along its shorter side, which would become {side} px, got a "
                "thinner picture; crop or pad it, or drop it."
            )


class Vilt(CognitionBackend):
    """`OrderedVilt`, trained whole or with LoRA."""

    def __init__(
        self,
        model: ViltModel,
        *,
        grid: int,
        tuning: Literal["lora", "full"],
        lora_r: int,
        lora_alpha: int,
        lora_dropout: float,
        lora_targets: Sequence[str],
    ) -> None:
        """Sets what trains.

        Args:
            model: loaded, or on the meta device.
            grid: rows and columns of the image features.
            tuning: full: all of it, LoRA options are ignored; lora: nothing of it but LoRA.
            lora_r: rank; 0 = none, the model stays frozen.
            lora_alpha: the update is scaled by alpha / r.
            lora_dropout: before the update.
            lora_targets: names of `BERT_PATHS`.
        """
        super().__init__()
        self.feature_dim = model.config.hidden_size
        self.grid = grid
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
    def build(cls, config: ViltCognition, *, weights: bool, dtype: torch.dtype) -> Self:
        """See `CognitionBackend`."""
        model = load_pretrained(
            OrderedVilt,
            config.weights,
            _architecture(config, weights=weights),
            weights=weights,
            dtype=dtype,
            left_in_file=_LEFT_IN_FILE,
        )
        return cls(
            model,
            grid=config.grid,
            tuning=config.tuning,
            lora_r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            lora_targets=config.lora.targets,
        )

    @classmethod
    def check_weights(cls, config: ViltCognition) -> None:
        """See `CognitionBackend`."""
        architecture = _architecture(config, weights=True)
        check_names(OrderedVilt, config.weights, architecture, left_in_file=_LEFT_IN_FILE)

    @classmethod
    def build_processor(cls, config: ViltCognition) -> ViltProcessor:
        """See `CognitionBackend`."""
        architecture = _architecture(config, weights=True)
        phrases = load_phrase_tokenizer(
            config, vocab_size=architecture.vocab_size, num_positions=architecture.max_position_embeddings
        )
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
        """See `CognitionBackend`; the phrase's length is estimated, the picture is a usual one of COCO."""
        architecture = _architecture(config, weights=False)
        patch_size = _side(architecture.patch_size)
        rows = _side(architecture.image_size) // patch_size
        columns = int(rows * PLANNED_ASPECT)
        num_images = max(image_index) + 1
        input_ids, padding_mask = planned_phrases(config, phrase, len(image_index))
        inputs = CognitionInputs(
            pixel_values=torch.empty(num_images, 3, rows * patch_size, columns * patch_size, device="meta"),
            input_ids=input_ids,
            token_padding_mask=padding_mask,
            text_feature_mask=~padding_mask,
            image_grid=torch.tensor([[rows, columns]] * num_images),
        )
        return PlannedInputs(inputs, input_ids.shape[1] + 1 + rows * columns, shared_tokens=0)

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
        """See `CognitionBackend`. Image features depend on the phrase: P rows."""
        assert inputs.image_grid is not None, "a ViltProcessor gives every picture's grid"
        grid_P2 = inputs.image_grid[image_index]
        height, width = inputs.pixel_values.shape[-2:]
        patch_size = _side(self.model.config.patch_size)
        is_picture_PHW = _corner_mask(grid_P2 * patch_size, height, width)
        grids, num_text = grid_P2.tolist(), inputs.input_ids.shape[1]
        num_patches = grid_P2.prod(dim=1)
        is_patch = (
            torch.arange(max(rows * columns for rows, columns in grids), device=grid_P2.device) < num_patches[:, None]
        )
        patches = is_patch.nonzero(as_tuple=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
            hidden = self.model(
                input_ids=inputs.input_ids,
                attention_mask=(~inputs.token_padding_mask).long(),
                pixel_values=inputs.pixel_values[image_index],
                pixel_mask=is_picture_PHW.long(),
            ).last_hidden_state
        return CognitionFeatures(
            image_feats=resampled_maps(hidden[:, num_text + 1 :][patches], grids, self.grid),
            image_feats_index=torch.arange(len(image_index), device=image_index.device),
            text_feats=hidden[:, :num_text],
            text_padding_mask=inputs.token_padding_mask,
            cls_feat=hidden[:, 0],
        )


class OrderedEmbeddings(ViltEmbeddings):
    """transformers' embeddings of words and patches, but every patch in its place."""

    def visual_embed(
        self, pixel_values: Tensor, pixel_mask: Tensor, max_image_length: int = -1
    ) -> tuple[Tensor, Tensor, None]:
        """Embeds class token and patches with their positions.

        Args:
            pixel_values: float (P, 3, h_px, w_px), padded at the right and the bottom.
            pixel_mask: int64 (P, h_px, w_px), 1 = picture, 0 = padding.
            max_image_length: not used: no patch is left out.

        Returns:
            float (P, 1 + N, D), patches row-major, and int64 (P, 1 + N), 0 = padding, which is at the end.
        """
        table = self.position_embeddings
        side = round((table.shape[1] - 1) ** 0.5)
        position_map = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        first = (self.cls_token + table[:, :1])[0]
        patches = self.patch_embeddings(pixel_values)
        stride = pixel_mask.shape[-1] // patches.shape[-1]
        is_patch = pixel_mask[:, ::stride, ::stride]
        grid = torch.stack([is_patch[:, :, 0].sum(dim=1), is_patch[:, 0].sum(dim=1)], dim=1)
        tokens = []
        for picture, (rows, columns) in zip(patches, grid.tolist(), strict=True):
            positions = F.interpolate(position_map, size=(rows, columns), mode="bilinear", align_corners=True)[0]
            placed = picture[:, :rows, :columns] + positions.to(picture.dtype)
            tokens.append(torch.cat([first, placed.flatten(1).T]))
        embedded = pad_sequence(tokens, batch_first=True)
        is_token = torch.arange(embedded.shape[1], device=grid.device) < 1 + grid.prod(dim=1, keepdim=True)
        return self.dropout(embedded), is_token.long(), None


class OrderedVilt(ViltModel):
    """`ViltModel` with `OrderedEmbeddings`, without the pooler, which would take part in nothing."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.embeddings = OrderedEmbeddings(config)
        self.post_init()


def _corner_mask(sizes: Tensor, height: int, width: int) -> Tensor:
    """True in the upper left (h, w) of `sizes` (P, 2): bool (P, height, width)."""
    is_row = torch.arange(height, device=sizes.device) < sizes[:, :1]
    is_column = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return is_row[:, :, None] & is_column[:, None, :]


def _architecture(config: ViltCognition, *, weights: bool) -> ViltConfig:
    architecture = architecture_of(config.weights, weights=weights)
    if not isinstance(architecture, ViltConfig):
        raise ValueError(
            f"cognition.weights={config.weights}: expected the weights of a ViLT, got a {architecture.model_type}; take "
            "e.g. dandelin/vilt-b32-mlm or another cognition.backend."
        )
    check_max_phrase_tokens(config, architecture.max_position_embeddings)
    return architecture


def _side(size: int | list[int] | tuple[int, int]) -> int:
    """The side of a square that transformers writes as one number or two."""
    return size if isinstance(size, int) else size[0]
