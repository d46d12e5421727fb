"""A pipeline saved as a folder, pushed to a stand-in of the hub, and loaded by its id; devices of transformers' habit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from deris_llm import DerisPipeline
from deris_llm.checkpoints.layout import CheckpointError
from deris_llm.checkpoints.save import save_weights
from deris_llm.common import hub
from deris_llm.config import load_config
from deris_llm.evaluation.calibration import Calibration
from deris_llm.models.deris import build_model
from deris_llm.testing import synthetic_images, tiny_config, tiny_weights
from tests.serving.hub_stand_in import TOKEN, HubStandIn

PHRASES = ["red circle", "star"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(*tiny_weights(tmp_path_factory.mktemp("weights")), "evaluation.score_threshold=0.4")
    torch.manual_seed(3)
    save_weights(folder / "best", build_model(config), config, {})
    rule = config.evaluation
    Calibration(
        0.55, rule.selection, rule.presence, "refcoco/val", "mIoU", "original", "0123abcd", 12, "2026-01-01",
        ({"threshold": 0.55, "mIoU": 62.0},),
    ).write(folder / "best")  # fmt: skip
    return folder


PUSH = """
import sys
from deris_llm import DerisPipeline
from deris_llm.checkpoints.layout import find_checkpoint
pipeline = DerisPipeline.from_pretrained(sys.argv[1], score_threshold=0.3)
print(pipeline.push_to_hub("me/tiny", merge=True, private=True, commit_message="the first"))
find_checkpoint("me/tiny")  # downloads it
"""


def test_pushed_and_loaded_by_its_id(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = HubStandIn()
    with served.serving() as url:
        environment = {
            **os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path),
            "HF_TOKEN": TOKEN,
        }  # fmt: skip
        command = [sys.executable, "-c", PUSH, str(run)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{url}/me/tiny/commit/{served.commit_of('me/tiny')}\n"
    assert served.messages == ["the first"]
    assert served.created["me/tiny"]["visibility"] == "private"
    assert {"README.md", "config.yaml", "model.safetensors", "checksums.json"} <= set(served.files["me/tiny"])
    assert b'DerisPipeline.from_pretrained("me/tiny")' in served.files["me/tiny"]["README.md"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    loaded = DerisPipeline.from_pretrained("me/tiny")  # offline, from the cache
    assert loaded.config.evaluation.score_threshold == 0.3
    image = synthetic_images(1)[0]
    original = DerisPipeline.from_pretrained(run, score_threshold=0.3)
    for ours, theirs in zip(loaded(image, PHRASES), original(image, PHRASES), strict=True):
        assert ours.referring_scores == pytest.approx(theirs.referring_scores, abs=1e-5)
        assert (ours.mask != theirs.mask).mean() < 1e-3


@pytest.mark.parametrize(
    ("rule", "threshold"),
    [({}, 0.55), ({"score_threshold": 0.3}, 0.3), ({"score_threshold": 0.55}, 0.55), ({"presence": "gate"}, 0.4)],
)
def test_a_folder_keeps_the_rule_that_the_user_set(
    run: Path, tmp_path: Path, rule: dict[str, object], threshold: float, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = DerisPipeline.from_pretrained(run, device_map="auto", **rule)
    assert pipeline.save_pretrained(tmp_path / "small").merge is None
    assert "which has no name on the hub: readers must give its folder" in caplog.text
    weights = [f"{part}.weights={getattr(pipeline.config, part).weights}" for part in ("cognition", "perception")]
    used, again = pipeline.config.evaluation, DerisPipeline.from_pretrained(tmp_path / "small", overrides=weights)
    assert used.score_threshold == threshold
    assert again.config.evaluation == used
    assert (tmp_path / "small" / "calibration.json").is_file() == (threshold == 0.55)
    with pytest.raises(ValueError, match="expected a new folder"):
        pipeline.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"dtype: expected None without merge=True, got torch\.bfloat16"):
        pipeline.save_pretrained(tmp_path / "other", dtype=torch.bfloat16)
    if not rule:
        assert pipeline.save_pretrained(tmp_path / "full", merge=True, dtype=torch.bfloat16).merge
        assert load_config(tmp_path / "full" / "config.yaml").cognition.lora.r == 0


def test_what_cannot_be_pushed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = DerisPipeline.from_pretrained(run)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(
        ValueError, match=r"push_to_hub\('me/tiny'\): expected to upload .*, got .*`hf upload me/tiny folder`"
    ):
        pipeline.push_to_hub("me/tiny", token=TOKEN)
    for name in ("tiny", "me/tiny@main", "me/tiny/deep"):
        with pytest.raises(ValueError, match=rf"repo_id: expected owner/name, got '{name}'"):
            pipeline.push_to_hub(name)
    monkeypatch.setattr(hub, "check_login", lambda token: None)
    with pytest.raises(
        ValueError, match=r"got \S+llava and \S+mask2former in a folder of this machine; give merge=True"
    ):
        pipeline.push_to_hub("me/tiny")
    by_hand = DerisPipeline(pipeline.config, pipeline.model, pipeline.processor)
    with pytest.raises(ValueError, match="save_pretrained: expected a pipeline that `from_pretrained` loaded"):
        by_hand.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_id_that_was_never_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"me/tiny: expected a checkpoint folder or the Hugging Face id of one, got no such"
    ):
        DerisPipeline.from_pretrained("me/tiny")


def test_devices_of_transformers_habit(run: Path) -> None:
    for given in ({"device_map": "balanced"}, {"device_map": {"": 0}}, {"device_map": "auto", "device": "cpu"}):
        with pytest.raises(
            ValueError, match=r"device_map: expected 'auto' without a device, got .*give one, such as device="
        ):
            DerisPipeline.from_pretrained(run, **given)
