"""The synthetic world is opened as REFER's and gRefCOCO's own APIs open their files, and `score` counts as the public code does.

What the APIs and the evaluations of LAVT, LISA and ReLA do is written again here, slowly, in numpy; each says where it is from.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as _pycocotools_mask

from deris_llm.config.protocols import PROTOCOLS, protocols_of_file
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.data.sources import read_split
from deris_llm.data.synthetic.scene import mask_box_xyxy
from deris_llm.data.synthetic.world import rle_counts, write_world
from deris_llm.evaluation.results import EvaluationResult
from deris_llm.evaluation.score import run_score, score_submission
from deris_llm.evaluation.submissions import read_submission
from deris_llm.evaluation.truth import merged_truth, resampled_truth
from deris_llm.structures import ReferringRecord

coco_mask: Any = _pycocotools_mask
SPLITS = {
    ("refcoco", "unc"): ("train", "val", "testA", "testB"),
    ("refcoco+", "unc"): ("train", "val", "testA", "testB"),
    ("refcocog", "umd"): ("train", "val", "test"),
}
GREF_SPLITS = ("train", "val", "testA", "testB")


class Refer:
    """REFER's API (refer.py of lichengunc/refer; the copies of LAVT and LISA do the same)."""

    def __init__(self, root: Path, dataset: str, split_by: str) -> None:
        self.image_folder = root / "images" / "mscoco" / "images" / "train2014"
        self.refs = pickle.loads((root / dataset / f"refs({split_by}).p").read_bytes())
        instances = json.loads((root / dataset / "instances.json").read_text())
        self.images = {each["id"]: each for each in instances["images"]}
        self.categories = {each["id"]: each["name"] for each in instances["categories"]}
        annotations = {each["id"]: each for each in instances["annotations"]}
        self.annotation_of = {ref["ref_id"]: annotations[ref["ann_id"]] for ref in self.refs}
        assert len(self.annotation_of) == len(self.refs)  # a ref_id that is there twice is silently lost
        assert len(annotations) == len(instances["annotations"])

    def refs_of(self, split: str) -> list[dict[str, Any]]:
        if split in ("testA", "testB"):  # any split with this letter in its name
            return [ref for ref in self.refs if split[-1] in ref["split"]]
        if split == "test":
            return [ref for ref in self.refs if "test" in ref["split"]]
        return [ref for ref in self.refs if ref["split"] == split]

    def layers(self, ref: dict[str, Any]) -> np.ndarray:
        """How many of the object's polygons cover each pixel."""
        segmentation, image = self.annotation_of[ref["ref_id"]]["segmentation"], self.images[ref["image_id"]]
        is_polygons = type(segmentation[0]) is list  # KeyError 0 of a crowd, which is a dictionary
        drawn = coco_mask.frPyObjects(segmentation, image["height"], image["width"]) if is_polygons else segmentation
        return coco_mask.decode(drawn).sum(axis=2).astype(np.uint8)


class GRefer:
    """gRefCOCO's API (G_REFER of henghuiding/gRefCOCO) and what ReLA's `load_grefcoco_json` and mapper assert."""

    def __init__(self, root: Path) -> None:
        self.image_folder = root / "images" / "train2014"
        self.refs = json.loads((root / "grefcoco" / "grefs(unc).json").read_text())
        instances = json.loads((root / "grefcoco" / "instances.json").read_text())
        self.images = {each["id"]: each for each in instances["images"]}
        self.annotations: dict[int, Any] = {-1: None} | {each["id"]: each for each in instances["annotations"]}

    def refs_of(self, split: str) -> list[dict[str, Any]]:
        return [ref for ref in self.refs if ref["split"] == split]

    def polygons(self, ref: dict[str, Any]) -> list[list[list[float]]]:
        """Of each referent that is no crowd."""
        found = [self.annotations[annotation_id] for annotation_id in ref["ann_id"]]
        if None in found:
            assert found == [None]
            return []
        kept = [each for each in found if not each["iscrowd"]]
        assert kept, "ReLA's mapper: a phrase with a target has an annotation that is no crowd"
        assert all(each["image_id"] == ref["image_id"] for each in kept)
        return [[part for part in each["segmentation"] if len(part) >= 6] for each in kept]

    def mask(self, ref: dict[str, Any], size_hw: tuple[int, int] | None = None) -> np.ndarray:
        """The union of the referents; drawn at another size as ReLA draws it, from scaled polygons."""
        image = self.images[ref["image_id"]]
        height, width = size_hw or (image["height"], image["width"])
        scale = np.array([width / image["width"], height / image["height"]])
        merged = np.zeros((height, width), dtype=bool)
        for polygons in self.polygons(ref):
            scaled = [(np.reshape(part, (-1, 2)) * scale).ravel().tolist() for part in polygons]
            merged |= coco_mask.decode(coco_mask.frPyObjects(scaled, height, width)).any(axis=2)
        return merged


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("public") / "world"
    write_world(root, seed=7, num_train=24, num_val=12, num_test=4)
    return root


