"""The thin scripts of eval/ are `deris-llm eval` with their splits."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from deris_llm.data.formats.refer import DATASETS, GENERALISED_DATASETS

EVAL = Path(__file__).parents[1] / "eval"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"eval_{name}", EVAL / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "count"), [("refcoco", 8), ("grefcoco", 3)])
def test_splits_are_those_of_the_datasets(name: str, count: int) -> None:
    splits = _script(name).SPLITS
    datasets = {split.partition("/")[0] for split in splits}
    assert len(splits) == len(set(splits)) == count
    assert datasets <= DATASETS.keys()
    assert datasets <= GENERALISED_DATASETS if name == "grefcoco" else not datasets & GENERALISED_DATASETS


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("refcoco", []),
        ("grefcoco", []),
        ("video", []),
        ("grefcoco", ["--set", "evaluation.presence=gate", "data.root=elsewhere"]),
    ],
)
def test_a_folder_without_a_checkpoint_is_refused_by_the_command(
    name: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.setenv("RANK", "0")  # evaluate in this process
    assert _script(name).main() != 0
    said = "".join(capsys.readouterr())
    assert str(tmp_path) in said
    assert not (tmp_path / "out").exists()


def test_score_hands_its_arguments_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "given.jsonl").touch()
    arguments = [
        str(tmp_path / "given.jsonl"),
        "--data",
        str(tmp_path / "data"),
        "--split",
        "refcoco/val",
        "--output",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["score.py", *arguments])
    assert _script("score").main() == 2
    assert str(tmp_path / "data") in capsys.readouterr().err
    assert not out.exists()
