"""Groups by image, and what happens to pictures and masks on their way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deris_llm.data.loaders import GroupDataset
from deris_llm.data.dataset import GroupSelection, ImageGroup, group_by_image, some_images
from deris_llm.data.errors import DataError
from deris_llm.data.sources import read_split
from deris_llm.data.images import load_image
from deris_llm.models.preprocess import Resize, perception_pixels, warp_mask, warp_picture


def test_group_by_image_joins_datasets_and_keeps_order(refer_root: Path) -> None:
    records = [*read_split(refer_root, "refcoco/train"), *read_split(refer_root, "refcoco+/train")]
    groups = group_by_image(records)
    assert [g.records[0].image_id[-1] for g in groups] == ["1", "2", "3", "4", "5"]
    assert [len(g.records) for g in groups] == [10, 10, 10, 5, 5]
    assert sorted(r.phrase_id for g in groups for r in g.records) == sorted(r.phrase_id for r in records)


def test_selection(make_records: Any) -> None:
    groups = group_by_image(make_records([3, 4]))
    chosen = GroupDataset(groups)[GroupSelection(1, (0, 3))]
    assert [r.phrase_id for r in chosen.records] == ["refcoco/train/1-0", "refcoco/train/1-3"]


@pytest.mark.parametrize("number", [1, 2, 500, 750, 751, 1000, 1499])
def test_some_images_are_spread_over_the_split(number: int, make_records: Any) -> None:
    records = make_records([1 + i % 3 for i in range(1500)])
    order = list(dict.fromkeys(record.image_id for record in records))
    kept = some_images(records, number)
    chosen = [order.index(image_id) for image_id in dict.fromkeys(record.image_id for record in kept)]
    assert chosen == [i * 1500 // number for i in range(number)]  # evaluation/run.py's; of 751 the last is 1498
    assert list(kept) == [record for record in records if record.image_id in {order[i] for i in chosen}]


def test_some_images_of_all(make_records: Any) -> None:
    records = make_records([2, 1])
    assert list(some_images(records, 0)) == list(some_images(records, 2)) == list(some_images(records, 9)) == records


def test_a_group_is_of_one_image(make_records: Any) -> None:
    with pytest.raises(ValueError, match="records of one image"):
        ImageGroup(tuple(make_records([1, 1])))


def test_pictures_of_other_modes_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "CMYK"):
        Image.new(mode, (6, 4)).save(tmp_path / f"{mode}.jpg")
        assert load_image(tmp_path / f"{mode}.jpg", size_hw=(4, 6)).mode == "RGB"


def test_truncated_jpeg(refer_folder: Any) -> None:
    root = refer_folder.write()
    path = refer_folder.image_path(5)
    path.write_bytes(path.read_bytes()[:-300])
    ids = [r.phrase_id for r in read_split(root, "refcoco/val")]
    with pytest.raises(DataError, match="truncated") as caught:
        load_image(path, asked_by=ids)
    assert str(path) in str(caught.value)
    assert "refcoco/val/20" in str(caught.value)
    assert "COCO_train2014_000000000005" in str(caught.value)


def test_unreadable_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("text.jpg", "empty.jpg", "missing.jpg"):
        with pytest.raises(DataError, match="expected an image, got"):
            load_image(tmp_path / name)


def test_a_resized_picture_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (20, 15)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="expected 40 x 30 px, for which the masks were annotated, got 20 x 15"):
        load_image(tmp_path / "a.png", size_hw=(30, 40))


@pytest.mark.parametrize("resize", ["antialias", "opencv"])
def test_perception_pixels_are_normalised_rgb(resize: Resize) -> None:
    image = Image.new("RGB", (50, 20), (255, 0, 128))
    pixels = perception_pixels(image, 32, resize)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.float32
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(pixels.mean((1, 2)), torch.tensor(expected), rtol=0, atol=1e-5)


def test_warped_mask_stays_on_the_warped_object() -> None:
    """A white object on black: the warped mask is where the warped picture is bright."""
    mask = np.zeros((37, 61), dtype=bool)
    mask[9:30, 20:51] = True
    image = Image.fromarray(np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=2))
    for size in (32, 160):
        warped = warp_mask(mask, size, "antialias")
        assert warped.shape == (size, size)
        assert warped.dtype == bool
        bright = perception_pixels(image, size, "antialias")[0] > (0.5 - 0.485) / 0.229
        # measured 0.0017 at most; mirrored or transposed masks differ by 0.2 and more
        assert (warped != bright.numpy()).mean() < 0.01
        assert abs(warped.mean() - mask.mean()) < 0.02


@pytest.mark.parametrize("resize", ["antialias", "opencv"])
def test_warping_to_the_own_size_changes_nothing(resize: Resize) -> None:
    generator = np.random.default_rng(0)
    mask = generator.random((48, 48)) > 0.5
    assert (warp_mask(mask, 48, resize) == mask).all()
    assert (warp_mask(mask, 96, resize)[::2, ::2] == mask).all()
    picture = generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert (warp_picture(Image.fromarray(picture), 48, resize) == picture).all()


def test_opencv_does_not_antialias() -> None:
    """Stripes of one pixel: Pillow averages them to grey, OpenCV's bilinear sees two neighbours at most."""
    stripes = np.zeros((40, 40, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    image = Image.fromarray(stripes)
    assert np.ptp(warp_picture(image, 8, "antialias")[2:-2, 2:-2]) <= 11  # measured
    assert np.ptp(warp_picture(image, 13, "opencv")) > 100


def test_opencv_bilinear_is_the_plain_formula() -> None:
    """Against a slow re-write in float64; OpenCV interpolates uint8 in fixed point, so it is within one grey level."""
    picture = np.random.default_rng(3).integers(0, 256, (23, 41, 3), dtype=np.uint8)
    size = 30
    expected = np.zeros((size, size, 3))
    for y in range(size):
        for x in range(size):
            at_y, at_x = (y + 0.5) * 23 / size - 0.5, (x + 0.5) * 41 / size - 0.5
            top, left = int(np.floor(at_y)), int(np.floor(at_x))
            for row, column, weight in (
                (top, left, (1 - at_y + top) * (1 - at_x + left)),
                (top, left + 1, (1 - at_y + top) * (at_x - left)),
                (top + 1, left, (at_y - top) * (1 - at_x + left)),
                (top + 1, left + 1, (at_y - top) * (at_x - left)),
            ):
                expected[y, x] += weight * picture[min(max(row, 0), 22), min(max(column, 0), 40)]
    assert np.abs(warp_picture(Image.fromarray(picture), size, "opencv") - expected).max() < 1
