"""COCO-style folders: the category is the phrase, all its instances are meant; and what is wrong with others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deris_llm.data.errors import DataError
from deris_llm.data.sources import is_generalised, read_split, split_names

SQUARE = [[4, 5, 16, 5, 16, 25, 4, 25]]
OTHER = [[24, 5, 36, 5, 36, 25, 24, 25]]


@pytest.fixture
def coco(world: Any) -> dict[str, Any]:
    """Two dogs and a cat in one image, nothing in the other."""
    world.images("a.png", "b.png", folder=world.folder / "images")
    return {
        "images": [{"id": i, "file_name": f"{'ab'[i]}.png", "width": 40, "height": 30} for i in (0, 1)],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 3, "segmentation": SQUARE, "iscrowd": 0},
            {"id": 2, "image_id": 0, "category_id": 3, "segmentation": OTHER, "iscrowd": 0},
            {"id": 3, "image_id": 0, "category_id": 4, "segmentation": OTHER, "iscrowd": 0},
            {
                "id": 4,
                "image_id": 1,
                "category_id": 4,
                "segmentation": {"size": [30, 40], "counts": [0, 1200]},
                "iscrowd": 1,
            },
        ],
        "categories": [{"id": 3, "name": "dog"}, {"id": 4, "name": "cat"}],
    }


def _write(world: Any, content: Any, name: str = "instances_train.json") -> Path:
    (world.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (world.folder / name).write_text(json.dumps(content))
    return world.folder / name


def test_categories_are_phrases(world: Any, coco: Any) -> None:
    _write(world, coco)
    _write(world, coco, "instances_val.json")
    world.prepare(world.folder, format="coco")
    assert split_names(world.root, "mine") == ("train", "val")
    dogs, cat = read_split(world.root, "mine/train")  # crowds are nobody's object
    assert (dogs.phrase_id, dogs.phrase, [i.annotation_id for i in dogs.instances]) == ("mine/train/0-3", "dog", [1, 2])
    assert (cat.phrase, cat.category, cat.num_same_class) == ("cat", "cat", 0)
    assert is_generalised(world.root, "mine")
    assert Path(cat.image_path) == world.folder / "images/a.png"


def test_crowds_are_counted_named_and_taken_on_request(world: Any, coco: Any) -> None:
    """Annotation tools write iscrowd=1 for every RLE mask."""
    source = _write(world, coco)
    (note,) = (note for note in world.prepare(source, format="coco").manifest["notes"] if "crowds" in note)
    assert note.startswith("train: 1 of 4 annotations are crowds (iscrowd: 1) and are left out; annotation tools")
    assert note.endswith("take them with --crowds taken: 4")
    made = world.prepare(source, "all", format="coco", takes_crowds=True)
    assert "train: 1 of 4 annotations are crowds (iscrowd: 1) and are taken as objects" in made.manifest["notes"][-1]
    assert [(r.phrase, len(r.instances), r.crowds) for r in read_split(world.root, "all/train")][-1] == ("cat", 1, ())
    assert len(read_split(world.root, "all/train")) == len(read_split(world.root, "mine/train")) + 1
    coco["annotations"] = coco["annotations"][3:]
    with pytest.raises(DataError, match=r"expected phrases, got none(.|\n)*1 of 1 annotations are crowds .* --crowds taken: 4"):
        world.prepare(_write(world, coco), "none", format="coco")
    with pytest.raises(DataError, match="--crowds taken: expected --format coco, got jsonl"):
        world.prepare(source, "none", format="jsonl", takes_crowds=True)


def test_captions_are_phrases_of_one_object(world: Any, coco: Any) -> None:
    coco["annotations"][0]["caption"] = "the left dog"
    world.prepare(_write(world, coco), format="coco")
    records = read_split(world.root, "mine/train")
    assert [(r.phrase, [i.annotation_id for i in r.instances], r.num_same_class) for r in records] == [
        ("the left dog", [1], 1),
        ("dog", [1, 2], 0),
        ("cat", [3], 0),
    ]
    coco["annotations"][0]["says"] = coco["annotations"][0].pop("caption")
    world.prepare(_write(world, coco), "said", format="coco", mapping={"caption": "says"})
    assert [r.phrase for r in read_split(world.root, "said/train")] == ["the left dog", "dog", "cat"]


def test_cocos_own_tree(world: Any, coco: Any) -> None:
    del coco["images"][1], coco["annotations"][3]
    for year in ("train2017", "val2017"):
        world.images("a.png", folder=world.folder / year)
        _write(world, coco, f"annotations/instances_{year}.json")
        _write(world, {**coco, "annotations": [{"id": 1, "image_id": 0, "caption": "x"}]}, f"annotations/captions_{year}.json")
        _write(world, coco, f"annotations/person_keypoints_{year}.json")
    made = world.prepare(world.folder, format="coco")
    assert split_names(world.root, "mine") == ("train", "val")
    for split in ("train", "val"):
        records = read_split(world.root, f"mine/{split}")
        assert [record.phrase for record in records] == ["dog", "cat"]
        assert Path(records[0].image_path) == world.folder / f"{split}2017/a.png"
    assert made.manifest["notes"] == [
        *(f"{name}_{year}2017.json: not read, no instances" for name in ("captions", "person_keypoints") for year in ("train", "val")),
        *(f"{world.folder}/annotations/instances_{year}2017.json: read as split {year}" for year in ("train", "val")),
    ]
    world.prepare(world.folder / "annotations/person_keypoints_val2017.json", "people", format="coco")
    assert split_names(world.root, "people") == ("val",)


def test_folders_of_splits_as_roboflow_writes_them(world: Any, coco: Any) -> None:
    for split in ("train", "valid", "test"):
        world.images("a.png", "b.png", folder=world.folder / split)
        _write(world, coco, f"{split}/_annotations.coco.json")
    world.prepare(world.folder, format="coco")
    assert split_names(world.root, "mine") == ("train", "val", "test")
    assert Path(read_split(world.root, "mine/val")[0].image_path) == world.folder / "valid/a.png"
    world.prepare(world.folder / "valid/_annotations.coco.json", "one", format="coco")
    assert split_names(world.root, "one") == ("val",)
    _write(world, coco, "train/instances_train.json")
    _write(world, coco, "train/instances_train2017.json")
    with pytest.raises(DataError, match=r"got instances_train\.json and instances_train2017\.json, both train"):
        world.prepare(world.folder / "train", "two", format="coco")


@pytest.mark.parametrize("given", ["images", "images/train2017", None])
def test_lvis_names_pictures_in_addresses(world: Any, coco: Any, given: str | None) -> None:
    for image, folder in zip(coco["images"], ("train2017", "val2017"), strict=True):
        world.images(image["file_name"], folder=world.folder / "images" / folder)
        image["coco_url"] = f"http://images.cocodataset.org/{folder}/{image.pop('file_name')}"
    del coco["annotations"][3]
    source = _write(world, coco, "lvis_v1_train.json")
    world.prepare(source, format="coco", images=world.folder / given if given else None)
    assert Path(read_split(world.root, "mine/train")[0].image_path) == world.folder / "images/train2017/a.png"


def test_categories_that_lvis_annotated_in_part(world: Any, coco: Any) -> None:
    coco["images"][0]["not_exhaustive_category_ids"] = [3, 9]
    source = _write(world, coco)
    with pytest.raises(DataError, match="train image 0: expected all objects of 'dog', but LVIS says that some are not"):
        world.prepare(source, format="coco")
    made = world.prepare(source, format="coco", skip_bad=True)
    assert [r.phrase for r in read_split(world.root, "mine/train")] == ["cat"]
    assert made.manifest["skipped"] == {"train": {"target": 1}}


def test_names_that_utf8_cannot_hold(world: Any, coco: Any) -> None:
    for key, field in (("images", "file_name"), ("categories", "name")):
        spoilt = json.loads(json.dumps(coco))
        spoilt[key][0][field] = "\udce9\ud800"
        source = _write(world, spoilt)
        with pytest.raises(DataError, match=r"\\udce9\\ud800") as caught:
            world.prepare(source, format="coco")
        str(caught.value).encode()
        if key == "categories":
            world.prepare(source, format="coco", skip_bad=True)
            assert [r.phrase for r in read_split(world.root, "mine/train")] == ["cat"]
    source = _write(world, coco, "instances_\udce9.json")
    with pytest.raises(DataError, match=r"expected the name of a split, letters and digits, got '\\udce9'"):
        world.prepare(source, "named", format="coco")


@pytest.mark.parametrize("name", ["images\\a.png", "images/a.png", "a.png"])
def test_names_as_label_studio_writes_them(world: Any, coco: Any, name: str) -> None:
    coco["images"][0]["file_name"] = name
    world.prepare(_write(world, coco, "result.json"), format="coco")
    assert Path(read_split(world.root, "mine/result")[0].image_path) == world.folder / "images/a.png"


def test_pictures_in_a_folder_of_another_name(world: Any, coco: Any) -> None:
    world.images("a.png", "c.png", folder=world.folder / "imgs")
    for image, name in zip(coco["images"], ("images/a.png", "images/c.png"), strict=True):
        image["file_name"] = name
    made = world.prepare(_write(world, coco), format="coco", images=world.folder / "imgs")
    assert Path(read_split(world.root, "mine/train")[0].image_path) == world.folder / "imgs/a.png"
    said = "2 images were found by the last part of their names, e.g. images/a.png as a.png"
    assert made.manifest["notes"][-1] == said
    coco["images"][1]["file_name"] = "more/a.png"  # which of both a.png is, nothing says
    with pytest.raises(DataError, match=r"images: expected 2 in one of .*imgs, got none of them, not even images/a\.png\. Name"):
        world.prepare(_write(world, coco), "two", format="coco", images=world.folder / "imgs")


def test_categories_of_one_name_are_one(world: Any, coco: Any) -> None:
    coco["categories"][1]["name"] = "dog"
    del coco["annotations"][2]
    coco["annotations"][1]["category_id"] = 4
    made = world.prepare(_write(world, coco), format="coco")
    (dogs,) = read_split(world.root, "mine/train")
    assert (dogs.phrase_id, [i.annotation_id for i in dogs.instances]) == ("mine/train/0-3", [1, 2])
    assert made.manifest["notes"][0] == ("train: categories 3, 4 have the same name, 'dog', and are read as one")


def test_names_that_differ_in_case_and_blanks_are_one_phrase(world: Any, coco: Any) -> None:
    coco["categories"][1]["name"] = " Dog"
    world.prepare(_write(world, coco), format="coco")
    (dogs,) = read_split(world.root, "mine/train")
    assert (dogs.phrase, len(dogs.instances)) == ("dog", len({i.annotation_id for i in dogs.instances}))
    assert {1, 2} < {i.annotation_id for i in dogs.instances}


@pytest.mark.parametrize("name", ["a.png", "./a.png"])
def test_a_picture_under_two_ids_has_no_class_twice(world: Any, coco: Any, name: str) -> None:
    first = coco["images"][0]
    coco["images"].append({**first, "id": 77, "file_name": name})
    coco["annotations"].append({**coco["annotations"][0], "id": 99, "image_id": 77})
    with pytest.raises(DataError, match="expected one record of image .*a.png with all of its objects 'dog', got several"):
        world.prepare(_write(world, coco), format="coco")
    world.prepare(_write(world, coco), format="coco", skip_bad=True)
    assert [r.phrase for r in read_split(world.root, "mine/train")] == ["cat"]  # neither half of the dogs is all of them


def test_a_caption_of_null_is_none(world: Any, coco: Any) -> None:
    for annotation in coco["annotations"]:
        annotation["caption"] = None
    world.prepare(_write(world, coco), format="coco")
    assert [r.phrase for r in read_split(world.root, "mine/train")] == ["dog", "cat"]


def test_folders_without_instances(world: Any, coco: Any) -> None:
    (world.folder / "photos").mkdir(parents=True)
    with pytest.raises(DataError, match=r"expected COCO's instances as JSON, or a folder of such files, got none\."):
        world.prepare(world.folder / "photos", format="coco")
    _write(world, {"shapes": []}, "photos/a.json")
    with pytest.raises(DataError, match=r"got a dict with shapes\. a\.json looks like --format labelme\."):
        world.prepare(world.folder / "photos", format="coco")
    (world.folder / "photos/a.json").write_bytes(b"PK\3\4 zip")
    with pytest.raises(DataError, match="got a zip or gzip archive. Unpack it"):
        world.prepare(world.folder / "photos", format="coco")


def _first(key: str, **changes: Any) -> Callable[[Any], Any]:
    return lambda content: content[key][0].update(changes)


def _cat(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Spoils the only object of its category: its phrase has no other."""
    return lambda content: content["annotations"][2].update(values)


RECORDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another image's": (_first("annotations", image_id=9), "expected image_id among `images`, got 9"),
    "no category": (_first("annotations", category_id=9), "expected category_id among `categories`, got 9"),
    "a category of text": (_first("annotations", category_id="3"), "expected category_id among `categories`, got '3'"),
    "a list as category": (_first("annotations", category_id=[3]), "expected category_id among `categories`, got [3]"),
    "no polygons": (_first("annotations", segmentation=[]), "got an empty list"),
    "NaN": (_first("annotations", segmentation=[[1, 2, float("nan"), 4, 5, 6]]), "expected polygons [x0, y0"),
    "two points": (_cat(segmentation=[[1, 2, 3, 4]]), "none of its polygons has three points"),
    "outside": (_cat(segmentation=[[50, 50, 60, 50, 60, 60]]), "lie outside the image (40 x 30 px)"),
    "bad RLE": (
        _first("annotations", segmentation={"size": [30, 40], "counts": [5]}),
        "expected RLE counts that sum to",
    ),
    "an RLE's size": (
        _first("annotations", segmentation={"size": [3, 4], "counts": [0, 12]}),
        "RLE of the image's size",
    ),
    "the same id": (_first("annotations", id=2), "expected one record of id 2 in annotations, got different ones: number 0 (segmentation [[4"),
    "an empty caption": (_first("annotations", caption=""), "expected a phrase a1 of some words, got str ''"),
    "a caption of numbers": (_first("annotations", caption=4), "expected a phrase a1 of some words, got int '4'"),
    "a category without name": (_first("categories", name=" "), "expected the category's name, got str ' '"),
    "another size": (_first("images", width=41), "expected masks drawn for a.png, 40 x 30 px, got 41 x 30 px"),
    "an absent image": (_first("images", file_name="c.png"), "expected an image, got no file"),
    "a path": (_first("images", file_name="../instances_train.json"), "that stays inside it"),
    "no image": (lambda content: content["images"][0].pop("file_name"), "expected the name of an image, got None"),
    "an id of text": (_first("annotations", id="1"), "number 0 of annotations: expected a whole number as id, got '1'"),
    "an id null": (_first("annotations", id=None), "number 0 of annotations: expected a whole number as id, got None"),
    "half an id": (_first("annotations", id=1.5), "number 0 of annotations: expected a whole number as id, got 1.5"),
    "another image's id": (
        lambda content: content["annotations"].append({**content["annotations"][0], "image_id": 1}),
        "annotation 1: expected one record of id 1 in annotations, got different ones: number 0 (image_id 0) and number 4 "
        "(image_id 1)",
    ),
    "another category's id": (
        lambda content: content["categories"].append({"id": 3, "name": "horse"}),
        "expected one record of id 3 in categories, got different ones: number 0 (name 'dog') and number 2 (name 'horse')",
    ),
    "another image's id": (
        lambda content: content["images"].append({**content["images"][0], "file_name": "b.png"}),
        "expected one record of id 0 in images, got different ones: number 0 (file_name 'a.png') and number 2 (file_name 'b",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_broken_records(world: Any, coco: Any, case: str) -> None:
    spoil, expected = RECORDS[case]
    spoil(coco)
    source = _write(world, coco)
    with pytest.raises(DataError) as caught:
        world.prepare(source, format="coco")
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "\n  - train " in message
    assert expected in message, message
    assert "Repair or remove these records" in message
    assert world.is_untouched()


def test_repeated_records_are_one_and_whole_floats_are_numbers(world: Any, coco: Any) -> None:
    coco["annotations"][0]["id"] = 0  # an id like others
    for table in ("images", "annotations", "categories"):
        coco[table] += [dict(each) for each in coco[table]]
    coco["annotations"][0].update(id=0.0, image_id=0.0, category_id=3.0)
    coco["images"][0].update(id=0.0, width=40.0)
    world.prepare(_write(world, coco), format="coco")
    dogs, cat = read_split(world.root, "mine/train")
    assert (dogs.phrase_id, [i.annotation_id for i in dogs.instances]) == ("mine/train/0-3", [0, 2])
    assert (cat.phrase_id, [i.annotation_id for i in cat.instances]) == ("mine/train/0-4", [3])


def test_one_bad_record_does_not_stop_a_file(world: Any, coco: Any) -> None:
    del coco["annotations"][0]["segmentation"]
    coco["annotations"].append({**coco["annotations"][2], "id": None})
    coco["annotations"].append({**coco["annotations"][2], "id": "x", "image_id": [1]})
    coco["images"].append({"id": 7, "file_name": "b.png"})
    coco["annotations"].append({**coco["annotations"][2], "id": 9, "image_id": 1})
    made = world.prepare(_write(world, coco), format="coco", skip_bad=True)
    # The other dog and cat of the image alone would not be what "dog" and "cat" mean there.
    assert made.manifest["skipped"]["train"] == {"structure": 3, "mask": 1, "target": 2}
    assert [[i.annotation_id for i in r.instances] for r in read_split(world.root, "mine/train")] == [[9]]


FILES: dict[str, tuple[Any, str]] = {
    "cut off": (b'{"images": [', "expected JSON in UTF-8, got JSONDecodeError"),
    "not UTF-8": (b'"\xff"', "expected JSON in UTF-8, got UnicodeDecodeError"),
    "a list": ([], "expected COCO instances with `images`, `annotations` and `categories`, got list '[]'"),
    "no annotations": ({"images": []}, "got a dict with images"),
    "annotations an object": ({"images": [], "annotations": {}}, "got annotations that are a dict with nothing"),
    "ids of text": (
        {"images": [{"id": "0", "width": 4, "height": 3}], "annotations": []},
        "number 0 of images: expected a whole number as id, got '0'",
    ),
    "sizes absent": (
        {"images": [{"id": 0}], "annotations": []},
        "number 0 of images: expected a whole number as width, got none (a dict with id)",
    ),
    "no segmentation": (
        {"images": [{"id": 0, "width": 4, "height": 3}], "categories": [{"id": 1, "name": "x"}],
         "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 1, 2, 2]}]},
        "annotation 0: expected a segmentation, got none (a dict with id, image_id, category_id, bbox); a box is not a mask",
    ),
    "categories of text": (
        {"images": [], "annotations": [], "categories": ["dog"]},
        "number 0 of categories: expected an object, got str 'dog'",
    ),
    "categories unnamed": (
        {"images": [], "annotations": [], "categories": [{"id": 1}]},
        "number 0 of categories: expected a text as name, got none",
    ),
    "nothing": ({"images": [], "annotations": []}, "expected phrases, got none. Check the file"),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_files(world: Any, coco: Any, case: str) -> None:
    content, expected = FILES[case]
    source = world.folder / "instances_train.json"
    source.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(DataError) as caught:
        world.prepare(source, format="coco")
    assert str(source) in str(caught.value)
    assert expected in str(caught.value), str(caught.value)
    assert world.is_untouched()
