"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whichever the weights are, with LoRA in the language model or the latter whole.

I images, P phrases, L tokens of a prompt, S of the longest prefix, O of the longest own part, h w rows and columns of a
picture's image tokens, D width of the language model.

Pictures keep their aspect: each is resized to a number of pixels between `cognition.min_pixels` and
`cognition.max_pixels` and has its own grid of image tokens (a token is 28 x 28 px, of Qwen3-VL 32 x 32). The vision tower
and its mergers are frozen and run once per image. With the image first, the phrases of an image share its prefix
(`shared_prefix.py`), each at its own multimodal rotary positions.

The contract has one map size for a batch, so the map of every picture is resampled to `cognition.grid` rows and columns,
a fixed number: results do not depend on what shares the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from PIL import Image
from qwen_vl_utils import process_vision_info, smart_resize
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLModel,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
    Qwen3VLModel,
)

from deris_llm.config import QwenVlCognition
from deris_llm.models.cognition.base import CognitionBackend, PlannedInputs, TokenCount
from deris_llm.models.cognition.lora import add_lora
from deris_llm.models.cognition.maps import resampled_maps
from deris_llm.models.cognition.prompts import LeftAlignment, PromptTokenizer, padded, raised_messages
from deris_llm.models.cognition.qwen2_ov import IMAGE_TOKEN, PLANNED_TEXT_TOKENS, attention_kernels
from deris_llm.models.cognition.shared_prefix import check_prefix, first_phrases, pack_prompts
from deris_llm.models.pretrained import (
    architecture_of,
    check_names,
    load_image_processor,
    load_pretrained,
    load_tokenizer,
)
from deris_llm.structures import CognitionFeatures, CognitionInputs

MODELS: dict[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VLModel,
    "qwen2_5_vl": Qwen2_5_VLModel,
    "qwen3_vl": Qwen3VLModel,
}
VISION_START, VISION_PATCH, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
PLANNED_PICTURE = (480, 640)  # px, height and width: a usual picture of COCO


