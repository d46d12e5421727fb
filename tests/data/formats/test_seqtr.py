"""The JSON of SeqTR, SimVG and DeRIS in its variants, whole and broken."""

import json
from pathlib import Path
from typing import Any

import pytest

from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.data.sources import is_generalised, read_split, split_names

SQUARE = [[4, 5, 16, 5, 16, 25, 4, 25]]
OTHER = [[24, 5, 36, 5, 36, 25, 24, 25]]
ENTRY = {"image_id": 5, "bbox": [4, 5, 12, 20], "category_id": 1, "expressions": ["left one", "a"], "mask": SQUARE}
SIZED = {**ENTRY, "width": 40, "height": 30}


@pytest.fixture
def tree(world: Any) -> Path:
    """A root with images where COCO has them and a folder for annotations."""
    images = world.folder / "images/mscoco/images/train2014"
    world.images(*(f"COCO_train2014_{i:012d}.jpg" for i in (5, 6)), folder=images)
    (world.folder / "seqtr_type/annotations/refcoco-unc").mkdir(parents=True)
    return world.folder


def _write(tree: Path, content: Any, name: str = "seqtr_type/annotations/refcoco-unc/instances.json") -> Path:
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_one_file_with_all_splits(world: Any, tree: Path) -> None:
    _write(tree, {"train": [ENTRY, {**SIZED, "image_id": 6, "mask": OTHER}], "val_refcoco_unc": [ENTRY]})
    world.prepare(tree, format="seqtr")
    assert split_names(world.root, "mine") == ("train", "val_refcoco_unc")
    records = read_split(world.root, "mine/train")
    assert [r.phrase_id for r in records] == [f"mine/train/{i}-{k}" for i in (0, 1) for k in (0, 1)]
    assert [r.image_id for r in records[::2]] == ["COCO_train2014_000000000005", "COCO_train2014_000000000006"]
    assert Path(records[0].image_path).is_file()
    assert not is_generalised(world.root, "mine")


def test_a_file_per_split(world: Any, tree: Path) -> None:
    for split in ("train", "testA"):
        _write(tree, [ENTRY], f"annotations/{split}.json")
    world.prepare(tree / "annotations", format="seqtr")
    assert split_names(world.root, "mine") == ("train", "testA")


def test_crowds_beside_other_referents_are_kept_apart(world: Any, tree: Path) -> None:
    """As of gRefCOCO in REFER's form; also where COCO's own file says which annotations are crowds."""
    left, right = {"id": 50, "segmentation": SQUARE}, {"id": 51, "segmentation": OTHER, "iscrowd": 1}
    entry = {"image_id": 5, "expressions": ["x"]}
    _write(tree, {"val": [{**entry, "annotations": [left, right]}, {**entry, "annotations": [right]}]})
    world.prepare(tree, format="seqtr")
    both, alone = read_split(world.root, "mine/val")
    assert [[i.annotation_id for i in found] for found in (both.instances, both.crowds)] == [[50], [51]]
    assert [[i.annotation_id for i in found] for found in (alone.instances, alone.crowds)] == [[51], []]
    assert is_generalised(world.root, "mine")
    coco = {
        "images": [{"id": 5, "file_name": "COCO_train2014_000000000005.jpg", "width": 40, "height": 30}],
        "annotations": [{**each, "image_id": 5} for each in (left, right)],
    }
    mapping = {"instances": str(_write(tree, coco, "coco.json"))}
    source = _write(tree, {"val": [{**entry, "annotations": [{"id": 50}, {"id": 51}]}]})
    world.prepare(source, "by_id", format="seqtr", mapping=mapping, images=tree / "images/mscoco/images/train2014")
    (record,) = read_split(world.root, "by_id/val")
    assert [[i.annotation_id for i in found] for found in (record.instances, record.crowds)] == [[50], [51]]


