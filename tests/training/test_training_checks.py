import pytest

from deris_llm.config import load_config
from deris_llm.training.run import train


def test_bf16_without_deepspeed_is_refused(run_overrides, tmp_path):
    config = load_config("tiny-refcoco", [*run_overrides, "training.precision=bf16"])
    with pytest.raises(ValueError, match="training.precision=bf16 needs DeepSpeed"):
        train(config, output=tmp_path)


def test_the_switch_that_drops_deepspeed_silently_is_refused(run_overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="expected ACCELERATE_USE_CPU unset"):
        train(load_config("tiny-refcoco", run_overrides), output=tmp_path)


def test_deepspeed_without_a_launcher_is_refused(run_overrides, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}')
    with pytest.raises(ValueError, match="expected to be started by a launcher"):
        train(load_config("tiny-refcoco", run_overrides), output=tmp_path, deepspeed=tmp_path / "ds.json")