class QwenVLProcessor:
    """Pictures resized with their aspect and cut into patches; phrases put into the prompt and tokenised whole."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessor,
        *,
        min_pixels: int,
        max_pixels: int,
        prompt: str,
        text_features: Literal["phrase_and_after", "phrase", "last"],
        max_phrase_tokens: int,
        num_positions: int,
    ) -> None:
        """Keeps what is needed to prepare batches.

        Args:
            tokenizer: see `PromptTokenizer`; with the tokens that frame a picture.
            image_processor: of the weights; makes patches of pictures that have their size already.
            min_pixels: smaller pictures are enlarged.
            max_pixels: larger pictures are reduced.
            prompt: holds `{phrase}` and `<image>` once each; the latter becomes a framed picture.
            text_features: which tokens become text features.
            max_phrase_tokens: longer phrases are cut at the end of this many tokens.
            num_positions: tokens that the language model has positions for.
        """
        self.image_processor = image_processor
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.prompts = PromptTokenizer(
            tokenizer,
            prompt=prompt.replace(IMAGE_TOKEN, f"{VISION_START}{VISION_PATCH}{VISION_END}"),
            image_token=VISION_PATCH,
            text_features=text_features,
            max_phrase_tokens=max_phrase_tokens,
            num_positions=num_positions,
        )

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """See `CognitionProcessor`. Prompts are padded on the right; `pixel_values` has the patches of all pictures."""
        patches = self.image_processor(
            images=[self.resized(image) for image in images], do_resize=False, return_tensors="pt"
        )
        grid = patches["image_grid_thw"][:, 1:] // self.image_processor.merge_size
        num_image_tokens = grid.prod(dim=1).tolist()
        input_ids, padding_mask, text_feature_mask = padded(
            [
                self.prompts.encode(phrase, num_image_tokens[image])
                for phrase, image in zip(phrases, image_index, strict=True)
            ],
            self.prompts.pad_token_id,
        )
        return CognitionInputs(
            pixel_values=patches["pixel_values"],
            input_ids=input_ids,
            token_padding_mask=padding_mask,
            text_feature_mask=text_feature_mask,
            image_grid=grid,
        )

    def count_tokens(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[TokenCount]:
        """See `TokenCounter`."""
        areas = [math.prod(self._resized_size(height, width)) for height, width in sizes]
        return self.prompts.count_tokens(phrases, [area // self._token_size**2 for area in areas])

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """See `InputChecker`; pictures may be too thin."""
        distinct = list(dict.fromkeys(sizes))
        too_thin = raised_messages(range(len(distinct)), lambda i: self._resized_size(*distinct[i]))
        messages = {distinct[i]: message for i, message in too_thin.items()}
        areas = {size: math.prod(self._resized_size(*size)) for size in distinct if size not in messages}
        num_image_tokens = [areas.get(size, 0) // self._token_size**2 for size in sizes]
        return self.prompts.refused(phrases, num_image_tokens) | {
            i: messages[size] for i, size in enumerate(sizes) if size in messages
        }

    @property
    def _token_size(self) -> int:
        """Px that an image token covers along a side."""
        return self.image_processor.patch_size * self.image_processor.merge_size

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        return resized_size(height, width, self._token_size, min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def resized(self, image: Image.Image) -> Image.Image:
        """The picture in RGB at the size that the budget gives it.

        Raises:
            ValueError: the picture is too thin.
        """
        patch_size = self.image_processor.patch_size
        self._resized_size(image.height, image.width)
        content: dict[str, Any] = {
            "type": "image",
            "image": image,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
        }
        pictures, _ = process_vision_info([{"role": "user", "content": [content]}], image_patch_size=patch_size)[:2]
        return cast(list[Image.Image], pictures)[0]


class QwenVL(CognitionBackend):
    """transformers' model of the family, frozen but for LoRA in its language model, or but for the language model."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        grid: int,
        tuning: Literal["lora", "full"],
        lora_r: int,
        lora_alpha: int,
        lora_dropout: float,
        lora_targets: Sequence[str],
        prompt_order: Literal["image_first", "text_first"],
    ) -> None:
        """Freezes the model and puts LoRA into its language model, or lets the language model train.

        Args:
            model: one of `MODELS`, loaded or on the meta device.
            grid: rows and columns of the image features.
            tuning: full: the language model with its embeddings trains, LoRA options are ignored; the vision tower and
                its mergers stay frozen in both cases.
            lora_r: rank; 0 = none, the language model stays frozen.
            lora_alpha: the update is scaled by alpha / r.
            lora_dropout: before the update.
            lora_targets: names of the linears that get it.
            prompt_order: image_first: image tokens cannot see the phrase, so their features are the image's alone.
        """
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.grid = grid
        self.prompt_order = prompt_order
        self.shares_images = prompt_order == "image_first"
        self.is_trained = tuning == "full" or lora_r > 0
        self.feature_dim = self.model.config.text_config.hidden_size
        if tuning == "full":
            self.model.language_model.requires_grad_(True)
        elif lora_r > 0:
            add_lora(
                self.model.language_model,
                lora_targets,
                r=lora_r,
                alpha=lora_alpha,
                dropout=lora_dropout,
                dtype=model.dtype,
            )
        self.train(self.training)

    @classmethod
    def build(cls, config: QwenVlCognition, *, weights: bool, dtype: torch.dtype) -> Self:
        """See `CognitionBackend`."""
        architecture = _architecture(config.weights, weights=weights)
        model = load_pretrained(
            MODELS[architecture.model_type],
            config.weights,
            architecture,
            weights=weights,
            dtype=dtype,
            left_in_file=("lm_head.weight",),
            attention=attention_kernels(dtype, prompt_order=config.prompt_order),
            in_4_bits_except=("visual",) if config.quantization == "nf4" else None,
        )
        return cls(
            model,
            grid=config.grid,
            tuning=config.tuning,
            lora_r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            lora_targets=config.lora.targets,
            prompt_order=config.prompt_order,
        )

    @classmethod
    def check_weights(cls, config: QwenVlCognition) -> None:
        """See `CognitionBackend`."""
        architecture = _architecture(config.weights, weights=True)
        check_names(MODELS[architecture.model_type], config.weights, architecture, left_in_file=("lm_head.weight",))

    @classmethod
    def build_processor(cls, config: QwenVlCognition) -> QwenVLProcessor:
        """See `CognitionBackend`."""
        architecture = _architecture(config.weights, weights=True)
        tokenizer = load_tokenizer(config.weights)
        found = {token: tokenizer.get_vocab().get(token) for token in (VISION_START, VISION_PATCH, VISION_END)}
        expected = {
            VISION_START: architecture.vision_start_token_id,
            VISION_PATCH: architecture.image_token_id,
            VISION_END: architecture.vision_end_token_id,
        }
        if found != expected or not tokenizer.is_fast:
            raise ValueError(
                f"cognition.weights={config.weights}: expected a fast tokenizer with the tokens {expected} of the "
                f"model's config, got {found} from a {type(tokenizer).__name__}; take tokenizer and model from the same "
                "folder."
            )
        image_processor = load_image_processor(Qwen2VLImageProcessor, config.weights)
        vision = architecture.vision_config
        cut = (image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size)
        if cut != (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size):
            raise ValueError(
                f"cognition.weights={config.weights}: expected an image processor with patches of {vision.patch_size} px, "
                f"merged {vision.spatial_merge_size} x {vision.spatial_merge_size}, {vision.temporal_patch_size} in time, "
                f"as the model's config says, got {cut}; take preprocessor_config.json and model from the same folder."
            )
        return QwenVLProcessor(
            tokenizer,
            image_processor,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
            prompt=config.prompt,
            text_features=config.text_features,
            max_phrase_tokens=config.max_phrase_tokens,
            num_positions=architecture.text_config.max_position_embeddings,
        )

    @classmethod
    def plan_inputs(cls, config: QwenVlCognition, phrase: str, image_index: Sequence[int]) -> PlannedInputs:
        """See `CognitionBackend`; without weights at hand the architecture suffices, as shipped for the run configs."""
        architecture = _architecture(config.weights, weights=False)
        if config.weights.startswith("builtin:") or Path(config.weights).is_dir():
            inputs = super().plan_inputs(config, phrase, image_index).inputs
        else:
            inputs = _planned_inputs(config, architecture.vision_config, architecture.image_token_id, image_index)
        places = (inputs.input_ids[0] == architecture.image_token_id).nonzero()
        shared = int(places.max()) + 1 if config.prompt_order == "image_first" else 0
        return PlannedInputs(inputs, tokens_per_phrase=inputs.input_ids.shape[1], shared_tokens=shared)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        """Sets the mode; the frozen parts stay in eval."""
        super().train(mode)
        self.model.eval()
        self.model.language_model.train(mode and self.is_trained)
        return self

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes the language model's layers in the backward pass; the tower runs without gradient anyway."""
        language_model = self.model.language_model
        older_name = language_model.gradient_checkpointing_enable  # before transformers 5.2x
        enable = getattr(language_model, "activation_checkpointing_enable", older_name)
        enable(activation_checkpointing_kwargs or {"use_reentrant": False})

    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        """See `CognitionBackend`. What the host reads of the inputs, it reads before the language model is queued."""
        assert inputs.image_grid is not None, "a QwenVLProcessor gives every picture's grid"
        patch_grid = F.pad(inputs.image_grid * self.model.visual.spatial_merge_size, (1, 0), value=1)
        positions_PL3 = self._positions(inputs, patch_grid[image_index])
        if self.prompt_order == "image_first":
            rows = self._packed_rows(inputs, image_index, positions_PL3)
            image_feats_index, owners = image_index, range(len(inputs.image_grid))
        else:
            rows = self._whole_prompts(inputs, positions_PL3)
            image_feats_index, owners = torch.arange(len(image_index), device=image_index.device), image_index.tolist()
        text = LeftAlignment.of(rows.is_text_PO)
        image_places = (rows.ids_RT == self.model.config.image_token_id).nonzero(as_tuple=True)
        grids = inputs.image_grid.tolist()
        with torch.no_grad():
            vision = _VisionTokens.of(self.model.get_image_features(inputs.pixel_values, patch_grid))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
            hidden_RTD = self._hidden(rows, len(image_places[0]), vision.repeated(owners))
        own_POD = hidden_RTD[rows.row_PO, rows.place_PO]
        last = rows.is_own_PO.sum(dim=1) - 1
        return CognitionFeatures(
            image_feats=resampled_maps(hidden_RTD[image_places], [grids[owner] for owner in owners], self.grid),
            image_feats_index=image_feats_index,
            text_feats=text.aligned(own_POD),
            text_padding_mask=text.padding_mask,
            cls_feat=own_POD[torch.arange(len(last), device=last.device), last],
        )

    def _positions(self, inputs: CognitionInputs, patch_grid: Tensor) -> Tensor:
        """Multimodal rotary positions (time, row, column) of every prompt by itself: int64 (P, L, 3)."""
        is_image = inputs.input_ids == self.model.config.image_token_id
        # On the CPU: the model's own loop reads single values of these.
        positions, _ = self.model.get_rope_index(
            inputs.input_ids.cpu(),
            mm_token_type_ids=is_image.int().cpu(),
            image_grid_thw=patch_grid.cpu(),
            attention_mask=(~inputs.token_padding_mask).long().cpu(),
        )
        return positions.permute(1, 2, 0).to(inputs.input_ids.device)

    def _packed_rows(self, inputs: CognitionInputs, image_index: Tensor, positions: Tensor) -> _Rows:
        """The prompts with what lies before the phrase once per image."""
        ids = inputs.input_ids
        places = torch.arange(ids.shape[1], device=ids.device)
        prefix_lengths = (places * (ids == self.model.config.image_token_id)).argmax(dim=1) + 1
        lengths = (~inputs.token_padding_mask).sum(dim=1)
        own = torch.arange(int((lengths - prefix_lengths).max()), device=ids.device)
        is_own = own < (lengths - prefix_lengths)[:, None]
        own_places = torch.where(is_own, prefix_lengths[:, None] + own, 0)
        phrases = torch.arange(len(ids), device=ids.device)[:, None]

        num_images, longest = len(cast(Tensor, inputs.image_grid)), int(prefix_lengths.max())
        is_prefix_PS = places[:longest] < prefix_lengths[:, None]
        prefix_ids_PS = ids[:, :longest].masked_fill(~is_prefix_PS, 0)
        check_prefix(prefix_ids_PS, image_index, num_images)
        first_phrase = first_phrases(image_index, num_images)
        packed = pack_prompts(is_own, is_prefix_PS[first_phrase], image_index)
        return _Rows(
            ids_RT=packed.laid_out(prefix_ids_PS[first_phrase], ids[phrases, own_places]),
            positions_RT3=packed.laid_out(positions[first_phrase, :longest], positions[phrases, own_places]),
            attention_mask=packed.additive_mask(self.model.dtype),
            row_PO=packed.rows_PO,
            place_PO=packed.readable_PO,
            is_own_PO=is_own,
            is_text_PO=inputs.text_feature_mask[phrases, own_places] & is_own,
        )

    def _whole_prompts(self, inputs: CognitionInputs, positions: Tensor) -> _Rows:
        """Whole prompts, each in a row by itself: all of its tokens are its own."""
        is_valid = ~inputs.token_padding_mask
        places = torch.arange(is_valid.shape[1], device=is_valid.device).expand_as(is_valid)
        return _Rows(
            ids_RT=inputs.input_ids,
            positions_RT3=positions,
            attention_mask=is_valid.long(),
            row_PO=torch.arange(len(is_valid), device=is_valid.device)[:, None],
            place_PO=places,
            is_own_PO=is_valid,
            is_text_PO=inputs.text_feature_mask,
        )

    def _hidden(self, rows: _Rows, num_image_tokens: int, vision: _VisionTokens) -> Tensor:
        """Runs the language model over rows of tokens with the pictures' tokens put in.

        The model's own `forward` would do that too, but takes features that are already there since transformers 5.2x
        only, and earlier drops them without a word.

        Args:
            rows: R rows of T tokens.
            num_image_tokens: placeholders in them.
            vision: of the rows' pictures, in their order.

        Returns:
            float (R, T, D).
        """
        is_image = rows.ids_RT == self.model.config.image_token_id
        embeddings = self.model.get_input_embeddings()(rows.ids_RT)
        tokens = torch.cat(vision.tokens).to(embeddings.dtype)
        assert len(tokens) == num_image_tokens, "one placeholder per image token"
        deepstack = {}
        if vision.deepstack:
            levels = [torch.cat(level).to(embeddings.dtype) for level in vision.deepstack]
            deepstack = {"visual_pos_masks": is_image, "deepstack_visual_embeds": levels}
        return self.model.language_model(
            inputs_embeds=embeddings.masked_scatter(is_image[..., None], tokens),
            attention_mask=rows.attention_mask,
            position_ids=rows.positions_RT3.permute(2, 0, 1),
            use_cache=False,
            **deepstack,
        ).last_hidden_state