def test_grefcoco(world: Any, tree: Path) -> None:
    several = {
        "image_id": 5,
        "expressions": {"raw": "Both of them", "sent": "both of them"},
        "annotations": [{"id": 51, "segmentation": OTHER}, {"id": 50, "mask": SQUARE}],
    }
    nothing = {
        "image_id": 5,
        "expressions": {"raw": ["A unicorn", "A dragon"]},
        "annotations": [{"id": -1, "mask": []}],
    }
    empty = {"image_id": 5, "expressions": "a griffin", "empty": True, "annotations": []}
    ids = {"image_id": 6, "expressions": ["a"], "ann_id": [-1]}
    world.prepare(_write(tree, {"val": [several, nothing, empty, ids]}), format="seqtr")
    assert is_generalised(world.root, "mine")
    records = read_split(world.root, "mine/val")
    assert [[i.annotation_id for i in r.instances] for r in records] == [[51, 50], [], [], [], []]
    assert records[0].phrase == "both of them"
    assert [r.phrase for r in records[1:]] == ["A unicorn", "A dragon", "a griffin", "a"]


@pytest.mark.parametrize(
    "below",
    ["seqtr_type/images/mscoco/train2014", "images/mscoco/train2014", "coco2014/train2014", "coco_2014/train2014"],
)
def test_trees_of_deris_and_others(world: Any, below: str) -> None:
    world.images("COCO_train2014_000000000005.jpg", folder=world.folder / below)
    _write(world.folder, {"train": [ENTRY]}, "seqtr_type/annotations/grefs/instance.json")
    world.prepare(world.folder, format="seqtr")
    assert Path(read_split(world.root, "mine/train")[0].image_path).parent == (world.folder / below).resolve()


def test_no_target_as_deris_writes_it(world: Any, tree: Path) -> None:
    nothing = {"iscrowd": None, "bbox": None, "category_id": None, "id": None, "bbox_mode": 1, "empty": True}
    entry = {"image_id": 5, "expressions": {"raw": "dotted house", "sent_id": 5}, "annotations": [nothing]}
    several = {**entry, "annotations": [{"id": 7, "empty": False, "segmentation": SQUARE}, nothing]}
    unknown = {**entry, "annotations": [{**nothing, "empty": False}]}
    world.prepare(_write(tree, {"val": [entry, several]}), format="seqtr")
    records = read_split(world.root, "mine/val")
    assert [[i.annotation_id for i in r.instances] for r in records] == [[], [7]]
    with pytest.raises(DataError, match="expected a mask, got annotation None without"):
        world.prepare(_write(tree, {"val": [unknown]}), "unknown", format="seqtr")


def test_annotations_of_each_expression_as_simvg_nests_them(world: Any, tree: Path) -> None:
    annotations = [
        [{"id": 0, "original_id": 51, "segmentation": SQUARE}],
        [{"id": 0, "segmentation": SQUARE}, {"id": 1, "segmentation": OTHER}],
        [{"id": -1, "bbox": [0, 0, 0, 0]}],
    ]
    entry = {"image_id": 5, "expressions": ["LEFT", "both", "a unicorn"], "annotations": annotations}
    world.prepare(_write(tree, {"val": [entry]}), format="seqtr")
    records = read_split(world.root, "mine/val")
    assert [(r.phrase, [i.annotation_id for i in r.instances]) for r in records] == [
        ("LEFT", [51]),
        ("both", [0, 1]),
        ("a unicorn", []),
    ]
    assert [r.phrase_id for r in records] == ["mine/val/0-0", "mine/val/0-1", "mine/val/0-2"]
    uneven = {**entry, "annotations": annotations[:2]}
    with pytest.raises(DataError, match="expected a list of annotations for each of 3 expressions, got 2"):
        world.prepare(_write(tree, {"val": [uneven]}), "uneven", format="seqtr")
    boxes = {**entry, "expressions": ["LEFT"], "annotations": [[{"id": 0, "original_id": 51, "bbox": [1, 2, 3, 4]}]]}
    with pytest.raises(DataError, match="expected a mask, got annotation 51 without; name COCO's file"):
        world.prepare(_write(tree, {"val": [boxes]}), "boxes", format="seqtr")


def test_lists_of_alternatives_are_entries(world: Any, tree: Path) -> None:
    one = {"file_name": "COCO_train2014_000000000005.jpg", "annotations": [{"id": 7, "segmentation": SQUARE}]}
    none = {**one, "annotations": [{"id": None, "empty": True}]}
    entry = [{**one, "expressions": {"raw": "left"}}, {**none, "expressions": {"raw": "a unicorn"}}]
    made = world.prepare(_write(tree, {"val_rrefcoco": [entry, entry[0]]}), format="seqtr")
    records = read_split(world.root, "mine/val_rrefcoco")
    assert [(r.phrase_id, r.phrase, len(r.instances)) for r in records] == [
        ("mine/val_rrefcoco/0.0-0", "left", 1),
        ("mine/val_rrefcoco/0.1-0", "a unicorn", 0),
        ("mine/val_rrefcoco/1-0", "left", 1),
    ]
    assert "1 entries are lists of alternatives" in made.manifest["notes"][0]


