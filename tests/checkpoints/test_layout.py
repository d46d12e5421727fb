"""Which checkpoint a name means, and whether it may import code."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from deris_llm.checkpoints.fingerprints import recorded_base_checkpoint
from deris_llm.checkpoints.layout import CheckpointError, _digest_of_entries, check_files, find_checkpoint, read_json
from deris_llm.common import hub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("checkpoint-2", "checkpoint-10"):
        (tmp_path / "run" / name).mkdir(parents=True)
        for file in ("config.yaml", "trainable.safetensors", "base_weights.json"):
            (tmp_path / "run" / name / file).touch()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("overrides", "is_allowed"),
    [
        ([], False),
        (["cognition.backend=mine:Class"], True),
        ([" cognition.backend = mine:Class"], True),
        (["cognition.backend_of_mine=1", "cognition.weights=x"], False),
    ],
)
def test_code_is_imported_only_if_the_user_names_the_backend(run: Path, overrides: list[str], is_allowed: bool) -> None:
    for given in (run, run / "checkpoint-10"):
        found = find_checkpoint(given, overrides)
        assert found.folder == run / "checkpoint-10"
        assert found.allow_module == is_allowed


def test_a_hub_id_is_downloaded_and_a_path_is_not(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, revision: str | None = None) -> str:
        asked.append((repository, revision))
        if repository == "owner/none":
            raise OSError("404: owner/none")
        return str(run / "checkpoint-2")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(run.parent)
    assert find_checkpoint("owner/name").folder == run / "checkpoint-2"
    assert find_checkpoint("owner/name@v1").folder == run / "checkpoint-2"
    with pytest.raises(CheckpointError, match=r"owner/none: .*Hugging Face id.*404"):
        find_checkpoint("owner/none")
    assert asked == [("owner/name", None), ("owner/name", "v1"), ("owner/none", None)]
    assert find_checkpoint("run/checkpoint-2").folder == Path("run/checkpoint-2")
    with pytest.raises(CheckpointError, match="no such folder"):  # `run` is a folder here, not an owner
        find_checkpoint("run/checkpoint-3")
    assert len(asked) == 3


@pytest.mark.parametrize("name", ["base_weights.json", "metrics.json", "checksums.json"])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_named(run: Path, name: str) -> None:
    """Optional files were passed over, and `checksums.json` then checked nothing."""
    folder = run / "checkpoint-10"
    (folder / name).unlink(missing_ok=True)
    for make in (os.mkfifo, os.mkdir):
        make(folder / name)
        with pytest.raises(CheckpointError, match=f"{name}.* that is a folder, a pipe|{name}: .*got a damaged file"):
            find_checkpoint(folder)
        with pytest.raises(CheckpointError, match="a folder, a pipe, a device"):
            read_json(folder / name)
        (folder / name).unlink() if (folder / name).is_fifo() else (folder / name).rmdir()


@pytest.mark.parametrize(
    ("name", "entry"), [("../../secret", {"bytes": 1, "sha256": ""}), ("/etc/passwd", {}), ("config.yaml", [])]
)
def test_checksums_that_no_run_wrote(run: Path, name: str, entry: Any) -> None:
    files = {name: entry}
    content = {"files": files, "sha256": _digest_of_entries(files)}
    (run / "checkpoint-10/checksums.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="No run wrote this"):
        check_files(run / "checkpoint-10")


@pytest.mark.parametrize(
    "entry",
    [None, [], {"weights": 5, "files": {}}, {"weights": "a", "files": ["b"]}, {"weights": "a", "files": {"b": 1}}],
)
def test_base_weights_that_no_run_wrote(run: Path, entry: Any) -> None:
    (run / "checkpoint-10/base_weights.json").write_text(json.dumps({"cognition": entry}))
    with pytest.raises(CheckpointError, match="expected an object with the base weights of cognition"):
        recorded_base_checkpoint(run / "checkpoint-10")
    (run / "checkpoint-10/base_weights.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        recorded_base_checkpoint(run / "checkpoint-10")
