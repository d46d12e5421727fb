"""`deris-llm eval` from the command line: sweep, then numbers with the swept threshold and everything that stands with them."""

import json
import os
from pathlib import Path

import pytest
import torch

from deris_llm.checkpoints.fingerprints import checkpoint_fingerprint
from deris_llm.checkpoints.save import save_full_checkpoint
from deris_llm.cli import evaluate
from deris_llm.cli.main import main
from deris_llm.common.error_file import QUIET
from deris_llm.config import RunConfig, load_config
from deris_llm.config.protocols import protocols_of
from deris_llm.data.synthetic.world import write_world
from deris_llm.evaluation import launch
from deris_llm.evaluation.calibration import Calibration
from deris_llm.evaluation.launch import run_on_ranks
from deris_llm.evaluation.page.stored import open_evaluation
from deris_llm.models.deris import build_model
from deris_llm.testing import tiny_config, tiny_weights


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
    assert report["notes"] == {
        "refcoco/val": ["the threshold was chosen on this split, so its numbers are slightly optimistic"]
    }
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


def test_each_checkpoint_and_threshold_has_a_folder_of_its_own(
    checkpoint: Path,
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run [/red]"
    run.mkdir(parents=True)
    checkpoint.rename(run / "best")
    torch.manual_seed(1)
    save_full_checkpoint(tmp_path / "other", build_model(config).eval(), config)
    prints = [checkpoint_fingerprint(folder) for folder in (run / "best", tmp_path / "other")]
    some = ["--splits", "refcoco/testA", "--max-images", "1"]
    assert main(["eval", "--checkpoint", str(run), *some]) == 0  # a run's folder is taken too
    assert main(["eval", "--checkpoint", str(run), *some, "--set", "evaluation.score_threshold=0.31"]) == 0
    assert main(["eval", "--checkpoint", "other", *some]) == 0
    threshold = config.evaluation.score_threshold
    answered = ((prints[0], threshold), (prints[0], 0.31), (prints[1], threshold))
    expected = [f"{config.name}-{which}-threshold-{t:g}" for which, t in answered]
    assert sorted(path.name for path in (tmp_path / "runs" / "eval").iterdir()) == sorted(expected)
    report = json.loads((tmp_path / "runs" / "eval" / expected[0] / "report.json").read_text())
    assert report["about"]["fingerprint"] == prints[0]
    assert report["about"]["checkpoint"] == str(run / "best")
    capsys.readouterr()

    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("report.*")}
    assert main(["eval", "--checkpoint", "other", *some, "--output", f"runs/eval/{expected[0]}"]) == 2
    assert f"expected a new folder or results of checkpoint {prints[1]}, got results of checkpoint {prints[0]}" in (
        capsys.readouterr().err
    )
    command = ["report", f"runs/eval/{expected[0]}", "--against", f"runs/eval/{expected[2]}"]
    assert main(command) == 0
    opened = open_evaluation(f"runs/eval/{expected[0]}", run)
    assert opened.checkpoint == run / "best"
    page = tmp_path / "runs" / "eval" / expected[0] / f"report-against-{expected[2]}.html"
    assert f"written to {page.relative_to(tmp_path)}" in capsys.readouterr().out
    assert page.is_file()
    assert before == {path: path.read_bytes() for path in before}


def test_a_sweep_without_a_better_threshold_keeps_the_present_one(checkpoint: Path) -> None:
    """Untrained scores are low: many thresholds answer alike."""
    for present in (0.72, 0.9):
        changed = ["--set", f"evaluation.score_threshold={present}", "--max-images", "1"]
        assert main(["eval", "--checkpoint", str(checkpoint), "--sweep", "refcoco/val", *changed]) == 0
        found = Calibration.read(checkpoint)
        assert found is not None
        at = {point["threshold"]: point["mIoU"] or 0.0 for point in found.curve}
        assert len(at) == (19 if present == 0.9 else 20)  # the present one joins those that are swept
        assert len({at[t] for t in at if t >= 0.5}) == 1  # the scores of untrained queries are lower
        best = max(at.values())
        assert found.threshold == present if at[present] == best else at[found.threshold] == best


def test_ranks_say_once_why_they_stop(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_on_ranks(["config", "show", "--config", "no-such-config"], 2) == 2
    said = capfd.readouterr().err
    assert said.count("no-such-config") == 1
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert QUIET not in os.environ
    assert run_on_ranks(["config", "list"], 2) == 0


def test_a_folder_without_a_checkpoint_is_refused_before_ranks_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "run_on_ranks", lambda *_: pytest.fail("started"))
    assert main(["eval", "--checkpoint", str(tmp_path)]) == 2
    assert "expected a checkpoint folder with config.yaml" in capsys.readouterr().err


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
    monkeypatch.setattr(evaluate, "_evaluate_on_this_rank", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(launch, "run_on_ranks", lambda *_: pytest.fail("started"))
    assert main(["eval", "--checkpoint", str(checkpoint), *options]) == 2
    assert says in capsys.readouterr().err


def test_quiet_and_json(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        "eval",
        "--checkpoint",
        str(checkpoint),
        "--splits",
        "refcoco/val",
        "--max-images",
        "2",
        "--output",
        str(out),
    ]
    assert main([*command, "--quiet"]) == 0
    report = json.loads((out / "report.json").read_text())
    said = capsys.readouterr()
    miou = report["splits"]["refcoco/val"]["original"]["mIoU"]
    assert said.out == f"refcoco/val mIoU {miou:.2f}: written to {out}\n"
    assert "%" not in said.err

    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("written") == str(out)
    assert printed["splits"] == report["splits"]
