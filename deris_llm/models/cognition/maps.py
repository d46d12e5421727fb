"""Maps of image tokens whose size varies by picture, brought to one size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def resampled_maps(tokens: Tensor, grids: Sequence[tuple[int, int]], side: int) -> Tensor:
    """Resamples every map to a square of a fixed size, bilinear, antialiased where a map is reduced.

    The perception branch's picture is warped to a square too: a cell of one lies over the same part of the picture in the
    other.

    Args:
        tokens: float (n, D), the tokens of all maps one after the other, each row-major, top row first.
        grids: R pairs of rows and columns.
        side: rows and columns of the result.

    Returns:
        float (R, D, side, side).
    """
    maps = tokens.split([rows * columns for rows, columns in grids])
    resampled = [
        F.interpolate(
            cells.float().unflatten(0, (rows, columns)).permute(2, 0, 1)[None],
            size=(side, side),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        for cells, (rows, columns) in zip(maps, grids, strict=True)
    ]
    return torch.cat(resampled).to(tokens.dtype)
