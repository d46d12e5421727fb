"""The state of a run: the optimizer's moments and master weights, its schedule and random states, saved and restored.

Parameters and moments are stored whole, whatever ZeRO stage and number of ranks a run has. What a rank holds of a tensor is a
`_Fragment` of it; fragments are gathered to save and filled to restore.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deris_llm.checkpoints.layout import OPTIMIZER_FILE, STATE_FILE, TRAINABLE_FILE, CheckpointError
from deris_llm.checkpoints.load import opened
from deris_llm.common.ranks import gathered, rank, reduced, world_size
from deris_llm.config import RunConfig

# -- schedule and random states --------------------------------------------------------------------------------------


def scheduler_state(scheduler: torch.optim.lr_scheduler.LRScheduler, config: RunConfig) -> dict[str, Any]:
    """Returns the content of ``state.pt``. A collective: every rank calls it."""
    return {
        "scheduler": scheduler.state_dict(),
        "images_per_step": _images_per_step(config),
        "random": gathered(_random_state()),
    }


def read_state(folder: Path) -> dict[str, Any]:
    """Reads ``state.pt``.

    Raises:
        CheckpointError: it is damaged (checkpoints of earlier versions have no checksums that detect this).
    """
    try:
        return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder / STATE_FILE}: expected the state of a run, got {type(error).__name__}: {str(error)[:200]}. Copy the file "
            "again, or use another checkpoint"
        ) from error


def restore_training_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: RunConfig,
) -> None:
    """Restores optimizer, master weights and schedule. `load.restore_weights` is called before the engine exists.

    Raises:
        CheckpointError: another number of images per step, or the file lacks moments of the optimizer.
    """
    state = read_state(folder)
    if state["images_per_step"] != _images_per_step(config):
        raise CheckpointError(
            f"{folder}: expected {state['images_per_step']} images per step as in the saved run, got {_images_per_step(config)} = "
            f"training.images_per_device {config.training.images_per_device} x training.accumulation {config.training.accumulation} x "
            f"{world_size()} ranks; choose the first two so that the product is the same"
        )
    _restore_moments(model, optimizer, folder)
    scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(base_optimizer(optimizer).param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def restore_random_state(folder: Path) -> None:
    """Restores this rank's random states of Python, NumPy and torch. New ranks keep their fresh RNG state."""
    states = read_state(folder)["random"]
    if rank() >= len(states):
        return
    state = states[rank()]
    random.setstate(state["python"])
    np.random.set_state(("MT19937", state["numpy"]["keys"].numpy().astype(np.uint32), *state["numpy"]["rest"]))
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _random_state() -> dict[str, Any]:
    state: Any = np.random.get_state()
    _, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": rest},
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _images_per_step(config: RunConfig) -> int:
    """Returns how many images one optimizer step sees over all ranks."""
    return config.training.images_per_device * config.training.accumulation * world_size()


# -- parameters and moments ------------------------------------------------------------------------------------------


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns every trainable parameter by name: whole, float32, on the CPU, on rank 0 (empty on the others).

    Under DeepSpeed with bf16 these are the optimizer's master weights. A collective: every rank calls it.
    """
    trainable = _trainable(model)
    return _whole(trainable, [_fragment(parameter) for parameter in trainable.values()])


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, dict[str, Tensor]]:
    """Returns the optimizer's step count and its moments as ``MOMENT/NAME``, whole, on rank 0 (empty on the others)."""
    base = base_optimizer(optimizer)
    steps = {float(entry["step"]) for entry in base.state.values() if entry}
    if len(steps) != 1:
        raise CheckpointError(
            f"optimizer state: expected one common step count, got {sorted(steps)}; save after an optimizer step"
        )
    trainable = _trainable(model)
    moments = {}
    for moment in moment_names(base):
        whole = _whole(trainable, [_fragment(parameter, base, moment) for parameter in trainable.values()])
        moments.update({f"{moment}/{name}": values for name, values in whole.items()})
    return steps.pop(), moments


