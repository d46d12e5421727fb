"""gRefCOCO's own files: several referents, none, and what is wrong with a file said in one error."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deris_llm.config import DataConfig
from deris_llm.data import sources
from deris_llm.data.check import KNOWN_PHRASES, check_data
from deris_llm.data.collate import referring_targets
from deris_llm.data.dataset import group_by_image
from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.mix import training_mix
from deris_llm.data.formats.refer import refs_path
from deris_llm.data.sources import count_refs, read_split, split_names, split_notes
from deris_llm.data.synthetic.world import write_world


def _ref(ref_id: int, image_id: int, ann_id: list[int], split: str) -> dict[str, Any]:
    """Keys as in the published file."""
    return {
        "ref_id": ref_id,
        "image_id": image_id,
        "split": split,
        "ann_id": ann_id,
        "category_id": [-1 if i == -1 else 1 for i in ann_id],
        "no_target": ann_id == [-1],
        "file_name": f"COCO_train2014_{image_id:012d}.jpg",
        "sent_ids": [2 * ref_id, 2 * ref_id + 1],
        "sentences": [
            {"sent_id": 2 * ref_id + k, "sent": f"thing {k} of {ref_id}", "raw": f"Thing {k} of {ref_id}.", "tokens": ["thing"]}
            for k in range(2)
        ],
    }  # fmt: skip


@pytest.fixture
def grefs(refer_folder: Any) -> list[dict[str, Any]]:
    """For each image of conftest's refcoco: its left object, both of them, and nothing."""
    splits = {1: "train", 2: "train", 5: "val", 6: "testA", 7: "testB"}
    refs = []
    for image_id, split in splits.items():
        left, right = 10 * image_id, 10 * image_id + 1
        refs += [_ref(len(refs) + k, image_id, ids, split) for k, ids in enumerate(([left], [right, left], [-1]))]
    return refs


def _written(refer_folder: Any, grefs: Any, *, pickled: bool = False) -> Path:
    root: Path = refer_folder.write()
    (root / "grefcoco").mkdir()
    (root / "grefcoco" / "instances.json").write_text(json.dumps(refer_folder.instances["refcoco"]))
    if pickled:
        (root / "grefcoco" / "grefs(unc).p").write_bytes(pickle.dumps(grefs, 2))
    else:
        (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(grefs))
    return root


@pytest.mark.parametrize("pickled", [False, True])
def test_none_one_and_several_referents(refer_folder: Any, grefs: Any, pickled: bool) -> None:
    root = _written(refer_folder, grefs, pickled=pickled)
    assert refs_path(root, "grefcoco").suffix == (".p" if pickled else ".json")
    assert split_names(root, "grefcoco") == ("train", "val", "testA", "testB")
    records = read_split(root, "grefcoco/val")
    assert [[i.annotation_id for i in r.instances] for r in records] == [[50], [50], [51, 50], [51, 50], [], []]
    assert [r.is_no_target for r in records] == [False] * 4 + [True] * 2
    assert records[2].phrase_id == "grefcoco/val/14"
    assert records[2].phrase == "thing 0 of 7"
    assert read_split(root, "grefcoco/val", phrase_field="raw")[2].phrase == "Thing 0 of 7."
    assert count_refs(root, "grefcoco/val") == 3
    right, left = (decode_segmentation(i.segmentation, 30, 40) for i in records[2].instances)
    assert left[10, 8]
    assert right[10, 28]
    assert not (left & right).any()


def test_referents_of_a_phrase_are_targets_of_their_own(refer_folder: Any, grefs: Any) -> None:
    records = read_split(_written(refer_folder, grefs), "grefcoco/val")
    targets = referring_targets(group_by_image(records), 64, "antialias")
    assert targets.phrase_index.tolist() == [0, 1, 2, 2, 3, 3]
    assert not (targets.masks[2] & targets.masks[3]).any()


def _rle(annotation: dict[str, Any]) -> dict[str, Any]:
    mask = decode_segmentation(annotation["segmentation"], 30, 40)
    edges = np.flatnonzero(np.diff(mask.ravel(order="F").astype(np.int8))) + 1
    return {"size": [30, 40], "counts": np.diff(np.array([0, *edges.tolist(), mask.size])).tolist()}


