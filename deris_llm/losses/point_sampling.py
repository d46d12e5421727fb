"""Point sampling: masks are compared at sampled points instead of at every pixel (PointRend, Mask2Former section 3.3).

Points are (x, y) in [0, 1] of the image: (0, 0) is its top left corner, and pixel centres are at (j + 0.5) / width. Maps
of different resolutions (logits at 1/4, targets at full size) are therefore read at the same place without upsampling.

Letters: N maps, C channels, K points.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

OVERSAMPLE_RATIO = 3  # candidate points per sampled point (Mask2Former)
IMPORTANCE_RATIO = 0.75  # share of the sampled points at which the prediction is least certain; the rest are uniform


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Reads maps at points, bilinearly; outside the outermost pixel centres the value fades to 0.

    The public code samples logits after upsampling them x4 with align_corners=True; `postprocess.readable_logits` does
    so before this is called.

    Args:
        maps: float (N, C, h, w).
        points: float (N, K, 2), (x, y) in [0, 1].

    Returns:
        float (N, C, K).
    """
    grid = points.unsqueeze(2) * 2 - 1  # grid_sample counts from -1 to 1
    return functional.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(3)


def random_points(
    num_maps: int, num_points: int, *, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform points.

    Args:
        num_maps: N.
        num_points: K.
        device: where the points end up.
        generator: source of randomness, on any device; None = torch's global one.

    Returns:
        float (N, K, 2), (x, y) in [0, 1).
    """
    source = generator.device if generator is not None else device
    return torch.rand(num_maps, num_points, 2, device=source, generator=generator).to(device)


@torch.no_grad()
def uncertain_points(
    mask_logits: Tensor,
    num_points: int,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Importance sampling: most points lie where the prediction is least certain, the rest anywhere.

    Args:
        mask_logits: float (N, h, w).
        num_points: K.
        generator: source of randomness.

    Returns:
        float (N, K, 2), (x, y) in [0, 1].
    """
    num_maps = mask_logits.shape[0]
    num_uncertain = int(IMPORTANCE_RATIO * num_points)
    device = mask_logits.device
    candidates = random_points(num_maps, num_points * OVERSAMPLE_RATIO, device=device, generator=generator)
    uncertainty = -sample_points(mask_logits.unsqueeze(1), candidates).squeeze(1).abs()
    chosen = uncertainty.topk(num_uncertain, dim=1, sorted=False).indices
    uncertain = candidates.gather(1, chosen.unsqueeze(2).expand(-1, -1, 2))
    anywhere = random_points(num_maps, num_points - num_uncertain, device=device, generator=generator)
    return torch.cat([uncertain, anywhere], dim=1)
