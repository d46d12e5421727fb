"""Scenes: the promises that phrases, pre-training and the written world rely on."""

from __future__ import annotations

import numpy as np
import pytest

from deris_llm.data.synthetic.scene import (
    CROWD,
    MIN_VISIBLE_FRACTION,
    MIN_VISIBLE_PX,
    SPARSE,
    Layout,
    Scene,
    sample_scene,
)
from deris_llm.data.synthetic.vocabulary import COLOURS, KINDS, KINDS_A, KINDS_B, PATTERNS, SIZES

NUM_SCENES = 80


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(np.random.default_rng([5, k])) for k in range(NUM_SCENES)]


def test_same_generator_state_gives_the_same_scene() -> None:
    first, again, other = (sample_scene(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first.image, again.image)
    assert [item.profile for item in first.objects] == [item.profile for item in again.objects]
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(first.objects, again.objects, strict=True))
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


@pytest.fixture(scope="module")
def crowds() -> list[Scene]:
    return [sample_scene(np.random.default_rng([5, k]), layout=CROWD) for k in range(20)]


@pytest.mark.parametrize(("name", "layout"), [("scenes", SPARSE), ("crowds", CROWD)])
def test_objects_are_visible_disjoint_and_consistent_with_depth(
    name: str, layout: Layout, request: pytest.FixtureRequest
) -> None:
    for scene in request.getfixturevalue(name):
        shape = scene.image.shape[:2]
        assert scene.image.dtype == np.uint8
        assert min(shape) >= layout.height_px[0]
        assert max(shape) <= layout.width_px[1]
        assert layout.num_objects[0] <= len(scene.objects) <= layout.num_objects[1]
        assert sorted(item.depth for item in scene.objects) == list(range(len(scene.objects)))
        assert np.sum([item.mask for item in scene.objects], axis=0).max() == 1
        for item in scene.objects:
            assert item.mask.shape == item.full_mask.shape == shape
            assert item.mask.sum() >= MIN_VISIBLE_PX
            assert item.mask.sum() >= MIN_VISIBLE_FRACTION * item.full_mask.sum()
            assert not (item.mask & ~item.full_mask).any()
            x0, y0, x1, y1 = item.box_xyxy
            assert item.mask[y0:y1, x0:x1].sum() == item.mask.sum()
            assert item.mask[y0].any()
            assert item.mask[y1 - 1].any()
            for nearer in scene.objects:
                if nearer.depth > item.depth:
                    assert not (item.mask & nearer.full_mask).any()


def test_every_value_of_every_attribute_occurs(scenes: list[Scene]) -> None:
    profiles = np.array([item.profile for scene in scenes for item in scene.objects])
    for slot, values in enumerate((KINDS, COLOURS, PATTERNS, SIZES)):
        assert set(profiles[:, slot]) == set(values)


def test_sizes_are_apart(scenes: list[Scene]) -> None:
    """The star's mask fills the same part of its box at any size, so its area tells its diameter."""
    diameters: dict[str, list[float]] = {"small": [], "large": []}
    for scene in scenes:
        for item in scene.objects:
            if item.kind == "star":
                diameters[item.size].append(np.sqrt(item.full_mask.sum()) / min(scene.image.shape[:2]))
    assert min(diameters["large"]) / max(diameters["small"]) > 0.9 * SPARSE.large[0] / SPARSE.small[1]


def test_crowds_are_crowded(crowds: list[Scene]) -> None:
    numbers = [len(scene.objects) for scene in crowds]
    assert np.mean(numbers) >= 18
    assert max(numbers) >= 26
    overlapping = [
        any((a.full_mask & b.full_mask).any() for b in scene.objects if b is not a)
        for scene in crowds
        for a in scene.objects
    ]
    assert 0.2 <= np.mean(overlapping) <= 0.6


def test_pictures_hold_distractors_that_differ_in_exactly_one_attribute(scenes: list[Scene]) -> None:
    def differences(scene: Scene) -> list[int]:
        return [
            sum(x != y for x, y in zip(a.profile, b.profile, strict=True))
            for k, a in enumerate(scene.objects)
            for b in scene.objects[:k]
        ]

    assert np.mean([1 in differences(scene) for scene in scenes]) >= 0.95
    assert np.mean([0 in differences(scene) for scene in scenes]) >= 0.2  # twins: attributes are not enough


def test_occlusion_happens_in_a_third_of_the_pictures(scenes: list[Scene]) -> None:
    has_pair = [
        any((a.full_mask & b.full_mask).any() for k, a in enumerate(s.objects) for b in s.objects[:k]) for s in scenes
    ]
    assert 0.2 <= np.mean(has_pair) <= 0.6


@pytest.mark.parametrize("kinds", [KINDS_A, KINDS_B])
def test_target_kinds(kinds: tuple[str, ...]) -> None:
    for seed in range(15):
        scene = sample_scene(np.random.default_rng(seed), target_kinds=kinds)
        assert sum(item.kind in kinds for item in scene.objects) >= 3


def test_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"target_kinds.*zebra"):
        sample_scene(np.random.default_rng(0), target_kinds=("cat", "zebra"))


def test_colours_are_seen_in_the_picture(scenes: list[Scene]) -> None:
    """The median pixel of a plain object is nearest to its own colour's name among all colours (away from the rim)."""
    reference = {
        "red": (200, 30, 30),
        "yellow": (235, 200, 30),
        "green": (35, 145, 55),
        "blue": (30, 80, 210),
        "purple": (140, 45, 175),
        "white": (240, 240, 240),
        "black": (25, 25, 30),
    }
    hits = []
    for scene in scenes:
        for item in scene.objects:
            if item.pattern == "plain":
                median = np.median(scene.image[item.mask], axis=0)
                nearest = min(reference, key=lambda name: float(np.abs(median - np.array(reference[name])).sum()))
                hits.append(nearest == item.colour)
    assert np.mean(hits) >= 0.97
