"""The pre-trainings of the shipped tiny backbones, a few steps of each on a few scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration, Mask2FormerForUniversalSegmentation

from deris_llm.data.synthetic.world import WORLD_STREAM
from scripts.pretrain_tiny import perception
from scripts.pretrain_tiny.cognition import CognitionRecipe, pretrain_cognition
from scripts.pretrain_tiny.muon import Muon
from scripts.pretrain_tiny.pool import HELD_OUT_FIRST_INDEX, POOL_STREAM, ScenePool, write_pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for name, first in (("train", 0), ("held_out", HELD_OUT_FIRST_INDEX)):
        write_pool(folder / name, num_scenes=8, seed=7, workers=1, first_index=first)
    return folder


def test_scenes_are_of_a_seed_stream_that_no_split_uses(pool: Path) -> None:
    assert POOL_STREAM != WORLD_STREAM
    train, held_out = ScenePool(pool / "train"), ScenePool(pool / "held_out")
    assert len(train) == len(held_out) == 8
    assert not any((picture == other).all() for picture in train.images_128 for other in held_out.images_128)
    for ids, record in zip(train.instance_ids, train.records, strict=True):
        assert set(np.unique(ids)) <= set(range(len(record["objects"]) + 1))


def test_perception_resumed_equals_straight(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "seed": 1,
        "steps": 3,
        "batch_size": 2,
        "evaluate_every": 1,
        "checkpoint_seconds": 0.0,
        "warmup_steps": 1,
    }
    perception.pretrain_perception(tmp_path / "straight", pool, **options)

    untouched, calls = perception.training_loss, []

    def interrupted(*arguments: object, **keywords: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return untouched(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(perception, "training_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        perception.pretrain_perception(tmp_path / "resumed", pool, **options)
    monkeypatch.setattr(perception, "training_loss", untouched)
    metrics = perception.pretrain_perception(tmp_path / "resumed", pool, **options)

    assert metrics["finished_steps"] == 3
    straight, resumed = (
        Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / name).state_dict()
        for name in ("straight", "resumed")
    )
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    assert not (tmp_path / "resumed.state").exists()


def test_cognition_folder_loads_and_answers(pool: Path, tmp_path: Path) -> None:
    recipe = CognitionRecipe(vision_steps=1, language_steps=1, vision_batch=2, language_batch=2)
    metrics = pretrain_cognition(tmp_path / "tiny", pool, recipe, command="a test")
    assert 0 <= metrics["final"]["grounding"] <= 1
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "tiny")
    processor = AutoProcessor.from_pretrained(tmp_path / "tiny")
    picture = ScenePool(pool / "train").images_120[0]
    inputs = processor(images=picture, text="<|im_start|>user\n<image>\nWhere is red mug?", return_tensors="pt")
    assert model(**inputs).logits.shape[-1] == len(processor.tokenizer)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_muon_is_torchs_but_for_bfloat16(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = (
        Muon([ours], lr=0.01, weight_decay=0.02),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - start).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
