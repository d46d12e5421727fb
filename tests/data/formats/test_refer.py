"""REFER's files read as they are; what is wrong with them is said in one error."""

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deris_llm.data.formats import refer
from deris_llm.data.check import KNOWN_COUNTS, check_data
from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.sources import images_of_split, read_split, split_names
from deris_llm.common.unpickle import UnsafePickleError


def test_records_of_a_split(refer_root: Path) -> None:
    records = read_split(refer_root, "refcocog_umd/test")
    assert [r.phrase for r in records] == [
        "left thing 0 of refcocog",
        "left thing 1 of refcocog",
        "right thing 0 of refcocog",
        "right thing 1 of refcocog",
        "right thing 2 of refcocog",
    ]
    first = records[0]
    assert first.phrase_id == "refcocog_umd/test/25"
    assert (first.dataset, first.split, first.image_id) == ("refcocog_umd", "test", "COCO_train2014_000000000003")
    assert Path(first.image_path) == refer_root / "images/train2014/COCO_train2014_000000000003.jpg"
    assert (first.width, first.height) == (40, 30)
    assert not first.is_no_target
    (instance,) = first.instances
    assert instance.annotation_id == 30
    mask = decode_segmentation(instance.segmentation, 30, 40)
    expected = np.zeros((30, 40), dtype=bool)
    expected[5:25, 4:16] = True
    assert (mask == expected).all()


def test_counts_splits_and_ids(refer_root: Path) -> None:
    assert split_names(refer_root, "refcoco") == ("train", "val", "testA", "testB")
    assert split_names(refer_root, "refcocog_umd") == ("train", "val", "test")
    ids = []
    for dataset in ("refcoco", "refcoco+", "refcocog_umd"):
        for split in split_names(refer_root, dataset):
            ids.extend(r.phrase_id for r in read_split(refer_root, f"{dataset}/{split}"))
    assert len(ids) == len(set(ids)) == 5 * (7 + 7 + 6)
    assert images_of_split(refer_root, "refcoco/val") == {"COCO_train2014_000000000005"}


def test_phrase_field(refer_root: Path) -> None:
    sent = read_split(refer_root, "refcoco/val", phrase_field="sent")
    raw = read_split(refer_root, "refcoco/val", phrase_field="raw")
    assert [r.phrase.upper() for r in sent] == [r.phrase for r in raw]
    assert sent[0].phrase != raw[0].phrase


def test_classes_and_others_of_the_same(refer_folder: Any) -> None:
    instances = refer_folder.instances["refcoco"]
    for annotation in instances["annotations"]:
        del annotation["category_id"]
    before = list(read_split(refer_folder.write(), "refcoco/val"))
    assert {(r.category, r.num_same_class) for r in before} == {(None, None)}  # the file does not say
    assert {r.ref_id for r in before} == {
        ref["ref_id"] for ref in refer_folder.refs["refcoco"] if ref["split"] == "val"
    }
    instances["categories"] = [{"id": 3, "name": "cat"}]
    for annotation in instances["annotations"]:
        annotation["category_id"] = 3
    crowd = {**instances["annotations"][0], "id": 999, "image_id": 5, "category_id": 3, "iscrowd": 1}
    instances["annotations"].append(crowd)
    after = list(read_split(refer_folder.write(), "refcoco/val"))
    assert {(r.category, r.num_same_class) for r in after} == {
        ("cat", 1)
    }  # two objects of the image; crowds are no object
    assert after == before  # what a record is does not change


@pytest.mark.parametrize(
    "images", ["train2014", "images/mscoco/images/train2014", "images/mscoco/train2014", "seqtr_type/images/mscoco/train2014"]
)
def test_other_places_of_the_pictures(refer_folder: Any, images: str) -> None:
    refer_folder.images = images
    root = refer_folder.write()
    assert Path(read_split(root, "refcoco/val")[0].image_path).parent == root / images


