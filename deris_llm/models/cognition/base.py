"""The contract of a cognition backend. `deris_llm.testing.check_cognition_backend` runs it as a test."""

from __future__ import annotations

import abc
import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from deris_llm.config import CognitionConfig
from deris_llm.structures import CognitionFeatures, CognitionInputs

logger = logging.getLogger(__name__)

TYPICAL_SIZE = (480, 640)  # height and width of a typical COCO image, px


class CognitionProcessor(Protocol):
    """Turns images and phrases into tensors. Picklable and without a model: it runs in the data loader's workers."""

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """Prepares a batch.

        Args:
            images: I images at their original size.
            phrases: P phrases.
            image_index: P numbers in 0..I-1, non-decreasing: the image of each phrase. Every image has a phrase.

        Raises:
            ValueError: a phrase is empty.
        """
        ...


class TokenCount(NamedTuple):
    """Tokens that the image-text model reads for a phrase and its image."""

    shared: int  # read once for all phrases of the image, image tokens included
    own: int  # read for this phrase alone


@runtime_checkable
class TokenCounter(Protocol):
    """A processor that can count prompt tokens without building the prompts; `data.max_tokens_per_image` needs it."""

    def count_tokens(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[TokenCount]:
        """Counts tokens; a phrase that will be cut counts as cut.

        Args:
            phrases: P phrases.
            sizes: height and width of each phrase's image, px.
        """
        ...


@runtime_checkable
class InputChecker(Protocol):
    """A processor that can tell which phrases and images it will refuse; training asks before it starts."""

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """Finds the phrases for which `CognitionProcessor` would raise; must take seconds for 100,000 phrases.

        Args:
            phrases: P phrases.
            sizes: height and width of each phrase's image, px.

        Returns:
            the error message of each refused phrase, by the phrase's index.
        """
        ...


class PlannedInputs(NamedTuple):
    """Inputs of the sizes that a run has, for `deris-llm plan`."""

    inputs: CognitionInputs  # pixel values may be on `meta`
    tokens_per_phrase: int  # through the image-text model, image tokens included
    shared_tokens: int  # how many of these run once for all phrases of an image


class CognitionBackend(nn.Module, abc.ABC):
    """An image-text model whose trainable and frozen parameters are already set.

    `transformers_backend.TransformersBackend` implements all but the processor and `forward` around a transformers model.

    Attributes:
        feature_dim: D, the width of all features.
        shares_images: whatever depends on the image alone runs once for all of its phrases.
    """

    feature_dim: int
    shares_images: bool = False

    @classmethod
    @abc.abstractmethod
    def build(cls, config: CognitionConfig, *, weights: bool, dtype: torch.dtype) -> Self:
        """Builds the model; `weights=False` builds the architecture alone, without network and on any device."""

    @classmethod
    def check_weights(cls, config: CognitionConfig) -> None:
        """Checks config and parameter names against the weight files, reading headers only. The default does nothing.

        It runs before the weights of any part of the model are read or downloaded.

        Raises:
            ValueError: the files do not fit the backend.
        """

    @classmethod
    @abc.abstractmethod
    def build_processor(cls, config: CognitionConfig) -> CognitionProcessor:
        """Builds the processor that goes with the model."""

    @classmethod
    def plan_inputs(cls, config: CognitionConfig, phrase: str, image_index: Sequence[int]) -> PlannedInputs:
        """Makes inputs for counting memory and tokens without a run, here with the real processor and blank images.

        A backend overrides this if it can estimate them without the files of its processor.

        Args:
            config: the run's cognition section.
            phrase: every phrase of the batch.
            image_index: as in `CognitionProcessor`, of a full micro-batch.
        """
        height, width = TYPICAL_SIZE
        images = [Image.new("RGB", (width, height))] * (max(image_index) + 1)
        processor = cls.build_processor(config)
        inputs = processor(images, [phrase] * len(image_index), image_index)
        count = TokenCount(0, inputs.input_ids.shape[1])
        if isinstance(processor, TokenCounter):
            [count] = processor.count_tokens([phrase], [TYPICAL_SIZE])
        return PlannedInputs(inputs, tokens_per_phrase=sum(count), shared_tokens=count.shared)

    @abc.abstractmethod
    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        """Computes the features of I images and P phrases.

        Args:
            inputs: from the processor.
            image_index: int64 (P,), non-decreasing: the image of each phrase.
        """

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes the activations of the trained layers in the backward pass. The default recomputes nothing.

        Args:
            activation_checkpointing_kwargs: arguments of `torch.utils.checkpoint`.
        """
        del activation_checkpointing_kwargs


@functools.cache
def say_once(message: str) -> None:
    """Logs a message once per process."""
    logger.info("%s", message)
