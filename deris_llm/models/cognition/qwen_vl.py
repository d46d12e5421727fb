"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whichever the weights are.

Images keep their aspect: each is resized to a number of pixels between `cognition.min_pixels` and `cognition.max_pixels`
and has its own grid of image tokens (a token is 28 x 28 px, in Qwen3-VL 32 x 32). The vision tower and its mergers are
frozen and run once per image.

The contract has one map size for a batch, so the map of every image is resampled to `cognition.grid` rows and columns, a
fixed number: results do not depend on what shares the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from PIL import Image
from qwen_vl_utils import process_vision_info, smart_resize
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen2_5_VLModel, Qwen2VLImageProcessor, Qwen2VLModel, Qwen3VLModel

from deris_llm.config.schema import QwenVlCognition
from deris_llm.models.cognition.base import TYPICAL_SIZE, TokenCount
from deris_llm.models.cognition.causal import CausalBackend, VisionTokens, with_rows
from deris_llm.models.cognition.prompts import PromptTokenizer, each_once, padded, raised_messages
from deris_llm.models.pretrained import load_image_processor, load_tokenizer
from deris_llm.structures import CognitionInputs

VISION_START, VISION_PATCH, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


class QwenVLProcessor:
    """Resizes images with their aspect, cuts them into patches and puts phrases into the prompt."""

    def __init__(
        self, prompts: PromptTokenizer, image_processor: Qwen2VLImageProcessor, *, min_pixels: int, max_pixels: int
    ) -> None:
        """Keeps what is needed to prepare batches.

        Args:
            prompts: of the run.
            image_processor: of the weights; makes patches of images that have their size already.
            min_pixels: smaller images are enlarged.
            max_pixels: larger images are reduced.
        """
        self.prompts = prompts
        self.image_processor = image_processor
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.token_size = image_processor.patch_size * image_processor.merge_size  # px along a side

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """See `CognitionProcessor`; `pixel_values` has the patches of all images."""
        resized = [self.resized(image) for image in images]
        patches = self.image_processor(images=resized, do_resize=False, return_tensors="pt")
        grids = tuple((image.height // self.token_size, image.width // self.token_size) for image in resized)
        asked = [(phrase, math.prod(grids[image])) for phrase, image in zip(phrases, image_index, strict=True)]
        encoded = each_once(lambda pair: self.prompts.encode(*pair), asked)
        return with_rows(
            padded(encoded, self.prompts.pad_token_id, image_index, patches["pixel_values"], grids),
            image_token_id=self.prompts.image_token_id,
            is_shared=self.prompts.is_image_first,
            has_multimodal_positions=True,
        )

    def count_tokens(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[TokenCount]:
        """See `TokenCounter`."""
        areas = [math.prod(self._resized_size(*size)) for size in sizes]
        return self.prompts.count_tokens(phrases, [area // self.token_size**2 for area in areas])

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """See `InputChecker`; images may be too thin."""
        distinct = list(dict.fromkeys(sizes))
        too_thin = raised_messages(range(len(distinct)), lambda i: self._resized_size(*distinct[i]))
        messages = {distinct[i]: message for i, message in too_thin.items()}
        areas = {size: math.prod(self._resized_size(*size)) for size in distinct if size not in messages}
        refused = self.prompts.refused(phrases, [areas.get(size, 0) // self.token_size**2 for size in sizes])
        return refused | {i: messages[size] for i, size in enumerate(sizes) if size in messages}

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        return resized_size(height, width, self.token_size, min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def resized(self, image: Image.Image) -> Image.Image:
        """Converts an image to RGB at the size that the budget gives it.

        Raises:
            ValueError: the image is too thin.
        """
        self._resized_size(image.height, image.width)
        content: dict[str, Any] = {
            "type": "image", "image": image, "min_pixels": self.min_pixels, "max_pixels": self.max_pixels,
        }  # fmt: skip
        message = {"role": "user", "content": [content]}
        images, _ = process_vision_info([message], image_patch_size=self.image_processor.patch_size)[:2]
        return cast(list[Image.Image], images)[0]


class QwenVL(CausalBackend):
    """transformers' model of the family that the weights belong to."""

    models = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}
    expects = f"a {', '.join(models)}"
    advice = "take e.g. Qwen/Qwen2.5-VL-7B-Instruct"
    left_in_file = ("lm_head.weight",)
    unquantized = ("visual",)

    def __init__(self, model: PreTrainedModel, config: QwenVlCognition) -> None:
        super().__init__(model, config)
        self.grid = config.grid

    @classmethod
    def build_processor(cls, config: QwenVlCognition) -> QwenVLProcessor:
        architecture = cls.architecture(config, weights=True)
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
        prompts = PromptTokenizer(
            tokenizer,
            config,
            image=f"{VISION_START}{VISION_PATCH}{VISION_END}",
            image_token=VISION_PATCH,
            num_positions=architecture.text_config.max_position_embeddings,
        )
        return QwenVLProcessor(prompts, image_processor, min_pixels=config.min_pixels, max_pixels=config.max_pixels)

    @classmethod
    def planned_images(
        cls, config: QwenVlCognition, architecture: Any, num_images: int
    ) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        vision = architecture.vision_config
        token_size = vision.patch_size * vision.spatial_merge_size
        size = resized_size(*TYPICAL_SIZE, token_size, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        rows, columns = (pixels // token_size for pixels in size)
        num_patches = num_images * rows * columns * vision.spatial_merge_size**2
        patch_values = 3 * vision.temporal_patch_size * vision.patch_size**2
        return torch.empty(num_patches, patch_values, device="meta"), ((rows, columns),) * num_images

    def see(self, inputs: CognitionInputs) -> VisionTokens:
        # transformers' tower reads every image's grid on the host, so it waits for this small copy.
        patch_grids = torch.tensor(inputs.image_grids) * self.model.visual.spatial_merge_size
        patch_grids = F.pad(patch_grids, (1, 0), value=1).to(inputs.input_ids.device, non_blocking=True)
        features = self.model.get_image_features(inputs.pixel_values, patch_grids)
        lengths = [math.prod(grid) for grid in inputs.image_grids]
        levels = features.get("deepstack_features") or ()  # split by image since transformers 5.2x
        return VisionTokens(
            features.pooler_output, [level.split(lengths) if isinstance(level, Tensor) else level for level in levels]
        )


def resized_size(height: int, width: int, token_size: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that an image is resized to: multiples of `token_size`, within the budget, aspect kept.

    Args:
        height: px.
        width: px.
        token_size: px that one image token covers along a side.
        min_pixels: smallest area.
        max_pixels: largest area.

    Raises:
        ValueError: the image is so thin that the budget leaves no token along its shorter side.
    """
    try:
        resized = smart_resize(height, width, token_size, min_pixels, max_pixels)
    except ValueError:
        resized = (0, 0)  # its sides differ by more than qwen-vl-utils' limit, 200 times
    if min(resized) < token_size:
        raise ValueError(
            f"image of {width} x {height} px: expected at least one image token ({token_size} px) along its shorter "
            f"side within cognition.max_pixels={max_pixels}, and sides that differ at most 200 times, got a thinner "
            "image; crop or pad it, drop it, or raise cognition.max_pixels."
        )
    return resized
