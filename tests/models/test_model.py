"""The whole model on tiny random weights. `UPDATE_GOLDEN=1 pytest tests/models/test_model.py -k golden` rewrites the goldens."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from deris_llm.config import RunConfig, load_config
from deris_llm.losses.criterion import build_criterion
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import Deris, build_model, trainable_names
from deris_llm.structures import DerisOutput, ReferringBatch, ReferringTargets
from deris_llm.testing import relative_difference, synthetic_batch, synthetic_images, tiny_config, tiny_weights
from tests.models.padded_rows import with_more_padding

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def config(overrides: list[str]) -> RunConfig:
    return tiny_config(*overrides)


@pytest.fixture(scope="module")
def model(config: RunConfig) -> Deris:
    return built(config).eval()


@pytest.fixture(scope="module")
def batch(config: RunConfig) -> ReferringBatch:
    return synthetic_batch(config, num_images=2, phrases_per_image=2)


def built(config: RunConfig) -> Deris:
    torch.manual_seed(0)
    model = build_model(config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def part(config: RunConfig, batch: ReferringBatch, images: list[int], phrases: list[int]) -> ReferringBatch:
    """A batch of these images (repeats allowed, one per entry) and these phrases, prepared anew."""
    pictures = synthetic_images(batch.perception_image.shape[0])
    texts = [batch.phrases[phrase] for phrase in phrases]
    index = (
        list(range(len(images)))
        if len(images) == len(phrases)
        else [images.index(int(batch.image_index[p])) for p in phrases]
    )
    return replace(
        batch,
        perception_image=batch.perception_image[images],
        cognition=build_processor(config)([pictures[image] for image in images], texts, index),
        image_index=torch.tensor(index),
        phrases_per_image=tuple(index.count(image) for image in range(len(images))),
        phrase_ids=tuple(batch.phrase_ids[phrase] for phrase in phrases),
        phrases=tuple(texts),
        targets=None,
    )


def difference(ours: DerisOutput, reference: DerisOutput, mine: int | slice, theirs: int | slice) -> float:
    pairs = [(ours.presence_logit[mine], reference.presence_logit[theirs])]
    for a, b in zip(ours.rounds, reference.rounds, strict=True):
        pairs += [(a.mask_logits[mine], b.mask_logits[theirs]), (a.referring_logits[mine], b.referring_logits[theirs])]
    return max(relative_difference(a, b) for a, b in pairs)


def test_phrases_in_a_batch_are_as_one_by_one(config: RunConfig, model: Deris, batch: ReferringBatch):
    with torch.no_grad():
        together = model(batch)
        for phrase in range(batch.num_phrases):
            alone = model(part(config, batch, [int(batch.image_index[phrase])], [phrase]))
            assert difference(alone, together, 0, phrase) < 1e-4  # measured 1.1e-6


def test_shared_images_are_as_repeated_ones(config: RunConfig, model: Deris, batch: ReferringBatch):
    with torch.no_grad():
        shared = model(batch)
        repeated = model(part(config, batch, [0, 0, 1, 1], [0, 1, 2, 3]))
    everything = slice(None)
    assert difference(repeated, shared, everything, everything) < 1e-4  # measured 1.1e-6


def test_perception_runs_once_per_image(model: Deris, batch: ReferringBatch):
    seen: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
        for module in (model.perception.backbone, model.cognition.model.vision_tower)
    ]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    assert seen == [2, 2]
    assert batch.num_phrases == 4


def test_longer_padding_changes_nothing(model: Deris, batch: ReferringBatch):
    padded = replace(batch, cognition=with_more_padding(batch.cognition, 9))
    with torch.no_grad():
        assert difference(model(padded), model(batch), slice(None), slice(None)) < 1e-4


@pytest.mark.parametrize("targets_per_phrase", [1, 0], ids=["targets", "no_target"])
def test_every_trainable_parameter_gets_a_finite_gradient_and_no_other(config: RunConfig, targets_per_phrase: int):
    model = built(config).train()
    batch = synthetic_batch(config, targets_per_phrase=targets_per_phrase)
    generator = torch.Generator().manual_seed(0)
    build_criterion(config)(model(batch), batch.targets, generator=generator).total.backward()
    trainable = set(trainable_names(model))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trainable), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_an_unfrozen_backbone_gets_gradients(overrides: list[str]):
    config = tiny_config(*overrides, "perception.freeze_backbone=false", "cognition.lora.r=0")
    model = built(config).train()
    batch = synthetic_batch(config)
    build_criterion(config)(model(batch), batch.targets).total.backward()
    trainable = trainable_names(model)
    assert any(name.startswith("perception.backbone.") for name in trainable)
    assert not any(name.startswith("cognition.") for name in trainable)
    assert [n for n, p in model.named_parameters() if (p.grad is not None) != (n in set(trainable))] == []


def test_frozen_parts_stay_in_eval(model: Deris):
    model.train()
    for frozen in (
        model.perception.backbone,
        model.cognition.model.vision_tower,
        model.cognition.model.multi_modal_projector,
    ):
        assert not any(module.training for module in frozen.modules())
    assert model.loopback.training
    assert model.perception.pixel_decoder.training
    model.eval()
    assert not any(module.training for module in model.modules())


def test_activation_checkpointing_changes_no_gradient(overrides: list[str]):
    gradients = []
    for enabled in ("false", "true"):
        config = tiny_config(*overrides, f"cognition.gradient_checkpointing={enabled}")
        model, batch = built(config).train(), synthetic_batch(config)
        layers = model.cognition.model.language_model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [enabled == "true"] * 2
        model(batch).final.mask_logits.square().mean().backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    for plain, again in zip(*gradients, strict=True):
        assert relative_difference(again, plain) < 1e-5


def test_checkpointing_hooks_of_trainer(config: RunConfig):
    model = built(config)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False}, every_n_layers=1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in model.cognition.model.language_model.layers)
    with pytest.raises(ValueError, match="every_n_layers=1 and offload=False"):
        model.activation_checkpointing_enable(offload=True)
    assert model.config.hidden_size == 32
    assert json.loads(model.config.to_json_string())["model_type"] == "deris"


def test_bf16_runs_and_stays_close(overrides: list[str], model: Deris, batch: ReferringBatch):
    half = built(tiny_config(*overrides, "training.precision=bf16")).eval()
    half.load_state_dict(model.state_dict())
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        ours, reference = half(batch).rounds[0], model(batch).rounds[0]
    assert relative_difference(ours.mask_logits.float(), reference.mask_logits) < 0.1


def test_trained_parts_follow_a_train_step(config: RunConfig, batch: ReferringBatch):
    model = built(config).train()
    criterion = build_criterion(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = criterion(model(batch), batch.targets, generator=torch.Generator().manual_seed(0)).total
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_synthetic_batch_is_what_it_says(config: RunConfig):
    batch = synthetic_batch(config, num_images=3, phrases_per_image=2, targets_per_phrase=2)
    assert batch.image_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert isinstance(batch.targets, ReferringTargets)
    assert batch.targets.masks.shape == (12, 64, 64)
    assert batch.targets.masks.flatten(1).any(dim=1).all()
    assert batch.targets.phrase_index.tolist() == sorted([*range(6), *range(6)])


@pytest.mark.parametrize("name", ["tiny-random", "tiny-refcoco", "deris-0.5b-refcoco", "deris-7b-refcoco"])
def test_trainable_parameters_are_the_golden_ones(name: str, overrides: list[str]):
    """What trains is a tested fact: names with layer numbers as *, each with its count and its number of parameters."""
    config = tiny_config(*overrides) if name == "tiny-random" else load_config(name)
    model = build_model(config, weights=False, device="meta")
    found: dict[str, list[int]] = {}
    parameters = dict(model.named_parameters())
    for parameter_name in trainable_names(model):
        entry = found.setdefault(re.sub(r"\.\d+(?=\.)", ".*", parameter_name), [0, 0])
        entry[0] += 1
        entry[1] += parameters[parameter_name].numel()
    path = GOLDEN / f"trainable_{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        path.write_text(f"{{\n{lines}\n}}\n")
    assert found == json.loads(path.read_text())
