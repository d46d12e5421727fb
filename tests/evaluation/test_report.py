"""report.json keeps its form, is added to and replaced whole; the table has the published numbers."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from deris_llm.config.protocols import PROTOCOLS
from deris_llm.evaluation.report import PUBLISHED, PUBLISHED_GRES, read_report, report_table, update_report


def _numbers(miou: float) -> dict[str, dict[str, float]]:
    values = {"mIoU": miou, "oIoU": 60.0, "n_phrases": 1234, "n_images": 9} | {
        f"Pr@0.{i}": 50.0 + i for i in range(5, 10)
    }
    return {"original": values, "deris": values | {"mIoU": miou + 1}}


def _printed(report: dict) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200, color_system=None, markup=False).print(report_table(report))
    return stream.getvalue()


def test_report_grows_call_by_call(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    update_report(path, section="step0", numbers={"refcoco/val": _numbers(3.0)}, timing={"evaluate step0": 1.23456})
    update_report(path, section="splits", numbers={"refcoco/val": _numbers(71.23456789)}, protocols=PROTOCOLS.values())
    update_report(path, section="splits", numbers={"refcoco/testA": _numbers(72.0)})
    update_report(path, section="control", numbers={"refcoco/val": _numbers(20.0)})
    report = json.loads(path.read_text())
    assert report.keys() == {"splits", "control", "step0", "timing", "versions"}
    assert list(report["splits"]) == ["refcoco/val", "refcoco/testA"]
    assert report["splits"]["refcoco/val"]["original"]["mIoU"] == 71.2346
    assert report["splits"]["refcoco/val"]["original"]["n_phrases"] == 1234
    assert report["step0"]["refcoco/val"]["deris"]["mIoU"] == 4
    assert report["timing"] == {"evaluate step0": 1.23}
    assert report["versions"]["torch"]
    assert PROTOCOLS["deris"].fingerprint() in report["versions"]["protocols"]["deris"]
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_new_numbers_of_a_split_replace_the_old(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    update_report(path, section="splits", numbers={"refcoco/val": _numbers(1.0)})
    update_report(path, section="splits", numbers={"refcoco/val": _numbers(2.0)})
    assert read_report(path)["splits"]["refcoco/val"]["original"]["mIoU"] == 2


@pytest.mark.parametrize("content", ["not json", "[]", '{"splits": {}}'])
def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="expected a report"):
        update_report(path, section="splits", numbers={"refcoco/val": _numbers(1.0)})
    assert path.read_text() == content


def test_table_shows_ours_beside_the_published(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report = update_report(
        path, section="splits", numbers={"refcoco/val": _numbers(71.5), "grefcoco/val": _numbers(10.0)}
    )
    text = _printed(report)
    row = next(line for line in text.splitlines() if "refcoco/val" in line)
    for value in ("1,234", "71.50", "72.50", "84.05", "74.90", "79.50"):
        assert value in row
    assert "real COCO" in " ".join(text.split())  # the caption is wrapped
    assert "control" not in text
    assert "step 0" not in text
    report = update_report(path, section="control", numbers={"refcoco/val": _numbers(20.25)})
    row = next(line for line in _printed(report).splitlines() if "refcoco/val" in line)
    assert "20.25" in row


def test_published_numbers_are_complete() -> None:
    assert {len(numbers) for numbers in PUBLISHED.values()} == {8}
    assert PUBLISHED["DeRIS-7B"]["refcocog_umd/test"] == 80.59


def _gres_numbers(giou: float, **changes: float | None) -> dict[str, dict[str, float | None]]:
    values = {
        "gIoU": giou, "cIoU": 61.25, "N-acc": 72.5, "T-acc": 93.75, "Pr@0.7": 55.5, "Pr@0.8": 44.0, "Pr@0.9": 33.0,
        "F1": 41.5, "oracle_gIoU": 88.5, "always_empty_gIoU": 21.5, "always_empty_cIoU": 0.0, "never_empty_gIoU": 7.25,
        "never_empty_cIoU": 8.5, "n_no_target": 120, "n_phrases": 1234, "n_images": 9,
    }  # fmt: skip
    return {"original": {**values, **changes}, "deris": {**values, "gIoU": giou + 1, **changes}}


def _row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


def test_gres_splits_have_a_table_with_what_answering_without_looking_gets(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report = update_report(path, section="splits", numbers={"grefcoco/val": _gres_numbers(66.5)}, notes={})
    text = _printed(report)
    for value in (
        "1,234 (120)",
        "66.50",
        "61.25",
        "72.50",
        "93.75",
        "55.50",
        "41.50",
        "88.50",
        "67.50",
        "77.7/72.0/82.2",
    ):
        assert value in _row(text, "grefcoco/val")
    assert [cell for cell in _row(text, "always empty").split() if cell != "-"][2:6] == [
        "21.50",
        "0.00",
        "100.00",
        "0.00",
    ]
    assert [cell for cell in _row(text, "never empty").split() if cell != "-"][2:6] == [
        "7.25",
        "8.50",
        "0.00",
        "100.00",
    ]
    assert "Referring image segmentation" not in text
    report = update_report(path, section="splits", numbers={"refcoco/val": _numbers(71.5)})
    both = _printed(report)
    assert "71.50" in _row(both, "refcoco/val")
    assert "66.50" in _row(both, "grefcoco/val")


def test_a_number_of_nothing_is_null_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    only_empty = _gres_numbers(50.0, **{"T-acc": None, "Pr@0.7": None, "Pr@0.8": None, "Pr@0.9": None})
    said = "no target phrases: no T-acc, no Pr@X"
    update_report(path, section="splits", numbers={"grefcoco/val": only_empty}, notes={"grefcoco/val": (said,)})
    report = read_report(path)
    assert report["splits"]["grefcoco/val"]["original"]["T-acc"] is None
    assert report["notes"] == {"grefcoco/val": [said]}
    text = _printed(report)
    assert said in " ".join(text.split())
    assert "nan" not in text.lower().split()
    update_report(path, section="splits", numbers={"grefcoco/val": _gres_numbers(50.0)}, notes={"grefcoco/val": ()})
    assert read_report(path)["notes"] == {}


def test_published_gres_numbers_are_complete() -> None:
    assert {len(numbers) for numbers in PUBLISHED_GRES.values()} == {3}
    assert PUBLISHED_GRES["DeRIS-L"]["grefcoco/val"] == (77.67, 72.00, 82.22)


@pytest.mark.parametrize("width", [44, 80, 120])
def test_a_narrow_terminal_loses_no_number(tmp_path: Path, width: int) -> None:
    numbers = {"refcoco/val": _numbers(71.25), "grefcoco/val": _gres_numbers(66.5)}
    report = update_report(tmp_path / "report.json", section="splits", numbers=numbers)
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(report_table(report))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for value in ("71.25", "72.25", "55.00", "57.00", "59.00", "60.00", "84.05", "74.90", "79.50", "1,234"):
        assert value in text
    for value in ("66.50", "67.50", "61.25", "72.50", "93.75", "55.50", "41.50", "88.50", "77.7/72.0/82.2", "100.00"):
        assert value in text
    assert "…" not in text


def test_published_numbers_stand_beside_published_splits_alone(tmp_path: Path) -> None:
    own = {"mine [/red]/val": _numbers(71.5), "mine/gen": _gres_numbers(66.5)}
    text = _printed(update_report(tmp_path / "own.json", section="splits", numbers=own))
    assert not any(word in text for word in ("DeRIS", "LISA", "GLaMM", "GSVA", "other", "Table 1", "Table 2"))
    text = _printed(update_report(tmp_path / "ours.json", section="splits", numbers={"refcoco/val": _numbers(71.5)}))
    assert all(f"{method}†" in text for method in PUBLISHED)
    said = " ".join(text.split())
    assert "whose metric the table does not state" in said
    assert "LISA, GSVA, GLaMM and SAM4MLLM report cIoU" in said


def test_a_table_for_a_terminal_without_a_dagger(tmp_path: Path) -> None:
    report = update_report(tmp_path / "report.json", section="splits", numbers={"refcoco/val": _numbers(71.5)})
    stream = io.BytesIO()
    latin = io.TextIOWrapper(stream, encoding="latin-1")
    Console(file=latin, width=80, color_system=None).print(report_table(report))
    latin.flush()
    assert "DeRIS-7B+" in stream.getvalue().decode("latin-1")
