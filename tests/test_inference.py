"""Linears through oneDNN give the same answers; which machine profits is not tested."""

import pytest
import torch
from torch import nn

from deris_llm.models import cpu_inference as inference
from deris_llm.models.cpu_inference import OneDnnLinear, for_cpu_inference, use_onednn_linears
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


@pytest.mark.parametrize("is_faster", [False, True])
def test_the_machine_decides(monkeypatch, is_faster):
    monkeypatch.setattr(inference, "is_onednn_faster", lambda: is_faster)
    model = for_cpu_inference(nn.Sequential(nn.Linear(128, 128)).eval())
    assert isinstance(model[0], OneDnnLinear) == is_faster


def test_a_model_in_training_is_refused():
    with pytest.raises(AssertionError, match="no gradient"):
        use_onednn_linears(nn.Sequential(nn.Linear(128, 128)))
