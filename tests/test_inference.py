"""Linears through oneDNN give the same answers; which machine profits is not tested, how that is decided is.

No test measures time: the clocks here are counters.
"""

import inspect
import logging
import time

import pytest
import torch
from torch import nn

from deris_llm.models import cpu_inference as inference
from deris_llm.models.cpu_inference import LinearTimes, OneDnnLinear, for_cpu_inference, use_onednn_linears
from deris_llm.models.deris import build_model
from deris_llm.testing import relative_difference, synthetic_batch, tiny_config, tiny_weights
from tests.models.tiny_backends import tiny_beit3


@pytest.mark.parametrize("backend", ["qwen2_ov", "beit3"])
def test_answers_are_the_same(tmp_path, monkeypatch, backend):
    monkeypatch.setattr(inference, "MIN_WEIGHTS", 1)
    overrides = tiny_weights(tmp_path) + (tiny_beit3(tmp_path) if backend == "beit3" else [])
    config = tiny_config(*overrides)
    torch.manual_seed(0)
    model = build_model(config).eval()
    batch = synthetic_batch(config)
    with torch.inference_mode():
        expected = model(batch)
        assert use_onednn_linears(model) > 50
        got = model(batch)
    assert any(isinstance(module, OneDnnLinear) for module in model.cognition.modules())
    for ours, reference in zip(got.rounds, expected.rounds, strict=True):
        assert relative_difference(ours.mask_logits, reference.mask_logits) < 1e-5  # measured 1.4e-6
        assert relative_difference(ours.referring_logits, reference.referring_logits) < 1e-5


def test_small_linears_and_those_that_are_only_read_stay():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Linear(128, 128), nn.MultiheadAttention(128, 4), nn.Linear(128, 128).half()
    ).eval()
    assert use_onednn_linears(model) == 1
    assert [type(module) for module in model] == [nn.Linear, OneDnnLinear, nn.MultiheadAttention, nn.Linear]
    assert type(model[2].out_proj) is not OneDnnLinear


FASTER, SLOWER = LinearTimes(mkl_ms=2.0, onednn_ms=1.0), LinearTimes(mkl_ms=1.0, onednn_ms=0.9)


@pytest.mark.parametrize(("times", "is_faster"), [(FASTER, True), (SLOWER, False)])
def test_the_machine_decides(monkeypatch, caplog, times, is_faster):
    """By a margin: 1.1 times faster is not enough. The log says which library it is, and why."""
    monkeypatch.setattr(inference, "linear_times", lambda: times)
    with caplog.at_level(logging.INFO):
        model = for_cpu_inference(nn.Sequential(nn.Linear(128, 128)).eval())
    assert isinstance(model.get_submodule("0"), OneDnnLinear) == is_faster
    assert f"through {'oneDNN' if is_faster else 'MKL'} (" in caplog.text
    assert all(f"{ms:.1f}" in caplog.text for ms in (times.mkl_ms, times.onednn_ms))


class Machine:
    """A clock, and runs that let it advance; while it is slow, they take ten times as long."""

    def __init__(self, slow_calls: range = range(0)) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.slow_calls = slow_calls

    def run(self, name: str, seconds: float):
        def executed() -> None:
            self.now += seconds * (10 if len(self.calls) in self.slow_calls else 1)
            self.calls.append(name)

        return executed


def test_runs_take_turns_and_the_best_of_each_counts():
    machine = Machine()
    runs = [machine.run("a", 3.0), machine.run("b", 2.0)]
    assert inference.best_seconds(runs, repeats=2, clock=lambda: machine.now) == [3.0, 2.0]
    assert machine.calls == ["a", "b"] * 3  # once before


@pytest.mark.parametrize("start", range(2, 9))
def test_a_slow_moment_changes_nothing(start: int):
    """One that is longer than a round of all runs, at any place."""
    machine = Machine(slow_calls=range(start, start + 3))
    runs = [machine.run("a", 3.0), machine.run("b", 2.0)]
    assert inference.best_seconds(runs, clock=lambda: machine.now) == [3.0, 2.0]


def test_only_cpu_time_of_this_thread_counts():
    """Other processes and threads do not change it."""
    assert inspect.signature(inference.best_seconds).parameters["clock"].default is time.thread_time


def test_without_onednn_the_default_stays(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not inference.linear_times.__wrapped__().is_onednn_faster


def test_each_library_gets_the_time_of_all_its_layers(monkeypatch):
    seconds = [float(number) for number in range(1, 2 * len(inference.MEASURED_SIZES) + 1)]
    monkeypatch.setattr(inference, "best_seconds", lambda runs: seconds[: len(runs)])
    times = inference.linear_times.__wrapped__()
    assert (times.mkl_ms, times.onednn_ms) == (1e3 * sum(seconds[::2]), 1e3 * sum(seconds[1::2]))


def test_a_model_in_training_is_refused():
    with pytest.raises(AssertionError, match="no gradient"):
        use_onednn_linears(nn.Sequential(nn.Linear(128, 128)))
