"""Collectives between the ranks of a run. All of them also work in a single process without a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """Another rank failed and reports why; this rank stops because of it."""


def world_size() -> int:
    """Returns the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns the rank of this process, 0..world_size - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def reduced(value: Tensor, operation: str = "sum") -> Tensor:
    """Reduces a tensor over all ranks, in place, and returns it.

    Args:
        value: same shape on every rank.
        operation: ``sum`` or ``max``.
    """
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
    return value


def gathered(value: Any) -> list[Any]:
    """Returns every rank's value, by rank, on every rank. Values must be picklable."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: Tensor) -> bool:
    """Returns whether a boolean scalar is true on at least one rank. Costs a small collective and waits for the device."""
    return bool(reduced(flag.to(torch.int32), "max").item())


def on_first_rank(action: Callable[[], T]) -> T:
    """Runs an action on rank 0 and returns its result, or raises its exception, on every rank.

    So no rank continues after rank 0 failed to write a file, and none waits forever.

    Args:
        action: its result must be picklable.
    """
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # raised on every rank below
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
