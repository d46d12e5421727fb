"""Faster inference on AMD CPUs: linear layers through oneDNN instead of MKL.

PyTorch multiplies float32 matrices with MKL, which leaves the AVX-512 units of AMD processors idle. oneDNN is more than
twice as fast there (236 against 104 GFLOP/s on one core of an EPYC). On Intel processors both are about equal, so the
speed is measured first. Results are the same up to rounding.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

MIN_WEIGHTS = 2**14
"""Smaller layers are not replaced: converting their tensors costs what the product saves."""
WORTHWHILE = 1.2


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
    """Replaces the linear layers of a model on the CPU if oneDNN is faster on this machine.

    Args:
        model: in evaluation mode; it cannot be trained or saved afterwards.

    Returns:
        the same model.
    """
    if next(model.parameters()).device.type == "cpu" and is_onednn_faster():
        number = use_onednn_linears(model)
        logger.info("%d linear layers run through oneDNN, which is faster than MKL on this processor", number)
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
def is_onednn_faster() -> bool:
    """Measures whether oneDNN is at least `WORTHWHILE` times faster than MKL here; takes about 20 ms, once."""
    if not torch.backends.mkldnn.is_available():
        return False
    plain = nn.Linear(768, 768)
    packed = OneDnnLinear(plain)
    tokens = torch.randn(256, 768)
    return _best_seconds(lambda: plain(tokens)) > WORTHWHILE * _best_seconds(lambda: packed(tokens))


def _best_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
