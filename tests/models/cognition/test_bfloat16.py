"""Every built-in backend at the precision of GPUs: features of that type, finite gradients, through the whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deris_llm.models.deris import build_model
from deris_llm.testing import synthetic_batch, tiny_config
from tests.models.tiny_backends import tiny_bert_weights, tiny_qwen_vl_weights, tiny_vilt_weights


def _llava_onevision(folder: Path) -> list[str]:
    return []  # `tiny_weights` has it


def _qwen3_vl(folder: Path) -> list[str]:
    return tiny_qwen_vl_weights(folder, "qwen3_vl")


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(
    "weights", [_llava_onevision, tiny_qwen_vl_weights, _qwen3_vl, tiny_vilt_weights, tiny_bert_weights]
)
def test_features_and_gradients(
    overrides: list[str], weights: Callable[[Path], list[str]], tuning: str, tmp_path: Path
):
    more = ["training.precision=bf16", f"cognition.tuning={tuning}"]
    config = tiny_config(*overrides, *weights(tmp_path), *more)
    torch.manual_seed(0)
    model, batch = build_model(config).train(), synthetic_batch(config)
    features = model.cognition(batch.cognition, batch.image_index)
    assert {each.dtype for each in (features.image_feats, features.text_feats, features.cls_feat)} == {torch.bfloat16}
    output = model(batch)
    answers = [output.presence_logit.sum(), *(r.mask_logits.sum() + r.referring_logits.sum() for r in output.rounds)]
    torch.stack(answers).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
