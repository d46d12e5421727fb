"""Checkpoints that hold every tensor, and runs that start from the weights of another checkpoint."""

import json
import logging
import resource
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sentencepiece import SentencePieceTrainer

from deris_llm.checkpoints import fingerprints
from deris_llm.checkpoints.fingerprints import base_checkpoint, base_fingerprints
from deris_llm.checkpoints.layout import CheckpointError
from deris_llm.checkpoints.load import checkpoint_config, load_checkpoint, restore_first_weights
from deris_llm.checkpoints.save import save_full_checkpoint, save_weights
from deris_llm.cli.main import main
from deris_llm.common.folders import FolderError, written_aside
from deris_llm.config import Beit3Cognition, RunConfig, load_config, save_config
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import build_model
from deris_llm.testing import synthetic_batch, synthetic_images, tiny_config
from deris_llm.training.run import train


@pytest.fixture(scope="module")
def overrides(run_overrides, tmp_path_factory):
    """The tiny run, whose base weights this module may take away."""
    folder = tmp_path_factory.mktemp("base")
    changed = []
    for text in run_overrides:
        key, _, value = text.partition("=")
        if key in ("cognition.weights", "perception.weights"):
            value = shutil.copytree(value, folder / Path(value).name)
        changed.append(f"{key}={value}")
    return [*changed, "training.max_steps=2", "training.save_every=1"]


@pytest.fixture(scope="module")
def config(overrides):
    return tiny_config(*overrides)


@pytest.fixture(scope="module")
def model(config):
    """Every tensor moved away from its base weights, buffers too."""
    torch.manual_seed(5)
    model = build_model(config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.randn_like(tensor))
    return model


@pytest.fixture(scope="module")
def full(config, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "released"
    spm = folder.parent / "somewhere.spm"
    spm.write_bytes(b"a sentencepiece model")
    save_full_checkpoint(folder, model, config, {"beit3.spm": spm})
    return folder


@pytest.fixture
def copy(full, tmp_path):
    """For tests that change files on purpose: without hashes."""
    return shutil.copytree(full, tmp_path / "copy", ignore=shutil.ignore_patterns("checksums.json"))


@pytest.fixture(scope="module")
def started(full, overrides, tmp_path_factory):
    """A run of two steps from the full checkpoint's weights."""
    return train(
        load_config("tiny-refcoco", [*overrides, f"training.start_from={full}"]),
        output=tmp_path_factory.mktemp("started") / "run",
    )


def same_state(model, reference, *, but_for=lambda name: False):
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours if not but_for(name))


def test_a_full_checkpoint_needs_no_base_weights(full, config, model, monkeypatch):
    monkeypatch.setattr(fingerprints, "_fingerprint", None)
    for weights in (config.cognition.weights, config.perception.weights):
        for path in Path(weights).glob("*.safetensors"):
            path.rename(path.with_suffix(".away"))
    try:
        loaded_config, loaded = load_checkpoint(full)
    finally:
        for weights in (config.cognition.weights, config.perception.weights):
            for path in Path(weights).glob("*.away"):
                path.rename(path.with_suffix(".safetensors"))
    assert loaded_config.training == config.training
    assert same_state(loaded, model)
    assert not loaded.training
    batch = synthetic_batch(config)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).final.mask_logits, model(batch).final.mask_logits, rtol=0, atol=0)


def test_what_is_in_the_folder(full, model):
    assert sorted(path.name for path in full.iterdir()) == [
        "beit3.spm",
        "checksums.json",
        "config.yaml",
        "model.safetensors",
    ]
    assert safetensors.torch.load_file(full / "model.safetensors").keys() == model.state_dict().keys()
    assert (full / "beit3.spm").read_bytes() == b"a sentencepiece model"


def test_other_names_and_shapes_are_refused(copy):
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    tensors["loopback.somebody_elses.weight"] = tensors.pop("loopback.presence_head.weight")
    tensors["loopback.referring_head.bias"] = torch.zeros(7)
    safetensors.torch.save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy)
    assert f"expected exactly the model's {len(tensors)} parameters and buffers, got 3 differences" in str(caught.value)
    assert "missing in the file: loopback.presence_head.weight" in str(caught.value)
    assert "unknown here: loopback.somebody_elses.weight" in str(caught.value)
    assert "loopback.referring_head.bias: shape (7,) in the file, (1,) here" in str(caught.value)