def test_masks_of_cocos_own_file(world: Any, tree: Path) -> None:
    source = _write(tree, {"val": [{"image_id": 5, "expressions": ["x"], "mask_id": 50}]})
    coco = {
        "images": [{"id": 5, "width": 40, "height": 30}],
        "annotations": [{"id": 50, "image_id": 5, "segmentation": SQUARE}],
    }
    with pytest.raises(DataError, match="expected a mask, got annotation 50 without; name COCO's file"):
        world.prepare(source, format="seqtr")
    world.prepare(source, format="seqtr", mapping={"instances": str(_write(tree, coco, "coco.json"))})
    assert read_split(world.root, "mine/val")[0].instances[0].annotation_id == 50
    coco["annotations"].append({**coco["annotations"][0], "segmentation": OTHER})
    with pytest.raises(DataError, match=r"val\[0\]: expected one record of id 50 in annotations, got different ones"):
        world.prepare(source, "twice", format="seqtr", mapping={"instances": str(_write(tree, coco, "coco.json"))})
    with pytest.raises(DataError, match="expected COCO's instances file, got nothing there"):
        world.prepare(source, "other", format="seqtr", mapping={"instances": str(tree / "no.json")})


def test_one_annotation_id_is_one_object(world: Any, tree: Path) -> None:
    """Several entries may name it; another mask or image under it would be found as the first one's."""
    first = {**ENTRY, "annotation_id": 9}
    world.prepare(_write(tree, {"train": [first, {**first, "expressions": ["again"]}, {**ENTRY, "mask": OTHER}]}), format="seqtr")
    assert [r.instances[0].annotation_id for r in read_split(world.root, "mine/train")[:3]] == [9, 9, 9]
    unknown = [{**ENTRY, "annotation_id": -1, "mask": mask} for mask in (SQUARE, OTHER)]
    world.prepare(_write(tree, {"train": unknown}), "unknown", format="seqtr")
    ids = [r.instances[0].annotation_id for r in read_split(world.root, "unknown/train")]
    assert ids[0] == ids[1] != ids[2] == ids[3]  # by content
    first["annotation_id"] = 9.0  # a table program's integer
    for other, got in (({"mask": OTHER}, "another mask"), ({"image_id": 6}, "image COCO_train2014_000000000005.jpg")):
        source = _write(tree, {"train": [first, {**first, **other}]})
        ask = rf"train\[1\]: expected annotation id 9 to be one object, got {got} under it in train\[0\]"
        with pytest.raises(DataError, match=ask):
            world.prepare(source, "other", format="seqtr")


def test_an_annotation_of_id_0_is_an_object(world: Any, tree: Path) -> None:
    entry = {"image_id": 5, "expressions": ["x"], "annotations": [{"id": 0, "mask": SQUARE}]}
    world.prepare(_write(tree, {"val": [entry]}), format="seqtr")
    assert [i.annotation_id for i in read_split(world.root, "mine/val")[0].instances] == [0]


