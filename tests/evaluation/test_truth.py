"""Ground truth at the size at which a protocol compares: OpenCV's and Pillow's nearest neighbour."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deris_llm.config.protocols import PROTOCOLS
from deris_llm.evaluation.truth import resampled_truth

GOLDEN = Path(__file__).parents[1] / "golden" / "parity" / "preproc.npz"


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("mask", ["mask", "part"])
def test_truth_is_resized_as_upstream_does(name: str, mask: str) -> None:
    with np.load(GOLDEN) as fixture:
        width = fixture[f"{name}_bgr"].shape[1]
        before = np.unpackbits(fixture[f"{name}_{mask}"], axis=-1, count=width).astype(bool)
        after = np.unpackbits(fixture[f"{name}_{mask}384"], axis=-1, count=384).astype(bool)
    np.testing.assert_array_equal(resampled_truth(PROTOCOLS["deris"], before), after)


@pytest.mark.parametrize("size_hw", [(480, 640), (427, 640), (640, 480), (333, 500), (97, 61)])
def test_rela480_resizes_the_truth_as_pillow_does(size_hw: tuple[int, int]) -> None:
    truth = np.random.default_rng(0).random(size_hw) < 0.5
    expected = Image.fromarray(truth.astype(np.uint8)).resize((480, 480), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(resampled_truth(PROTOCOLS["rela480"], truth), np.asarray(expected).astype(bool))


def test_the_original_size_leaves_masks_as_they_are() -> None:
    truth = np.eye(7, 9, dtype=bool)
    assert resampled_truth(PROTOCOLS["original"], truth) is truth
