"""Points are (x, y) in [0, 1], the same place at every resolution."""

import pytest
import torch

from deris_llm.losses.point_sampling import (
    IMPORTANCE_RATIO,
    OVERSAMPLE_RATIO,
    random_points,
    sample_points,
    uncertain_points,
)


def test_pixel_centres_read_the_pixels() -> None:
    maps = torch.arange(2 * 3 * 4, dtype=torch.float32).view(1, 2, 3, 4)
    y, x = torch.meshgrid((torch.arange(3) + 0.5) / 3, (torch.arange(4) + 0.5) / 4, indexing="ij")
    points = torch.stack([x, y], dim=-1).view(1, -1, 2)
    torch.testing.assert_close(sample_points(maps, points), maps.flatten(2))


def test_points_mean_the_same_place_at_every_resolution() -> None:
    def ramp(size: int) -> torch.Tensor:  # value = x, read at pixel centres
        return ((torch.arange(size) + 0.5) / size).expand(1, 1, size, size)

    points = 0.1 + 0.8 * random_points(1, 50, device=torch.device("cpu"), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample_points(ramp(8), points)[0, 0], points[0, :, 0])
    torch.testing.assert_close(sample_points(ramp(64), points)[0, 0], points[0, :, 0])


def test_uncertain_points_crowd_where_the_logit_is_small() -> None:
    logits = torch.full((2, 32, 32), 9.0)
    logits[:, :, 8:12] = 0.0
    points = uncertain_points(logits, 400, generator=torch.Generator().manual_seed(0))
    assert points.shape == (2, 400, 2)
    assert points.min() >= 0
    assert points.max() <= 1
    in_band = ((points[..., 0] > 7 / 32) & (points[..., 0] < 13 / 32)).float().mean().item()
    anywhere = random_points(2, 400, device=logits.device, generator=torch.Generator().manual_seed(0))
    in_band_by_chance = ((anywhere[..., 0] > 7 / 32) & (anywhere[..., 0] < 13 / 32)).float().mean().item()
    assert in_band_by_chance == pytest.approx(6 / 32, abs=0.05)
    assert in_band > 2 * in_band_by_chance


def test_generator_decides_the_points() -> None:
    def draw(seed: int) -> torch.Tensor:
        return uncertain_points(
            torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1)),
            20,
            generator=torch.Generator().manual_seed(seed),
        )

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


def test_ratios_are_mask2formers() -> None:
    assert (OVERSAMPLE_RATIO, IMPORTANCE_RATIO) == (3, 0.75)