@pytest.mark.parametrize("dataset", SPLITS, ids=lambda dataset: dataset[0])
def test_refers_api_opens_every_split(root: Path, dataset: tuple[str, str]) -> None:
    api = Refer(root, *dataset)
    ours = "refcocog_umd" if dataset[0] == "refcocog" else dataset[0]
    for split in SPLITS[dataset]:
        phrases = {record.phrase_id: record for record in read_split(root, f"{ours}/{split}")}
        for ref in api.refs_of(split):
            image, annotation = api.images[ref["image_id"]], api.annotation_of[ref["ref_id"]]
            with Image.open(api.image_folder / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
            layers = api.layers(ref)
            assert annotation["iscrowd"] == 0
            assert annotation["area"] == (layers > 0).sum() > 0
            x0, y0, x1, y1 = mask_box_xyxy(layers > 0)
            assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
            assert ref["category_id"] == annotation["category_id"] in api.categories
            for sentence, sent_id in zip(ref["sentences"], ref["sent_ids"], strict=True):
                record = phrases.pop(f"{ours}/{split}/{sent_id}")
                assert (record.phrase, sentence["sent_id"]) == (sentence["sent"], sent_id)
                assert np.array_equal(merged_truth(record), layers > 0)
        assert not phrases


def test_grefcocos_api_opens_every_split(root: Path) -> None:
    api = GRefer(root)
    several = 0
    for split in GREF_SPLITS:
        phrases = {record.phrase_id: record for record in read_split(root, f"grefcoco/{split}")}
        for ref in api.refs_of(split):
            assert (api.image_folder / api.images[ref["image_id"]]["file_name"]).is_file()
            several += len(ref["ann_id"]) > 1
            for sentence in ref["sentences"]:
                record = phrases.pop(f"grefcoco/{split}/{sentence['sent_id']}")
                assert np.array_equal(merged_truth(record), api.mask(ref))
                assert record.is_no_target == (ref["ann_id"] == [-1])
        assert not phrases
    assert several > 40


class Compared(NamedTuple):
    """A phrase under somebody's rule."""

    prediction: np.ndarray
    truth: np.ndarray  # how many polygons cover a pixel, or bool
    says_target: bool
    has_target: bool

    @property
    def pixels(self) -> tuple[int, int]:
        """Intersection and union; LAVT and LISA count what exactly one polygon covers as the truth."""
        truth = self.truth == 1
        return int((self.prediction & truth).sum()), int((self.prediction | truth).sum())


def lavt(phrases: list[Compared]) -> dict[str, float]:
    """`evaluate` of LAVT-RIS test.py."""
    cum_i, cum_u, ious = 0, 0, []
    for phrase in phrases:
        i, u = phrase.pixels
        ious.append(0.0 if u == 0 else i / u)
        cum_i, cum_u = cum_i + i, cum_u + u
    levels = (0.5, 0.6, 0.7, 0.8, 0.9)
    precision = {f"Pr@{level}": 100 * float(np.mean([iou >= level for iou in ious])) for level in levels}
    return {"mIoU": 100 * float(np.mean(ious)), "oIoU": 100 * cum_i / cum_u, **precision}


def lisa(phrases: list[Compared]) -> dict[str, float]:
    """`validate` of LISA's train_ds.py, class 1; its gIoU is what we call mIoU, its cIoU our oIoU."""
    pixels = [phrase.pixels for phrase in phrases]
    giou = float(np.mean([1.0 if u == 0 else i / (u + 1e-5) for i, u in pixels]))
    return {"mIoU": 100 * giou, "oIoU": 100 * sum(i for i, _ in pixels) / (sum(u for _, u in pixels) + 1e-10)}


def rela(phrases: list[Compared]) -> dict[str, float]:
    """`ReferEvaluator.evaluate` of ReLA, N-acc as since August 2023."""
    accum_i = accum_u = accum_iou = tp = tn = fp = fn = 0.0
    precise = dict.fromkeys((0.7, 0.8, 0.9), 0)
    for phrase in phrases:
        i, u = phrase.pixels
        if not phrase.has_target:
            tp, fn = tp + (not phrase.says_target), fn + phrase.says_target
            accum_iou += not phrase.says_target
            accum_u += u if phrase.says_target else 0
            continue
        tn, fp = tn + phrase.says_target, fp + (not phrase.says_target)
        i = i if phrase.says_target else 0
        iou = i / u if u else 0.0
        accum_iou, accum_i, accum_u = accum_iou + iou, accum_i + i, accum_u + u
        for level in precise:
            precise[level] += iou >= level
    return {
        "gIoU": 100 * accum_iou / len(phrases),
        "cIoU": 100 * accum_i / accum_u,
        "T-acc": 100 * tn / (tn + fp),
        "N-acc": 100 * tp / (tp + fn),
        **{f"Pr@{level}": 100 * count / (tn + fp) for level, count in precise.items()},
    }


def _predictions(records: list[ReferringRecord]) -> Iterator[tuple[ReferringRecord, np.ndarray]]:
    """Masks of every quality: the truth moved by 0 to 8 px, now and then nothing, or a box where there is no target."""
    rng = np.random.default_rng(5)
    for record in records:
        mask = np.roll(merged_truth(record), int(rng.integers(0, 9)), axis=int(rng.integers(0, 2)))
        draw = rng.random()
        if draw < 0.1:
            mask[:] = False
        elif record.is_no_target and draw < 0.4:
            mask[10:40, 20:60] = True
        yield record, mask


def _scored(
    root: Path, split: str, folder: Path
) -> tuple[EvaluationResult, dict[str, np.ndarray], dict[str, ReferringRecord]]:
    records = list(read_split(root, split))
    masks = {record.phrase_id: mask for record, mask in _predictions(records)}
    path = folder / "predictions.jsonl"
    lines = [json.dumps({"phrase_id": name, "mask": encode_mask(mask)}) for name, mask in masks.items()]
    path.write_text("\n".join(lines))
    submission = read_submission(path, records)
    protocols = protocols_of_file(["original", "rela480"])
    scored = score_submission(submission, records, protocols, is_generalised=split.startswith("g"), workers=1)
    return scored.result, masks, {record.phrase_id: record for record in records}


def _at_480(mask: np.ndarray) -> np.ndarray:
    """Torchvision's resize of a Pillow picture with NEAREST, as LAVT's transforms.py has it."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((480, 480), Image.Resampling.NEAREST))


@pytest.mark.parametrize("split", ["val", "train"])
def test_score_counts_as_lavt_and_lisa_do(root: Path, tmp_path: Path, split: str) -> None:
    """To the last digit where no two polygons of an object overlap; LAVT and LISA lose the pixels where some do."""
    result, masks, records = _scored(root, f"refcoco/{split}", tmp_path)
    api = Refer(root, "refcoco", "unc")
    by_phrase = {f"refcoco/{split}/{sent_id}": ref for ref in api.refs_of(split) for sent_id in ref["sent_ids"]}
    layers = {name: api.layers(by_phrase[name]) for name in records}
    whole = [name for name, found in layers.items() if found.max() == 1]
    for protocol, resized, rules in (("original", lambda mask: mask, (lisa,)), ("rela480", _at_480, (lavt,))):
        of_phrase = {p.phrase_id: p.outcomes[protocol].overlap for p in result.answers}

        def compared(names: Any, truths: dict[str, np.ndarray], resized: Any = resized) -> list[Compared]:
            return [Compared(resized(masks[n]).astype(bool), resized(truths[n]), True, True) for n in names]

        for name, phrase in zip(whole, compared(whole, layers), strict=True):
            assert phrase.pixels == (of_phrase[name].intersection, of_phrase[name].union)
        for rule in rules:
            joined = rule(compared(records, {name: found > 0 for name, found in layers.items()}))
            for metric, value in joined.items():
                assert result.numbers[protocol][metric] == pytest.approx(value, abs=1e-3), (rule.__name__, metric)
    if split == "train":
        assert 0 < len(records) - len(whole) < 0.1 * len(records)


def test_score_counts_as_rela_does(root: Path, tmp_path: Path) -> None:
    """To the last digit; here also with ReLA's own truth, scaled polygons drawn at 480 px (outlines run along pixels)."""
    result, masks, records = _scored(root, "grefcoco/val", tmp_path)
    api = GRefer(root)
    refs = {f"grefcoco/val/{s['sent_id']}": ref for ref in api.refs_of("val") for s in ref["sentences"]}

    def compared(truth: Any) -> list[Compared]:
        return [
            Compared(_at_480(masks[name]).astype(bool), truth(name), bool(masks[name].any()), not record.is_no_target)
            for name, record in records.items()
        ]

    numbers = result.numbers["rela480"]
    resized = rela(compared(lambda name: resampled_truth(PROTOCOLS["rela480"], api.mask(refs[name]))))
    assert {metric: numbers[metric] for metric in resized} == pytest.approx(resized, abs=1e-9)
    drawn = rela(compared(lambda name: api.mask(refs[name], (480, 480))))
    assert drawn["N-acc"] == numbers["N-acc"]
    assert {metric: numbers[metric] for metric in ("gIoU", "cIoU")} == pytest.approx(
        {metric: drawn[metric] for metric in ("gIoU", "cIoU")}, abs=0.01
    )


@pytest.fixture
def crowded(root: Path, tmp_path: Path) -> Path:
    """gRefCOCO over the same pictures, where some referents of phrases that name several objects are crowds."""
    world = tmp_path / "crowded"
    world.mkdir()
    (world / "images").symlink_to(root / "images")
    shutil.copytree(root / "grefcoco", world / "grefcoco")
    named = [ref["ann_id"] for ref in GRefer(world).refs]
    path = world / "grefcoco" / "instances.json"
    instances = json.loads(path.read_text())
    sizes = {each["id"]: (each["height"], each["width"]) for each in instances["images"]}
    crowds: set[int] = set()
    for each in instances["annotations"]:
        groups = [set(ids) for ids in named if each["id"] in ids]
        if groups and all(group - crowds - {each["id"]} for group in groups):
            crowds.add(each["id"])
            mask = decode_segmentation(each["segmentation"], *sizes[each["image_id"]])
            each |= {"iscrowd": 1, "segmentation": {"size": list(mask.shape), "counts": rle_counts(mask)}}
    path.write_text(json.dumps(instances))
    return world


def test_crowds_are_left_out_of_grefcocos_truth_as_its_api_and_rela_do(crowded: Path, tmp_path: Path) -> None:
    split = "grefcoco/train"
    api = GRefer(crowded)
    refs = {f"{split}/{s['sent_id']}": ref for ref in api.refs_of("train") for s in ref["sentences"]}
    records = list(read_split(crowded, split))
    crowds = {number for number, each in api.annotations.items() if each and each["iscrowd"]}
    num_crowds = sum(bool(crowds & set(refs[record.phrase_id]["ann_id"])) for record in records)
    assert num_crowds == sum(bool(record.crowds) for record in records) > 10
    masks = {record.phrase_id: mask for record, mask in _predictions(records)}
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(json.dumps({"phrase_id": n, "mask": encode_mask(mask)}) for n, mask in masks.items()))
    kept = tmp_path / "kept.yaml"
    kept.write_text("id: kept\nsize: original\ncrowds: taken\n")
    report, _ = run_score(
        path, data_root=crowded, split=split, out=tmp_path / "out", protocols=["original", str(kept)], pictures=False
    )

    def expected(truth: Any) -> dict[str, float]:
        return rela(
            [
                Compared(masks[r.phrase_id], truth(r), bool(masks[r.phrase_id].any()), not r.is_no_target)
                for r in records
            ]
        )

    left_out = expected(lambda record: api.mask(refs[record.phrase_id]))
    everything = expected(lambda record: merged_truth(record, "taken"))
    found = report["splits"][split]
    assert {metric: found["original"][metric] for metric in left_out} == pytest.approx(left_out, abs=1e-4)
    assert {metric: found["kept"][metric] for metric in everything} == pytest.approx(everything, abs=1e-4)
    assert left_out["cIoU"] > everything["cIoU"] + 1
    assert found["original"]["n_crowds_left_out"] == num_crowds
    assert "n_crowds_left_out" not in found["kept"]
    assert any(
        f"phrases that name crowds beside other referents: {num_crowds}; " in note for note in report["notes"][split]
    )
    assert "crowds beside other referents are left out of the truth" in report["versions"]["protocols"]["original"]
    assert "crowds are in the truth" in report["versions"]["protocols"]["kept"]
