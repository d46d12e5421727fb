"""The whole DeRIS model: read this first.

A batch holds I images and P phrases. *Cognition* (an image-text model, `deris_llm.models.cognition`) reads each image at
low resolution together with each phrase, and represents what the phrase means. *Perception* (Swin and Mask2Former's pixel
decoder, `deris_llm.models.perception`) reads each image once at high resolution, and represents where objects are. The
*loopback* (`deris_llm.models.loopback`) passes Q queries per phrase between the two for N rounds. Every round predicts a
mask and a referring logit for each query; the last one also predicts whether the phrase has a referent at all.
`deris_llm.structures` defines the shape and meaning of everything that is passed.

By default the LoRA weights of the language model, the pixel decoder and the loopback are trained; the language model
itself, its vision tower and projector, and Swin are frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from deris_llm.config import RunConfig
from deris_llm.models.cognition import CognitionBackend, resolve_backend
from deris_llm.models.cognition.base import say_once
from deris_llm.models.loopback import Loopback
from deris_llm.models.perception import Perception, build_perception, check_perception
from deris_llm.models.variants import LoopbackVariant, build_loopback
from deris_llm.structures import DerisOutput, ReferringBatch


class DerisTrainerConfig(PreTrainedConfig):
    """The `model.config` that Trainer and DeepSpeed read: the width for ZeRO-3's "auto" sizes."""

    model_type = "deris"
    hidden_size: int = 0


class Deris(nn.Module):
    """Images and phrases -> masks, referring scores, presence.

    Attributes:
        config: for Trainer and DeepSpeed only; a run is described by its `RunConfig`.
    """

    def __init__(
        self, cognition: CognitionBackend, perception: Perception | None, loopback: Loopback | LoopbackVariant
    ) -> None:
        """Joins the parts.

        Args:
            cognition: the image-text model.
            perception: None if only cognition sees the image (`loopback.structure: cognition_centric`).
            loopback: built for both branches.
        """
        super().__init__()
        self.cognition = cognition
        self.perception = perception
        self.loopback = loopback
        self.config = DerisTrainerConfig(hidden_size=cognition.feature_dim)

    def forward(self, batch: ReferringBatch) -> DerisOutput:
        """Predicts masks, referring logits and presence of P phrases in I images."""
        # Cognition first: then the backward pass frees perception's activations before it recomputes the language model
        # (DeRIS-7B, one image: 0.18 GB less, counted).
        cognition = self.cognition(batch.cognition, batch.image_index)  # what the phrase means
        perception = None if self.perception is None else self.perception(batch.perception_image)  # where objects are
        return self.loopback(perception, cognition, batch.image_index, batch.phrases_per_image)  # which object it is

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,  # noqa: FBT001, FBT002 (transformers' signature)
    ) -> None:
        """Implements Trainer's `gradient_checkpointing` for the language model only.

        transformers' own version covers every submodel and fails on Swin. The pixel decoder has its own setting,
        `perception.activation_checkpointing`.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                "activation checkpointing: expected every_n_layers=1 and offload=False, which every backend supports, "
                f"got every_n_layers={every_n_layers}, offload={offload}; leave them at their defaults."
            )
        self.cognition.activation_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The same under its older name, which transformers before 5.2x calls."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)


def build_model(
    config: RunConfig,
    *,
    weights: bool = True,
    device: str | torch.device | None = None,
    allow_module: bool = True,
    before_reading: Callable[[], None] | None = None,
) -> Deris:
    """Builds the model of a run and freezes what does not train.

    New parameters are drawn from torch's global generator: set its seed first. Parameters have the run's precision; the
    optimizer keeps fp32 master copies.

    Args:
        config: the run.
        weights: False builds only the architecture, e.g. on `meta`; for the shipped run configs this needs no network.
        device: of the parameters; None = torch's default device.
        allow_module: False for a config that came with a checkpoint: it cannot make us import any class as backend.
        before_reading: a further check of the weight files, once their names and shapes are right and before they are read.

    Raises:
        ValueError: weights are missing or of another model, or the config has unknown names.
    """
    options, ways = config.loopback, config.ways
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.training.precision]
    on_device = contextlib.nullcontext() if device is None or weights else torch.device(device)
    with on_device:
        backend = resolve_backend(config.cognition.backend, allow_module=allow_module)
        if weights:  # check both parts before reading gigabytes of the first
            check_weight_files(config, allow_module=allow_module)
            if before_reading is not None:
                before_reading()
        cognition = backend.build(config.cognition, weights=weights, dtype=dtype)
        perception, query_decoder = build_perception(
            config.perception,
            rounds=options.rounds,
            num_queries=options.num_queries,
            weights=weights,
            dtype=dtype,
            fpn=ways.fpn,
            keep_query_feats=options.queries_start == "mask2former",
        )
        loopback = build_loopback(config, query_decoder, cognition_dim=cognition.feature_dim).to(dtype)
        if weights and not cognition.shares_images:
            order = getattr(config.cognition, "prompt_order", "image_first")
            say_once(
                f"cognition.backend={config.cognition.backend} does not share an image between its phrases and runs once per phrase"
                + (": cognition.prompt_order=text_first" if order == "text_first" else "")
            )
        model = Deris(cognition, None if config.loopback.structure == "cognition_centric" else perception, loopback)
    if config.cognition.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model if device is None else model.to(device)


def check_weight_files(config: RunConfig, *, allow_module: bool = True) -> None:
    """Checks files, names and shapes of both branches' base weights, reading headers only; arguments as `build_model`.

    Raises:
        ValueError: weights are missing or of another model.
    """
    resolve_backend(config.cognition.backend, allow_module=allow_module).check_weights(config.cognition)
    check_perception(config.perception, rounds=config.loopback.rounds, num_queries=config.loopback.num_queries)


def trainable_names(model: nn.Module) -> list[str]:
    """Returns the names of the trainable parameters, in the model's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
