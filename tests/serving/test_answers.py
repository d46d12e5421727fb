"""An answer prints as one line, draws itself and saves its mask."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deris_llm.data.masks import decode_segmentation
from deris_llm.serving.answers import ImageAnswer

HEIGHT, WIDTH = 60, 100


def answer_of(phrase: str, source: object, *, box: tuple[int, int, int, int] | None, score: float) -> ImageAnswer:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    if box is not None:
        mask[box[1] : box[3], box[0] : box[2]] = True
    return ImageAnswer(
        mask=mask,
        instance_masks=mask[None][: box is not None],
        query_index=(0,) if box is not None else (),
        referring_scores=np.array([score, 0.01], dtype=np.float32),
        presence=0.99,
        score_threshold=0.7,
        is_guess=box is not None and score < 0.7,
        phrase=phrase,
        source=source,
    )


@pytest.fixture
def image() -> Image.Image:
    return Image.new("RGB", (WIDTH, HEIGHT), "navy")


def test_one_line(image: Image.Image) -> None:
    car = answer_of("the red car", image, box=(10, 20, 30, 50), score=0.93)
    assert str(car) == "the red car: 10.0 % of the image, score 0.93, present 0.99"
    assert repr(car) == "ImageAnswer(the red car: 10.0 % of the image, score 0.93, present 0.99)"
    guess = answer_of("a dog", image, box=(0, 0, 1, 1), score=0.2)
    assert str(guess) == "a dog: < 0.1 % of the image, best guess below 0.7, score 0.20, present 0.99"
    nothing = answer_of("  the\tcat \x1b[31m\n there ", image, box=None, score=0.02)
    assert str(nothing) == "the cat [31m there: not in the image, score 0.02, present 0.99"


def test_box_and_rle(image: Image.Image) -> None:
    car = answer_of("the red car", image, box=(10, 20, 30, 50), score=0.9)
    assert car.box == (10, 20, 30, 50)
    rle = json.loads(json.dumps(car.rle))
    assert rle["size"] == [HEIGHT, WIDTH]
    np.testing.assert_array_equal(decode_segmentation(rle, HEIGHT, WIDTH), car.mask)
    nothing = answer_of("a cat", image, box=None, score=0.02)
    assert nothing.box is None
    assert not decode_segmentation(nothing.rle, HEIGHT, WIDTH).any()


def test_the_mask_as_png_and_as_nothing_else(image: Image.Image, tmp_path: Path) -> None:
    car = answer_of("the red car", image, box=(10, 20, 30, 50), score=0.9)
    car.save(str(tmp_path / "new" / "mask.png"))
    saved = Image.open(tmp_path / "new" / "mask.png")
    assert saved.mode == "L"
    np.testing.assert_array_equal(np.asarray(saved), car.mask * np.uint8(255))
    for name, ending in (("mask.jpg", r"\.jpg"), ("mask", "no ending")):
        with pytest.raises(ValueError, match=rf"expected a name that ends in \.png, got {ending}"):
            car.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("kind", ["file", "image", "array"])
def test_it_draws_itself_on_the_image_as_it_was_given(image: Image.Image, tmp_path: Path, kind: str) -> None:
    image.save(tmp_path / "image.png")
    source = {"file": str(tmp_path / "image.png"), "image": image, "array": np.asarray(image)}[kind]
    car = answer_of("the red car", source, box=(50, 0, 100, 60), score=0.9)
    drawn = car.overlay()
    assert drawn.size == (480, 180 + 62)  # 3 times the image, and the caption
    left, right = (np.asarray(drawn)[:180, columns].mean(axis=(0, 1)) for columns in (slice(95, 235), slice(245, 385)))
    assert left[0] < 1  # navy as it was
    assert right[0] > 80  # tinted orange
    shown = Image.open(io.BytesIO(car._repr_png_()))
    assert shown.format == "PNG"
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(drawn))


def test_large_images_are_reduced(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1800)).save(tmp_path / "large.jpg")
    car = answer_of(
        "the red car", tmp_path / "large.jpg", box=(0, 0, 9, 9), score=0.9
    )  # its mask is small, as for display
    assert car.overlay().size == (1280, 768 + 62)
    assert car.overlay(max_width_px=700).size == (700, 420 + 62)
    assert Image.open(io.BytesIO(car._repr_png_())).size == (640, 384 + 62)


def test_a_file_that_changed_is_named(image: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    car = answer_of("the red car", path, box=(0, 0, 9, 9), score=0.9)
    image.rotate(90, expand=True).save(path)
    with pytest.raises(
        ValueError, match=r"image\.png: expected the image of the answer, 100 x 60 px .*, got 60 x 100 px"
    ):
        car.overlay()
    path.unlink()
    with pytest.raises(ValueError, match=r"image\.png: expected an image, got no file"):
        car.overlay()
    assert car.box == (0, 0, 9, 9)  # the rest needs no image


def test_answers_of_many_files_hold_no_images(image: Image.Image) -> None:
    fields = {field.name for field in dataclasses.fields(ImageAnswer)}
    car = answer_of("the red car", "image.png", box=(0, 0, 9, 9), score=0.9)
    assert not [name for name in fields if isinstance(getattr(car, name), Image.Image)]
