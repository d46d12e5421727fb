"""Causal language models that read an image and a phrase in one prompt; the phrases of an image share what precedes them.

I images, P phrases, L tokens of a prompt, R rows of T tokens, D width.

With the image first, its hidden states do not depend on the phrase. Rows `[prefix | phrase 1 | phrase 2 | ... | padding]`
therefore run template and image once per image instead of once per phrase: with 729 image tokens and seven phrases of 30
tokens the model reads 5.7 times fewer tokens. Each phrase sees the prefix and itself, at the positions that it has alone,
so the result equals separate runs up to rounding, in training too.

Rows are laid out on the host when the batch is made, so that `forward` never waits for the device.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from deris_llm.config.schema import LanguageModelCognition
from deris_llm.models.cognition.base import PlannedInputs, say_once
from deris_llm.models.cognition.maps import resampled_maps
from deris_llm.models.cognition.prompts import padded
from deris_llm.models.cognition.transformers_backend import TransformersBackend, additive_mask
from deris_llm.structures import CognitionFeatures, CognitionInputs, TokenRows

PLANNED_TEXT_TOKENS = 30  # of template and phrase, where no tokenizer is at hand


class VisionTokens(NamedTuple):
    """Output of a vision tower."""

    tokens: Sequence[Tensor]  # per image float (n, D), row-major, top row first
    deepstack: Sequence[Sequence[Tensor]] = ()  # the same for each early layer of the language model (Qwen3-VL)


class CausalBackend(TransformersBackend):
    """A frozen vision tower and a causal language model that trains; no lm_head, no generation.

    The hidden states at the image tokens are the image features, those at the phrase and the tokens after it the text
    features.

    Attributes:
        grid: rows and columns that the image features are resampled to; None = all images have the same grid, which stays.
    """

    trained_part = "language_model"
    grid: int | None = None

    def __init__(self, model: PreTrainedModel, config: LanguageModelCognition) -> None:
        """Sets what trains and whether phrases share their image; see `TransformersBackend`."""
        super().__init__(model, config)
        self.shares_images = config.prompt_order == "image_first"

    @abc.abstractmethod
    def see(self, inputs: CognitionInputs) -> VisionTokens:
        """Runs the vision tower and its projector, once per image."""

    @classmethod
    @abc.abstractmethod
    def planned_images(
        cls, config: LanguageModelCognition, architecture: Any, num_images: int
    ) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Pixel values on `meta` and token grids of typical images."""

    @classmethod
    def attention(cls, config: LanguageModelCognition, dtype: torch.dtype) -> dict[str, str]:
        return attention_kernels(dtype, prompt_order=config.prompt_order)

    @classmethod
    def plan_inputs(cls, config: LanguageModelCognition, phrase: str, image_index: Sequence[int]) -> PlannedInputs:
        """See `CognitionBackend`; for weights that are not on disk, the number of text tokens is estimated."""
        if config.weights.startswith("builtin:") or Path(config.weights).is_dir():
            return super().plan_inputs(config, phrase, image_index)
        architecture = cls.architecture(config, weights=False)
        pixel_values, grids = cls.planned_images(config, architecture, max(image_index) + 1)
        rows, columns = grids[0]
        half, image = [0] * (PLANNED_TEXT_TOKENS // 2), [architecture.image_token_id] * (rows * columns)
        prompt = ([*half, *image, *half], [False] * len([*half, *image]) + [True] * len(half))
        is_shared = config.prompt_order == "image_first"
        inputs = with_rows(
            padded([prompt] * len(image_index), 0, image_index, pixel_values, grids),
            image_token_id=architecture.image_token_id,
            is_shared=is_shared,
        )
        return PlannedInputs(inputs, len(prompt[0]), shared_tokens=len(half) + len(image) if is_shared else 0)

    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        rows = inputs.rows
        assert rows is not None, "the processor lays out the rows, see with_rows"
        with torch.no_grad():
            vision = self.see(inputs)
        images = range(len(inputs.image_grids)) if self.shares_images else inputs.phrase_images  # of the rows
        with self.grad_if_trained():
            hidden = self._hidden(inputs.input_ids.flatten()[rows.source], rows, vision, images).flatten(0, 1)
        return CognitionFeatures(
            image_feats=self._maps(hidden[rows.image_places], [inputs.image_grids[image] for image in images]),
            image_feats_index=image_index if self.shares_images else torch.arange(len(images), device=hidden.device),
            text_feats=hidden[rows.text_places],
            text_padding_mask=rows.text_padding_mask,
            cls_feat=hidden[rows.last_places],
        )

    def _hidden(self, ids: Tensor, rows: TokenRows, vision: VisionTokens, images: Sequence[int]) -> Tensor:
        """Runs the language model over rows of tokens, each with the tokens of its image put in: (R, T) -> (R, T, D).

        The model's own `forward` would do that too, but it takes features that are already there only since transformers
        5.2x; earlier versions ignore them silently.
        """
        embeddings = self.model.get_input_embeddings()(ids)
        tokens, *deepstack = (
            torch.cat([level[image] for image in images]).to(embeddings.dtype)
            for level in (vision.tokens, *vision.deepstack)
        )
        embedded = embeddings.flatten(0, 1).index_copy(0, rows.image_places, tokens).view_as(embeddings)
        more = {}
        if deepstack:
            is_image = torch.zeros_like(ids, dtype=torch.bool).flatten().index_fill(0, rows.image_places, value=True)
            more = {"visual_pos_masks": is_image.view_as(ids), "deepstack_visual_embeds": deepstack}
        return read_rows(self.model.language_model, embedded, rows, **more)

    def _maps(self, tokens: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Hidden states at all image tokens (n, D) -> image features (R, D, h, w)."""
        if self.grid is None:
            return tokens.unflatten(0, (len(grids), *grids[0])).permute(0, 3, 1, 2)
        return resampled_maps(tokens.split([rows * columns for rows, columns in grids]), grids, self.grid)


def read_rows(language_model: nn.Module, embeddings: Tensor, rows: TokenRows, **more: Any) -> Tensor:
    """Runs a causal language model over rows of tokens.

    Args:
        language_model: transformers'; FlashAttention 2 can read rows that nothing is packed in.
        embeddings: float (R, T, D).
        rows: their layout.
        more: arguments for the language model.

    Returns:
        hidden states, float (R, T, D); those of padding are meaningless.
    """
    positions = rows.positions if rows.positions.ndim == 2 else rows.positions.permute(2, 0, 1)
    return language_model(
        inputs_embeds=embeddings,
        attention_mask=_attention_mask(language_model, rows, embeddings.dtype),
        position_ids=positions,
        use_cache=False,
        **more,
    ).last_hidden_state


def _attention_mask(language_model: nn.Module, rows: TokenRows, dtype: torch.dtype) -> Tensor:
    if getattr(language_model.config, "_attn_implementation", None) == "flash_attention_2":
        return (rows.owner >= 0).long()  # it takes padding alone
    return additive_mask(is_visible(rows)[:, None], dtype)


def is_visible(rows: TokenRows) -> Tensor:
    """Which token sees which: bool (R, T, T), True = the query (second axis) sees the key (third axis)."""
    owner, length = rows.owner, rows.owner.shape[1]
    is_earlier = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
    # Padding sees padding: a softmax over nothing would be NaN.
    return is_earlier & ((owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None]))


def with_rows(
    inputs: CognitionInputs,
    *,
    image_token_id: int,
    is_shared: bool,
    has_multimodal_positions: bool = False,
) -> CognitionInputs:
    """Lays out the rows that a causal language model reads.

    Args:
        inputs: from `padded`, with the grid of every image.
        image_token_id: placeholder of the image's tokens in `input_ids`.
        is_shared: the image comes first, and the phrases of an image share it and what precedes it.
        has_multimodal_positions: positions are (time, row, column), as Qwen-VL counts them.

    Raises:
        ValueError: an image without a phrase.
    """
    ids, grids = inputs.input_ids.numpy(), inputs.image_grids
    lengths, index, column = np.array(inputs.prompt_lengths), np.array(inputs.phrase_images), np.arange(ids.shape[1])
    lacking = sorted(set(range(len(grids))) - set(inputs.phrase_images))
    if lacking:
        raise ValueError(
            f"image_index: expected every one of {len(grids)} images to have a phrase, got none for image {lacking[0]} of the "
            "batch; leave that image out."
        )
    is_valid = column < lengths[:, None]
    is_image = (ids == image_token_id) & is_valid
    if has_multimodal_positions:
        firsts = is_image.argmax(axis=1)
        positions = np.stack(
            [multimodal_positions(ids.shape[1], first, grids[i]) for first, i in zip(firsts, index, strict=True)]
        )
    else:
        positions = np.broadcast_to(column, ids.shape)
    row = index if is_shared else np.arange(len(ids))
    prefix = (column * is_image).max(axis=1) + 1 if is_shared else lengths  # length of what the whole row reads
    start, width = _starts(row, lengths - prefix, prefix.max())
    is_prefix = column < prefix[:, None]
    place = row[:, None] * width + np.where(is_prefix, column, start[:, None] + column - prefix[:, None])
    owner = np.where(is_prefix, 0, np.arange(1, len(ids) + 1)[:, None])
    size = (int(row[-1]) + 1, width)
    first_of_row = np.searchsorted(row, np.arange(size[0]))

    def laid_out(values: np.ndarray, fill: int) -> Tensor:
        rows = np.full((size[0] * size[1], *values.shape[2:]), fill, dtype=np.int64)
        rows[place[is_valid]] = values[is_valid]  # a prefix is written once per phrase, each time the same
        return torch.from_numpy(rows.reshape(*size, *values.shape[2:]))

    last = place[np.arange(len(ids)), lengths - 1]
    text_places, text_padding_mask = _left_aligned(place, inputs.text_feature_mask.numpy(), last)
    rows = TokenRows(
        source=laid_out(np.arange(ids.size).reshape(ids.shape), 0),
        positions=laid_out(positions, 0),
        owner=laid_out(owner, -1),
        image_places=torch.from_numpy(place[first_of_row][is_image[first_of_row]]),
        text_places=torch.from_numpy(text_places),
        text_padding_mask=torch.from_numpy(text_padding_mask),
        last_places=torch.from_numpy(last),
    )
    return replace(inputs, rows=rows)


def _starts(row: np.ndarray, lengths: np.ndarray, prefix: int) -> tuple[np.ndarray, int]:
    """Column at which each phrase's own tokens start in its row, behind the longest prefix, and the rows' length."""
    ends, totals = lengths.cumsum(), np.bincount(row, weights=lengths).astype(np.int64)
    before = totals.cumsum() - totals
    return prefix + ends - lengths - before[row], int(prefix + totals.max())


def _left_aligned(place: np.ndarray, chosen: np.ndarray, fill: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of chosen tokens, moved to the left in their order, and the padding mask: (P, most chosen) each."""
    counts = chosen.sum(axis=1)
    order = (~chosen).argsort(axis=1, kind="stable")[:, : counts.max()]
    is_padding = np.arange(counts.max()) >= counts[:, None]
    return np.where(is_padding, fill[:, None], np.take_along_axis(place, order, axis=1)), is_padding


def multimodal_positions(length: int, first: int, grid: tuple[int, int]) -> np.ndarray:
    """Positions (time, row, column) of a prompt with one image, as Qwen2-VL to Qwen3-VL count them: int64 (length, 3).

    An image token has the image's place plus its row and column; text goes on behind the longer side.

    Args:
        length: of the prompt.
        first: place of the first image token.
        grid: rows and columns of image tokens.
    """
    rows, columns = grid
    positions = np.repeat(np.arange(length)[:, None], 3, axis=1)
    end = first + rows * columns
    positions[first:end, 0] = first
    positions[first:end, 1] = first + np.repeat(np.arange(rows), columns)
    positions[first:end, 2] = first + np.tile(np.arange(columns), rows)
    positions[end:] += max(rows, columns) - rows * columns
    return positions


def attention_kernels(dtype: torch.dtype, *, prompt_order: Literal["image_first", "text_first"]) -> dict[str, str]:
    """Chooses FlashAttention 2 where it is installed and can be used, else PyTorch's SDPA, and logs the choice once.

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
