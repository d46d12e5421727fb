"""CVAT for images: every shape, subsets, and XML that is not to be trusted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.sources import read_split, split_names

SQUARE = "4.00,5.00;16.00,5.00;16.00,25.00;4.00,25.00"
OTHER = "24,5;36,5;36,25;24,25"
DOG = f'<polygon label="dog" source="manual" occluded="0" points="{SQUARE}" z_order="0"></polygon>'


def _image(*shapes: str, name: str = "a.png", more: str = "") -> str:
    return f'<image id="0" name="{name}" {more} width="40" height="30">{"".join(shapes)}</image>'


def _write(world: Any, *images: str, name: str = "annotations.xml") -> Path:
    (world.folder / name).parent.mkdir(parents=True, exist_ok=True)
    head = '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version><meta><task/></meta>'
    (world.folder / name).write_text(f"{head}{''.join(images)}</annotations>")
    return world.folder / name


def _records(world: Any, split: str = "mine/train") -> list[tuple[str, int, int]]:
    return [
        (r.phrase, len(r.instances), int(sum(decode_segmentation(i.segmentation, 30, 40).sum() for i in r.instances)))
        for r in read_split(world.root, split)
    ]


def test_every_shape(world: Any) -> None:
    world.images("images/a.png")
    shapes = [
        DOG,
        f'<polygon label="dog" points="{OTHER}"/>',
        f'<polygon label="cat" points="{OTHER}"><attribute name="caption"> the left cat </attribute>'
        '<attribute name="colour">red</attribute></polygon>',
        f'<polygon label="car" points="{SQUARE}" group_id="3"/><polygon label="car" points="{OTHER}" group_id="3"/>',
        '<mask label="bird" rle="1, 2, 4, 1, 4" left="10" top="20" width="4" height="3"/>',
        '<ellipse label="ball" cx="20" cy="15" rx="5" ry="10" rotation="90"/>',
        '<box label="sign" xtl="10" ytl="10" xbr="20" ybr="15"/>',
        '<tag label="street"/>',
    ]
    _write(world, _image(*shapes))
    made = world.prepare(world.folder, format="cvat", mapping={"boxes": "masks"})
    found = _records(world)
    assert found[:3] == [("the left cat", 1, 240), ("dog", 2, 480), ("car", 1, 480)]
    assert (found[3], found[5]) == (("bird", 1, 3), ("sign", 1, 50))
    assert found[4][0] == "ball"
    assert abs(found[4][2] - np.pi * 50) < 5
    bird = decode_segmentation(read_split(world.root, "mine/train")[3].instances[0].segmentation, 30, 40)
    assert np.argwhere(bird).tolist() == [[20, 11], [20, 12], [21, 13]]
    ball = decode_segmentation(read_split(world.root, "mine/train")[4].instances[0].segmentation, 30, 40)
    assert (ball.any(0).sum(), ball.any(1).sum()) == (20, 10)  # lying
    assert made.manifest["notes"] == [
        "1 tags of whole images were left out",
        "attributes not read: colour; --mapping caption=NAME reads one as phrases",
    ]


def test_subsets_are_splits(world: Any) -> None:
    world.images("images/Train/a.png", "images/Validation/b.png", "images/c.png", "images/mine/d.png")
    _write(
        world,
        _image(DOG, more='subset="Train"'),
        _image(DOG, name="b.png", more='subset="Validation"'),
        _image(DOG, name="c.png", more='subset="default"'),
        _image(DOG, name="d.png", more='subset="mine"'),
    )
    world.prepare(world.folder, format="cvat")
    assert split_names(world.root, "mine") == ("train", "val", "mine")
    assert [Path(r.image_path).name for r in read_split(world.root, "mine/train")] == ["a.png", "c.png"]
    assert Path(read_split(world.root, "mine/val")[0].image_path) == world.folder / "images/Validation/b.png"


SHAPES = {
    "a box": ('<box label="x" xtl="1" ytl="1" xbr="9" ybr="9"/>', "box 1: a box is not a mask"),
    "points": ('<points label="x" points="1,2;3,4"/>', "got a points, which has no area"),
    "no points": ('<polygon label="x"/>', "expected points x,y;x,y;..., got ''"),
    "no number": ('<ellipse label="x" cx="1" cy="2" rx="3"/>', "expected a number as ry, got None"),
    "counts": ('<mask label="x" rle="1, 2" left="1" top="1" width="2" height="2"/>', "counts of 2 x 2 px in all, got 3"),
    "outside": ('<mask label="x" rle="0, 4" left="39" top="1" width="2" height="2"/>', "expected a mask within the image"),
    "huge": ('<mask label="x" rle="0, 9999999999" left="0" top="0" width="9999999999" height="1"/>', "RLE counts of"),
    "a part of a pixel": ('<mask label="x" rle="0, 4" left="1.5" top="1" width="2" height="2"/>', "whole number as left, got '1.5'"),
    "a comma for a point": ('<polygon label="x" points="1,5,2;3,4;5,6"/>', "expected points x,y;x,y;..., got '1,5,2'"),
    "no label": (f'<polygon points="{OTHER}"/>', "got NoneType"),
    "NaN": ('<polygon label="x" points="nan,1;2,2;3,4"/>', "expected polygons"),
}


def test_a_class_with_an_unusable_shape_is_not_asked(world: Any) -> None:
    world.images("a.png")
    source = _write(world, _image(f'{DOG}<polygon label="Dog" points="1,2;3"/><polygon label="cat" points="{OTHER}"/>'))
    with pytest.raises(DataError, match="image a.png polygon 1: object 2 of 2: expected points x,y;x,y"):
        world.prepare(source, format="cvat")
    world.prepare(source, format="cvat", skip_bad=True)
    assert [phrase for phrase, *_ in _records(world)] == ["cat"]


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_are_no_masks(world: Any, case: str) -> None:
    shape, expected = SHAPES[case]
    world.images("a.png")
    source = _write(world, _image(DOG, shape))
    with pytest.raises(DataError, match=r"\n  - annotations\.xml image a\.png ") as caught:
        world.prepare(source, format="cvat")
    assert expected in str(caught.value), str(caught.value)
    world.prepare(source, format="cvat", skip_bad=True)
    assert _records(world) == [("dog", 1, 240)]


_BOMB = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 30))
FILES = {
    "an entity bomb": (f'<!DOCTYPE a [<!ENTITY e0 "ha">{_BOMB}]><annotations>&e29;</annotations>', "no document type, got one"),
    "another file": ('<!DOCTYPE a [<!ENTITY x SYSTEM "/etc/passwd">]><annotations>&x;</annotations>', "no document type"),
    "an address": ('<!DOCTYPE a SYSTEM "http://example.org/a.dtd"><annotations/>', "no document type"),
    "in UTF-16": ('<!DOCTYPE a [<!ENTITY x "y">]><annotations>&x;</annotations>', "expected XML in UTF-8"),
    "cut off": ("<annotations><image", "expected XML in UTF-8, got ParseError"),
    "a video": ('<annotations><track id="0"/></annotations>', "got <annotations> with track. Export the task as"),
    "another XML": ("<annotation><object/></annotation>", "got <annotation> with object"),
    "no size": ('<annotations><image id="0" name="a.png" width="-4"/></annotations>', "height and width in px, got '' and '-4'"),
    "a huge size": (
        '<annotations><image id="0" name="a.png" width="99999" height="99999"/></annotations>',
        "expected height and width in px",
    ),
    "deep": ("<annotations>" + "<image>" * 200_000, "expected XML in UTF-8, got ParseError"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_good(world: Any, case: str) -> None:
    content, expected = FILES[case]
    world.images("a.png")
    source = _write(world)
    source.write_bytes(content.encode("utf-16" if case == "in UTF-16" else "utf-8"))
    with pytest.raises(DataError) as caught:
        world.prepare(source, format="cvat")
    assert expected in str(caught.value), str(caught.value)
    assert str(source) in str(caught.value)
    assert world.is_untouched()


def test_archives_and_empty_folders(world: Any) -> None:
    source = _write(world, name="task.zip")
    source.write_bytes(b"PK\3\4rest")
    with pytest.raises(DataError, match="got a zip or gzip archive. Unpack it"):
        world.prepare(source, format="cvat")
    with pytest.raises(DataError, match=r"expected CVAT's annotations\.xml, or its folder, got none\."):
        world.prepare(world.folder, format="cvat")