def test_crowds_beside_other_referents_are_left_out(refer_folder: Any, grefs: Any) -> None:
    """As in gRefCOCO's own API; a phrase that names a crowd alone, which that cannot open, keeps it."""
    crowd = next(a for a in refer_folder.instances["refcoco"]["annotations"] if a["id"] == 51)
    crowd.update(iscrowd=1, segmentation=_rle(crowd))
    root = _written(refer_folder, [*grefs, _ref(90, 5, [51], "val")])
    records = read_split(root, "grefcoco/val")
    assert [[i.annotation_id for i in r.instances] for r in records] == [[50], [50], [50], [50], [], [], [51], [51]]
    assert [[i.annotation_id for i in r.crowds] for r in records] == [[], [], [51], [51], [], [], [], []]
    assert records[2].num_same_class == records[0].num_same_class
    (note,) = split_notes(root, "grefcoco/val")
    assert note.startswith("phrases that name crowds beside other referents: 2; the crowds are not in the truth")
    assert note.endswith("sent_id 14 (ann_id 51); sent_id 15 (ann_id 51)")
    assert split_notes(root, "grefcoco/train") == ()
    counts = next(c for c in check_data(root, ["grefcoco"]) if c.name == "grefcoco/val")
    assert counts.notes == (note,)
    targets = referring_targets(group_by_image(records), 64, "antialias")
    assert targets.phrase_index.tolist() == [0, 1, 2, 3, 6, 7]


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ([[3.2, 3.2, 3.4, 3.2, 3.4, 3.4]], "its polygons cover no pixel"),
        ([[3, 3, 9, 9]], "none of its polygons has three points"),
        ({"size": [30, 40], "counts": [1200]}, "its RLE mask is empty"),
        ([[41, 3, 48, 3, 48, 9]], "its polygons lie outside the image"),
    ],
)
def test_a_referent_without_a_pixel_does_not_stop_a_split(
    refer_folder: Any, grefs: Any, caplog: pytest.LogCaptureFixture, segmentation: Any, says: str
) -> None:
    tables = refer_folder.instances["refcoco"]
    left = next(a for a in tables["annotations"] if a["id"] == 50)
    tables["annotations"].append({**left, "id": 59, "segmentation": segmentation})
    root = _written(refer_folder, [*grefs, _ref(90, 5, [50, 59, 51], "val"), _ref(91, 5, [59], "val")])
    records = read_split(root, "grefcoco/val")
    assert [[i.annotation_id for i in r.instances] for r in records[6:]] == [[50, 51], [50, 51], [59], [59]]
    assert not any(r.is_no_target for r in records[6:])
    empty = records[9].instances[0]
    assert not decode_segmentation(empty.segmentation, 30, 40).any()
    assert "referents that draw no pixel: 2; " in caplog.text
    assert f"ref_id 90: object 2 of 3: annotation 59: {says}" in caplog.text
    assert "(COCO_train2014_000000000005.jpg); ref_id 91: annotation 59" in split_notes(root, "grefcoco/val")[0]
    assert referring_targets(group_by_image(records), 64, "antialias").phrase_index.tolist()[-6:] == [6, 6, 7, 7, 8, 9]


