"""Which checkpoint a name means, and whether it may import code."""

from pathlib import Path

import pytest

from deris_llm.checkpoints.layout import CheckpointError, find_checkpoint
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
