"""The written world: REFER's formats, determinism, masks that come back, splits."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from deris_llm.data.synthetic.scene import mask_box_xyxy
from deris_llm.data.synthetic.vocabulary import KIND_WORDS, KINDS, KINDS_A, KINDS_B, LOCATION_WORDS
from deris_llm.data.synthetic.world import (
    DATASETS,
    REFS_FILES,
    assign_splits,
    image_scene,
    polygons_of,
    rle_counts,
    write_world,
)

SEED = 11
write_few = functools.partial(write_world, num_train=14, num_val=20, num_test=6)
write_fewest = functools.partial(write_world, num_train=1, num_val=1, num_test=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("worlds") / "world"
    write_few(out, seed=SEED)
    return out


@pytest.fixture(scope="module")
def instances(world: Path) -> dict[str, dict[str, Any]]:
    return {name: json.loads((world / name / "instances.json").read_text()) for name in DATASETS}


@pytest.fixture(scope="module")
def refs(world: Path) -> dict[str, list[dict[str, Any]]]:
    loaded = {name: pickle.loads((world / name / REFS_FILES[name]).read_bytes()) for name in DATASETS[:3]}
    loaded["grefcoco"] = json.loads((world / "grefcoco" / REFS_FILES["grefcoco"]).read_text())
    return loaded


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    rle = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle).astype(bool)


def test_same_seed_same_bytes_whatever_the_workers(world: Path, tmp_path: Path) -> None:
    write_few(tmp_path / "again", seed=SEED, workers=2)
    assert file_hashes(tmp_path / "again") == file_hashes(world)


def test_pictures_do_not_depend_on_their_number_but_on_the_seed(world: Path, tmp_path: Path) -> None:
    write_fewest(tmp_path / "small", seed=SEED)
    write_fewest(tmp_path / "other", seed=SEED + 1)
    all_pictures = {name: sha for name, sha in file_hashes(world).items() if name.endswith(".jpg")}
    few = {name: sha for name, sha in file_hashes(tmp_path / "small").items() if name.endswith(".jpg")}
    other = {name: sha for name, sha in file_hashes(tmp_path / "other").items() if name.endswith(".jpg")}
    assert few
    assert few.items() <= all_pictures.items()
    assert other.keys() == few.keys()
    assert not other.items() & few.items()


def test_crowd_world(tmp_path: Path) -> None:
    """gRefCOCO's shares of phrases without a target: 9 % in train, 63, 23 and 29 % in val, testA and testB."""
    write = functools.partial(write_world, seed=SEED, num_train=12, num_val=6, num_test=6)
    write(tmp_path / "sparse")
    write(tmp_path / "crowd", crowd=True)
    refs = json.loads((tmp_path / "crowd" / "grefcoco" / REFS_FILES["grefcoco"]).read_text())
    families = json.loads((tmp_path / "crowd" / "families.json").read_text())
    shares: dict[str, list[bool]] = defaultdict(list)
    for ref in refs:
        for sent_id in ref["sent_ids"]:
            shares[ref["split"]].append(ref["no_target"])
            assert (families["grefcoco"][str(sent_id)] == "no_target") == ref["no_target"]
    for split, share in {"train": 0.09, "val": 0.63, "testA": 0.23, "testB": 0.29}.items():
        assert abs(np.mean(shares[split]) - share) <= 0.07
    for folder, low, high in (("sparse", 4, 10), ("crowd", 12, 30)):
        instances = json.loads((tmp_path / folder / "refcoco" / "instances.json").read_text())
        by_image: dict[int, int] = defaultdict(int)
        for annotation in instances["annotations"]:
            by_image[annotation["image_id"]] += 1
        assert low <= min(by_image.values()) <= max(by_image.values()) <= high
    write(tmp_path / "crowd", crowd=True)  # the same world: nothing to do
    with pytest.raises(FileExistsError, match="'crowd': False.*'crowd': True"):
        write(tmp_path / "crowd")


