"""What a cognition backend is. `deris_llm.testing.check_cognition_backend` is this contract as a program."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from PIL import Image
from torch import Tensor, nn

from deris_llm.config import CognitionConfig
from deris_llm.structures import CognitionFeatures, CognitionInputs


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


class CognitionBackend(nn.Module, abc.ABC):
    """An image-text model with what trains and what is frozen already set.

    Attributes:
        feature_dim: D, the width of all features.
    """

    feature_dim: int

    @classmethod
    @abc.abstractmethod
    def build(cls, config: CognitionConfig, *, weights: bool, dtype: torch.dtype) -> Self:
        """Builds the model; `weights=False` gives the architecture alone, without network and on any device."""

    @classmethod
    @abc.abstractmethod
    def build_processor(cls, config: CognitionConfig) -> CognitionProcessor:
        """Builds the processor that goes with the model."""

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
