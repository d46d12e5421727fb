"""LabelMe's JSON and LISA's ReasonSeg: every kind of shape, where images are, and files that are no good."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.sources import read_split, split_names

SQUARE = [[4, 5], [16, 5], [16, 25], [4, 25]]
OTHER = [[24, 5], [36, 5], [36, 25], [24, 25]]


def _shape(points: Any = SQUARE, label: Any = "dog", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": None, "shape_type": "polygon", "flags": {}, **more}


def _write(world: Any, *shapes: Any, name: str = "a.json", **more: Any) -> Path:
    path = world.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": "5.5.0", "imagePath": f"{path.stem}.png", "imageData": "AAAA", "imageHeight": 30, "imageWidth": 40}
    path.write_text(json.dumps({**content, "shapes": list(shapes), **more}))
    return path


def _records(world: Any, split: str = "mine/train") -> list[tuple[str, int, int]]:
    """Phrase, number of objects, px of all."""
    return [
        (
            record.phrase,
            len(record.instances),
            int(np.logical_or.reduce([decode_segmentation(i.segmentation, 30, 40) for i in record.instances]).sum()),
        )
        for record in read_split(world.root, split)
    ]


def test_labels_and_descriptions_are_phrases(world: Any) -> None:
    world.images("a.png", "b.png")
    _write(world, _shape(), _shape(OTHER), _shape(label="cat", description="the left cat"), _shape(OTHER, "tree", description=""))
    _write(world, name="b.json")
    made = world.prepare(world.folder, format="labelme")
    assert _records(world) == [("the left cat", 1, 240), ("dog", 2, 480), ("tree", 1, 240)]
    assert [r.phrase_id for r in read_split(world.root, "mine/train")] == ["mine/train/a#2", "mine/train/a-dog", "mine/train/a-tree"]
    assert made.manifest["notes"] == ["no folder name says a split: all is train"]
    assert len(made.manifest["source"]["files"]) == 2
    source = _write(world, _shape(says="my dog"))
    world.prepare(source, "said", format="labelme", mapping={"caption": "says"})
    assert _records(world, "said/train") == [("my dog", 1, 240)]


def test_every_shape(world: Any) -> None:
    world.images("a.png")
    stream = io.BytesIO()
    Image.fromarray(np.eye(6, 5) > 0).save(stream, format="PNG")
    mask = {"mask": base64.b64encode(stream.getvalue()).decode(), "shape_type": "mask"}
    shapes = [
        _shape([[20, 15], [20, 25]], "circle", shape_type="circle"),
        _shape([[3, 2], [7, 7]], "mask", **mask),
        _shape([[4, 5], [16, 25]], "box", shape_type="rectangle"),
        _shape(label="two parts", group_id=1),
        _shape(OTHER, "two parts", group_id=1),
        _shape([[3, 2], [7, 7]], "mixed", group_id=2, **mask),
        _shape(label="mixed", group_id=2),
    ]
    world.prepare(_write(world, *shapes), format="labelme", mapping={"boxes": "masks"})
    found = _records(world)
    assert [(name, count) for name, count, _ in found] == [(s, 1) for s in ("circle", "mask", "box", "two parts", "mixed")]
    assert abs(found[0][2] - np.pi * 100) < 6
    assert [px for _, _, px in found[1:4]] == [5, 240, 480]
    assert found[4][2] == 240 + 5 - 2  # the diagonal's last two lie inside
    diagonal = decode_segmentation(read_split(world.root, "mine/train")[1].instances[0].segmentation, 30, 40)
    assert np.argwhere(diagonal).tolist() == [[2 + k, 3 + k] for k in range(5)]


SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "a box": (_shape(shape_type="rectangle"), "a box is not a mask; if it encloses an object"),
    "a line": (_shape(shape_type="line"), "got shape_type 'line', which has no area"),
    "no points": (_shape(None), "expected points [[x, y], ...], got NoneType"),
    "three coordinates": (_shape([[1, 2, 3]] * 3), "expected points [[x, y], ...], got a list of 3"),
    "a circle of one point": (_shape([[1, 2]], shape_type="circle"), "expected two points of a circle"),
    "no mask": (_shape([[1, 2], [3, 4]], shape_type="mask"), "expected a mask as PNG in base64, got NoneType"),
    "a mask that is no base64": (_shape([[1, 2], [3, 4]], shape_type="mask", mask="?"), "base64"),
    "a label of numbers": (_shape(label=7), "expected a text as label, got int '7'"),
    "an empty label": (_shape(label=" "), "expected the category's name, got str ' '"),
    "two corners": (_shape([[1, 2], [3, 4]]), "none of its polygons has three points"),
}


def test_a_class_with_an_unusable_shape_is_not_asked(world: Any) -> None:
    world.images("a.png")
    source = _write(world, _shape(), _shape([[1, 2], [3, 4]], shape_type="line"), _shape(OTHER, "cat"))
    with pytest.raises(DataError, match="a.json shape 1: object 2 of 2: expected a polygon, circle or mask, got shape_type 'line'"):
        world.prepare(source, format="labelme")
    world.prepare(source, format="labelme", skip_bad=True)
    assert [phrase for phrase, *_ in _records(world)] == ["cat"]


def test_a_picture_that_may_be_either_of_two_is_refused(world: Any) -> None:
    world.images("a.png", "a.jpg")
    source = _write(world, _shape(), imagePath=None)
    with pytest.raises(DataError, match="expected the name of an image, got .'a.jpg', 'a.png'."):
        world.prepare(source, format="labelme")


def test_a_picture_with_two_files_of_one_class_is_refused(world: Any) -> None:
    world.images("a.png")
    _write(world, _shape())
    _write(world, _shape(OTHER), name="again.json", imagePath="a.png")
    with pytest.raises(DataError, match="expected one record of image a.png with all of its objects 'dog', got several"):
        world.prepare(world.folder, format="labelme")


def test_a_mask_of_several_values_is_refused(world: Any) -> None:
    world.images("a.png")
    stream = io.BytesIO()
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(stream, "PNG")
    encoded = base64.b64encode(stream.getvalue()).decode()
    source = _write(world, _shape([[1, 2], [4, 5]], shape_type="mask", mask=encoded))
    with pytest.raises(DataError, match="expected 0 and one other value, got 15 and 1 besides 0"):
        world.prepare(source, format="labelme")


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_are_no_masks(world: Any, case: str) -> None:
    shape, expected = SHAPES[case]
    world.images("a.png")
    source = _write(world, _shape(label="good"), shape)
    with pytest.raises(DataError) as caught:
        world.prepare(source, format="labelme")
    assert "\n  - a.json shape 1: " in str(caught.value)
    assert expected in str(caught.value), str(caught.value)
    world.prepare(source, format="labelme", skip_bad=True)
    assert [phrase for phrase, *_ in _records(world)] == ["good"]


@pytest.mark.parametrize(
    ("said", "there"),
    [
        ("a.png", "labels/train/a.png"),
        ("..\\..\\images\\a.png", "images/a.png"),
        ("../../images/a.png", "images/a.png"),
        ("C:\\Users\\me\\a.png", "labels/train/a.png"),
        ("../../../elsewhere/a.png", "labels/train/images/a.png"),
        (None, "labels/train/a.png"),
    ],
)
def test_where_pictures_are(world: Any, said: str | None, there: str) -> None:
    world.images(there)
    _write(world, _shape(), name="labels/train/a.json", imagePath=said)
    for name, source in (("mine", world.folder / "labels/train"), ("root", world.folder)):
        if name == "root":
            (world.folder / "train").symlink_to(world.folder / "labels/train")
        if name == "root" or not there.startswith("images"):
            world.prepare(source, name, format="labelme", follow_links=True)
            assert Path(read_split(world.root, f"{name}/train")[0].image_path).samefile(world.folder / there)
    world.prepare(world.folder / "labels", "given", format="labelme", images=(world.folder / there).parent)
    assert Path(read_split(world.root, "given/train")[0].image_path).samefile(world.folder / there)


def test_a_folder_for_each_split(world: Any) -> None:
    for split in ("train", "valid"):
        world.images("a.png", folder=world.folder / split)
        _write(world, _shape(), name=f"{split}/a.json")
    world.prepare(world.folder, format="labelme")
    assert split_names(world.root, "mine") == ("train", "val")
    assert Path(read_split(world.root, "mine/val")[0].image_path) == world.folder / "valid/a.png"


def test_files_that_are_no_good(world: Any) -> None:
    world.images("a.png", "c.png")
    good = _write(world, _shape())
    (world.folder / "classes.json").write_text('["dog"]')
    (world.folder / "broken.json").write_text('{"shapes": [')
    _write(world, name="c.json", shapes={})
    latin = os.fsencode(world.folder) + b"/caf\xe9.json"
    Path(os.fsdecode(latin)).write_bytes(good.read_bytes().replace(b"a.png", b"c.png"))
    with pytest.raises(DataError) as caught:
        world.prepare(world.folder, format="labelme")
    message = str(caught.value).encode().decode()
    assert "broken.json: expected JSON in UTF-8, got JSONDecodeError" in message
    assert "c.json: expected `shapes` to be a list of objects, got a dict with nothing" in message
    assert "caf\\udce9.json shape 0: expected a phrase id" in message
    made = world.prepare(world.folder, format="labelme", skip_bad=True)
    assert _records(world) == [("dog", 1, 240)]
    assert made.manifest["skipped"] == {"train": {"structure": 3}}
    assert made.manifest["notes"][0] == "not read, as they are not LabelMe's: classes.json"
    assert "caf\\udce9.json" in (world.root / "mine/left_out.jsonl").read_text()
    with pytest.raises(DataError, match=r"expected LabelMe's \*\.json with `shapes`, .*got classes\.json\. Check"):
        world.prepare(world.folder / "classes.json", "none", format="labelme")
    with pytest.raises(DataError, match="--mapping boxes=yes: expected masks or refused"):
        world.prepare(good, "boxes", format="labelme", mapping={"boxes": "yes"})


def test_reasonseg(world: Any) -> None:
    folder = world.folder / "train"
    world.images("1_COCO.jpg", "2.jpg", folder=folder)
    target = {"label": "target", "points": SQUARE, "shape_type": "polygon", "image_name": "1.jpg"}
    content = {"text": ["what barks", "something alive"], "is_sentence": True}
    shapes = [target, {**target, "points": OTHER}, {**target, "label": "flag", "points": [[0, 0], [1, 1], [0, 1]]}]
    (folder / "1_COCO.json").write_text(json.dumps({**content, "shapes": shapes}))
    (folder / "2.json").write_text(json.dumps({**content, "shapes": [{**target, "label": "ignore"}]}))
    with pytest.raises(DataError, match=r"2 of 4 records.*\n  - train/2\.json: .*expected some pixels|its RLE mask is empty"):
        world.prepare(world.folder, format="labelme")
    world.prepare(world.folder, format="labelme", skip_bad=True)
    assert _records(world) == [("what barks", 1, 546), ("something alive", 1, 546)]  # with their outlines, as LISA draws them
    assert Path(read_split(world.root, "mine/train")[0].image_path) == folder / "1_COCO.jpg"