def test_prepared_crowds_and_referents_without_a_pixel_are_those_of_the_files(
    refer_folder: Any, grefs: Any, world: Any
) -> None:
    tables = refer_folder.instances["refcoco"]
    left, right = (next(a for a in tables["annotations"] if a["id"] == number) for number in (50, 51))
    right.update(iscrowd=1, segmentation=_rle(right))
    tables["annotations"].append({**left, "id": 59, "segmentation": [[3.2, 3.2, 3.4, 3.2, 3.4, 3.4]]})
    more = [_ref(90 + k, 5, ids, "val") for k, ids in enumerate(([50, 59, 51], [59], [51], [59, 51]))]
    root = _written(refer_folder, [*grefs, *more])
    made = world.prepare(root, "grefcoco", format="refer").manifest
    assert not made["skipped"]
    assert (made["splits"]["val"]["num_phrases"], made["splits"]["val"]["num_no_target"]) == (14, 2)
    for direct, prepared in zip(
        read_split(root, "grefcoco/val"), sources.read_split(world.root, "grefcoco/val"), strict=True
    ):
        assert direct.num_same_class == prepared.num_same_class
        for ours, theirs in ((direct.instances, prepared.instances), (direct.crowds, prepared.crowds)):
            assert [i.annotation_id for i in ours] == [i.annotation_id for i in theirs]
            masks = [[decode_segmentation(i.segmentation, 30, 40) for i in side] for side in (ours, theirs)]
            assert np.array_equal(masks[0], masks[1])
    notes = sources.split_notes(world.root, "grefcoco/val")
    assert notes[0] == sources.split_notes(root, "grefcoco/val")[0]
    assert notes[0].startswith("phrases that name crowds beside other referents: 6; ")
    assert notes[1].startswith("referents that draw no pixel: 3; ")
    assert "ref_id 90: object 2 of 3: annotation 59: its polygons cover no pixel" in notes[1]
    lines = (world.root / "grefcoco" / "left_out.jsonl").read_text().splitlines()
    assert [(json.loads(line)["where"], json.loads(line)["num_phrases"]) for line in lines] == [
        ("ref_id 90", 0), ("ref_id 91", 0), ("ref_id 93", 0),
    ]  # fmt: skip


def test_the_json_file_is_preferred(refer_folder: Any, grefs: Any) -> None:
    root = _written(refer_folder, grefs)
    (root / "grefcoco" / "grefs(unc).p").write_bytes(b"something else")
    assert len(read_split(root, "grefcoco/train")) == 12


def test_in_the_training_mix(refer_folder: Any, grefs: Any) -> None:
    """Image 5 is val of refcoco and grefcoco; refcoco+ trains on it alone, so it leaves the mix."""
    root = _written(refer_folder, grefs)
    config = DataConfig(root=str(root), train=("grefcoco", "refcoco+"), eval=("grefcoco/val",))
    mix = training_mix(config)
    assert {r.image_id[-1] for r in mix.records} == {"1", "2", "3"}
    assert sum(r.is_no_target for r in mix.records) == 4


def test_counts(refer_folder: Any, grefs: Any) -> None:
    counts = {c.name: c for c in check_data(_written(refer_folder, grefs), ["grefcoco"])}
    assert list(counts) == ["grefcoco/train", "grefcoco/val", "grefcoco/testA", "grefcoco/testB"]
    train = counts["grefcoco/train"]
    assert (train.num_refs, train.num_phrases, train.num_no_target, train.num_images) == (6, 12, 4, 2)
    assert train.known_phrases == (209_344, 19_140)
    assert not train.is_as_published
    assert all(c.problem is None for c in counts.values())
    assert set(KNOWN_PHRASES) == set(counts)