def test_masks_come_back(instances: dict[str, dict[str, Any]]) -> None:
    """Measured over 950 annotations: mean IoU 0.9997, worst 0.978 (a dropped sliver). `bbox` and `area` are the drawn mask's."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in instances["refcoco"]["images"]}
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in instances["refcoco"]["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    ious, crowd_ious, num_parts = [], [], []
    for image_id, own in by_image.items():
        scene, _, _ = image_scene(image_id, SEED)
        assert sizes[image_id] == scene.image.shape[:2]
        assert len(own) == len(scene.objects)
        for annotation, item in zip(own, scene.objects, strict=True):
            decoded = decode(annotation["segmentation"], *sizes[image_id])
            iou = (decoded & item.mask).sum() / (decoded | item.mask).sum()
            (crowd_ious if annotation["iscrowd"] else ious).append(iou)
            if not annotation["iscrowd"]:
                num_parts.append(len(annotation["segmentation"]))
            x0, y0, x1, y1 = mask_box_xyxy(decoded)
            assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
            assert annotation["area"] == decoded.sum()
            assert annotation["category_id"] == KINDS.index(item.kind) + 1
    assert np.mean(ious) >= 0.99
    assert min(ious) >= 0.93
    assert set(crowd_ious) <= {1.0}
    assert max(num_parts) >= 2


def test_crowds_are_objects_that_no_phrase_names(tmp_path: Path) -> None:
    """What generator 1 wrote as a crowd has the same pixels as polygons where a phrase names it: numbers stay comparable."""
    world = tmp_path / "world"
    write_world(world, seed=7, num_train=10, num_val=1, num_test=6)
    instances = json.loads((world / "refcoco" / "instances.json").read_text())
    crowds = {each["id"] for each in instances["annotations"] if each["iscrowd"]}
    named = {i for ref in json.loads((world / "grefcoco" / "grefs(unc).json").read_text()) for i in ref["ann_id"]}
    for name in DATASETS[:3]:
        named |= {ref["ann_id"] for ref in pickle.loads((world / name / REFS_FILES[name]).read_bytes())}
    assert crowds == {20000600}
    assert not crowds & named
    annotation = next(each for each in instances["annotations"] if each["id"] == 1004)  # a crowd in generator 1
    scene, _, _ = image_scene(10, 7)
    assert isinstance(annotation["segmentation"], list)
    assert np.array_equal(decode(annotation["segmentation"], *scene.image.shape[:2]), scene.objects[4].mask)


def test_pictures_are_also_where_refers_own_api_looks(world: Path) -> None:
    names = sorted(path.name for path in (world / "images" / "train2014").iterdir())
    assert sorted(path.name for path in (world / "images" / "mscoco" / "images" / "train2014").iterdir()) == names
    assert (world / "images" / "mscoco" / "images" / "train2014").readlink() == Path("../../train2014")


def test_polygons_of_holes_touching_corners_and_slivers() -> None:
    ring = np.zeros((30, 40), dtype=bool)
    ring[5:25, 5:35] = True
    ring[10:20, 12:28] = False
    assert np.array_equal(decode(polygons_of(ring), 30, 40), ring)
    assert len(polygons_of(ring)) == 2
    corners = np.zeros((30, 40), dtype=bool)
    corners[2:8, 2:8] = corners[8:14, 8:14] = True
    assert np.array_equal(decode(polygons_of(corners), 30, 40), corners)
    assert len(polygons_of(corners)) == 2
    sliver = corners.copy()
    sliver[20, 20:23] = True
    assert polygons_of(sliver) == polygons_of(corners)
    assert np.array_equal(decode(polygons_of(sliver & ~corners), 30, 40), sliver & ~corners)
    assert np.array_equal(decode(polygons_of(sliver, min_part_px=1), 30, 40), sliver)


def test_rle_counts_of_a_mask_that_starts_with_ones() -> None:
    mask = np.random.default_rng(0).random((7, 9)) < 0.5
    mask[0, 0] = True
    counts = rle_counts(mask)
    assert counts[0] == 0
    assert np.array_equal(decode({"size": [7, 9], "counts": counts}, 7, 9), mask)


def test_refer_format(world: Path, instances: dict[str, dict[str, Any]], refs: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("refcoco", "refcoco+", "refcocog"):
        images = {image["id"]: image for image in instances[name]["images"]}
        annotations = {annotation["id"]: annotation for annotation in instances[name]["annotations"]}
        assert len(annotations) == len(instances[name]["annotations"])
        sent_ids = []
        for k, ref in enumerate(refs[name]):
            assert ref.keys() == {
                *("ref_id", "ann_id", "category_id", "image_id", "file_name", "split", "sentences", "sent_ids")
            }
            assert ref["ref_id"] == k
            annotation = annotations[ref["ann_id"]]
            assert annotation["image_id"] == ref["image_id"]
            assert annotation["category_id"] == ref["category_id"]
            stem, suffix = images[ref["image_id"]]["file_name"].removesuffix(".jpg"), ref["file_name"].split("_")[-1]
            assert ref["file_name"] == f"{stem}_{suffix}"
            assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
            assert 2 <= len(ref["sentences"]) <= 3
            for sentence in ref["sentences"]:
                assert sentence.keys() == {"sent_id", "raw", "sent", "tokens"}
                assert sentence["tokens"] == sentence["sent"].split()
                assert sentence["raw"].lower().rstrip(".") == sentence["sent"]
            sent_ids += ref["sent_ids"]
        assert sent_ids == list(range(len(sent_ids)))
        for image in images.values():
            with Image.open(world / "images" / "train2014" / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
        assert {item["id"]: item["name"] for item in instances[name]["categories"]} == dict(enumerate(KINDS, start=1))


def test_five_to_nine_phrases_an_image(refs: dict[str, list[dict[str, Any]]]) -> None:
    for name in DATASETS:
        num_phrases: dict[int, int] = defaultdict(int)
        for ref in refs[name]:
            num_phrases[ref["image_id"]] += len(ref["sentences"])
        assert min(num_phrases.values()) >= 5
        assert max(num_phrases.values()) <= 9


def test_splits_their_kinds_and_words(refs: dict[str, list[dict[str, Any]]]) -> None:
    categories = {
        split: {KINDS.index(kind) + 1 for kind in kinds} for split, kinds in (("testA", KINDS_A), ("testB", KINDS_B))
    }
    for name in ("refcoco", "refcoco+"):
        assert {ref["split"] for ref in refs[name]} == {"train", "val", "testA", "testB"}
        for split, allowed in categories.items():
            assert {ref["category_id"] for ref in refs[name] if ref["split"] == split} <= allowed
    assert {ref["split"] for ref in refs["refcocog"]} == {"train", "val", "test"}
    plus = {word for ref in refs["refcoco+"] for sentence in ref["sentences"] for word in sentence["tokens"]}
    assert not plus & LOCATION_WORDS
    assert all(len(sentence["tokens"]) >= 8 for ref in refs["refcocog"] for sentence in ref["sentences"])


def test_some_evaluation_pictures_are_in_another_train_set() -> None:
    splits = assign_splits(num_train=2000, num_val=100, num_test=80)
    short, long = splits["refcoco"], splits["refcocog"]
    assert len(set(short["train"]) & set(long["val"])) == 10
    assert len(set(short["train"]) & set(long["test"])) == 8
    assert len(set(short["val"]) & set(long["train"])) == 5
    for by_split in (short, long):
        ids = [image_id for image_ids in by_split.values() for image_id in image_ids]
        assert len(ids) == len(set(ids))
    assert {split: len(ids) for split, ids in short.items()} == {"train": 2000, "val": 100, "testA": 80, "testB": 80}
    assert {split: len(ids) for split, ids in long.items()} == {"train": 1987, "val": 100, "test": 80}


def test_grefcoco_format(instances: dict[str, dict[str, Any]], refs: dict[str, list[dict[str, Any]]]) -> None:
    ids = {annotation["id"]: annotation for annotation in instances["grefcoco"]["annotations"]}
    numbers = defaultdict(int)
    for ref in refs["grefcoco"]:
        if ref["no_target"]:
            assert (ref["ann_id"], ref["category_id"]) == ([-1], [-1])
        else:
            assert [ids[ann_id]["category_id"] for ann_id in ref["ann_id"]] == ref["category_id"]
            assert {ids[ann_id]["image_id"] for ann_id in ref["ann_id"]} == {ref["image_id"]}
            assert len(set(ref["ann_id"])) == len(ref["ann_id"])
        numbers["none" if ref["no_target"] else "one" if len(ref["ann_id"]) == 1 else "many"] += 1
    assert set(numbers) == {"none", "one", "many"}


def test_phrases_name_the_kind_of_their_annotation(refs: dict[str, list[dict[str, Any]]]) -> None:
    """The first noun of a phrase is the referent's, told by the category in the file."""
    kind_of_word = {word: kind for kind, words in KIND_WORDS.items() for word in words}
    checked = 0
    for name in ("refcoco", "refcoco+", "refcocog"):
        for ref in refs[name]:
            for sentence in ref["sentences"]:
                noun = next(word for word in sentence["tokens"] if word in kind_of_word or word in ("thing", "object"))
                if noun in kind_of_word:
                    assert KINDS.index(kind_of_word[noun]) + 1 == ref["category_id"], sentence
                    checked += 1
    assert checked > 300


