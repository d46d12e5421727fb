"""LLaVA-OneVision with Qwen2 ("Qwen2-OV"): SigLIP, a projector and a causal language model.

One base crop per image, no tiles. The vision tower and the projector are frozen and run once per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaOnevisionModel

from deris_llm.config.schema import Qwen2OvCognition
from deris_llm.models.cognition.base import TokenCount
from deris_llm.models.cognition.causal import CausalBackend, VisionTokens, with_rows
from deris_llm.models.cognition.prompts import IMAGE_SLOT, PromptTokenizer, each_once, padded
from deris_llm.models.pretrained import load_tokenizer
from deris_llm.structures import CognitionInputs


class Qwen2OneVisionProcessor:
    """Warps images to the vision tower's square and puts phrases into the prompt."""

    def __init__(self, prompts: PromptTokenizer, *, image_size: int, grid: int) -> None:
        """Keeps what is needed to prepare batches.

        Args:
            prompts: of the run.
            image_size: px, side of the vision tower's input.
            grid: rows and columns of image tokens.
        """
        self.prompts = prompts
        self.image_size = image_size
        self.grid = grid
        self.num_image_tokens = grid**2

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        pixel_values = torch.stack([self.pixels(image) for image in images])
        encoded = each_once(self.encode, phrases)
        return with_rows(
            padded(
                encoded, self.prompts.pad_token_id, image_index, pixel_values, ((self.grid, self.grid),) * len(images)
            ),
            image_token_id=self.prompts.image_token_id,
            is_shared=self.prompts.is_image_first,
        )

    def pixels(self, image: Image.Image) -> Tensor:
        """Warps an image to the square and normalizes it: float (3, s, s) in [-1, 1]."""
        square = image.convert("RGB").resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1).contiguous() / 127.5 - 1

    def encode(self, phrase: str) -> tuple[list[int], list[bool]]:
        """Returns the token ids of the prompt with a phrase, and for each whether it is a text feature."""
        return self.prompts.encode(phrase, self.num_image_tokens)

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        return self.prompts.refused(phrases, [self.num_image_tokens] * len(sizes))

    def count_tokens(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[TokenCount]:
        return self.prompts.count_tokens(phrases, [self.num_image_tokens] * len(sizes))


class Qwen2OneVision(CausalBackend):
    """transformers' `LlavaOnevisionModel`."""

    models = {"llava_onevision": LlavaOnevisionModel}
    expects = "a LLaVA-OneVision with Qwen2"
    advice = "take e.g. llava-hf/llava-onevision-qwen2-7b-ov-hf"
    left_in_file = ("lm_head.weight", "language_model.lm_head.weight")  # as transformers 5 and 4 write it
    unquantized = ("vision_tower", "multi_modal_projector")

    @classmethod
    def accepts(cls, architecture: Any) -> bool:
        return super().accepts(architecture) and architecture.text_config.model_type == "qwen2"

    @classmethod
    def build_processor(cls, config: Qwen2OvCognition) -> Qwen2OneVisionProcessor:
        architecture = cls.architecture(config, weights=True)
        tokenizer = load_tokenizer(config.weights)
        image_token_id = tokenizer.get_vocab().get(IMAGE_SLOT)
        if image_token_id != architecture.image_token_id or not tokenizer.is_fast:
            raise ValueError(
                f"cognition.weights={config.weights}: expected a fast tokenizer whose {IMAGE_SLOT} is token "
                f"{architecture.image_token_id} as the model's config says, got {image_token_id} from a "
                f"{type(tokenizer).__name__}; take tokenizer and model from the same folder."
            )
        num_positions = architecture.text_config.max_position_embeddings
        vision = architecture.vision_config
        return Qwen2OneVisionProcessor(
            PromptTokenizer(tokenizer, config, image=IMAGE_SLOT, image_token=IMAGE_SLOT, num_positions=num_positions),
            image_size=vision.image_size,
            grid=vision.image_size // vision.patch_size,
        )

    @classmethod
    def planned_images(
        cls, config: Qwen2OvCognition, architecture: Any, num_images: int
    ) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        size = architecture.vision_config.image_size
        grid = size // architecture.vision_config.patch_size
        return torch.empty(num_images, 3, size, size, device="meta"), ((grid, grid),) * num_images

    def see(self, inputs: CognitionInputs) -> VisionTokens:
        tower = self.model.vision_tower
        states = tower(inputs.pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
        return VisionTokens(self.model.multi_modal_projector(states[self.model.config.vision_feature_layer]))