class _Rows(NamedTuple):
    """What the language model reads: R rows of T tokens."""

    ids_RT: Tensor  # int64
    positions_RT3: Tensor  # int64, multimodal rotary positions
    attention_mask: Tensor  # as transformers takes it, (R, T) or (R, 1, T, T)
    row_PO: Tensor  # int64 (P, O) or (P, 1), the row of a phrase's own tokens
    place_PO: Tensor  # int64 (P, O), where they lie in it; padding lies anywhere
    is_own_PO: Tensor  # bool (P, O), False = padding
    is_text_PO: Tensor  # bool (P, O), True = text feature


class _VisionTokens(NamedTuple):
    """What the vision tower made of the pictures."""

    tokens: tuple[Tensor, ...]  # per picture float (n, D)
    deepstack: tuple[tuple[Tensor, ...], ...]  # per early layer of the language model, the same shapes (Qwen3-VL)

    @classmethod
    def of(cls, features: Any) -> _VisionTokens:
        """From `get_image_features`, whose deepstack features are split by picture since transformers 5.2x."""
        tokens = tuple(features.pooler_output)
        lengths = [len(each) for each in tokens]
        levels = features.get("deepstack_features") or ()
        split = (level.split(lengths) if isinstance(level, Tensor) else level for level in levels)
        return cls(tokens, tuple(tuple(level) for level in split))

    def repeated(self, images: Sequence[int]) -> _VisionTokens:
        """The pictures of these numbers, in this order."""
        return _VisionTokens(
            tuple(self.tokens[image] for image in images),
            tuple(tuple(level[image] for image in images) for level in self.deepstack),
        )


