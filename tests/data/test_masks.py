"""COCO segmentations of every form, good and bad."""

import json

import numpy as np
import pytest

from deris_llm.data.masks import decode_segmentation, encode_mask

RECTANGLE = [2, 1, 6, 1, 6, 4, 2, 4]


def test_polygon_covers_its_pixels() -> None:
    mask = decode_segmentation([RECTANGLE], 8, 10)
    expected = np.zeros((8, 10), dtype=bool)
    expected[1:4, 2:6] = True
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)


def test_overlapping_parts_are_joined() -> None:
    other = [4, 2, 9, 2, 9, 7, 4, 7]
    joined = decode_segmentation([RECTANGLE, other], 8, 10)
    np.testing.assert_array_equal(joined, decode_segmentation([RECTANGLE], 8, 10) | decode_segmentation([other], 8, 10))


def test_polygon_is_cut_at_the_picture_and_may_vanish() -> None:
    assert decode_segmentation([[-5, -5, 3, -5, 3, 2, -5, 2]], 8, 10).sum() == 3 * 2
    assert decode_segmentation([[20, 20, 30, 20, 30, 30]], 8, 10).sum() == 0


@pytest.mark.parametrize("seed", range(4))
def test_rle_round_trip(seed: int) -> None:
    mask = np.random.default_rng(seed).random((17, 23)) > (0.5, 0.05, 0.98, 2.0)[seed]
    rle = json.loads(json.dumps(encode_mask(mask)))
    assert rle["size"] == [17, 23]
    np.testing.assert_array_equal(decode_segmentation(rle, 17, 23), mask)


def test_uncompressed_rle_counts_columns_from_false() -> None:
    mask = decode_segmentation({"size": [3, 4], "counts": [1, 2, 9]}, 3, 4)
    expected = np.zeros((3, 4), dtype=bool)
    expected[1:, 0] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "an empty list"),
        (None, "got None"),
        ("abc", "got 'abc'"),
        ([[1, 2, 3, 4]], "at least 3 points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "even count"),
        ([[1, 2, 3, 4, 5, "6"]], "the polygon"),
        ([1, 2, 3, 4, 5, 6], "the polygon"),
        ([[1, 2, 3, 4, 5, float("nan")]], "finite coordinates"),
        ({"size": [8, 10]}, "or an RLE"),
        ({"size": [10, 8], "counts": [80]}, r"size \[h, w\] = \[8, 10\], got \[10, 8\]"),
        ({"size": [8, 10], "counts": [70]}, "sum to 8 x 10"),
        ({"size": [8, 10], "counts": [-1, 81]}, "sum to 8 x 10"),
        ({"size": [8, 10], "counts": "PPPP"}, "compressed RLE"),
        ({"size": [8, 10], "counts": "\x00\x01"}, "no valid form"),
        ({"size": [8, 10], "counts": "\ud800é"}, "no valid form"),
        ({"size": [8, 10], "counts": encode_mask(np.ones((8, 9), dtype=bool))["counts"]}, "one of 72 pixels"),
    ],
)
def test_malformed_segmentations_say_so(segmentation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, 8, 10)
