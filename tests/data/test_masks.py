"""COCO segmentations of every form, good and bad."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from deris_llm.data.masks import NoPixelError, decode_segmentation, encode_mask, mask_of_image, polygons_in_px, visible_rle

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
        ({"size": [8, 10], "counts": [-1, 81]}, "got int '-1' as number 0 of 2"),
        ({"size": [8, 10], "counts": [float("nan"), 80]}, "got float 'nan' as number 0 of 2"),
        ({"size": [8, 10], "counts": [80.0]}, "got float '80.0' as number 0 of 1"),
        ([[1, 2, None, 4, 5, 6]], "got None as coordinate 2 of the polygon"),
        ([[1, 2, 3, 4, 5, float("inf")]], "finite coordinates of at most 100,000 px, got inf as coordinate 5"),
        ([[1, 2, 3, 4, 5, -(10**400)]], "finite coordinates"),
        ({"size": [8, 10], "counts": "PPPP"}, "compressed RLE"),
        ({"size": [8, 10], "counts": "\x00\x01"}, "no valid form"),
        ({"size": [8, 10], "counts": "\ud800é"}, "no valid form"),
        ({"size": [8, 10], "counts": encode_mask(np.ones((8, 9), dtype=bool))["counts"]}, "one of 72 pixels"),
    ],
)
def test_malformed_segmentations_say_so(segmentation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, 8, 10)


@pytest.mark.parametrize("polygon", [[0, 0, 0, 0, 0, 0], [0.5, 0.5, 0.503, 0.5, 0.5, 0.504]])
def test_a_point_in_the_first_pixel_is_not_normalised(polygon: list[float]) -> None:
    """It draws nothing, which is counted; it does not stop a split whose other outlines are in px."""
    with pytest.raises(NoPixelError):
        visible_rle([polygon], 80, 100)
    assert not decode_segmentation([polygon], 80, 100).any()


@pytest.mark.parametrize(
    ("polygon", "is_of_the_picture"),
    [
        ([600, 400, 700, 400, 700, 470], True),  # 60 of 640 px outside
        ([-100, -100, 50, 10, 10, 50], True),
        ([10, 10, 50, 10, 50, 4000], False),  # y of another image
        ([10, 10, 50, 10, 50, -4000], False),
        ([10, 10, 1200, 10, 50, 50], False),
        ([-700, 10, 50, 10, 50, 50], False),
        ([10, 10, 50, 10, 50, 99_999], False),
    ],
)
def test_far_outside_is_another_picture(polygon: list[float], is_of_the_picture: bool) -> None:
    """Relative to the image of 640 x 480 px; a little outside is clipped."""
    if is_of_the_picture:
        assert visible_rle([polygon], 480, 640)
        assert decode_segmentation([polygon], 480, 640).any()
        return
    far = r"got [xy] from .* lie outside the image \(640 x 480 px\): the annotation belongs to another image"
    with pytest.raises(ValueError, match=far):
        visible_rle([polygon], 480, 640)
    with pytest.raises(ValueError, match=far):
        decode_segmentation([[20, 20, 30, 20, 30, 30], polygon], 480, 640)


@pytest.mark.parametrize("polygon", [[0.1, 0.125, 0.4, 0.125, 0.4, 0.5], [0.0, 0, 1, 0, 1, 1, 0, 1], [-0.01, 0, 1.02, 0, 1, 1]])
def test_normalised_coordinates_are_refused_or_scaled(polygon: list[float]) -> None:
    for check in (visible_rle, decode_segmentation):
        with pytest.raises(ValueError, match="coordinates look normalised; give --coordinates normalised"):
            check([polygon], 80, 100)
    in_px = [v * (80 if i % 2 else 100) for i, v in enumerate(polygon)]
    assert polygons_in_px([polygon], 80, 100) == [in_px]
    with pytest.raises(ValueError, match="expected normalised coordinates, from 0 to 1, got 40: for px leave out"):
        polygons_in_px([[0.1, 0.1, 40, 10, 9, 9]], 80, 100)


def _stored(array: np.ndarray, **options: object) -> Image.Image:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, **options)  # pyright: ignore[reportArgumentType]
    return Image.open(stream)


def test_a_jpeg_mask_is_thresholded_at_half() -> None:
    mask = decode_segmentation([[13, 9, 75, 20, 60, 70, 20, 61]], 80, 100)
    file = _stored(mask.astype(np.uint8) * 255, format="JPEG", quality=75)
    assert 10 < len(np.unique(np.asarray(file))) < 256  # above 0 would be 30 % more
    found, is_lossy = mask_of_image(file)
    assert is_lossy
    np.testing.assert_array_equal(found, mask)
    labels = np.where(mask, 120, 0).astype(np.uint8)
    with pytest.raises(ValueError, match="got grey areas .* as of a label map"):
        mask_of_image(_stored(labels, format="JPEG", quality=75))


@pytest.mark.parametrize("grey", [30, 60, 120, 200, 220])
def test_labels_beside_white_are_seen_in_a_jpeg(grey: int) -> None:
    labels = np.zeros((60, 80), np.uint8)
    labels[3:23, 5:25], labels[30:50, 40:70] = grey, 255
    with pytest.raises(ValueError, match=r"got grey areas \(value \d+ around x \d+, y \d+\) as of a label map"):
        mask_of_image(_stored(labels, format="JPEG", quality=75))


def test_thin_lines_survive_jpeg() -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[10:12, 5:70] = mask[15:50, 33] = 255
    for quality in (20, 50, 75, 95):
        found, _ = mask_of_image(_stored(mask, format="JPEG", quality=quality))
        assert (found != (mask > 0)).mean() < 0.02


@pytest.mark.parametrize(
    ("palette", "is_clear"),
    [([0, 0, 0, 128, 0, 0], True), ([255, 255, 255, 0, 0, 0], False), ([0, 0, 0, 0, 0, 0], False), ([9, 9, 9, 255, 255, 255], False)],
)
def test_numbers_of_a_palette_mean_what_their_colours_show(palette: list[int], is_clear: bool) -> None:
    numbers = np.zeros((8, 9), np.uint8)
    numbers[2:5, 3:6] = 1
    image = Image.fromarray(numbers).convert("P")
    image.putpalette(palette)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    file = Image.open(stream)
    if is_clear:
        np.testing.assert_array_equal(mask_of_image(file)[0], numbers == 1)
    else:
        with pytest.raises(ValueError, match="expected a palette whose first colour alone is black, got number [01] shown"):
            mask_of_image(file)


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (0, 65535), (255, 255), (1, 2), (0, 1, 2), (0, 128, 255)])
def test_a_mask_has_two_values(values: tuple[int, ...]) -> None:
    array = np.resize(np.array(values, np.uint16 if max(values) > 255 else np.uint8), (8, 9))
    file = _stored(array, format="PNG")
    if len(set(values) - {0}) == 1:
        found, is_lossy = mask_of_image(file)
        np.testing.assert_array_equal(found, array > 0)
        assert not is_lossy
    else:
        with pytest.raises(ValueError, match="expected 0 and one other value, got .* besides 0 .a label map"):
            mask_of_image(file)


def test_degenerate_parts_are_left_out() -> None:
    square = [2.0, 2, 9, 2, 9, 9, 2, 9]
    assert visible_rle([[1, 1, 2, 2], square], 30, 40) == visible_rle([square], 30, 40)


@pytest.mark.parametrize(
    "segmentation",
    [[], None, "text", [[1, 2, "x", 4, 5, 6]], [[float("nan")] * 6], [[1, 1, 9, 1, 9, 9, 1]], {"counts": [1]}, [{}]],
)
def test_malformed_segmentations_are_faults(segmentation: object) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        visible_rle(segmentation, 30, 40)
    assert not isinstance(caught.value, NoPixelError)


def test_a_thin_object_between_pixels_is_a_fault_and_a_small_one_is_not() -> None:
    with pytest.raises(NoPixelError):
        visible_rle([[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]], 30, 40)
    assert visible_rle([[5, 5, 7, 5, 7, 7, 5, 7]], 30, 40)
