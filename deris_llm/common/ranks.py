"""What the ranks of a run say to each other. All of it also works in a single process without a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """Another rank failed, and says why; this one stops because of it."""


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0..world_size - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def reduced(value: Tensor, operation: str = "sum") -> Tensor:
    """All ranks' values, element by element.

    Args:
        value: same shape on every rank; changed in place.
        operation: ``sum`` or ``max``.

    Returns:
        ``value``, on every rank.
    """
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
    return value


def gathered(value: Any) -> list[Any]:
    """Every rank's picklable value, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: Tensor) -> bool:
    """Whether a boolean scalar is true on at least one rank; one small collective and a wait for the device."""
    return bool(reduced(flag.to(torch.int32), "max").item())


def on_first_rank(action: Callable[[], T]) -> T:
    """Runs an action on rank 0 alone; its result, or its exception, is that of all ranks.

    No rank goes on as if a file were written that rank 0 failed to write, and none waits for ever.

    Args:
        action: its result must be picklable.

    Returns:
        the result, on every rank.
    """
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # noqa: BLE001 - handed to every rank below
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
