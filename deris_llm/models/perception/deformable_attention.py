"""Multi-scale deformable attention of the pixel decoder, in several formulations of the same computation.

Letters: I images, S cells of all levels, A heads, V levels, K points, C channels.

Each head of each cell reads K points of every level bilinearly and sums them with its attention weights: a weighted sum
of 4 K V rows of a table of cells.

- On a CPU this is `torch.nn.functional.embedding_bag`, whose kernel reads whole rows (the C / A channels of a head are
  contiguous). `grid_sample`, which transformers uses, reads channel by channel and is several times slower there.
- Elsewhere `perception.deformable_attention` selects `grid_sample`, the same compiled, or the kernel of Deformable DETR
  from the Hugging Face hub. The last two are compared with the first before use.

All compute in float32 and give the same numbers up to rounding, gradients included. `scripts/bench/perception.py`
measures them.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
)

logger = logging.getLogger(__name__)

Formulation = Literal["grid_sample", "compiled", "hub_kernel"]
Sampler = Callable[[Tensor, Sequence[tuple[int, int]], Tensor, Tensor], Tensor]
"""Arguments and result as of `sample_by_rows`."""

HUB_KERNEL, HUB_VERSION = "kernels-community/deformable-detr", 1
"""The kernel that transformers uses for Deformable DETR under `use_kernels` (`integrations/hub_kernels.py`)."""
EQUAL = 1e-4
"""Largest difference from `sample_by_grid`, relative to the largest value of the result and of each gradient. Measured on
a CPU: 1e-6; on a GPU, gradients are summed in no fixed order."""


class DeformableAttention(nn.Module):
    """Replaces transformers' module in an encoder layer, with its weights under the same names."""

    def __init__(
        self,
        source: Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
        *,
        formulation: Formulation = "grid_sample",
    ) -> None:
        """Takes over the modules of `source`.

        Args:
            source: of transformers.
            formulation: used on devices other than the CPU (`perception.deformable_attention`).
        """
        super().__init__()
        self.formulation: Formulation = formulation
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
        """Attends; called by transformers' encoder layer.

        Args:
            hidden_states: float (I, S, C), cells of all levels, coarse level first, row by row.
            position_embeddings: float (1 or I, S, C), added to the queries.
            reference_points: float (1 or I, S, V, 2): the centre of each cell, (x, y) in [0, 1], on every level.
            spatial_shapes_list: V sizes (h, w); the sum of h * w is S.

        Returns:
            float (I, S, C), and None for the attention weights, which are not used.
        """
        num_images, num_cells, _ = hidden_states.shape
        queries = hidden_states + position_embeddings
        by_head = (num_images, num_cells, self.n_heads)
        by_point = (*by_head, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(queries).view(*by_point, 2)
        weights = self.attention_weights(queries).view(*by_head, -1).softmax(dim=-1).view(by_point)
        sizes = _sizes_on(offsets.device, spatial_shapes_list).flip(1)  # w, h
        # In cells of each level; the centre of the first cell is 0. In float32: bf16 does not resolve neighbouring cells.
        points = (reference_points.float() * sizes - 0.5)[:, :, None, :, None, :] + offsets
        values = self.value_proj(hidden_states).view(num_images, num_cells, self.n_heads, -1)
        sample = sampler_on(values.device, self.formulation)
        return self.output_proj(sample(values, spatial_shapes_list, points, weights)), None


def sampler_on(device: torch.device, formulation: Formulation) -> Sampler:
    """Returns the sampler of a device: rows on a CPU, elsewhere the formulation, compared before its first use."""
    if device.type == "cpu":
        return sample_by_rows
    if formulation == "grid_sample" or device.type == "meta":
        return sample_by_grid
    return _compared_once(formulation, device)


@functools.cache
def _compared_once(formulation: Formulation, device: torch.device) -> Sampler:
    """Compares once for all layers of a process."""
    make = {"compiled": compiled_sampler, "hub_kernel": hub_sampler}[formulation]
    return compared(make, device, f"perception.deformable_attention={formulation}")


def compared(make: Callable[[], Sampler], device: torch.device, name: str) -> Sampler:
    """Returns a sampler if it equals `sample_by_grid` on a random example, otherwise `sample_by_grid` and warns.

    Args:
        make: builds the sampler; may raise anything.
        device: on which it will run.
        name: for the warning.
    """
    try:
        sampler = make()
        difference = _difference_from_grid(sampler, device)
        if difference <= EQUAL:  # False if it is NaN
            return sampler
        reason = f"it differs from grid_sample by {difference:.1e} of the largest value (allowed: {EQUAL:.0e})"
    except Exception as error:  # a download, a compiler or a driver failed; grid_sample needs none of them
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    logger.warning("%s cannot be used on %s, which samples through grid_sample instead: %s", name, device, reason)
    return sample_by_grid


def _difference_from_grid(sampler: Sampler, device: torch.device) -> float:
    """Returns the largest difference of the result and the three gradients, relative to the largest value of each.

    Two images, three levels; points up to two cells outside, none near a cell's centre, where the slope jumps. It runs
    within a forward pass and leaves no trace there: it draws from no global generator, and activation checkpointing saves
    none of its tensors.
    """
    sizes, heads, points, width = ((2, 3), (4, 6), (8, 12)), 2, 4, 32
    num_cells = sum(h * w for h, w in sizes)
    generator = torch.Generator().manual_seed(0)
    by_point = (2, num_cells, heads, len(sizes), points)
    extents = torch.tensor([(w + 3, h + 3) for h, w in sizes])[:, None]
    cells = (torch.rand(*by_point, 2, generator=generator) * extents).floor() - 2
    drawn = (
        torch.randn(2, num_cells, heads, width, generator=generator),
        cells + 0.1 + 0.8 * torch.rand(*by_point, 2, generator=generator),
        torch.rand(by_point, generator=generator),
    )
    upstream = torch.randn(2, num_cells, heads * width, generator=generator)
    found = []
    with torch.inference_mode(mode=False), torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
        for each in (sample_by_grid, sampler):
            values, places, weights = (tensor.to(device).requires_grad_() for tensor in drawn)
            summed = each(values, sizes, places, weights)
            gradients = torch.autograd.grad(summed, (values, places, weights), upstream.to(device))
            found.append((summed.detach(), *gradients))
    differences = [(ours - plain).abs().max() / plain.abs().max() for plain, ours in zip(*found, strict=True)]
    return float(torch.stack(differences).max())


def compiled_sampler() -> Sampler:
    """Compiles `sample_by_grid`: inductor fuses its forward pass into a few kernels; the first call takes seconds.

    It is compiled for each number of images; beyond eight numbers torch warns and runs the rest uncompiled.
    """
    return torch.compile(sample_by_grid, fullgraph=True, dynamic=False)


def hub_sampler() -> Sampler:
    """Downloads the CUDA kernel of Deformable DETR from the Hugging Face hub on first use.

    Raises:
        ImportError: the package `kernels` is missing, or this transformers does not support its version.
        Exception: no network, or no build for this machine; types as in `kernels`.
    """
    from transformers.integrations.hub_kernels import get_kernel

    return layer_sampler(get_kernel(HUB_KERNEL, version=HUB_VERSION).layers.MultiScaleDeformableAttention())


def layer_sampler(layer: nn.Module) -> Sampler:
    """Makes a sampler of a `MultiScaleDeformableAttention` of transformers or the hub."""

    def sample(values: Tensor, sizes_hw: Sequence[tuple[int, int]], points: Tensor, weights: Tensor) -> Tensor:
        sizes = _sizes_on(values.device, sizes_hw)
        counts = sizes.prod(dim=1)
        summed = layer(
            values.float().contiguous(),
            sizes,
            list(sizes_hw),
            counts.cumsum(dim=0) - counts,  # start of each level
            ((points.float() + 0.5) / sizes.flip(1)[:, None]).contiguous(),  # in [0, 1] within a level
            weights.float().contiguous(),
            len(values),  # images per kernel launch; must divide I
        )
        if summed.requires_grad:
            summed.register_hook(Tensor.contiguous)  # the kernel requires contiguous gradients
        return summed.to(values.dtype)

    return sample


def _sizes_on(device: torch.device, sizes_hw: Sequence[tuple[int, int]]) -> Tensor:
    """Returns the sizes as int64 (V, 2), without waiting for the device as `torch.tensor(..., device=...)` does."""
    return torch.tensor(sizes_hw).to(device, non_blocking=True)


def sample_by_rows(values: Tensor, sizes_hw: Sequence[tuple[int, int]], points: Tensor, weights: Tensor) -> Tensor:
    """Computes weighted sums of bilinearly read points as bags of table rows, image by image to stay in the cache.

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
    """Samples one image. A border of zero cells around each level makes points outside need no special case.

    Index arithmetic uses float32 tensors of full size, which is several times faster than broadcast integers and exact
    below 2^24 rows.
    """
    num_cells, num_heads, _, num_points = weights.shape
    widths, heights = [w for _, w in sizes_hw], [h for h, _ in sizes_hw]
    padded_sizes = [(h + 2) * (w + 2) for h, w in sizes_hw]
    starts = [sum(padded_sizes[:level]) for level in range(len(sizes_hw))]
    beyond = max(widths) + 4  # rows that points on the last border read with weight 0
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
        # In a diverged run, a NaN point reads the border; its shares stay NaN, and so does the result.
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
    """Returns weighted sums of table rows, float (B, c), with gradients for table and weights.

    Args:
        table: float32 (R, c), on the CPU.
        rows: int32 (B, N), in 0..R-1.
        weights: float32 (B, N).
    """
    return _Bags.apply(table, rows, weights)  # pyright: ignore[reportReturnType]


class _Bags(torch.autograd.Function):
    """`embedding_bag` with a faster backward pass: torch's sorts all rows and calls BLAS for each.

    The bags are the rows of a sparse matrix W (B, R). The result is W table, the table's gradient is W' gradient, and the
    weights' gradient is (gradient table') at the entries of W.
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
            from scipy.sparse import csr_array  # inference does not wait for scipy

            matrix = csr_array((weights.numpy().ravel(), entries.numpy(), starts.numpy()), shape=shape)
            table_gradient = torch.from_numpy(matrix.T @ gradient.numpy())
        if ctx.needs_input_grad[2]:
            _accept_sparse_csr()
            matrix = torch.sparse_csr_tensor(starts, entries, torch.zeros_like(weights).flatten(), shape)
            weights_gradient = torch.sparse.sampled_addmm(matrix, gradient, table.T, beta=0).values().view_as(weights)
        return table_gradient, None, weights_gradient


@functools.cache
def _accept_sparse_csr() -> None:
    """Suppresses torch's warning that sparse CSR tensors are in beta, which it gives once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))


def sample_by_grid(values: Tensor, sizes_hw: Sequence[tuple[int, int]], points: Tensor, weights: Tensor) -> Tensor:
    """Computes the same through `grid_sample`, level by level: arguments and result as in `sample_by_rows`.

    In float32 too: grid_sample takes points in [-1, 1] in the table's dtype, and bf16's steps of 2^-8 near 1 are a tenth
    of a cell of a map that is 48 cells wide.
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