BROKEN: dict[str, tuple[Any, str]] = {
    "a text": ("x", "expected an object, got str 'x'"),
    "no expressions": ({"image_id": 5, "mask": SQUARE}, "expected `expressions` to be texts, got NoneType"),
    "expressions a number": ({**ENTRY, "expressions": 5}, "expected `expressions` to be texts, got int '5'"),
    "expressions empty": ({**ENTRY, "expressions": []}, "expected `expressions` to be texts, got list '[]'"),
    "expressions without raw": (
        {**ENTRY, "expressions": {"tokens": []}},
        "`expressions` to be texts, got a dict with tokens",
    ),
    "an empty phrase": ({**ENTRY, "expressions": ["a", ""]}, "expected a phrase 1-1 of some words, got str ''"),
    "a number for a phrase": ({**ENTRY, "expressions": [3]}, "expected a phrase 1-0 of some words, got int '3'"),
    "no mask": ({"image_id": 5, "expressions": ["x"]}, "expected `mask`, `annotations` or ids of COCO's annotations"),
    "an annotation's number": (
        {"image_id": 5, "expressions": ["x"], "ann_id": "50"},
        "expected `mask`, `annotations` or ids",
    ),
    "annotations an object": (
        {**ENTRY, "annotations": {}},
        "expected `annotations` to be a list of objects, got a dict with nothing",
    ),
    "annotations empty": ({**ENTRY, "annotations": []}, "or one of id -1 for no target, got an empty list"),
    "an id of text": (
        {**ENTRY, "annotations": [{"id": "3", "mask": SQUARE}]},
        "ids of annotations to be whole numbers, got '3'",
    ),
    "an object twice": (
        {**ENTRY, "annotations": [{"id": 3, "mask": SQUARE}] * 2},
        "expected each object once, got one twice",
    ),
    "another image": ({**ENTRY, "image_id": 7}, "COCO_train2014_000000000007.jpg: expected an image, got no file"),
    "no image": ({**ENTRY, "image_id": None}, "expected the name of an image, got None"),
    "a path": ({**ENTRY, "file_name": "../x.jpg"}, "that stays inside it, got '../x.jpg'"),
    "size differs": ({**SIZED, "width": 39}, "expected masks drawn for COCO_train2014_000000000005.jpg, 40 x 30 px"),
    "two points": ({**ENTRY, "mask": [[1, 2, 3, 4]]}, "none of its polygons has three points"),
    "outside": ({**ENTRY, "mask": [[99, 99, 98, 99, 99, 98]]}, "lie outside the image (40 x 30 px)"),
    "bad RLE": ({**ENTRY, "mask": {"size": [30, 40], "counts": "~"}}, "got one of no valid form"),
    "a mask of text": ({**ENTRY, "mask": "x"}, "list or string}, got 'x'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_entries(world: Any, tree: Path, case: str) -> None:
    entry, expected = BROKEN[case]
    source = _write(tree, {"train": [ENTRY, entry]})
    with pytest.raises(DataError) as caught:
        world.prepare(source, format="seqtr")
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "\n  - train[1]: " in message
    assert expected in message, message
    assert "Repair or remove these records" in message
    assert world.is_untouched()


FILES: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"train": [', "expected JSON in UTF-8, got JSONDecodeError"),
    "not UTF-8": (b'{"train": "\xff"}', "expected JSON in UTF-8, got UnicodeDecodeError"),
    "a text": (b'"x"', "expected lists of entries by split, or one list, got str 'x'"),
    "an object of objects": (b'{"train": {}}', "expected lists of entries by split"),
    "empty": (b"{}", "expected lists of entries by split"),
    "deep": (b"[" * 100_000, "expected JSON in UTF-8, got RecursionError"),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_files(world: Any, tree: Path, case: str) -> None:
    content, expected = FILES[case]
    source = _write(tree, {})
    source.write_bytes(content)
    with pytest.raises(DataError) as caught:
        world.prepare(source, format="seqtr")
    assert str(source) in str(caught.value)
    assert expected in str(caught.value), str(caught.value)
    assert world.is_untouched()


def test_the_tree_that_is_expected(world: Any, tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        world.prepare(tree, format="seqtr")
    assert "ROOT/seqtr_type/annotations/SET/instances*.json   with ROOT/seqtr_type/images/mscoco/train2014" in str(
        caught.value
    )
    assert "got a folder that holds images, seqtr_type" in str(caught.value)
    _write(tree, [ENTRY])
    _write(tree, [ENTRY], "seqtr_type/annotations/mixed-seg/instances_nogoogle.json")
    with pytest.raises(DataError, match="expected one annotation file, got .*mixed-seg.*refcoco-unc"):
        world.prepare(tree, format="seqtr")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    source = _write(elsewhere, [{**ENTRY, "mask": encode_mask(decode_segmentation(SQUARE, 30, 40))}], "train.json")
    with pytest.raises(DataError, match="expected COCO's train2014 in a folder above, .*Name the folder with --images"):
        world.prepare(source, format="seqtr")
    world.prepare(source, format="seqtr", images=tree / "images/mscoco/images/train2014")
    assert len(read_split(world.root, "mine/train")) == 2
