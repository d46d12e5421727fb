"""What a cognition backend is. `deris_llm.testing.check_cognition_backend` is this contract as a program."""

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


class CognitionProcessor(Protocol):
    """Pictures and phrases -> tensors. Picklable and without a model: it runs in the loader's workers."""

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """Prepares a batch.

        Args:
            images: I pictures at their original size.
            phrases: P phrases.
            image_index: P numbers in 0..I-1, non-decreasing: the picture of each phrase.

        Raises:
            ValueError: a phrase is empty.
        """
        ...


class TokenCount(NamedTuple):
    """Tokens that the image-text model reads of a phrase and its picture."""

    shared: int  # once for all phrases of the picture, those of the picture included
    own: int  # for this phrase


@runtime_checkable
class TokenCounter(Protocol):
    """A processor that can say how long prompts are without making them; `data.max_tokens_per_image` asks it."""

    def count_tokens(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[TokenCount]:
        """Counts tokens, those of a cut phrase as cut.

        Args:
            phrases: P phrases.
            sizes: P pairs of height and width, px: of the phrase's picture.
        """
        ...


@runtime_checkable
class InputChecker(Protocol):
    """A processor that says which phrases and pictures it will refuse; training asks it before it starts."""

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """Finds what `CognitionProcessor` would raise an error for; hundreds of thousands of phrases take seconds.

        Args:
            phrases: P phrases.
            sizes: P pairs of height and width, px: of the phrase's picture.

        Returns:
            for each phrase that is refused, by its number: the message.
        """
        ...


class PlannedInputs(NamedTuple):
    """Inputs of the sizes that a run has, for `deris-llm plan`."""

    inputs: CognitionInputs  # pixel values may lie on `meta`
    tokens_per_phrase: int  # through the image-text model, image tokens included
    shared_tokens: int  # of these, how many run once for all phrases of an image


class CognitionBackend(nn.Module, abc.ABC):
    """An image-text model with what trains and what is frozen already set.

    Attributes:
        feature_dim: D, the width of all features.
        shares_images: what depends on the image alone runs once for all of its phrases.
    """

    feature_dim: int
    shares_images: bool = False

    @classmethod
    @abc.abstractmethod
    def build(cls, config: CognitionConfig, *, weights: bool, dtype: torch.dtype) -> Self:
        """Builds the model; `weights=False` gives the architecture alone, without network and on any device."""

    @classmethod
    def check_weights(cls, config: CognitionConfig) -> None:
        """Checks config and names of the weights, reading headers only (`deris_llm.models.pretrained.check_names`).

        It runs before the weights of any part are read or downloaded. Here it does nothing.

        Raises:
            ValueError: they do not fit the backend.
        """

    @classmethod
    @abc.abstractmethod
    def build_processor(cls, config: CognitionConfig) -> CognitionProcessor:
        """Builds the processor that goes with the model."""

    @classmethod
    def plan_inputs(cls, config: CognitionConfig, phrase: str, image_index: Sequence[int]) -> PlannedInputs:
        """Inputs for counting memory and tokens without a run.

        A backend overrides this to need no tokenizer, or where it shares tokens between phrases; here the real
        processor prepares blank pictures.

        Args:
            config: of the run.
            phrase: every phrase of the batch.
            image_index: as in `CognitionProcessor`, of a full micro-batch.
        """
        pictures = [Image.new("RGB", (640, 480))] * (max(image_index) + 1)
        inputs = cls.build_processor(config)(pictures, [phrase] * len(image_index), image_index)
        return PlannedInputs(inputs, tokens_per_phrase=inputs.input_ids.shape[1], shared_tokens=0)

    @abc.abstractmethod
    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        """Reads I images and P phrases.

        Args:
            inputs: what the processor made.
            image_index: int64 (P,), non-decreasing: the image of each phrase.
        """

    @abc.abstractmethod
    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes the trained layers' activations in the backward pass; arguments of `torch.utils.checkpoint`."""


@functools.cache
def say_once(message: str) -> None:
    """Logs what is worth knowing once in a process."""
    logger.info("%s", message)