def test_files_are_parsed_once_and_again_when_they_change(refer_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = refer_folder.write()
    parsed: list[str] = []
    load = refer.load_plain_pickle
    monkeypatch.setattr(refer, "load_plain_pickle", lambda path: parsed.append(str(path)) or load(path))
    for split in ("train", "val", "testA", "testB"):
        read_split(root, f"refcoco/{split}")
    assert len(parsed) == 1
    for ref in refer_folder.refs["refcoco"]:
        ref["sentences"][0]["sent"] = "something else entirely"
    refer_folder.write()
    assert read_split(root, "refcoco/val")[0].phrase == "something else entirely"
    assert len(parsed) == 2


def test_google_split_beside_umd(refer_folder: Any) -> None:
    root = refer_folder.write()
    google = [{**ref, "split": "val"} for ref in refer_folder.refs["refcocog"]]
    (root / "refcocog" / "refs(google).p").write_bytes(pickle.dumps(google, 0))
    assert split_names(root, "refcocog_google") == ("val",)
    assert len(read_split(root, "refcocog_google/val")) == 30
    assert len(read_split(root, "refcocog_umd/val")) == 5


def test_misnamed_dataset_folder(refer_root: Path) -> None:
    (refer_root / "refcoco+").rename(refer_root / "refcoco_plus")
    with pytest.raises(DataError) as caught:
        read_split(refer_root, "refcoco+/val")
    message = str(caught.value)
    assert str(refer_root / "refcoco+" / "instances.json") in message
    assert "refcoco_plus/" in message
    assert "Rename it to 'refcoco+'" in message
    assert "ROOT/images/train2014" in message


@pytest.mark.parametrize("file", ["instances.json", "refs(unc).p"])
def test_missing_file(refer_root: Path, file: str) -> None:
    (refer_root / "refcoco" / file).rename(refer_root / "refcoco" / f"old_{file}")
    with pytest.raises(DataError, match=f"Is it 'old_{file[:4]}") as caught:
        read_split(refer_root, "refcoco/val")
    assert str(refer_root / "refcoco" / file) in str(caught.value)


def test_an_empty_folder_of_pictures_is_passed_over(refer_root: Path) -> None:
    (refer_root / "images").rename(refer_root / "moved")
    (refer_root / "images/train2014").mkdir(parents=True)
    (refer_root / "coco2014").mkdir()
    (refer_root / "moved/train2014").rename(refer_root / "coco2014/train2014")
    record = read_split(refer_root, "refcoco/val")[0]
    assert Path(record.image_path).parent == refer_root / "coco2014/train2014"


def test_missing_pictures(refer_root: Path) -> None:
    shutil.rmtree(refer_root / "images")
    with pytest.raises(DataError, match="mscoco") as caught:
        read_split(refer_root, "refcoco/val")
    assert f"images in {refer_root} (one of images/train2014, train2014, images/mscoco/" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("refcoco/tets", "Did you mean refcoco/test"),
        ("refcoco/", "expected one of refcoco/train, refcoco/val, refcoco/testA, refcoco/testB"),
        ("refcocog_umd/testA", "Did you mean refcocog_umd/test"),
        ("refcocog/val", "Did you mean refcocog_umd or refcocog_google"),
        ("coco/val", "expected one of refcoco, refcoco\\+, refcocog_umd, refcocog_google"),
    ],
)
def test_wrong_names(refer_root: Path, name: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_split(refer_root, name)


def _spoil(folder: Any, what: str) -> None:
    ref = next(r for r in folder.refs["refcoco"] if r["split"] == "val")
    instances = folder.instances["refcoco"]
    annotation = next(a for a in instances["annotations"] if a["id"] == ref["ann_id"])
    if what == "ann":
        instances["annotations"].remove(annotation)
    elif what == "image":
        instances["images"] = [i for i in instances["images"] if i["id"] != ref["image_id"]]
    elif what == "other image":
        annotation["image_id"] = 1
    elif what == "phrase":
        ref["sentences"][1]["sent"] = " "
    elif what == "surrogate":
        ref["sentences"][1]["sent"] = "caf\udce9"
    elif what == "outside":
        annotation["segmentation"] = [[100, 100, 120, 100, 120, 120]]
    elif what == "rle size":
        annotation["segmentation"] = {"size": [40, 30], "counts": [600, 600]}
    elif what == "twice":
        ref["sentences"][1]["sent_id"] = ref["sentences"][0]["sent_id"]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("ann", r"ref_id 8: .*ann_id among the annotations of instances\.json, got 50"),
        ("image", r"ref_id 8: .*image_id among the images of instances\.json, got 5 "),
        ("other image", "ref_id 8: .*image 5, got ann_id 50 of image 1"),
        ("phrase", "ref_id 8: .*phrase 21 .*, got str ' '"),
        ("surrogate", r"ref_id 8: .*phrase 21 .*, got str 'caf\\udce9'"),
        ("outside", r"lie outside the image \(40 x 30 px\)"),
        ("rle size", r"\[30, 40\], got \[40, 30\]"),
        ("twice", "ref_id 8: .*each phrase id once in val, got 20 again"),
    ],
)
def test_bad_records(refer_folder: Any, what: str, says: str) -> None:
    _spoil(refer_folder, what)
    root = refer_folder.write()
    with pytest.raises(DataError, match=says) as caught:
        read_split(root, "refcoco/val")
    assert "refs(unc).p (refcoco/val)" in str(caught.value)
    assert "of 5 records cannot be used" in str(caught.value)
    assert read_split(root, "refcoco/testA")


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ([[5, 5, 10, 5, 20, 5]], "its polygons cover no pixel"),
        ([[5, 5, 10, 5]], "none of its polygons has three points"),
        ({"size": [30, 40], "counts": [1200]}, "its RLE mask is empty"),
    ],
)
def test_an_only_referent_without_a_pixel_is_counted_and_leaves_an_empty_truth(
    refer_folder: Any, caplog: pytest.LogCaptureFixture, segmentation: Any, says: str
) -> None:
    """REFER's own API draws nothing, and LAVT counts IoU 0 for every answer."""
    annotation = next(a for a in refer_folder.instances["refcoco"]["annotations"] if a["id"] == 50)
    annotation["segmentation"] = segmentation
    records = read_split(refer_folder.write(), "refcoco/val")
    assert len(records) == 5
    spoilt = [r for r in records if r.instances[0].annotation_id == 50]
    assert len(spoilt) == 2
    assert not any(r.is_no_target or decode_segmentation(r.instances[0].segmentation, 30, 40).any() for r in spoilt)
    assert "refcoco/val: referents that draw no pixel: 1; their phrases keep the others, or have an empty truth" in caplog.text
    assert f"ref_id 8: annotation 50: {says} (COCO_train2014_000000000005.jpg)" in caplog.text


