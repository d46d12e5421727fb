"""report.json keeps its form, is added to and replaced whole; the table has the published numbers."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from deris_llm.evaluation.protocols import PROTOCOLS
from deris_llm.evaluation.report import PUBLISHED, read_report, report_table, update_report


def _numbers(miou: float) -> dict[str, dict[str, float]]:
    values = {"mIoU": miou, "oIoU": 60.0, "n_phrases": 1234, "n_images": 9} | {
        f"Pr@0.{i}": 50.0 + i for i in range(5, 10)
    }
    return {"original": values, "deris": values | {"mIoU": miou + 1}}


def _printed(report: dict) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200, color_system=None).print(report_table(report))
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
