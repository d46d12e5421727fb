"""REFER's files through `data prepare`: what is wrong with them is named, and nothing is written."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deris_llm.data.errors import DataError
from deris_llm.data.sources import count_refs, read_split


def _val_ref(folder: Any) -> dict[str, Any]:
    return next(ref for ref in folder.refs["refcoco"] if ref["split"] == "val")


def _val_annotation(folder: Any) -> dict[str, Any]:
    ann_id = _val_ref(folder)["ann_id"]
    return next(a for a in folder.instances["refcoco"]["annotations"] if a["id"] == ann_id)


def _val_image(folder: Any) -> dict[str, Any]:
    return next(i for i in folder.instances["refcoco"]["images"] if i["id"] == 5)


RECORDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "annotation absent": (lambda f: _val_ref(f).update(ann_id=999), "expected ann_id among the annotations"),
    "annotation of another image": (
        lambda f: _val_ref(f).update(ann_id=10),
        "expected an annotation of image 5, got ann_id 10",
    ),
    "ann_id a text": (lambda f: _val_ref(f).update(ann_id="50"), "expected one ann_id, a whole number, got '50'"),
    "image absent": (
        lambda f: _val_ref(f).update(image_id=999),
        "expected image_id among the images of instances.json, got 999",
    ),
    "empty phrase": (lambda f: _val_ref(f)["sentences"][0].update(sent="  "), "of some words, got str '  '"),
    "no text": (lambda f: _val_ref(f)["sentences"][0].pop("sent"), "of some words, got NoneType 'None'"),
    "no sent_id": (
        lambda f: _val_ref(f)["sentences"][0].pop("sent_id"),
        "expected a phrase id, a text or number, got NoneType",
    ),
    "duplicate sent_id": (
        lambda f: _val_ref(f)["sentences"][1].update(sent_id=20),
        "expected each phrase id once in val, got 20",
    ),
    "NaN": (lambda f: _val_annotation(f).update(segmentation=[[1, 2, float("nan"), 4, 5, 6]]), "expected polygons"),
    "infinite": (
        lambda f: _val_annotation(f).update(segmentation=[[1, 2, float("inf"), 4, 5, 6]]),
        "expected polygons",
    ),
    "outside": (
        lambda f: _val_annotation(f).update(segmentation=[[90, 90, 99, 90, 99, 99]]),
        "lie outside the image (40 x 30 px)",
    ),
    "no mask": (lambda f: _val_annotation(f).update(segmentation=None), "list or string}, got None"),
    "bad RLE": (
        lambda f: _val_annotation(f).update(segmentation={"size": [30, 40], "counts": [1, 2, 3]}),
        "expected RLE counts that sum to 30 x 40",
    ),
    "RLE of another size": (
        lambda f: _val_annotation(f).update(segmentation={"size": [40, 30], "counts": [1200]}),
        "expected an RLE of the image's size [h, w] = [30, 40], got [40, 30]",
    ),
    "size differs": (
        lambda f: _val_image(f).update(width=41),
        "expected masks drawn for COCO_train2014_000000000005.jpg, 40 x 30 px",
    ),
    "path": (lambda f: _val_image(f).update(file_name="COCO_train2014_0.jpg"), "expected an image, got no file"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_broken_records(refer_folder: Any, world: Any, case: str) -> None:
    spoil, expected = RECORDS[case]
    spoil(refer_folder)
    root = refer_folder.write()
    with pytest.raises(DataError) as caught:
        world.prepare(root, "refcoco", format="refer")
    message = str(caught.value)
    assert message.startswith(f"{root}: ")
    assert "\n  - ref_id " in message
    assert expected in message, message
    assert "Repair or remove these records" in message
    assert world.is_untouched()
    made = world.prepare(root, "refcoco", format="refer", skip_bad=True)
    left_out = sum(made.manifest["skipped"]["val"].values())
    assert made.manifest["splits"].get("val", {"num_phrases": 0})["num_phrases"] == 5 - left_out < 5
    assert count_refs(world.root, "refcoco/train") == 8


PICTURES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda path: path.unlink(), "expected an image, got no file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "expected an image, got a folder"),
    "empty": (lambda path: path.write_bytes(b""), "expected an image, got a file of 0 bytes"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-300]), "expected a complete image, got OSError"),
    "resized": (
        lambda path: Image.new("RGB", (20, 15)).save(path),
        "expected masks drawn for COCO_train2014_000000000005.jpg, 20 x 15",
    ),
    "a link out": (
        lambda path: (path.rename(path.parents[3] / "x.jpg"), os.symlink(path.parents[3] / "x.jpg", path)),
        "a link to",
    ),
}


@pytest.mark.parametrize("case", PICTURES)
def test_broken_pictures(refer_folder: Any, world: Any, case: str) -> None:
    spoil, expected = PICTURES[case]
    root = refer_folder.write()
    spoil(refer_folder.image_path(5))
    with pytest.raises(DataError) as caught:
        world.prepare(root, "refcoco", format="refer")
    assert expected in str(caught.value), str(caught.value)
    assert "5 of " in str(caught.value)  # the phrases of that image
    assert world.is_untouched()


FILES: dict[str, tuple[str, bytes, str]] = {
    "no JSON": ("instances.json", b'{"images": [', "expected JSON, got"),
    "not UTF-8": ("instances.json", b'{"images": "\xff"}', "expected JSON, got"),
    "a list": ("instances.json", b"[]", "expected COCO instances with `images` and `annotations`, got list"),
    "no annotations": ("instances.json", b'{"images": []}', "got a dict with images"),
    "images no list": ("instances.json", b'{"images": {}, "annotations": []}', "got images that are a dict"),
    "an image without size": (
        "instances.json", b'{"images": [{"id": 5}], "annotations": []}', "number 0 of images: expected a whole number as width, got none",
    ),
    "a size as text": (
        "instances.json", b'{"images": [{"id": 5, "width": "4", "height": 3}], "annotations": []}', "number 0 of images: expected a whole number as width, got '4'",
    ),
    "a name as number": (
        "instances.json",
        b'{"images": [{"id": 5, "width": 4, "height": 3, "file_name": 7}], "annotations": []}',
        "number 0 of images: expected a text as file_name, got 7",
    ),
    "an annotation without image": (
        "instances.json", b'{"images": [], "annotations": [{"id": 5}]}', "number 0 of annotations: expected a whole number as image_id, got none",
    ),
    "two categories of one id": (
        "instances.json",
        b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}, {"id": 1, "name": "y"}]}',
        "expected one record of id 1 in categories, got different ones: number 0 (name 'x') and number 1 (name 'y')",
    ),
    "categories a text": ("instances.json", b'{"images": [], "annotations": [], "categories": "x"}', "categories that are str 'x'"),
    "a category's id": (
        "instances.json",
        b'{"images": [], "annotations": [], "categories": [{"id": [], "name": "x"}]}',
        "number 0 of categories: expected a whole number as id, got []",
    ),
    "a pickle cut off": ("refs(unc).p", pickle.dumps([1, 2, 3])[:-2], "refs(unc).p"),
    "a pickle of something": ("refs(unc).p", pickle.dumps({"a": 1}), "expected a list of refs"),
    "refs of numbers": ("refs(unc).p", pickle.dumps([1]), "got int '1' as number 0"),
    "a ref without keys": ("refs(unc).p", pickle.dumps([{"ref_id": 3}]), "number 0 (ref_id 3) without ann_id, image_id"),
    "a split of numbers": (
        "refs(unc).p",
        pickle.dumps([{"ref_id": 3, "ann_id": 1, "image_id": [1], "split": 4, "sentences": []}]),
        "number 0 (ref_id 3) with split 4 and image_id [1]",
    ),
    "code": ("refs(unc).p", b"cos\nsystem\n(S'echo'\ntR.", "refs(unc).p"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_broken_files(refer_folder: Any, world: Any, case: str) -> None:
    name, content, expected = FILES[case]
    root = refer_folder.write()
    (root / "refcoco" / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        world.prepare(root, "refcoco", format="refer")
    assert str(root / "refcoco" / name) in str(caught.value)
    assert expected in str(caught.value), str(caught.value)
    assert world.is_untouched()


def test_annotation_ids_given_twice(refer_folder: Any, world: Any) -> None:
    """Equal records are one; of different ones nobody knows which is meant. An annotation without mask spoils its ref."""
    annotations = refer_folder.instances["refcoco"]["annotations"]
    last = {**annotations[-1], "category_id": 1.0}  # a table program's integer
    annotations += [last, {**annotations[0], "segmentation": [[1, 1, 9, 1, 9, 9]]}]
    del annotations[1]["segmentation"]
    refer_folder.instances["refcoco"]["images"].append(dict(refer_folder.instances["refcoco"]["images"][0]))
    root = refer_folder.write()
    repeated = (
        r"expected one record of id 10 in annotations, got different ones: number 0 \(segmentation \[\[4.*\) and "
        rf"number {len(annotations) - 1} \(segmentation \[\[1"
    )
    with pytest.raises(DataError, match=repeated) as caught:
        world.prepare(root, "refcoco", format="refer")
    assert "\n  - ref_id 0: " in str(caught.value)
    assert "list or string}, got None" in str(caught.value)
    with pytest.raises(DataError, match=repeated):
        read_split(root, "refcoco/train")
    assert read_split(root, "refcoco/testB")[-1].instances[0].annotation_id == annotations[-3]["id"]
    made = world.prepare(root, "refcoco", format="refer", skip_bad=True)
    assert made.manifest["skipped"]["train"] == {"reference": 2, "mask": 3}


def test_image_ids_given_twice(refer_folder: Any, world: Any) -> None:
    images = refer_folder.instances["refcoco"]["images"]
    images.append({**images[0], "width": 20})
    root = refer_folder.write()
    ask = r"ref_id 0: expected one record of id 1 in images, got different ones: number 0 \(width 40\) and number 7 \(width 20\)"
    with pytest.raises(DataError, match=ask):
        world.prepare(root, "refcoco", format="refer")
    with pytest.raises(DataError, match=ask):
        read_split(root, "refcoco/train")


@pytest.mark.parametrize("ref_id", [True, 2**64, None, "7"])
def test_an_odd_ref_id_is_not_kept(refer_folder: Any, world: Any, ref_id: Any) -> None:
    _val_ref(refer_folder)["ref_id"] = ref_id
    world.prepare(refer_folder.write(), "refcoco", format="refer")
    assert [r.ref_id for r in read_split(world.root, "refcoco/val")][:2] == [None, None]


def test_a_byte_order_mark_is_no_fault(refer_folder: Any, world: Any) -> None:
    root = refer_folder.write()
    path = root / "refcoco/instances.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    world.prepare(root, "refcoco", format="refer")
    assert len(read_split(world.root, "refcoco/val")) == 5


def test_gref_ids(refer_folder: Any, world: Any) -> None:
    refs = [
        {
            "ref_id": 1,
            "image_id": 5,
            "split": "val",
            "ann_id": [50, 51],
            "no_target": False,
            "sentences": [_sentence(1)],
        },
        {"ref_id": 2, "image_id": 5, "split": "val", "ann_id": [-1], "no_target": True, "sentences": [_sentence(2)]},
        {
            "ref_id": 3,
            "image_id": 5,
            "split": "val",
            "ann_id": [-1, 50],
            "no_target": True,
            "sentences": [_sentence(3)],
        },
        {
            "ref_id": 4,
            "image_id": 5,
            "split": "val",
            "ann_id": [50, 50],
            "no_target": False,
            "sentences": [_sentence(4)],
        },
        {"ref_id": 5, "image_id": 5, "split": "val", "ann_id": [], "no_target": True, "sentences": [_sentence(5)]},
        {"ref_id": 6, "image_id": 5, "split": "val", "ann_id": [-1], "no_target": False, "sentences": [_sentence(6)]},
    ]
    root = refer_folder.write()
    (root / "grefcoco").mkdir()
    (root / "grefcoco/grefs(unc).json").write_text(json.dumps(refs))
    (root / "grefcoco/instances.json").write_text(json.dumps(refer_folder.instances["refcoco"]))
    with pytest.raises(DataError, match="4 of 6 records"):
        world.prepare(root, "grefcoco", format="refer")
    world.prepare(root, "mine", format="refer", mapping={"dataset": "grefcoco"}, skip_bad=True)
    several, nothing = read_split(world.root, "mine/val")
    assert [i.annotation_id for i in several.instances] == [50, 51]
    assert nothing.is_no_target


def _sentence(number: int) -> dict[str, Any]:
    return {"sent_id": number, "sent": f"thing {number}", "raw": f"Thing {number}", "tokens": []}


def test_the_tree_that_is_expected(world: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="dataset 'mine': expected one of refcoco, refcoco"):
        world.prepare(tmp_path / "data", format="refer")
    with pytest.raises(DataError) as caught:
        world.prepare(tmp_path / "data", "refcoco", format="refer")
    for part in (
        "ROOT/images/train2014/COCO_train2014_*.jpg",
        "refs(unc).p",
        "instances.json",
        "grefs(unc).json",
        "manifest.json",
    ):
        assert part in str(caught.value)


def test_images_that_are_not_decoded_need_not_be_there(refer_folder: Any, world: Any) -> None:
    root = refer_folder.write()
    refer_folder.image_path(5).unlink()
    made = world.prepare(root, "refcoco", format="refer", decode_images=False)
    assert made.manifest["splits"]["val"]["num_phrases"] == 5
    record = read_split(world.root, "refcoco/val")[0]
    assert (record.image_id, record.width, record.height) == ("COCO_train2014_000000000005", 40, 30)  # of instances.json
