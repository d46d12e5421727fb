"""The door to data: what is missing is what the message names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deris_llm.config import load_config
from deris_llm.data.check import check_data
from deris_llm.data.errors import DataError
from deris_llm.data.mix import training_mix
from deris_llm.data.sources import check_split, read_split, split_names

ASKED: dict[str, Callable[[Path], object]] = {
    "a split": lambda root: read_split(root, "refcoco/val"),
    "a set of one's own": lambda root: check_split(root, "mine/val"),
    "a dataset's splits": lambda root: split_names(root, "mine"),
    "a check": lambda root: check_data(root),
    "a check of a set": lambda root: check_data(root, ["mine"]),
    "a mix": lambda root: training_mix(load_config("tiny-refcoco", [f"data.root={root}", "data.train=[mine]"]).data),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_missing_root_is_what_the_message_says(ask: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the folder of images and datasets, got none at") as caught:
        ask(tmp_path / "nowhere")
    assert f"data root '{tmp_path / 'nowhere'}'" in str(caught.value)
    assert "--set data.root=DIR" in str(caught.value)
    assert "expected one of refcoco" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="got a file at"):
        ask(tmp_path / "file")


def test_a_relative_root_is_named_with_the_folder_it_was_looked_for_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"data root 'data': .* got none at {tmp_path}/data"):
        read_split("data", "refcoco/val")
