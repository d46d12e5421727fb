"""Errors for exhausted memory that list the settings which reduce it, with their present values."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence

import torch

from deris_llm.common.ranks import world_size
from deris_llm.config import RunConfig

_SIGNS = (
    "out of memory",  # CUDA, also inside another rank's error
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "DefaultCPUAllocator",
)
_WORKER = "DataLoader worker (pid"  # killed by the system, or without shared memory
_ONEDNN = "could not create a primitive"  # its whole message if memory runs out; with more words it is another error


class DoesNotFitError(ValueError):
    """A run does not fit in the memory of this machine as it is configured."""


@contextlib.contextmanager
def explains_out_of_memory(config: RunConfig, *, loading: bool = False) -> Iterator[None]:
    """Replaces an out-of-memory error by one that names settings of this run; other errors pass.

    Args:
        config: the run.
        loading: while loading weights, as opposed to processing batches.

    Raises:
        DoesNotFitError: the memory of a GPU or of the machine ran out inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        names = [frame.filename.replace("\\", "/") for frame in traceback.extract_tb(error.__traceback__)]
        is_evaluating = any(
            "deris_llm/evaluation/" in name or name.endswith("deris_llm/serving/pipeline.py") for name in names
        )
        doing, expected, cures = "training", "a batch", training_cures(config)
        if loading:
            doing, expected, cures = "loading", "the model", loading_cures(config)
        elif is_evaluating:
            doing, cures = "evaluation", evaluation_cures(config)
        if _WORKER in reason:
            cures = host_cures(config, ranks=world_size()) + cures
            cures.append("more shared memory, where this runs in a container: docker run --shm-size 8g or --ipc host")
        elif isinstance(error, MemoryError) or "DefaultCPUAllocator" in reason:
            cures += host_cures(config, ranks=world_size())
        if doing != "evaluation":
            cures.append("`deris-llm plan` says what each choice needs, before it runs")
        raise DoesNotFitError(
            f"{doing} ran out of memory: expected {expected} to fit, got: {reason}\n{_advice(cures)}"
        ) from error


def _reason(error: Exception) -> str | None:
    """Returns the line of an error that says how memory ran out; None if it did not."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if line.endswith(_ONEDNN):
            return f"{line.strip()} (oneDNN gives no reason; it is usually memory)"
        if _WORKER in line:
            return f"{line.strip()} (the system kills a process when the machine's memory runs out)"
        if any(sign in line for sign in _SIGNS):
            return line.strip()
    if isinstance(error, MemoryError):  # of numpy, Pillow or Python; from a loader process it includes a traceback
        return lines[-1].strip() if lines else "MemoryError (of this machine, not a GPU)"
    return lines[0].strip() if lines and isinstance(error, torch.OutOfMemoryError) else None


def training_cures(config: RunConfig) -> list[str]:
    """Returns the settings that reduce the memory of a training step and are not at their minimum, most effective first."""
    training, cognition = config.training, config.cognition
    cures = []
    if not cognition.gradient_checkpointing:
        cures.append("cognition.gradient_checkpointing=true (now false): recomputes the image-text model's layers")
    cures += _quantization_cure(config)
    cures += [
        f"{cure}, with training.accumulation={2 * training.accumulation} for the same step"
        for cure in _halved("training.images_per_device", training.images_per_device)
    ]
    cures += _halved("data.phrases_per_image", config.data.phrases_per_image)
    cures += _token_cure(config)
    if not config.perception.activation_checkpointing and config.loopback.structure != "cognition_centric":
        cures.append("perception.activation_checkpointing=true (now false): recomputes the pixel decoder")
    cures.append(f"criterion.num_points (now {config.criterion.num_points}): points at which masks are compared")
    return [*cures, _ZERO_CURE]


def evaluation_cures(config: RunConfig) -> list[str]:
    """Returns the settings that reduce the memory of an evaluation batch and are not at their minimum."""
    evaluation = config.evaluation
    return [
        *_halved("evaluation.images_per_device", evaluation.images_per_device),
        *_halved("evaluation.max_phrases_per_batch", evaluation.max_phrases_per_batch),
        *_token_cure(config),
    ]


def loading_cures(config: RunConfig) -> list[str]:
    """Returns the settings that reduce the memory of the weights alone, most effective first."""
    cures = _quantization_cure(config)
    if config.training.precision == "fp32":
        cures.append("training.precision=bf16 (now fp32): weights of half the size")
    return [*cures, f"in training, {_ZERO_CURE}"]


def host_cures(config: RunConfig, *, ranks: int) -> list[str]:
    """Returns the settings that reduce the memory of the machine, as opposed to that of its GPUs.

    Args:
        config: the run.
        ranks: processes that share the machine.
    """
    cures = []
    if ranks > 1:
        cures.append(f"fewer ranks on this machine (--gpus, now {ranks}): each has its own copy of model and batches")
    if workers := config.data.num_workers:
        cures.append(f"data.num_workers={workers // 2} (now {workers}): each loader process of a rank holds batches")
    if config.evaluation.compare_workers:
        cures.append(f"evaluation.compare_workers=0 (now {config.evaluation.compare_workers})")
    return cures


def killed_message(config: RunConfig, *, ranks: int) -> str:
    """Returns the error for a rank that ended by signal 9: Linux kills processes when the machine's memory runs out.

    Args:
        config: the run, in training.
        ranks: processes that share the machine.
    """
    cures = host_cures(config, ranks=ranks)
    if not torch.cuda.is_available():
        cures = training_cures(config) + cures
    return (
        "training ended: expected all ranks to finish, got one that was killed (signal 9), which the system does when the "
        f"machine's memory runs out.\n{_advice(cures)}"
    )


def _advice(cures: Sequence[str]) -> str:
    return "\n".join(["What reduces it, most effective first:", *(f"  - {cure}" for cure in cures)])


def _halved(field: str, now: int) -> list[str]:
    return [f"{field}={now // 2} (now {now})"] if now > 1 else []


_ZERO_CURE = "--deepspeed ds_configs/zero3.json, or zero3_offload.json: weights are partitioned over the GPUs, or kept on the host"


def _quantization_cure(config: RunConfig) -> list[str]:
    cognition = config.cognition
    if cognition.backend in ("qwen2_ov", "qwen_vl") and cognition.quantization == "none" and cognition.tuning == "lora":
        return ["cognition.quantization=nf4 (now none): QLoRA, the language model's weights in 4 bits (on a GPU)"]
    return []


def _token_cure(config: RunConfig) -> list[str]:
    if config.cognition.backend in ("beit3", "vilt", "bert"):  # not causal language models: they refuse it
        return []
    now = config.data.max_tokens_per_image or "no limit"
    return [f"data.max_tokens_per_image (now {now}): tokens of an image and the phrases that share it"]
