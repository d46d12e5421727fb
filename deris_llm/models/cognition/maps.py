"""Image features whose grid varies by image, resampled to one size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def resampled_maps(maps: Sequence[Tensor], grids: Sequence[tuple[int, int]], side: int) -> Tensor:
    """Resamples every map to a square of a fixed size: bilinear, antialiased where a map is reduced.

    The perception image is warped to a square too, so cells of both lie over the same part of the image.

    Args:
        maps: R maps, float (rows * columns, D), row-major, top row first.
        grids: their rows and columns.
        side: rows and columns of the result.

    Returns:
        float (R, D, side, side).
    """
    resampled = [
        F.interpolate(
            cells.float().unflatten(0, grid).permute(2, 0, 1)[None],
            size=(side, side),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        for cells, grid in zip(maps, grids, strict=True)
    ]
    return torch.cat(resampled).to(maps[0].dtype)