def resized_size(height: int, width: int, token_size: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that a picture is resized to: multiples of `token_size`, within the budget, aspect kept.

    Args:
        height: px.
        width: px.
        token_size: px that one image token covers along a side.
        min_pixels: smallest area.
        max_pixels: largest area.

    Raises:
        ValueError: the picture is so thin that the budget leaves no token along its shorter side.
    """
    try:
        resized = smart_resize(height, width, token_size, min_pixels, max_pixels)
    except ValueError:
        resized = (0, 0)  # its sides differ by more than qwen-vl-utils' limit, 200 times
    if min(resized) < token_size:
        raise ValueError(
            f"picture of {width} x {height} px: expected at least one image token ({token_size} px) along its shorter "
            f"side within cognition.max_pixels={max_pixels}, and sides that differ at most 200 times, got a thinner "
            "picture; crop or pad it, drop it, or raise cognition.max_pixels."
        )
    return resized


def _planned_inputs(
    config: QwenVlCognition, vision: Any, image_token_id: int, image_index: Sequence[int]
) -> CognitionInputs:
    """Inputs of usual pictures and an estimated number of text tokens."""
    token_size = vision.patch_size * vision.spatial_merge_size
    size = resized_size(*PLANNED_PICTURE, token_size, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    rows, columns = (pixels // token_size for pixels in size)
    num_images, num_image_tokens = max(image_index) + 1, rows * columns
    input_ids = torch.zeros(len(image_index), num_image_tokens + PLANNED_TEXT_TOKENS, dtype=torch.long)
    input_ids[:, PLANNED_TEXT_TOKENS // 2 :][:, :num_image_tokens] = image_token_id
    text_features = torch.zeros_like(input_ids, dtype=torch.bool)
    text_features[:, -PLANNED_TEXT_TOKENS // 2 :] = True
    patch_values = 3 * vision.temporal_patch_size * vision.patch_size**2
    num_patches = num_images * num_image_tokens * vision.spatial_merge_size**2
    return CognitionInputs(
        pixel_values=torch.empty(num_patches, patch_values, device="meta"),
        input_ids=input_ids,
        token_padding_mask=torch.zeros_like(text_features),
        text_feature_mask=text_features,
        image_grid=torch.tensor([[rows, columns]] * num_images),
    )


def _architecture(name: str, *, weights: bool) -> Any:
    """The config of a model of the family (Any: transformers types its sub-configs as dicts)."""
    architecture: Any = architecture_of(name, weights=weights)
    if architecture.model_type not in MODELS:
        raise ValueError(
            f"cognition.weights={name}: expected the weights of a {', '.join(MODELS)}, got a {architecture.model_type}; "
            "take e.g. Qwen/Qwen2.5-VL-7B-Instruct or another cognition.backend."
        )
    return architecture
