"""The notebooks of the documentation run, and show what their stored outputs show."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def shown(cell: Any) -> tuple[str, list[list[str]]]:
    """The text of a cell's outputs, without numbers, spacing and what goes to stderr, and the kinds of its other outputs."""
    if cell.cell_type != "code":
        return "", []
    text = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
    data = [o.data for o in cell.outputs if o.output_type in ("execute_result", "display_data")]
    text += "".join(one["text/plain"] for one in data)
    return re.sub(r"\d+(\.\d+)?|\s+", "#", text), [sorted(one) for one in data]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_outputs_are_up_to_date(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # deris-llm
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    stored = nbformat.read(path, 4)
    done = nbformat.read(path, 4)
    for cell in done.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    (tmp_path / "work").mkdir()
    NotebookClient(done, timeout=1200, resources={"metadata": {"path": str(tmp_path / "work")}}).execute()
    for ours, theirs in zip(done.cells, stored.cells, strict=True):
        assert shown(ours) == shown(theirs), f"{path.name}: run this cell again and save the notebook\n{ours.source}"


def test_there_is_a_notebook_and_it_stays_small() -> None:
    assert [path.name for path in NOTEBOOKS] == ["start.ipynb"]
    assert all(path.stat().st_size < 1_000_000 for path in NOTEBOOKS)
