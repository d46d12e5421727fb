import pytest

from deris_llm.config import load_config
from deris_llm.training.run import train
from deris_llm.training.trainer import selecting_number


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


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"mIoU": 70.0, "oIoU": 71.0, "n_phrases": 3}, 70.0),
        ({"gIoU": 60.0, "cIoU": 61.0, "mIoU": 62.0, "n_phrases": 3}, 61.0),
        ({"gIoU": 100.0, "n_phrases": 3}, None),
    ],
)
def test_the_number_that_selects_the_best_checkpoint(numbers, expected):
    assert selecting_number(numbers) == expected