def _spoiled(grefs: list[dict[str, Any]], what: str) -> object:
    refs: list[Any] = copy.deepcopy(grefs)
    both = next(r for r in refs if r["split"] == "val" and len(r["ann_id"]) == 2)
    if what == "unknown id":
        both["ann_id"] = [51, 999]
    elif what == "mixed":
        both["ann_id"] = [-1, 50]
    elif what == "twice":
        both["ann_id"] = [50, 50]
    elif what == "no list":
        both["ann_id"] = 50
    elif what == "empty list":
        both["ann_id"] = []
    elif what == "text":
        both["ann_id"] = ["50", "51"]
    elif what == "other image":
        both["ann_id"] = [50, 61]
    elif what == "contradiction":
        both["no_target"] = True
    elif what == "sent ids":
        both["sentences"][1]["sent_id"] = both["sentences"][0]["sent_id"]
    elif what == "unknown image":
        both["image_id"] = 4711
    elif what == "no phrase":
        del both["sentences"][0]["sent"]
    elif what == "missing key":
        del both["ann_id"]
    elif what == "sentences":
        both["sentences"] = "thing"
    elif what == "no dict":
        refs[3] = "thing"
    elif what == "no list of refs":
        return {"refs": refs}
    return refs


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("unknown id", r"ref_id 7: .*ann_id among the annotations of instances\.json, got 999"),
        ("mixed", r"ref_id 7: expected ann_id to name annotations or no target \(-1\), got both: \[-1, 50\]"),
        ("twice", r"ref_id 7: expected each annotation once in ann_id, got \[50, 50\]"),
        ("no list", r"ref_id 7: expected ann_id to be a list of whole numbers, \[-1\] for no target, got 50"),
        ("empty list", r"ref_id 7: expected ann_id to be a list of whole numbers, .* got \[\]"),
        ("text", r"ref_id 7: expected ann_id to be a list of whole numbers, .* got \['50', '51'\]"),
        ("other image", "ref_id 7: .*image 5, got ann_id 61 of image 6"),
        ("contradiction", r"ref_id 7: expected no_target to agree with ann_id, got True and \[51, 50\]"),
        ("sent ids", "ref_id 7: .*each phrase id once in val, got 14 again"),
        ("unknown image", r"ref_id 7: .*image_id among the images of instances\.json, got 4711"),
        ("no phrase", "ref_id 7: .*phrase 14 .*, got NoneType"),
    ],
)
def test_bad_records(refer_folder: Any, grefs: Any, what: str, says: str) -> None:
    root = _written(refer_folder, _spoiled(grefs, what))
    with pytest.raises(DataError, match=says) as caught:
        read_split(root, "grefcoco/val")
    assert "grefs(unc).json (grefcoco/val)" in str(caught.value)
    assert "of 6 records cannot be used" in str(caught.value)
    assert read_split(root, "grefcoco/testA")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("missing key", r"number 7 \(ref_id 7\) without ann_id: a dict with ref_id, image_id"),
        ("sentences", r"number 7 \(ref_id 7\) whose sentences are str 'thing'"),
        ("no dict", "str 'thing' as number 3"),
        ("no list of refs", "got a dict with refs"),
    ],
)
def test_bad_files(refer_folder: Any, grefs: Any, what: str, says: str) -> None:
    root = _written(refer_folder, _spoiled(grefs, what))
    with pytest.raises(DataError, match=says) as caught:
        read_split(root, "grefcoco/val")
    assert "expected a list of refs, each a dict with ann_id, image_id, ref_id, sentences, split" in str(caught.value)


def test_broken_json_and_missing_file(refer_folder: Any, grefs: Any) -> None:
    root = _written(refer_folder, grefs)
    path = root / "grefcoco" / "grefs(unc).json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"grefs\(unc\)\.json: expected JSON, got .*Download the file again"):
        read_split(root, "grefcoco/val")
    path.rename(path.with_name("grefs.json"))
    with pytest.raises(DataError, match=r"Is it 'grefs\.json'\? Rename it to 'grefs\(unc\)\.json'"):
        read_split(root, "grefcoco/val")


def test_refcoco_wants_one_annotation(refer_folder: Any) -> None:
    ref = next(r for r in refer_folder.refs["refcoco"] if r["split"] == "val")
    ref["ann_id"] = [50, 51]
    with pytest.raises(DataError, match=r"ref_id 8: expected one ann_id, a whole number, got \[50, 51\]"):
        read_split(refer_folder.write(), "refcoco/val")


def test_the_synthetic_world_is_read_as_it_is_written(tmp_path: Path) -> None:
    write_world(tmp_path / "world", seed=3, num_train=4, num_val=1, num_test=1)
    records = [
        r for split in ("train", "val", "testA", "testB") for r in read_split(tmp_path / "world", f"grefcoco/{split}")
    ]
    written = json.loads((tmp_path / "world" / "grefcoco" / "grefs(unc).json").read_text())
    assert len(records) == sum(len(ref["sentences"]) for ref in written)
    counts = {len(record.instances) for record in records}
    assert {0, 1, 2} <= counts
    assert {r.is_no_target for r in records if len(r.instances) == 0} == {True}