def test_missing_image_file(refer_folder: Any) -> None:
    root = refer_folder.write()
    refer_folder.image_path(5).unlink()
    with pytest.raises(DataError, match=r"2 of 5 records.*\n.*COCO_train2014_000000000005\.jpg is missing"):
        read_split(root, "refcoco/val")


def test_many_of_one_cause_are_one_line(refer_folder: Any) -> None:
    for ref in refer_folder.refs["refcoco"]:
        for sentence in ref["sentences"] if ref["split"] == "train" else []:
            sentence["sent"] = ""
    root = refer_folder.write()
    with pytest.raises(DataError, match="20 of 20 records.*") as caught:
        read_split(root, "refcoco/train")
    assert str(caught.value).count("got str ''") == 1
    assert "(20 times: also ref_id 1, ref_id 2, ref_id 3, ...)" in str(caught.value)


def test_polygon_over_the_border_is_clipped(refer_folder: Any) -> None:
    ref = next(r for r in refer_folder.refs["refcoco"] if r["split"] == "val")
    annotation = next(a for a in refer_folder.instances["refcoco"]["annotations"] if a["id"] == ref["ann_id"])
    annotation["segmentation"] = [[30, 20, 60, 20, 60, 50, 30, 50]]
    (instance,) = read_split(refer_folder.write(), "refcoco/val")[0].instances
    mask = decode_segmentation(instance.segmentation, 30, 40)
    assert mask[20:, 30:].all()
    assert mask.sum() == 100


