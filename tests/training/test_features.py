"""Features of frozen towers, kept on disk: training with them is training without them."""

import logging
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from deris_llm.cli.main import main
from deris_llm.config import RunConfig, load_config
from deris_llm.data import collate
from deris_llm.data.dataset import group_by_image
from deris_llm.data.errors import DataError
from deris_llm.data.loaders import train_loader
from deris_llm.data.mix import training_mix
from deris_llm.losses.criterion import build_criterion
from deris_llm.models.cognition import build_processor
from deris_llm.models.cognition.base import say_once
from deris_llm.models.deris import build_model
from deris_llm.testing import tiny_beit3, tiny_bert_weights
from deris_llm.training.features import compute_features, feature_cache, training_features, training_pictures
from deris_llm.training.run import train

# Measured: bit-equal where as many pictures were computed together as are in a batch, else 3e-7.
SAME = {"rtol": 1e-5, "atol": 1e-6}


def config_with(run_overrides: list[str], folder: Path, *more: str) -> RunConfig:
    return load_config("tiny-refcoco", [*run_overrides, f"data.feature_cache={folder}", *more])


def parts(config: RunConfig):
    torch.manual_seed(0)
    return build_model(config), build_processor(config), group_by_image(training_mix(config.data).records)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/??/*"))


@pytest.fixture(scope="module")
def kept(run_overrides, tmp_path_factory) -> Path:
    """Features of the pictures of `run_overrides`, one picture at a time as its batches have them."""
    folder = tmp_path_factory.mktemp("features")
    made = compute_features(config_with(run_overrides, folder, "evaluation.images_per_device=1"))
    assert made.num_computed == made.num_pictures == made.num_files == len(files(folder)) > 3
    return folder


def loss_and_gradients(model, config, batch):
    model.train().zero_grad()
    torch.manual_seed(0)  # of a trained backbone's drop path
    assert batch.targets is not None
    loss = build_criterion(config)(model(batch), batch.targets, generator=torch.Generator().manual_seed(0)).total
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("run", ["qwen2_ov", "beit3", "cognition_centric", "trained backbone"])
def test_losses_and_gradients_are_those_of_pictures(run_overrides, tmp_path, run, workers):
    more = {
        "qwen2_ov": [],
        "beit3": tiny_beit3(tmp_path),
        "cognition_centric": ["loopback.structure=cognition_centric"],
        "trained backbone": ["perception.freeze_backbone=false"],
    }[run]
    more += ["training.images_per_device=3", f"data.num_workers={workers}"]
    config = config_with(run_overrides, tmp_path / "features", *more)
    compute_features(config)
    model, processor, groups = parts(config)
    features = training_features(config, model, processor, groups)
    expected = next(iter(train_loader(config, groups, processor)))
    batch = next(iter(train_loader(config, groups, processor, features=features)))
    assert batch.phrase_ids == expected.phrase_ids
    assert all(level.dtype == torch.bfloat16 for level in batch.to(dtype=torch.bfloat16).perception_pyramid)
    assert bool(batch.perception_pyramid) == (run in ("qwen2_ov", "beit3"))
    assert (batch.cognition.vision_feats is None) == (run == "beit3")
    assert bool(batch.perception_image.numel()) == (run == "trained backbone")
    assert bool(batch.cognition.pixel_values.numel()) == (run == "beit3")
    loss, gradients = loss_and_gradients(model, config, expected)
    found_loss, found = loss_and_gradients(model, config, batch)
    torch.testing.assert_close(found_loss, loss, **SAME)
    torch.testing.assert_close(found, gradients, **SAME)


def test_training_ends_at_the_same_weights(run_overrides, kept, tmp_path, monkeypatch):
    """No picture that is trained on is decoded; a run may go on with or without the cache."""
    short = ["training.max_steps=2", "training.save_every=1"]
    plain = train(load_config("tiny-refcoco", [*run_overrides, *short]), output=tmp_path / "plain")
    decoded, load_image = [], collate.load_image
    monkeypatch.setattr(collate, "load_image", lambda path, **rest: decoded.append(path) or load_image(path, **rest))
    config = config_with(run_overrides, kept, *short)
    cached = train(config, output=tmp_path / "cached")
    trained_on = {picture.path for picture in training_pictures(parts(config)[2])}
    assert decoded
    assert not trained_on & set(decoded)
    expected = safetensors.torch.load_file(plain.checkpoint / "trainable.safetensors")
    found = safetensors.torch.load_file(cached.checkpoint / "trainable.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    shutil.rmtree(plain.checkpoint)
    resumed = train(config, output=tmp_path / "plain")
    found = safetensors.torch.load_file(resumed.checkpoint / "trainable.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_command_computes_what_is_missing(run_overrides, kept, tmp_path, capsys):
    shutil.copytree(kept, tmp_path / "kept")
    lost, *others = files(tmp_path / "kept")
    before = {path: path.stat().st_mtime_ns for path in others}
    content = lost.read_bytes()
    lost.unlink()
    words = ["--config", "tiny-refcoco", "--set", *run_overrides, f"data.feature_cache={tmp_path / 'kept'}"]
    assert main(["data", "features", *words]) == 0
    assert f"{len(others) + 1} pictures of tiny-refcoco, 1 computed in " in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in others} == before
    assert len(lost.read_bytes()) == len(content)
    assert main(["data", "features", "--config", "tiny-refcoco", "--set", *run_overrides]) == 2
    assert "add --set data.feature_cache=DIR" in capsys.readouterr().err


def test_a_copied_data_set_has_its_features_a_changed_picture_has_not(run_overrides, kept, tmp_path):
    config = config_with(run_overrides, kept)
    shutil.copytree(config.data.root, tmp_path / "moved")
    config = config_with(run_overrides, kept, f"data.root={tmp_path / 'moved'}")
    model, processor, groups = parts(config)
    features = training_features(config, model, processor, groups)
    assert features is not None
    picture = next(training_pictures(groups))
    assert features.read([picture]).vision.shape == (1, 16, 32)
    with Image.open(picture.path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture.path)
    with pytest.raises(
        DataError, match=r"1 of \d+ have none .*\n  - .*moved.*needed by refcoco/train/.*\nRun `deris-llm"
    ):
        training_features(config, model, processor, groups)
    loader = train_loader(config, groups, processor, features=features)  # the picture is changed while it is trained on
    with pytest.raises(DataError, match=r"1 of 1 have none"):
        list(loader)


def test_other_weights_and_options_are_another_fingerprint(run_overrides, kept):
    config = config_with(run_overrides, kept)
    model, processor, groups = parts(config)
    folder = feature_cache(config, model, processor).folder
    assert folder.parent == kept
    assert folder.is_dir()
    with torch.no_grad():
        next(model.loopback.parameters()).add_(1)
    assert feature_cache(config, model, processor).folder == folder
    for tower in (model.perception.backbone, model.cognition.model.vision_tower):
        weight = next(tower.parameters())
        with torch.no_grad():
            before = weight.flatten()[0].clone()
            weight.view(-1)[0] = before + 1e-3
            assert feature_cache(config, model, processor).folder != folder
            weight.view(-1)[0] = before
    for change, said in {
        "perception.image_size=96": "perception pictures: 64 px, antialias there, 96 px, antialias now",
        "perception.resize=opencv": "perception pictures: 64 px, antialias there, 64 px, opencv now",
        "training.precision=bf16": "precision: fp32 there, bf16 now",
    }.items():
        with pytest.raises(DataError, match=rf"got features of others\n  - {folder}: {said}\nrun `deris-llm data"):
            training_features(config_with(run_overrides, kept, change), model, processor, groups)


def test_no_features_at_all(run_overrides, tmp_path):
    config = config_with(run_overrides, tmp_path / "none")
    with pytest.raises(DataError, match=r"with features of this run's towers, got none; run `deris-llm data features`"):
        training_features(config, *parts(config))


def test_nothing_is_frozen(run_overrides, tmp_path, caplog):
    frozen = config_with(run_overrides, tmp_path, *tiny_bert_weights(tmp_path / "bert"))
    say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        feature_cache(frozen, *parts(frozen)[:2])
        feature_cache(frozen, *parts(frozen)[:2])
    assert caplog.text.count("keeps the backbone's pyramid alone: cognition.backend=bert has no frozen tower") == 1
    config = config_with(
        run_overrides, tmp_path, *tiny_bert_weights(tmp_path / "bert"), "perception.freeze_backbone=false"
    )
    with pytest.raises(ValueError, match=r"expected a frozen tower whose features can be kept, got none.*leave data"):
        compute_features(config)


def test_features_have_the_precision_of_the_run(run_overrides, tmp_path):
    compute_features(config_with(run_overrides, tmp_path, "training.precision=bf16"))
    tensors = safetensors.torch.load_file(files(tmp_path)[0])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_room_is_looked_for(run_overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 50_000))
    with pytest.raises(ValueError, match=r"expected room for the features of \d+ pictures, 0.0 GB, got 0.0 GB free"):
        compute_features(config_with(run_overrides, tmp_path))
