"""Phrases of scenes for the tiny BEiT-3, and a very short pre-training, interrupted and continued."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deris_llm.models.cognition import build_processor as build_run_processor
from deris_llm.models.cognition.beit3 import Beit3
from deris_llm.testing import check_cognition_backend, tiny_config
from scripts.pretrain_tiny import beit3
from scripts.pretrain_tiny.beit3 import (
    NUM_CELLS,
    Beit3Heads,
    Beit3Recipe,
    PhraseData,
    build_model,
    build_phrase_bank,
    build_processor,
    build_tokenizer,
    draw_phrases,
    phrase_batch,
    pointing_target,
    pretrain_beit3,
    referent_logits,
    tokenizer_corpus,
)
from scripts.pretrain_tiny.cognition import max_objects_of, scene_labels
from scripts.pretrain_tiny.pool import ScenePool, write_pool
from scripts.pretrain_tiny.questions import scene_geometry

RECIPE = Beit3Recipe(
    vision_steps=2, phrase_steps=3, vision_batch=2, phrase_batch=2, phrases_per_image=3, warmup_steps=1
)


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    write_pool(folder / "train", num_scenes=6, seed=5, workers=1)
    write_pool(folder / "held_out", num_scenes=3, seed=5, workers=1, first_index=1000)
    return folder


@pytest.fixture(scope="module")
def data(pools: Path) -> PhraseData:
    pool = ScenePool(pools / "train")
    geometry = scene_geometry(pool.instance_ids, max_objects=max_objects_of(pool))
    processor = build_processor(build_tokenizer(tokenizer_corpus(pool)))
    bank = build_phrase_bank(pool.records, geometry, processor)
    return PhraseData(pool.images_120, geometry, scene_labels(pool, geometry), bank)


def test_phrases_are_those_of_the_pool(data: PhraseData, pools: Path):
    pool = ScenePool(pools / "train")
    processor = build_processor(build_tokenizer(tokenizer_corpus(pool)))
    bank = data.bank
    for scene, record in enumerate(pool.records):
        first, none, last = *bank.offsets[scene], bank.offsets[scene + 1, 0]
        seen = [
            one for one, pixels in zip(record["objects"], data.geometry.pixels[scene], strict=False) if pixels >= 20
        ]
        assert none - first == sum(len(phrases) for one in seen for phrases in one["phrases"].values()) > 30
        assert (bank.targets[first:none] >= 0).all()
        wanted = [processor.encode(phrase["text"]) for phrase in record["no_target"]]
        assert [bank.tokens[text] for text in bank.texts[none:last]] == wanted
        phrase = int(first) + 7
        texts = {
            phrase["text"]: phrase["family"]
            for phrases in record["objects"][bank.targets[phrase]]["phrases"].values()
            for phrase in phrases
        }
        encoded = {text: processor.encode(text) for text in texts}
        assert bank.family_names[bank.families[phrase]] in {
            texts[text] for text, ids in encoded.items() if ids == bank.tokens[bank.texts[phrase]]
        }


def test_some_drawn_phrases_name_nothing(data: PhraseData):
    rng = np.random.default_rng(0)
    drawn = draw_phrases(data.bank, 1, 2000, rng, no_target_share=0.25)
    first, last = data.bank.offsets[1, 0], data.bank.offsets[2, 0]
    assert first <= drawn.min() < drawn.max() < last
    assert 0.2 < (data.bank.targets[drawn] < 0).mean() < 0.3


def test_targets_are_the_referents_pixels(data: PhraseData, pools: Path):
    scenes, chosen = np.array([2, 4]), [data.bank.offsets[2, 0] + np.array([0, 20]), data.bank.offsets[4, 1:]]
    batch = phrase_batch(data, scenes, chosen)
    assert batch.image_index.tolist() == [0, 0, 1]
    assert batch.has_target.tolist() == [True, True, False]
    ids = ScenePool(pools / "train").instance_ids[2]
    side = (np.arange(128) + 0.5) / 128 * 10
    for row, phrase in enumerate(chosen[0]):
        target = data.bank.targets[phrase]
        slow = [
            (ids[side.astype(int) == r][:, side.astype(int) == c] == target + 1).mean()
            for r in range(10)
            for c in range(10)
        ]
        np.testing.assert_allclose(batch.coverage[row].numpy(), slow, atol=1e-6)
        assert batch.attributes[row].tolist() == data.labels.attributes[2, target].tolist()
    assert (batch.coverage[2] == 0).all()
    pointing = pointing_target(batch)
    assert torch.allclose(pointing.sum(1), torch.ones(3))
    assert pointing[2, NUM_CELLS] == 1


def test_heads_read_patches_and_class_token():
    heads = Beit3Heads(8)
    last = torch.randn(2, 1 + NUM_CELLS + 5, 8)
    pointing, covering = referent_logits(heads, last)
    assert pointing.shape == (2, NUM_CELLS + 1)
    assert covering.shape == (2, NUM_CELLS)
    assert torch.allclose(pointing[:, -1], heads.nowhere(last[:, 0])[:, 0])
    assert torch.allclose(covering[:, 3], heads.referent(last[:, 4])[:, 1])


def test_an_interrupted_pre_training_continues_to_the_same_weights(
    pools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = pretrain_beit3(tmp_path / "whole", pools, RECIPE, evaluate_seconds=1000)
    losses = beit3.phrase_losses

    def stops(*arguments):
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return losses(*arguments)

    monkeypatch.setattr(beit3, "phrase_losses", stops)
    with pytest.raises(KeyboardInterrupt):
        pretrain_beit3(tmp_path / "parts", pools, RECIPE, evaluate_seconds=0)
    monkeypatch.setattr(beit3, "phrase_losses", losses)
    with pytest.raises(ValueError, match="expected the unfinished run in .* to have the recipe"):
        pretrain_beit3(tmp_path / "parts", pools, replace(RECIPE, phrase_rate=1e-3))
    pretrain_beit3(tmp_path / "parts", pools, RECIPE, evaluate_seconds=1000, command="again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text()) == whole
    assert whole["step"] == 5
    assert 0 <= whole["final"]["grounding"] <= 1
    assert "Made by `again`" in (tmp_path / "parts" / "README.md").read_text()
    assert not list(tmp_path.glob("*.state"))

    config = tiny_config("cognition.backend=beit3", f"cognition.weights={tmp_path / 'whole'}", "cognition.tuning=full")
    backend = Beit3.build(config.cognition, weights=True, dtype=torch.float32)
    check_cognition_backend(backend, build_run_processor(config), tolerance=1e-4)


def test_the_shipped_size(pools: Path):
    tokenizer = build_tokenizer(tokenizer_corpus(ScenePool(pools / "train")))
    assert sum(parameter.numel() for parameter in build_model(tokenizer).parameters()) == pytest.approx(3.7e6, rel=0.02)
