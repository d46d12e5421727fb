"""When memory runs out: the error says which config fields lower it, with what they are now."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import torch

from deris_llm.config import RunConfig

_SIGNS = ("out of memory", "DefaultCPUAllocator")  # of CUDA, also inside another rank's error; of the CPU


class DoesNotFitError(ValueError):
    """A run does not fit this machine as it is configured."""


@contextlib.contextmanager
def explains_out_of_memory(config: RunConfig) -> Iterator[None]:
    """Turns torch's error into one that names the fields of this run; other errors pass.

    Raises:
        DoesNotFitError: memory ran out inside.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        names = [frame.filename.replace("\\", "/") for frame in frames]
        is_evaluating = any("deris_llm/evaluation/" in name or name.endswith("deris_llm/pipeline.py") for name in names)
        cures = evaluation_cures(config) if is_evaluating else training_cures(config)
        raise DoesNotFitError(
            f"{'evaluation' if is_evaluating else 'training'} ran out of memory: expected a batch to fit, got: "
            f"{str(error).strip().splitlines()[0]}\nWhat lowers it, the most effective first:\n"
            + "\n".join(f"  - {cure}" for cure in cures)
        ) from error


def training_cures(config: RunConfig) -> list[str]:
    """Fields that lower the memory of a training step and have room to, the most effective first."""
    data, training, cognition = config.data, config.training, config.cognition
    cures = []
    if not cognition.gradient_checkpointing:
        cures.append("cognition.gradient_checkpointing=true (now false): recomputes the image-text model's layers")
    if cognition.backend in ("qwen2_ov", "qwen_vl") and cognition.quantization == "none" and cognition.tuning == "lora":
        cures.append("cognition.quantization=nf4 (now none): QLoRA, the language model's weights in 4 bits")
    if training.images_per_device > 1:
        cures.append(
            f"training.images_per_device={training.images_per_device // 2} (now {training.images_per_device}), with "
            f"training.accumulation={2 * training.accumulation} for the same step"
        )
    if data.phrases_per_image > 1:
        cures.append(f"data.phrases_per_image={data.phrases_per_image // 2} (now {data.phrases_per_image})")
    cures.append(_token_cure(config))
    if not config.perception.activation_checkpointing:
        cures.append("perception.activation_checkpointing=true (now false): recomputes the pixel decoder")
    cures.append(f"criterion.num_points (now {config.criterion.num_points}): points at which masks are compared")
    cures.append(
        "--deepspeed ds_configs/zero3.json, or zero3_offload.json: weights are spread over the GPUs, or kept on the host"
    )
    return [*cures, "`deris-llm plan` says what each choice needs, before it runs"]


def evaluation_cures(config: RunConfig) -> list[str]:
    """Fields that lower the memory of an evaluation batch and have room to, the most effective first."""
    evaluation = config.evaluation
    cures = []
    if evaluation.images_per_device > 1:
        cures.append(
            f"evaluation.images_per_device={evaluation.images_per_device // 2} (now {evaluation.images_per_device})"
        )
    if evaluation.max_phrases_per_batch > 1:
        cures.append(
            f"evaluation.max_phrases_per_batch={evaluation.max_phrases_per_batch // 2} (now {evaluation.max_phrases_per_batch})"
        )
    return [*cures, _token_cure(config)]


def _token_cure(config: RunConfig) -> str:
    now = config.data.max_tokens_per_image or "no limit"
    return f"data.max_tokens_per_image (now {now}): tokens behind one copy of an image (qwen2_ov, qwen_vl)"