def test_at_most_ten_names_are_listed(copy):
    safetensors.torch.save_file({"x": torch.zeros(1)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy)
    assert str(caught.value).count("missing in the file") == 10


def test_a_broken_file_is_a_clear_error(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a safetensors file, got "):
        load_checkpoint(copy)


def test_disk_full_is_a_clear_error_and_leaves_the_old_folder_whole(copy, config, model):
    before = (copy / "model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond this: the disk is "full"
    try:
        with pytest.raises(FolderError, match=r"expected to write this folder, got .*Make room"):
            save_full_checkpoint(copy, model, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (copy / "model.safetensors").read_bytes() == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_the_tokenizer_in_the_folder_wins_but_not_over_the_command_line(tmp_path):
    folder, run = tmp_path / "full", tmp_path / "run" / "best"
    for each in (folder, run):
        each.mkdir(parents=True)
        save_config(load_config("deris-b-refcoco"), each / "config.yaml")
    (folder / "beit3.spm").write_bytes(b"a sentencepiece model")
    (folder / "model.safetensors").write_bytes(safetensors.torch.save({}))  # not read here
    (run / "base_weights.json").write_text(json.dumps({"checkpoint": {"weights": str(folder), "files": {}}}))
    for each in (folder, run):  # the checkpoint itself, and a run that started from it
        assert _tokenizer(checkpoint_config(each)) == str(folder / "beit3.spm")
        assert _tokenizer(checkpoint_config(each, ["cognition.tokenizer=mine.spm"])) == "mine.spm"
    (folder / "beit3.spm").unlink()
    assert _tokenizer(checkpoint_config(folder)) == ""


def _tokenizer(config: RunConfig) -> str:
    assert isinstance(config.cognition, Beit3Cognition)
    return config.cognition.tokenizer


def test_eval_reads_a_full_checkpoint(full, tmp_path):
    options = ["--splits", "refcoco/val", "--gpus", "1", "--max-images", "2", "--output", str(tmp_path / "eval")]
    assert main(["eval", "--checkpoint", str(full), *options]) == 0
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert report["splits"]["refcoco/val"]["original"]["n_images"] == 2


def test_settings_of_eval_reach_the_model(full, tmp_path, capsys):
    command = [
        "eval",
        "--checkpoint",
        str(full),
        "--splits",
        "refcoco/val",
        "--gpus",
        "1",
        "--output",
        str(tmp_path / "eval"),
    ]
    assert main([*command, "--set", "loopback.rounds=2"]) == 2
    assert "unknown here: loopback.cognition_rounds.3." in capsys.readouterr().err


def test_a_run_starts_from_a_full_checkpoint(full, started, model):
    config, trained = load_checkpoint(started.checkpoint)
    assert same_state(trained, model, but_for=lambda name: dict(trained.named_parameters())[name].requires_grad)
    assert not same_state(trained, model)
    assert config.training.start_from == str(full)
    recorded = json.loads((started.checkpoint / "base_weights.json").read_text())
    assert {part: entry["weights"] for part, entry in recorded.items()} == {"checkpoint": str(full)}
    assert not (started.checkpoint / "model.safetensors").exists()
    data = [(folder / "data.json").read_text() for folder in (started.output, started.checkpoint, started.best)]
    assert data[0] == data[1] == data[2]
    assert json.loads(data[0])["datasets"].keys() == {"refcoco"}


def test_before_its_first_step_it_is_the_checkpoint(full, overrides, model):
    config = tiny_config(*overrides, f"training.start_from={full}")
    fresh = build_model(config, weights=False)
    restore_first_weights(fresh, config)
    assert same_state(fresh, model)


def test_resuming_such_a_run_is_going_straight_on(started, full, overrides, tmp_path):
    shutil.copytree(started.output / "checkpoint-1", tmp_path / "checkpoint-1")
    config = load_config("tiny-refcoco", [*overrides, f"training.start_from={full}"])
    resumed = train(config, output=tmp_path)
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        ours, theirs = (safetensors.torch.load_file(run.checkpoint / name) for run in (resumed, started))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_run_that_starts_from_it_stands_on_the_same_base(full, started, overrides, tmp_path):
    shutil.copytree(started.best, tmp_path / "first" / "best")
    second = train(
        load_config("tiny-refcoco", [*overrides, f"training.start_from={tmp_path / 'first' / 'best'}"]),
        output=tmp_path / "second",
    )
    shutil.rmtree(tmp_path / "first")  # what it trained is all in the second run's checkpoint
    recorded = json.loads((second.checkpoint / "base_weights.json").read_text())
    assert recorded == json.loads((started.checkpoint / "base_weights.json").read_text())
    _, trained = load_checkpoint(second.checkpoint)
    _, reference = load_checkpoint(started.checkpoint)
    assert same_state(trained, reference, but_for=lambda name: dict(trained.named_parameters())[name].requires_grad)


def test_a_base_that_is_gone_or_another_one_is_refused(full, started, tmp_path):
    without_hashes = shutil.ignore_patterns("checksums.json")
    checkpoint = shutil.copytree(started.checkpoint, tmp_path / "checkpoint-2", ignore=without_hashes)
    moved = shutil.copytree(full, tmp_path / "moved", ignore=without_hashes)
    recorded = json.loads((checkpoint / "base_weights.json").read_text())
    recorded["checkpoint"]["weights"] = str(tmp_path / "nowhere")
    (checkpoint / "base_weights.json").write_text(json.dumps(recorded))
    with pytest.raises(CheckpointError, match=r"expected the full checkpoint it was trained on at .*nowhere"):
        load_checkpoint(checkpoint)
    recorded["checkpoint"]["weights"] = str(moved)
    (checkpoint / "base_weights.json").write_text(json.dumps(recorded))
    assert same_state(load_checkpoint(checkpoint)[1], load_checkpoint(started.checkpoint)[1])
    tensors = safetensors.torch.load_file(moved / "model.safetensors")
    safetensors.torch.save_file({name: tensor * 2 for name, tensor in tensors.items()}, moved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"got other files for checkpoint: .*moved"):
        load_checkpoint(checkpoint)


def test_a_damaged_base_is_named(full, started, tmp_path):
    checkpoint = shutil.copytree(
        started.checkpoint, tmp_path / "checkpoint-2", ignore=shutil.ignore_patterns("checksums.json")
    )
    moved = shutil.copytree(full, tmp_path / "moved")
    recorded = json.loads((checkpoint / "base_weights.json").read_text())
    recorded["checkpoint"]["weights"] = str(moved)
    (checkpoint / "base_weights.json").write_text(json.dumps(recorded))
    with (moved / "model.safetensors").open("r+b") as file:
        file.seek((moved / "model.safetensors").stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(
        CheckpointError, match=r"which builds on .*moved: .* got model\.safetensors with changed content"
    ):
        load_checkpoint(checkpoint)


def test_starting_from_a_run_on_hub_weights(config, overrides, tmp_path):
    torch.manual_seed(8)
    first = build_model(config)
    save_weights(tmp_path / "best", first, config, {})
    start = tiny_config(*overrides, f"training.start_from={tmp_path / 'best'}")
    assert base_checkpoint(start) is None
    assert base_fingerprints(start) == base_fingerprints(config)
    second = build_model(start)
    assert not same_state(second, first)
    restore_first_weights(second, start)
    assert same_state(second, first)


def test_starting_from_a_run_on_other_hub_weights_is_refused(config, model, overrides, tmp_path):
    save_weights(tmp_path / "best", model, config, {})
    recorded = json.loads((tmp_path / "best" / "base_weights.json").read_text())
    recorded["cognition"]["files"]["model.safetensors"] = "0" * 64
    (tmp_path / "best" / "base_weights.json").write_text(json.dumps(recorded))
    (tmp_path / "best" / "checksums.json").unlink()
    start = tiny_config(*overrides, f"training.start_from={tmp_path / 'best'}")
    with pytest.raises(CheckpointError, match=r"expected the base weights it was trained on .*cognition"):
        restore_first_weights(build_model(start), start)


def test_starting_with_another_model_names_what_differs(full, overrides):
    for change, said in (
        ("loopback.rounds=2", "unknown here: loopback.cognition_rounds.3."),
        ("loopback.num_queries=3", "loopback.initial_queries.weight: shape (5, 32) in the file, (3, 32) here"),
    ):
        config = tiny_config(*overrides, f"training.start_from={full}", change)
        with pytest.raises(CheckpointError) as caught:
            restore_first_weights(build_model(config, weights=False), config)
        assert said in str(caught.value)


def test_starting_with_another_reading_of_the_weights_is_said(full, overrides, caplog):
    config = tiny_config(*overrides, f"training.start_from={full}", "cognition.text_features=last")
    model = build_model(config, weights=False)
    with caplog.at_level(logging.WARNING):
        restore_first_weights(model, config)
    said = [record.getMessage() for record in caplog.records if "start_from" in record.getMessage()]
    assert len(said) == 1
    assert said[0].endswith("cognition.text_features: 'phrase_and_after' there, 'last' now")


def test_a_start_that_is_no_checkpoint_is_refused_before_anything_is_loaded(overrides, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    config = load_config("tiny-refcoco", [*overrides, f"training.start_from={tmp_path}"])
    with pytest.raises(CheckpointError, match=r"training\.start_from=.*did you mean .*checkpoint-3\?"):
        train(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_beit3_from_a_full_checkpoint_reads_only_that_folder(tmp_path, monkeypatch):
    """The weights it was converted from are nowhere; their architecture is known by name."""
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the red circle on the left\na small blue square\nsecond green ring from the right\n" * 20)
    SentencePieceTrainer.train(  # type: ignore[attr-defined]
        input=str(corpus), model_prefix=str(tmp_path / "tiny"), vocab_size=25, minloglevel=2
    )
    folder = tmp_path / "deris-b"
    with written_aside(folder) as partial:
        save_config(load_config("deris-b-refcoco"), partial / "config.yaml")
        shutil.copyfile(tmp_path / "tiny.model", partial / "beit3.spm")
        (partial / "model.safetensors").write_bytes(safetensors.torch.save({}))  # not read here
    config = checkpoint_config(folder)
    assert not Path(config.cognition.weights).exists()
    inputs = build_processor(config)(synthetic_images(1), ["the red circle"], [0])
    assert inputs.pixel_values.shape == (1, 3, 224, 224)
