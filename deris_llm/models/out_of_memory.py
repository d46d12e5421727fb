"""When memory runs out: the error says which config fields lower it, with what they are now."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import torch

from deris_llm.common.ranks import world_size
from deris_llm.config import RunConfig

_SIGNS = (
    "out of memory",  # CUDA, also inside another rank's error
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "DefaultCPUAllocator",
)
_ONEDNN = "could not create a primitive"  # all that it says of lacking memory; with more words it is another error


class DoesNotFitError(ValueError):
    """A run does not fit this machine as it is configured."""


@contextlib.contextmanager
def explains_out_of_memory(config: RunConfig, *, loading: bool = False) -> Iterator[None]:
    """Turns the error of who asked for memory into one that names the fields of this run; other errors pass.

    Args:
        config: the run.
        loading: what happens inside is the model's weights finding their place, not batches.

    Raises:
        DoesNotFitError: memory ran out inside, a GPU's or the machine's.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        names = [frame.filename.replace("\\", "/") for frame in frames]
        is_evaluating = any(
            "deris_llm/evaluation/" in name or name.endswith("deris_llm/serving/pipeline.py") for name in names
        )
        doing, expected, cures = "training", "a batch", training_cures(config)
        if loading:
            doing, expected, cures = "loading", "the model", loading_cures(config)
        elif is_evaluating:
            doing, cures = "evaluation", evaluation_cures(config)
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in reason:
            cures += host_cures(config, ranks=world_size())
        if doing != "evaluation":
            cures.append("`deris-llm plan` says what each choice needs, before it runs")
        raise DoesNotFitError(
            f"{doing} ran out of memory: expected {expected} to fit, got: {reason}\nWhat lowers it, the most effective first:\n"
            + "\n".join(f"  - {cure}" for cure in cures)
        ) from error


def _reason(error: Exception) -> str | None:
    """The line of an error that says how memory ran out; None where it did not."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if line.endswith(_ONEDNN):
            return f"{line.strip()} (oneDNN, which says no more: memory is the usual reason)"
        if any(sign in line for sign in _SIGNS):
            return line.strip()
    if isinstance(
        error, MemoryError
    ):  # of numpy, Pillow, Python itself; from a loader process its traceback comes along
        return lines[-1].strip() if lines else "MemoryError (of this machine, not a GPU)"
    return lines[0].strip() if lines and isinstance(error, torch.OutOfMemoryError) else None


def training_cures(config: RunConfig) -> list[str]:
    """Fields that lower the memory of a training step and have room to, the most effective first."""
    data, training, cognition = config.data, config.training, config.cognition
    cures = []
    if not cognition.gradient_checkpointing:
        cures.append("cognition.gradient_checkpointing=true (now false): recomputes the image-text model's layers")
    cures += _quantization_cure(config)
    if training.images_per_device > 1:
        cures.append(
            f"training.images_per_device={training.images_per_device // 2} (now {training.images_per_device}), with "
            f"training.accumulation={2 * training.accumulation} for the same step"
        )
    if data.phrases_per_image > 1:
        cures.append(f"data.phrases_per_image={data.phrases_per_image // 2} (now {data.phrases_per_image})")
    cures += _token_cure(config)
    if not config.perception.activation_checkpointing and config.loopback.structure != "cognition_centric":
        cures.append("perception.activation_checkpointing=true (now false): recomputes the pixel decoder")
    cures.append(f"criterion.num_points (now {config.criterion.num_points}): points at which masks are compared")
    return [*cures, _ZERO_CURE]


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
    return [*cures, *_token_cure(config)]


def killed_message(config: RunConfig, *, ranks: int) -> str:
    """What to say of a rank that ended by signal 9: Linux kills where the machine's memory runs out, and nobody raises.

    Args:
        config: the run, in training.
        ranks: processes that share the machine.
    """
    cures = host_cures(config, ranks=ranks)
    if not torch.cuda.is_available():
        cures = training_cures(config) + cures
    return (
        "training ended: expected the ranks to finish, got one that was killed (signal 9), as the system does where the "
        "machine's memory runs out. What lowers it, the most effective first:\n"
        + "\n".join(f"  - {cure}" for cure in cures)
    )


def loading_cures(config: RunConfig) -> list[str]:
    """What lowers the memory that the weights alone take, the most effective first."""
    cures = _quantization_cure(config)
    if config.training.precision == "fp32":
        cures.append("training.precision=bf16 (now fp32): weights of half the size")
    return [*cures, f"in training, {_ZERO_CURE}"]


def host_cures(config: RunConfig, *, ranks: int) -> list[str]:
    """What lowers the memory of the machine, which is not that of its GPUs.

    Args:
        config: the run.
        ranks: processes that share the machine.
    """
    cures = []
    if ranks > 1:
        cures.append(
            f"fewer ranks on this machine (--gpus, now {ranks}): each has the model and its batches for itself"
        )
    if config.data.num_workers:
        now = config.data.num_workers
        cures.append(
            f"data.num_workers={now // 2} (now {now}): loader processes of a rank, each with batches of its own"
        )
    if config.evaluation.compare_workers:
        cures.append(f"evaluation.compare_workers=0 (now {config.evaluation.compare_workers})")
    return cures


_ZERO_CURE = (
    "--deepspeed ds_configs/zero3.json, or zero3_offload.json: weights are spread over the GPUs, or kept on the host"
)


def _quantization_cure(config: RunConfig) -> list[str]:
    cognition = config.cognition
    if cognition.backend in ("qwen2_ov", "qwen_vl") and cognition.quantization == "none" and cognition.tuning == "lora":
        return ["cognition.quantization=nf4 (now none): QLoRA, the language model's weights in 4 bits (on a GPU)"]
    return []


def _token_cure(config: RunConfig) -> list[str]:
    if config.cognition.backend in ("beit3", "vilt", "bert"):  # no language models: they refuse it
        return []
    now = config.data.max_tokens_per_image or "no limit"
    return [f"data.max_tokens_per_image (now {now}): tokens behind one copy of an image"]
