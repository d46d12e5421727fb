"""Ref-L4's review of RefCOCO's labels: wrong ones are left out of a set of another name, counted, and said with every number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deris_llm.data.errors import DataError
from deris_llm.data.sources import read_split, split_names, split_notes
from deris_llm.evaluation.report import PUBLISHED, published_on


def _review(refs: list[dict[str, Any]], split: str, wrong: set[int]) -> dict[str, Any]:
    """The published layout: a phrase is an image of its own, with an annotation; other keys as in the published file."""
    images, annotations = [], []
    for ref in refs:
        for sentence in ref["sentences"] if ref["split"] == split else ():
            number = len(images)
            images.append(
                {
                    "id": number,
                    "original_id": ref["image_id"],
                    "file_name": f"COCO_train2014_{ref['image_id']:012d}.jpg",
                    "height": 30,
                    "width": 40,
                    "caption": sentence["sent"],
                    "dataset_name": "refcoco",
                    "tokens_negative": [],
                }
            )
            annotations.append(
                {
                    "id": number,
                    "image_id": number,
                    "original_id": ref["ann_id"],
                    "category_id": 1,
                    "bbox": [4, 5, 12, 20],
                    "caption_quality": int(sentence["sent_id"] not in wrong),
                    "tokens_positive": [],
                }
            )
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": []}


@pytest.fixture
def reviewed(refer_folder: Any, tmp_path: Path) -> Callable[..., Path]:
    """Writes REFER's files and the reviews of refcoco's val and testA; returns the folder of the reviews."""
    refer_folder.write()
    folder = tmp_path / "refcocos_annotation_reviewed"
    folder.mkdir()

    def write(wrong: set[int], spoil: Callable[[dict[str, Any]], Any] = lambda _: None) -> Path:
        for split in ("val", "testA"):
            review = _review(refer_folder.refs["refcoco"], split, wrong)
            spoil(review)
            (folder / f"refcoco_{split}_reviewed.json").write_text(json.dumps(review))
        return folder

    return write


def _prepare(world: Any, root: Path, folder: Path, name: str = "refcoco-reviewed", **options: Any) -> Any:
    world.root = root
    mapping = {"dataset": options.pop("dataset", "refcoco"), "reviewed": str(folder)}
    return world.prepare(root, name, format="refer", mapping=mapping, **options)


def test_wrong_labels_are_left_out_and_said(refer_folder: Any, reviewed: Any, world: Any) -> None:
    val = [ref for ref in refer_folder.refs["refcoco"] if ref["split"] == "val"]
    first, second = ([each["sent_id"] for each in ref["sentences"]] for ref in val)
    root, folder = refer_folder.root, reviewed({*first, second[1]})
    made = _prepare(world, root, folder)
    assert split_names(root, "refcoco-reviewed") == ("val", "testA")
    records = read_split(root, "refcoco-reviewed/val")
    assert [record.phrase_id for record in records] == [f"refcoco-reviewed/val/{i}" for i in (second[0], second[2])]
    assert len(read_split(root, "refcoco/val")) == 5
    (note,) = split_notes(root, "refcoco-reviewed/val")
    assert note.startswith("REVIEWED LABELS: 3 of 5 phrases of refcoco/val, which Ref-L4's reviewers called wrong")
    assert published_on(["refcoco-reviewed/val"], PUBLISHED) == {}  # never beside published numbers
    assert split_notes(root, "refcoco-reviewed/testA")[0].startswith("REVIEWED LABELS: 0 of 5 phrases")
    assert made.manifest["notes"][:2] == [
        "not reviewed, so left out: train, testB",
        "reviewed 10 phrases, of which 3 are wrong; published: 21,586 and 3,054 in all splits",
    ]
    assert [file["file"] for file in made.manifest["source"]["files"]][-1].endswith("refcoco_val_reviewed.json")


def test_phrases_of_one_text_are_matched_in_order(refer_folder: Any, reviewed: Any, world: Any) -> None:
    ref = next(ref for ref in refer_folder.refs["refcoco"] if ref["split"] == "val")
    for sentence in ref["sentences"]:
        sentence["sent"] = "the same"
    refer_folder.write()
    wrong, right = (each["sent_id"] for each in ref["sentences"])
    _prepare(world, refer_folder.root, reviewed({wrong}))
    ids = [record.phrase_id.rpartition("/")[2] for record in read_split(refer_folder.root, "refcoco-reviewed/val")]
    assert (str(wrong) in ids, str(right) in ids) == (False, True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r["annotations"].pop(), "got none of 1 .* and 0 of other phrases"),
        (lambda r: r["images"][0].update(caption="another"), "got none of 1 .* and 1 of other phrases"),
        (lambda r: r["images"][0].update(original_id=1), "got none of 1 .* and 1 of other phrases"),
        (lambda r: r["annotations"][0].update(caption_quality=2), "expected caption_quality to be 0 or 1, got 2"),
        (lambda r: r["annotations"][0].pop("caption_quality"), "expected images with id, .*KeyError: 'caption_quality'"),
        (lambda r: r["annotations"][0].update(image_id=999), "KeyError: 999"),
        (lambda r: r.pop("images"), "KeyError: 'images'"),
    ],
)
def test_a_review_of_other_phrases_is_an_error(
    refer_folder: Any, reviewed: Any, world: Any, spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        _prepare(world, refer_folder.root, reviewed(set(), spoil))
    assert not (refer_folder.root / "refcoco-reviewed").exists()


def test_phrases_without_a_verdict_are_counted_under_skip_bad(refer_folder: Any, reviewed: Any, world: Any) -> None:
    root = refer_folder.root
    _prepare(world, root, reviewed(set(), lambda review: review["images"][0].update(caption="another")), skip_bad=True)
    assert len(read_split(root, "refcoco-reviewed/val")) == 4
    assert "0 of 5 phrases of refcoco/val" in split_notes(root, "refcoco-reviewed/val")[0]
    assert "are left out, and 1 that were not reviewed, so numbers" in split_notes(root, "refcoco-reviewed/val")[0]


def test_the_options_must_fit(refer_folder: Any, reviewed: Any, world: Any, tmp_path: Path) -> None:
    root, folder = refer_folder.root, reviewed(set())
    for name in ("refcoco", "refcoco+"):  # a filtered set never has the name of an unfiltered one
        with pytest.raises(DataError, match="expected a name that says that phrases were left out.* Name it refcoco-reviewed"):
            _prepare(world, root, folder, name)
    with pytest.raises(DataError, match="expected one of testA, val, which were reviewed"):
        _prepare(world, root, folder, splits=("val", "testB"))
    with pytest.raises(DataError, match=r"expected a folder with refcocog_SPLIT_reviewed.json, got none there"):
        _prepare(world, root, folder, dataset="refcocog_umd")
    with pytest.raises(DataError, match="got none there"):
        _prepare(world, root, tmp_path / "nowhere")
