"""Multi-scale deformable attention of the pixel decoder, in the formulation that is fastest where it runs.

I images, S cells of all levels together, A heads, V levels, K points, C channels.

Each head of each cell reads K points of every level bilinearly and sums them with its attention weights: a weighted sum
of 4 K V rows of a table of cells. On the CPU that is `torch.nn.functional.embedding_bag`, whose kernel reads whole rows
(C / A channels lie side by side); `grid_sample`, as transformers has it, reads channel by channel. Both give the same
numbers up to rounding, gradients included (`scripts/bench_perception.py` has the times).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
)


class DeformableAttention(nn.Module):
    """Takes the place of transformers' module in an encoder layer, with its weights under the same names."""

    def __init__(self, source: Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention) -> None:
        super().__init__()
        self.n_heads = source.n_heads
        self.n_levels = source.n_levels
        self.n_points = source.n_points
        self.sampling_offsets = source.sampling_offsets
        self.attention_weights = source.attention_weights
        self.value_proj = source.value_proj
        self.output_proj = source.output_proj

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        reference_points: Tensor,
        spatial_shapes_list: Sequence[tuple[int, int]],
        **_not_needed: object,
    ) -> tuple[Tensor, None]:
        """Attends; called by transformers' encoder layer, which also passes masks that hide nothing.

        Args:
            hidden_states: float (I, S, C), cells of all levels, coarse level first, row by row.
            position_embeddings: float (1 or I, S, C), added to the queries.
            reference_points: float (1 or I, S, V, 2): each cell's own centre, (x, y) in [0, 1], on every level.
            spatial_shapes_list: V sizes (h, w); the sum of h * w is S.

        Returns:
            float (I, S, C), and None for the attention weights that nobody asks for.
        """
        num_images, num_cells, _ = hidden_states.shape
        queries = hidden_states + position_embeddings
        by_head = (num_images, num_cells, self.n_heads)
        by_point = (*by_head, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(queries).view(*by_point, 2)
        weights = self.attention_weights(queries).view(*by_head, -1).softmax(dim=-1).view(by_point)
        sizes = torch.tensor([(w, h) for h, w in spatial_shapes_list], dtype=torch.float32, device=offsets.device)
        # In cells of each level; the centre of the first cell is 0. In float32: bf16 cannot tell neighbouring cells apart.
        points = (reference_points.float() * sizes - 0.5)[:, :, None, :, None, :] + offsets
        values = self.value_proj(hidden_states).view(num_images, num_cells, self.n_heads, -1)
        sample = sample_by_rows if values.device.type == "cpu" else sample_by_grid
        return self.output_proj(sample(values, spatial_shapes_list, points, weights)), None


def sample_by_rows(values: Tensor, sizes_hw: Sequence[tuple[int, int]], points: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinearly read points, as bags of table rows; image by image, which stays in the cache.

    Args:
        values: float (I, S, A, C / A).
        sizes_hw: V sizes (h, w).
        points: float (I, S, A, V, K, 2), (x, y) in cells of the level, 0 = centre of the first; outside reads 0.
        weights: float (I, S, A, V, K).

    Returns:
        float (I, S, C), of the dtype of `values`.
    """
    summed = [
        _image_by_rows(*image, sizes_hw) for image in zip(values.float(), points.float(), weights.float(), strict=True)
    ]
    return torch.stack(summed).to(values.dtype)


def _image_by_rows(values: Tensor, points: Tensor, weights: Tensor, sizes_hw: Sequence[tuple[int, int]]) -> Tensor:
    """Of one image. Each level gets a border of zero cells, so that no point needs to be told apart from others.

    Index arithmetic is done in float32 on tensors of full size, which is several times faster than integers that are
    broadcast; it is exact below 2^24 rows.
    """
    num_cells, num_heads, _, num_points = weights.shape
    widths, heights = [w for _, w in sizes_hw], [h for h, _ in sizes_hw]
    padded_sizes = [(h + 2) * (w + 2) for h, w in sizes_hw]
    starts = [sum(padded_sizes[:level]) for level in range(len(sizes_hw))]
    beyond = max(widths) + 4  # read with weight 0 by points on the last border
    assert (sum(padded_sizes) + beyond) * num_heads < 2**24, "row numbers must be exact in float32"
    levels = values.flatten(1).split([h * w for h, w in sizes_hw])
    bordered = [
        F.pad(v.view(h, w, -1), (0, 0, 1, 1, 1, 1)).flatten(0, 1) for v, (h, w) in zip(levels, sizes_hw, strict=True)
    ]
    table = torch.cat([*bordered, values.new_zeros(beyond, bordered[0].shape[1])]).view(-1, values.shape[-1])

    def of_level(per_level: Sequence[int]) -> Tensor:  # (S A, V K)
        row = torch.tensor(per_level, dtype=torch.float32, device=values.device).repeat_interleave(num_points)
        return row.expand(num_cells * num_heads, -1).contiguous()

    x, y = (axis.reshape(num_cells * num_heads, -1) for axis in points.unbind(dim=-1))
    x = x.clamp(min=-1).minimum(of_level(widths)) + 1  # 0 = the border
    y = y.clamp(min=-1).minimum(of_level(heights)) + 1
    with torch.no_grad():
        # A point that is NaN, in a diverged run, reads the border; its shares stay NaN, and so the result.
        left, top = x.floor().nan_to_num_(), y.floor().nan_to_num_()
        row_length = of_level([(w + 2) * num_heads for w in widths])
        heads = torch.arange(num_heads, dtype=torch.float32, device=values.device).repeat(num_cells)[:, None]
        upper_left = torch.addcmul(of_level([s * num_heads for s in starts]) + heads, top, row_length)
        upper_left = upper_left.add(left, alpha=num_heads).to(torch.int32)
        lower_left = upper_left + row_length.to(torch.int32)
    right_share, lower_share = x - left, y - top
    weights = weights.reshape(num_cells * num_heads, -1)
    lower = weights * lower_share
    upper = weights - lower
    upper_right, lower_right = upper * right_share, lower * right_share
    rows = torch.cat([upper_left, upper_left + num_heads, lower_left, lower_left + num_heads], dim=1)
    shares = torch.cat([upper - upper_right, upper_right, lower - lower_right, lower_right], dim=1)
    return _bags(table, rows, shares).view(num_cells, -1)


def _bags(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sums of chosen rows of a table, float (B, c), with gradients for table and weights.

    Args:
        table: float32 (R, c), on the CPU.
        rows: int32 (B, N), in 0..R-1.
        weights: float32 (B, N).
    """
    return _Bags.apply(table, rows, weights)  # pyright: ignore[reportReturnType]


class _Bags(torch.autograd.Function):
    """`embedding_bag` with a backward pass of its own: torch's sorts all rows and calls BLAS for each; this one does neither.

    The bags are the rows of a sparse matrix, W (B, R): the result is W table, the table's gradient is W' gradient, and
    the weights' is gradient table' where W has its entries.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, rows, weights)
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        table, rows, weights = ctx.saved_tensors
        shape, starts = (len(rows), len(table)), torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=torch.int32)
        gradient, entries = gradient.contiguous(), rows.flatten()
        table_gradient = weights_gradient = None
        if ctx.needs_input_grad[0]:
            matrix = csr_array((weights.numpy().ravel(), entries.numpy(), starts.numpy()), shape=shape)
            table_gradient = torch.from_numpy(matrix.T @ gradient.numpy())
        if ctx.needs_input_grad[2]:
            _accept_sparse_csr()
            matrix = torch.sparse_csr_tensor(starts, entries, torch.zeros_like(weights).flatten(), shape)
            weights_gradient = torch.sparse.sampled_addmm(matrix, gradient, table.T, beta=0).values().view_as(weights)
        return table_gradient, None, weights_gradient


@functools.cache
def _accept_sparse_csr() -> None:
    """Lets torch say once, to nobody, that its sparse CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))


