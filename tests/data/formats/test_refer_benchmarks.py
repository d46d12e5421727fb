"""Ref-ZOM, R-RefCOCO and RRSIS-D in their published layouts: REFER's, with what is special about each."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from deris_llm.config import load_config
from deris_llm.data.check import check_data, differences
from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.data.mix import leakage_notice
from deris_llm.data.sources import benchmark_of, is_generalised, read_split, split_names
from deris_llm.evaluation.report import benchmark_notes, report_table
from deris_llm.evaluation.score import run_score

SIZE = {"height": 30, "width": 40}
SQUARES = {50: [4, 5, 16, 5, 16, 25, 4, 25], 51: [24, 5, 36, 5, 36, 25, 24, 25]}


def _sentence(sent_id: int, text: str, **more: Any) -> dict[str, Any]:
    return {"sent_id": sent_id, "sent": text, "raw": text.title(), "tokens": text.split(), **more}


def _ref(ref_id: int, ann_id: Any, sentences: list[dict[str, Any]], split: str = "test", **more: Any) -> dict[str, Any]:
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": 5,
        "split": split,
        "category_id": 1,
        "sent_ids": [each["sent_id"] for each in sentences],
        "sentences": sentences,
        "file_name": "COCO_val2014_000000000005.jpg",
        **more,
    }


def _write(
    root: Path,
    folder: str,
    refs: list[dict[str, Any]],
    *,
    file: str = "refs(unc).p",
    images: str = "images/train2014",
    image: str = "COCO_train2014_000000000005.jpg",
    annotations: list[dict[str, Any]] | None = None,
) -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / images).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE["width"], SIZE["height"]), (9, 80, 40)).save(root / images / image)
    given = annotations or [
        {"id": i, "image_id": 5, "segmentation": [polygon], "iscrowd": 0, "category_id": 1}
        for i, polygon in SQUARES.items()
    ]
    tables = {
        "images": [{"id": 5, "file_name": image, **SIZE}],
        "annotations": given,
        "categories": [{"id": 1, "name": "car"}],
    }
    (root / folder / "instances.json").write_text(json.dumps(tables))
    (root / folder / file).write_bytes(pickle.dumps(refs, 2))
    return root


def _zom(root: Path, *refs: dict[str, Any]) -> Path:
    return _write(
        root,
        "ref-zom",
        list(refs),
        file="refs(final).p",
        images="images/trainval2014",
        image="COCO_val2014_000000000005.jpg",
    )


ZOM = (
    _ref(0, [], [_sentence(0, "the unicorn")], source="zero"),
    _ref(1, 50, [_sentence(1, "left car")], source="one"),
    _ref(2, [51, 50], [_sentence(2, "both cars"), _sentence(3, "cars")], source="many"),
)


def test_ref_zom(tmp_path: Path) -> None:
    root = _zom(tmp_path, *ZOM)
    records = read_split(root, "ref-zom/test")
    assert [[each.annotation_id for each in record.instances] for record in records] == [[], [50], [51, 50], [51, 50]]
    assert [record.is_no_target for record in records] == [True, False, False, False]
    assert records[0].image_id == "COCO_val2014_000000000005"  # other datasets over COCO recognise it
    assert (is_generalised(root, "ref-zom"), benchmark_of(root, "ref-zom")) == (True, "ref-zom")
    (counts,) = check_data(root)
    assert (counts.num_phrases, counts.num_no_target, counts.known, counts.problem) == (4, 1, None, None)


def test_ref_zoms_own_code_reads_the_raw_text_and_no_ids_of_zero(tmp_path: Path) -> None:
    refs = [_ref(0, [50], [{"sent_id": 0, "raw": "The unicorn", "tokens": ["unicorn"]}], source="zero")]
    (record,) = read_split(_zom(tmp_path, *refs), "ref-zom/test")
    assert (record.phrase, record.is_no_target) == ("The unicorn", True)


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"source": "few"}, "expected source to be zero, one or many, as in Ref-ZOM's own file, got 'few'"),
        ({"source": None}, "got None"),
        ({"ann_id": []}, r"expected ann_id of source one to be whole numbers, got \[\]"),
        ({"ann_id": "50"}, "to be whole numbers, got '50'"),
        ({"ann_id": [77]}, "expected ann_id among the annotations of instances.json, got 77"),
    ],
)
def test_spoilt_refs_of_ref_zom(tmp_path: Path, spoilt: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_split(_zom(tmp_path, ZOM[0], {**ZOM[1], **spoilt}), "ref-zom/test")


def test_ref_zoms_images_are_those_of_train_and_val_together(tmp_path: Path) -> None:
    root = _zom(tmp_path, *ZOM)
    (root / "images" / "trainval2014").rename(root / "images" / "train2014")
    with pytest.raises(DataError, match="one of images/trainval2014"):
        read_split(root, "ref-zom/test")


RRIS = (
    _ref(
        7,
        50,
        [_sentence(0, "left car", exist=True), _sentence(1, "left dog", exist=False), _sentence(2, "car", exist=True)],
        "val",
    ),
    _ref(8, 51, [_sentence(3, "right car"), _sentence(4, "red lorry", exist=False)], "val"),
)


@pytest.mark.parametrize("dataset", ["rrefcoco", "rrefcoco+", "rrefcocog"])
def test_r_refcoco(tmp_path: Path, dataset: str) -> None:
    """A sentence without the key exists, as in the public code."""
    root = _write(tmp_path, dataset, list(RRIS))
    records = read_split(root, f"{dataset}/val")
    found = [(r.phrase, [each.annotation_id for each in r.instances], r.ref_id) for r in records]
    assert found == [
        ("left car", [50], 7),
        ("car", [50], 7),
        ("left dog", [], 7),
        ("right car", [51], 8),
        ("red lorry", [], 8),
    ]
    assert (is_generalised(root, dataset), benchmark_of(root, dataset)) == (True, "r-refcoco")


def test_the_one_refs_file_of_r_refcocog_is_read(tmp_path: Path) -> None:
    root = _write(tmp_path, "rrefcocog", list(RRIS), file="refs(umd).p")
    assert split_names(root, "rrefcocog") == ("val",)
    _write(root, "rrefcocog", list(RRIS), file="refs(google).p")
    with pytest.raises(DataError, match=r"expected .*refs\(unc\).p"):
        split_names(root, "rrefcocog")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (_ref(1, 50, [_sentence(0, "car", exist="no")], "val"), "expected exist of sent_id 0 to be true or false, got 'no'"),
        (_ref(1, 50, [_sentence(0, "car", exist=None)], "val"), "to be true or false, got None"),
        ({**RRIS[0], "ref_id": "7"}, "expected ref_id, over whose sentences rIoU is computed, to be a whole number, got '7'"),
    ],
)
def test_spoilt_refs_of_r_refcoco(tmp_path: Path, ref: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_split(_write(tmp_path, "rrefcoco", [ref]), "rrefcoco/val")


def _report(root: Path, split: str, says: dict[str, list[int]], protocols: tuple[str, ...] = ("original",)) -> dict[str, Any]:
    """Scores answers: phrase -> the annotations whose union is answered."""
    lines = []
    for record in read_split(root, split):
        polygons = [SQUARES[i] for i in says.get(record.phrase, [])]
        lines.append(json.dumps({"phrase_id": record.phrase_id, "mask": polygons or None}))
    (root / "answers.jsonl").write_text("\n".join(lines))
    return run_score(root / "answers.jsonl", data_root=root, split=split, out=root / "scored", protocols=protocols)[0]


def test_from_files_to_the_tables_of_r_refcoco(tmp_path: Path) -> None:
    """Ref 7: one phrase right, one missed, a wrong answer of the same 240 px to "left dog". Ref 8: all right."""
    root = _write(tmp_path, "rrefcoco", list(RRIS))
    report = _report(root, "rrefcoco/val", {"left car": [50], "left dog": [51], "right car": [51]}, ("original", "rela480"))
    numbers = report["splits"]["rrefcoco/val"]["original"]
    found = [numbers[f"R-RefCOCO {name}"] for name in ("mIoU", "oIoU", "mRR", "rIoU", "Pr@0.5")]
    assert found == pytest.approx([100 * (0.5 + 1) / 2, 100 * 2 / 3, 50, 100 * (240 / 720 + 1) / 2, 100 * 2 / 3], abs=1e-3)
    assert numbers["intervals"].keys().isdisjoint({"R-RefCOCO rIoU"})  # of one image
    assert numbers["N-acc"] == 50
    shown = Console(width=80, record=True, file=io.StringIO())
    shown.print(report_table(report))
    text = shown.export_text()
    assert "R-RefCOCO's own numbers, percent" in text
    assert "66.67" in text
    page = (root / "scored" / "report.html").read_text()
    assert "R-RefCOCO&#39;s own numbers" in page or "R-RefCOCO's own numbers" in page


def test_from_files_to_the_table_of_ref_zom(tmp_path: Path) -> None:
    root = _zom(tmp_path, *ZOM)
    report = _report(root, "ref-zom/test", {"the unicorn": [50], "left car": [50], "both cars": [51]})
    numbers = report["splits"]["ref-zom/test"]["original"]
    assert [numbers[f"Ref-ZOM {name}"] for name in ("mIoU", "oIoU", "Acc")] == pytest.approx([50, 40, 0], abs=1e-3)
    assert benchmark_notes(report, "Ref-ZOM", ["ref-zom/test"])[1].startswith("Published: DMMI")
    report["about"]["synthetic"] = True  # published numbers never stand beside synthetic data
    assert len(benchmark_notes(report, "Ref-ZOM", ["ref-zom/test"])) == 1


def _rrsisd(root: Path, *masks: np.ndarray) -> Path:
    annotations = [
        {"id": 50, "image_id": 5, "category_id": 1, "iscrowd": 0, "segmentation": [encode_mask(mask) for mask in masks]}
    ]
    return _write(
        root,
        "rrsisd",
        [_ref(0, 50, [_sentence(0, "the vehicle on the left")])],
        images="images/rrsisd/JPEGImages",
        image="00005.jpg",
        annotations=annotations,
    )


def test_rrsis_d_has_lists_of_rle_masks(tmp_path: Path) -> None:
    masks = np.zeros((2, SIZE["height"], SIZE["width"]), dtype=bool)
    masks[0, 5:9, 4:9] = masks[1, 7:12, 6:12] = True
    root = _rrsisd(tmp_path, *masks)
    (record,) = read_split(root, "rrsisd/test")
    mask = decode_segmentation(record.instances[0].segmentation, SIZE["height"], SIZE["width"])
    assert (mask == masks.any(axis=0)).all()
    assert Path(record.image_path).name == "00005.jpg"
    assert (is_generalised(root, "rrsisd"), benchmark_of(root, "rrsisd")) == (False, None)
    assert differences(check_data(root)) == []  # no published counts that were verified


def test_a_mask_of_another_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected an RLE of the image's size \[h, w\] = \[30, 40\], got \[40, 30\]"):
        read_split(_rrsisd(tmp_path, np.ones((40, 30), dtype=bool)), "rrsisd/test")


def test_images_of_rrsis_d_are_nobody_elses() -> None:
    config = load_config("tiny-refcoco", [])
    assert "rrefcoco/val" in (leakage_notice(config, ["rrefcoco/val"]) or "")
    assert leakage_notice(config, ["rrsisd/test"]) is None