def moment_names(base: torch.optim.Optimizer) -> tuple[str, ...]:
    """Returns the names of the moments that torch's Adam or AdamW keeps for a parameter."""
    largest = ("max_exp_avg_sq",) if base.defaults["amsgrad"] else ()
    return ("exp_avg", "exp_avg_sq", *largest)


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Returns the torch optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _restore_moments(model: nn.Module, optimizer: Any, folder: Path) -> None:
    with opened(folder / TRAINABLE_FILE) as file:
        masters = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    with opened(folder / OPTIMIZER_FILE) as file:
        moments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        step = float(file.metadata()["step"])
    base, trainable = base_optimizer(optimizer), _trainable(model)
    names = moment_names(base)
    missing = [f"{moment}/{name}" for moment in names for name in trainable if f"{moment}/{name}" not in moments]
    if missing:
        listed = "\n".join(f"  - {name}" for name in missing[:10])
        raise CheckpointError(
            f"{folder / OPTIMIZER_FILE}: expected {', '.join(names)} of every trainable parameter, got a file without "
            f"{len(missing)} of them\n{listed}\nResume from another checkpoint, or start a new run from these weights with "
            f"training.start_from={folder}"
        )
    # DeepSpeed creates the moments at the first step; a resumed run needs them before.
    for flat in _optimizer_tensors(optimizer):
        base.state[flat] = {
            "step": torch.tensor(step, device=flat.device if base.defaults.get("fused") else "cpu"),
            **{moment: torch.zeros_like(flat, memory_format=torch.preserve_format) for moment in names},
        }
    for name, parameter in trainable.items():
        for moment in (None, *names):
            value = masters[name] if moment is None else moments[f"{moment}/{name}"]
            _fill(_fragment(parameter, base, moment), value)


def _optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """Returns the tensors that the torch optimizer updates: the parameters, or DeepSpeed's flat partitions of them."""
    while hasattr(optimizer, "optimizer"):
        for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # ZeRO-3; ZeRO-1 and 2
            if hasattr(optimizer, attribute):
                return list(getattr(optimizer, attribute))
        optimizer = optimizer.optimizer
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class _Fragment(NamedTuple):
    """The values that this rank holds of a parameter's master weight, or of one of its moments."""

    values: Tensor  # a view: writing into it changes the optimizer
    start: int  # of the values in the flattened parameter; there may be padding past its end
    is_partition: bool  # the other ranks hold other parts, not copies


def _fragment(
    parameter: nn.Parameter, base: torch.optim.Optimizer | None = None, moment: str | None = None
) -> _Fragment:
    """Finds a master weight (``moment`` None), or a moment in the torch optimizer ``base``.

    DeepSpeed's `safe_get_full_optimizer_state` is not used under ZeRO-1 and 2: it is linked when the first group has taken
    its first step, so it never finds the moments of the other groups (0.19.8), nor those of a resumed run.
    """
    if hasattr(parameter, "_z3_optimizer"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if moment is None:
            local = safe_get_local_fp32_param(parameter)
        else:
            local = safe_get_local_optimizer_state(parameter, moment)
        return _Fragment(local, rank() * local.numel(), is_partition=True)
    if hasattr(parameter, "_hp_mapping"):
        mapping: Any = getattr(parameter, "_hp_mapping")  # noqa: B009 - DeepSpeed sets it
        if mapping is None:  # another rank holds all of it
            return _Fragment(torch.empty(0, device=parameter.device), 0, is_partition=True)
        start = mapping.lp_fragment_address.start
        if moment is None:
            return _Fragment(mapping.hp_fragment, start, is_partition=True)
        assert base is not None, "moments are in the optimizer"
        flat = base.param_groups[mapping.param_group_index]["params"][0]
        at = mapping.hp_fragment_address
        return _Fragment(base.state[flat][moment].narrow(0, at.start, at.numel), start, is_partition=True)
    if moment is None:
        return _Fragment(parameter.data, 0, is_partition=False)
    assert base is not None, "moments are in the optimizer"
    return _Fragment(base.state[parameter][moment], 0, is_partition=False)


def _whole(parameters: Mapping[str, nn.Parameter], fragments: Sequence[_Fragment]) -> dict[str, Tensor]:
    """Gathers all ranks' fragments: in the parameters' shapes, float32, on the CPU, on rank 0 (empty on the others).

    This is one collective for all parameters: thousands of small ones take seconds where ranks share cores.
    """
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in parameters.items()}
    # Ranks communicate on this device; offloaded fragments are on the CPU.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), dtype=torch.float32, device=device)
    views = flat.split([shape.numel() for shape in shapes.values()])
    for view, fragment in zip(views, fragments, strict=True):
        if fragment.is_partition or rank() == 0:
            inside = view[fragment.start : fragment.start + fragment.values.numel()]
            inside.copy_(fragment.values.detach().flatten()[: inside.numel()])
    reduced(flat)
    if rank() != 0:
        return {}
    return {name: view.view(shapes[name]).cpu() for name, view in zip(shapes, views, strict=True)}


def _fill(fragment: _Fragment, whole: Tensor) -> None:
    """Copies a fragment's part of a whole tensor; what is past its end (all, of a tensor with fewer values than ranks) is 0."""
    number = fragment.values.numel()
    source = whole.flatten()[fragment.start : fragment.start + number]
    fragment.values.detach().copy_(F.pad(source, (0, number - source.numel())).view_as(fragment.values))