def sample_by_grid(values: Tensor, sizes_hw: Sequence[tuple[int, int]], points: Tensor, weights: Tensor) -> Tensor:
    """The same through `grid_sample`, level by level: arguments and result as in `sample_by_rows`.

    In float32 too: grid_sample wants places in [-1, 1] and of the table's dtype, and bf16's steps of 2^-8 near 1 are a
    tenth of a cell of a map 48 cells wide.
    """
    num_images, num_cells, num_heads, _ = values.shape
    by_level = values.float().split([h * w for h, w in sizes_hw], dim=1)
    read = []
    for level, (height, width) in enumerate(sizes_hw):
        table = by_level[level].permute(0, 2, 3, 1).reshape(num_images * num_heads, -1, height, width)
        x, y = points[:, :, :, level].float().unbind(dim=-1)
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
        grid = grid.transpose(1, 2).flatten(0, 1)  # (I A, S, K, 2)
        read.append(F.grid_sample(table, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    shares = weights.float().transpose(1, 2).reshape(num_images * num_heads, 1, num_cells, -1)
    summed = (torch.stack(read, dim=-2).flatten(-2) * shares).sum(dim=-1)  # (I A, C / A, S)
    return summed.view(num_images, -1, num_cells).transpose(1, 2).to(values.dtype)