def test_second_call_returns_at_once_and_another_request_is_refused(world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    calls: list[tuple[int, int]] = []
    write_few(world, seed=SEED, on_progress=lambda done, total: calls.append((done, total)))
    assert not calls
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before
    with pytest.raises(FileExistsError, match=r"expected the world.*'seed': 12.*found.*'seed': 11.*another"):
        write_few(world, seed=SEED + 1)


def test_foreign_and_damaged_folders_are_refused_and_unfinished_ones_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"without world\.json"):
        write_fewest(tmp_path / "mine", seed=0)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"unfinished"):
        write_fewest(tmp_path / "new", seed=0)
    assert (tmp_path / "new.partial" / "thesis.txt").read_text() == "precious"
    (tmp_path / "new.partial" / "unfinished.json").write_text("{}")  # now it looks like a killed run's
    calls: list[tuple[int, int]] = []
    write_fewest(tmp_path / "new", seed=0, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(k + 1, len(calls)) for k in range(len(calls))]
    assert not (tmp_path / "new.partial").exists()
    assert not (tmp_path / "new" / "thesis.txt").exists()
    (tmp_path / "new" / "refcoco" / "refs(unc).p").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"changed or missing.*refcoco/refs"):
        write_fewest(tmp_path / "new", seed=0)


def test_arguments_out_of_range_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_val.*seed.*workers"):
        write_world(tmp_path / "x", seed=-1, num_train=1, num_val=0, num_test=1, workers=0)
