"""A run that is asked to stop finishes the step that has begun, saves and ends; in an evaluation it ends at once."""

import json
import os
import signal

import pytest

from deris_llm.config import load_config
from deris_llm.training import interruption
from deris_llm.training.early_warnings import EarlyWarnings
from deris_llm.training.run import train


@pytest.fixture(autouse=True)
def handled():
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    interruption.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interruption._State.asked_at = None


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_a_request_waits_for_the_step_and_ends_other_work(number):
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    interruption.install()
    with interruption.after_the_step():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # repeated by a launcher
        assert interruption.is_asked()
        with pytest.raises(KeyboardInterrupt), interruption.at_once():
            pytest.fail("an evaluation began")


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "_SECONDS_OF_ONE_REQUEST", 0.0)
    with interruption.after_the_step():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_step_is_saved_and_the_run_goes_on_to_the_same_end(run_overrides, tmp_path, monkeypatch):
    config = load_config("tiny-refcoco", [*run_overrides, "training.save_every=100", "data.num_workers=1"])

    def stop(callback, args, state, control, **_):  # between the forward passes of step 3 and its end
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(EarlyWarnings, "on_step_begin", stop, raising=False)
        with pytest.raises(
            KeyboardInterrupt, match=r"interrupted after step 3: the last checkpoint is .*checkpoint-3; the same"
        ):
            train(config, output=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not list((tmp_path / "run").glob(".*"))  # neither lock nor signs of life
    interruption.install()
    result = train(config, output=tmp_path / "run")
    straight = train(config, output=tmp_path / "straight")
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        assert (result.checkpoint / name).read_bytes() == (straight.checkpoint / name).read_bytes()
    losses = [
        [
            entry["loss"]
            for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for folder in (result.checkpoint, straight.checkpoint)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
