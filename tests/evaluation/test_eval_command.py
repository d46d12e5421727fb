"""`deris-llm eval` from the command line: sweep, then numbers with the swept threshold and everything that stands with them."""

import json
from pathlib import Path

import pytest
import torch

from deris_llm.cli import main
from deris_llm.config import RunConfig, load_config
from deris_llm.data.synthetic.world import write_world
from deris_llm.evaluation.calibration import Calibration
from deris_llm.evaluation.protocols import protocols_of
from deris_llm.model import build_model
from deris_llm.testing import tiny_config, tiny_weights
from deris_llm.training.checkpoints import save_full_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, seed=0, num_train=1, num_val=3, num_test=2)
    return tiny_config(
        *tiny_weights(tmp_path_factory.mktemp("weights")), f"data.root={root}", "data.allow_leakage=true"
    )


@pytest.fixture
def checkpoint(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANK", "0")  # evaluate in this process
    monkeypatch.setenv("WORLD_SIZE", "1")
    torch.manual_seed(0)
    save_full_checkpoint(tmp_path / "checkpoint", build_model(config).eval(), config)
    return tmp_path / "checkpoint"


def test_sweep_then_eval(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in checkpoint.iterdir())
    assert main(["eval", "--checkpoint", str(checkpoint), "--sweep", "refcoco/val", "--protocol", "rela480"]) == 0
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted([*before, "calibration.json"])
    found = Calibration.read(checkpoint)
    assert found is not None
    assert (found.protocol, found.split, len(found.curve)) == ("rela480", "refcoco/val", 19)
    assert "Sweep of refcoco/val" in capsys.readouterr().out

    out = tmp_path / "out"
    splits = ["--splits", "refcoco/val", "refcoco/testA", "--protocol", "original", "rela480", "--output", str(out)]
    assert main(["eval", "--checkpoint", str(checkpoint), *splits]) == 0
    report = json.loads((out / "report.json").read_text())
    used = load_config(
        checkpoint / "config.yaml",
        ["evaluation.protocols=[original, rela480]", f"evaluation.score_threshold={found.threshold}"],
    )
    prints = {protocol.id: protocol.fingerprint() for protocol in protocols_of(used)}
    assert prints["rela480"] == found.fingerprint
    said = " ".join(capsys.readouterr().out.split())
    for split in ("refcoco/val", "refcoco/testA"):
        assert {name: values["fingerprint"] for name, values in report["splits"][split].items()} == prints
        for values in report["splits"][split].values():
            assert values["selection"]["error"] == pytest.approx(values["oracle_mIoU"] - values["mIoU"], abs=2e-4)
            low, high = values["intervals"]["mIoU"]
            assert low <= values["mIoU"] <= high
            assert set(values["breakdown"]) == {"object_size", "phrase_length", "location_words", "same_class"}
    assert report["notes"] == {"refcoco/val": ["the threshold was chosen on this split, which flatters it a little"]}
    assert report["about"]["threshold_source"] == str(found)
    assert report["about"]["score_threshold"] == found.threshold
    assert report["about"]["checkpoint"] == str(checkpoint)
    assert "LEAKAGE (data.allow_leakage=true)" in report["about"]["leakage"]
    for part in (str(found), "LEAKAGE (data.allow_leakage=true)", *(f"{name} ({x})" for name, x in prints.items())):
        assert part in said
    assert "refcoco/val: the threshold was chosen on this split" in said

    again = ["--splits", "refcoco/val", "--output", str(out), "--set", "evaluation.score_threshold=0.31"]
    assert main(["eval", "--checkpoint", str(checkpoint), *again]) == 0
    report = json.loads((out / "report.json").read_text())
    assert "threshold 0.31: set by the user, so not the calibrated" in report["about"]["threshold_source"]
    assert report["notes"] == {}
    said = " ".join(capsys.readouterr().out.split())
    assert "refcoco/testA)" in said  # two fingerprints of `original` in one report: each with its splits


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sweep", "refcoco/testA"], "expected a val split"),
        (["--sweep", "refcoco/val", "--splits", "refcoco/val"], "expected --checkpoint alone, got --splits too"),
        (["--protocol", "orignal"], "did you mean original?"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_read(
    checkpoint: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK")
    (checkpoint / "checksums.json").unlink()  # as of earlier versions; with it the damage would be found first
    (checkpoint / "model.safetensors").write_bytes(b"")
    assert main(["eval", "--checkpoint", str(checkpoint), *options]) == 2
    assert says in capsys.readouterr().err
