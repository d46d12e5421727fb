"""Faster inference on CPUs: Swin without padded windows; on AMD CPUs, linear layers through oneDNN instead of MKL.

PyTorch multiplies float32 matrices with MKL, which leaves the AVX-512 units of AMD processors idle. oneDNN is more than
twice as fast there (236 against 104 GFLOP/s on one core of an EPYC). On Intel processors both are about equal, and on an
EPYC without AVX-512 MKL is faster (geometric mean 1.2 times over 15 sizes), so the speed is measured first. Results are the
same up to rounding.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

MIN_WEIGHTS = 2**14
"""Smaller layers are not replaced: converting their tensors costs what the product saves."""
WORTHWHILE = 1.2
MEASURED_SIZES = ((128, 768, 768), (256, 256, 1024), (256, 1024, 256), (128, 384, 1536))
"""Tokens, inputs and outputs of the timed layers: attention, two feed-forward layers of the pixel decoder, one of Swin."""


@dataclass(frozen=True)
class LinearTimes:
    """CPU time that the layers of `MEASURED_SIZES` take through both libraries."""

    mkl_ms: float
    onednn_ms: float

    @property
    def is_onednn_faster(self) -> bool:
        """Whether oneDNN is at least `WORTHWHILE` times faster."""
        return self.mkl_ms > WORTHWHILE * self.onednn_ms

    @property
    def library(self) -> str:
        """The one that is used."""
        return "oneDNN" if self.is_onednn_faster else "MKL"

    def __str__(self) -> str:
        """Names the library that is used, and why."""
        return (
            f"{self.library} ({len(MEASURED_SIZES)} layers took {self.mkl_ms:.1f} CPU ms "
            f"through MKL, {self.onednn_ms:.1f} through oneDNN; oneDNN is used if it is {WORTHWHILE} times faster)"
        )


class OneDnnLinear(nn.Module):
    """A linear layer for inference with its tensors in oneDNN's layout (torch's `to_mkldnn`)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", source.weight.detach().to_mkldnn())
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().to_mkldnn())

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps (..., C_in) to (..., C_out), float32."""
        return F.linear(hidden.to_mkldnn(), self.weight, self.bias).to_dense()


def for_cpu_inference(model: nn.Module) -> nn.Module:
    """Replaces Swin's layers of a model on the CPU, and its linear layers if oneDNN is faster here; logs the choice.

    Args:
        model: in evaluation mode; it cannot be trained or saved afterwards.

    Returns:
        the same model.
    """
    if next(model.parameters()).device.type != "cpu":
        return model
    from deris_llm.models.perception.swin_windows import use_indexed_swin_layers  # imports transformers

    use_indexed_swin_layers(model)
    times = linear_times()
    if times.is_onednn_faster:
        use_onednn_linears(model)
    logger.info("linear layers run through %s", times)
    return model


def use_onednn_linears(model: nn.Module) -> int:
    """Replaces every float32 linear layer of at least `MIN_WEIGHTS` weights.

    Args:
        model: in evaluation mode, on the CPU.

    Returns:
        the number of replaced layers.
    """
    assert not model.training, "oneDNN's linear layers have no gradient"
    number = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # Not subclasses: nn.MultiheadAttention reads the weights of its own and never calls it.
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.numel() >= MIN_WEIGHTS:
                setattr(parent, name, OneDnnLinear(child))
                number += 1
    return number


@functools.cache
@torch.inference_mode()
def linear_times() -> LinearTimes:
    """Times both libraries on this machine; takes about 0.1 s, once per process. Without oneDNN its time is infinite."""
    if not torch.backends.mkldnn.is_available():
        return LinearTimes(mkl_ms=0.0, onednn_ms=float("inf"))
    runs: list[Callable[[], object]] = []
    for num_tokens, num_inputs, num_outputs in MEASURED_SIZES:
        plain, tokens = nn.Linear(num_inputs, num_outputs), torch.randn(num_tokens, num_inputs)
        runs += [functools.partial(plain, tokens), functools.partial(OneDnnLinear(plain), tokens)]
    seconds = best_seconds(runs)
    return LinearTimes(mkl_ms=1e3 * sum(seconds[::2]), onednn_ms=1e3 * sum(seconds[1::2]))


def best_seconds(
    runs: Sequence[Callable[[], object]], *, repeats: int = 3, clock: Callable[[], float] = time.thread_time
) -> list[float]:
    """Returns the shortest time of each run.

    Runs take turns, so that a slow moment of the machine meets all of them. By default the clock counts the CPU time of
    this thread, because wall time includes other processes: with it, 14 of 60 decisions were wrong on a busy machine.

    Args:
        runs: each is executed once before it is timed.
        repeats: timed executions of each.
        clock: returns seconds.
    """
    for run in runs:
        run()
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = clock()
            run()
            best[i] = min(best[i], clock() - start)
    return best
