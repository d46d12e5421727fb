"""Out of memory: the message names the fields that lower it; nothing else is touched."""

import pytest
import torch

from deris_llm.evaluation import evaluator
from deris_llm.out_of_memory import DoesNotFitError, evaluation_cures, explains_out_of_memory, training_cures
from deris_llm.testing import tiny_config


def test_training_names_the_fields_that_have_room() -> None:
    config = tiny_config("training.images_per_device=4", "data.phrases_per_image=8", "training.accumulation=3")
    with pytest.raises(DoesNotFitError) as caught, explains_out_of_memory(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
    said = str(caught.value)
    assert said.startswith("training ran out of memory: expected a batch to fit, got: CUDA out of memory. Tried")
    for cure in (
        "training.images_per_device=2 (now 4), with training.accumulation=6",
        "data.phrases_per_image=4 (now 8)",
    ):
        assert cure in said
    assert "gradient_checkpointing=true (now false)" in said
    assert "data.max_tokens_per_image (now no limit)" in said
    assert "more lines" not in said
    least = training_cures(
        tiny_config(
            "training.images_per_device=1",
            "data.phrases_per_image=1",
            "cognition.gradient_checkpointing=true",
            "perception.activation_checkpointing=true",
            "data.max_tokens_per_image=900",
        )
    )
    assert not any("images_per_device" in cure or "phrases_per_image" in cure or "=true" in cure for cure in least)
    assert any("data.max_tokens_per_image (now 900)" in cure for cure in least)


def test_an_allocation_that_really_fails_is_explained() -> None:
    with pytest.raises(DoesNotFitError, match="ran out of memory"), explains_out_of_memory(tiny_config()):
        torch.empty(2**60, dtype=torch.uint8)


def test_evaluation_names_its_own_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("evaluation.images_per_device=4", "evaluation.max_phrases_per_batch=64")

    def full(*_: object, **__: object) -> object:
        raise RuntimeError("rank 1: OutOfMemoryError: CUDA out of memory.")

    monkeypatch.setattr(evaluator, "check_records", full)
    told = r"evaluation ran out of memory(.|\n)*images_per_device=2 \(now 4\)"
    with pytest.raises(DoesNotFitError, match=told), explains_out_of_memory(config):
        evaluator.evaluate(torch.nn.Identity(), config, [], None, device="cpu")  # type: ignore[arg-type]
    assert any("max_phrases_per_batch=32 (now 64)" in cure for cure in evaluation_cures(config))


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, explains_out_of_memory(tiny_config()):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, DoesNotFitError)