def test_hostile_refs_file(refer_root: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (refer_root / "refcoco" / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    with pytest.raises(UnsafePickleError, match="os.system"):
        read_split(refer_root, "refcoco/val")
    assert not marker.exists()


@pytest.mark.parametrize("content", [{"refs": []}, [], [{"ref_id": 1}]])
def test_refs_of_another_form(refer_root: Path, content: object) -> None:
    (refer_root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(DataError, match="expected a list of refs"):
        read_split(refer_root, "refcoco/val")


@pytest.mark.parametrize(("content", "says"), [("{", "expected JSON"), (json.dumps([1]), "`images` and `annotations`")])
def test_instances_of_another_form(refer_root: Path, content: str, says: str) -> None:
    (refer_root / "refcoco" / "instances.json").write_text(content)
    with pytest.raises(DataError, match=says):
        read_split(refer_root, "refcoco/val")


def test_a_file_name_cannot_leave_the_images_folder(refer_folder: Any) -> None:
    for image in refer_folder.instances["refcoco"]["images"]:
        image["file_name"] = "../../" + image["file_name"]
    root = refer_folder.write()
    assert Path(read_split(root, "refcoco/val")[0].image_path).parent == root / "images/train2014"


def test_check_counts_and_names_problems(refer_folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _spoil(refer_folder, "phrase")
    counts = {c.name: c for c in check_data(refer_folder.write())}
    assert list(counts) == [
        "refcoco/train", "refcoco/val", "refcoco/testA", "refcoco/testB",
        "refcoco+/train", "refcoco+/val", "refcoco+/testA", "refcoco+/testB",
        "refcocog_umd/train", "refcocog_umd/val", "refcocog_umd/test",
    ]  # fmt: skip
    train = counts["refcoco/train"]
    assert (train.num_refs, train.num_phrases, train.num_images) == (8, 20, 4)
    assert train.known == (42_404, 120_624, 16_994)
    assert not train.is_as_published
    assert "ref_id 8: expected a phrase 21 of some words, got str ' '" in (counts["refcoco/val"].problem or "")
    assert all(c.problem is None for name, c in counts.items() if name != "refcoco/val")


def test_known_counts_are_the_published_totals() -> None:
    # REFER's README: 50,000 / 49,856 / 49,822 refs, 142,210 / 141,564 / 95,010 phrases.
    for dataset, refs, phrases in (
        ("refcoco", 50_000, 142_210),
        ("refcoco+", 49_856, 141_564),
        ("refcocog_umd", 49_822, 95_010),
    ):
        known = [counts for name, counts in KNOWN_COUNTS.items() if name.startswith(dataset + "/")]
        assert (sum(c[0] for c in known), sum(c[1] for c in known)) == (refs, phrases)


def test_the_layout_is_drawn_and_seqtrs_is_known(tmp_path: Path) -> None:
    (tmp_path / "images/train2014").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        read_split(tmp_path, "refcoco/val")
    assert "\n  ROOT/refcoco/     instances.json   refs(unc).p\n" in str(caught.value)
    assert "seqtr" not in str(caught.value)
    (tmp_path / "seqtr_type/annotations").mkdir(parents=True)
    with pytest.raises(DataError, match="looks like SeqTR's layout: `deris-llm data prepare --format seqtr"):
        read_split(tmp_path, "refcoco/val")
