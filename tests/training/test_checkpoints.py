import dataclasses
import hashlib
import json
import os
import resource
import shutil

import pytest
import safetensors.torch
import torch
from PIL import Image

from deris_llm.checkpoints import layout as checkpoint_folders
from deris_llm.checkpoints.fingerprints import (
    base_fingerprints,
    file_digest,
    recorded_base_checkpoint,
    weights_fingerprint,
)
from deris_llm.checkpoints.layout import CheckpointError
from deris_llm.checkpoints.load import checkpoint_config, load_checkpoint
from deris_llm.checkpoints.same_run import check_same_run
from deris_llm.checkpoints.save import save_weights
from deris_llm.cli.main import main
from deris_llm.common.folders import FolderError, finish_replacements, written_aside
from deris_llm.data.mix import training_mix
from deris_llm.models.deris import build_model
from deris_llm.testing import synthetic_batch, tiny_config
from deris_llm.training.data_manifest import data_manifest, write_data_manifest


@pytest.fixture(scope="module")
def config(run_overrides):
    return tiny_config(*run_overrides)


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(1)
    return build_model(config).eval()


@pytest.fixture(scope="module")
def saved(config, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "best"
    save_weights(folder, model, config, {"mIoU": 12.5})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """For tests that change files on purpose: without hashes."""
    return shutil.copytree(saved, tmp_path / "best", ignore=shutil.ignore_patterns("checksums.json"))


def test_loading_gives_config_and_the_same_model(saved, config, model):
    loaded_config, loaded = load_checkpoint(saved)
    assert loaded_config == config
    batch = synthetic_batch(config)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).final.mask_logits, model(batch).final.mask_logits, rtol=0, atol=0)
    assert not loaded.training


def test_only_trainables_are_saved(saved, model):
    names = set(safetensors.torch.load_file(saved / "trainable.safetensors"))
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    assert json.loads((saved / "metrics.json").read_text()) == {"mIoU": 12.5}


def test_other_parameter_names_are_refused(copy):
    tensors = safetensors.torch.load_file(copy / "trainable.safetensors")
    tensors["loopback.somebody_elses.weight"] = tensors.pop("loopback.presence_head.weight")
    tensors["loopback.referring_head.bias"] = torch.zeros(7)
    safetensors.torch.save_file(tensors, copy / "trainable.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy)
    assert "missing in the file: loopback.presence_head.weight" in str(caught.value)
    assert "not trainable here: loopback.somebody_elses.weight" in str(caught.value)
    assert "loopback.referring_head.bias: shape (7,) in the file, (1,) here" in str(caught.value)


def test_at_most_ten_names_are_listed(copy):
    safetensors.torch.save_file({"x": torch.zeros(1)}, copy / "trainable.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy)
    assert str(caught.value).count("missing in the file") == 10


def test_other_base_weights_are_refused_with_both_fingerprints(copy, config):
    prints = json.loads((copy / "base_weights.json").read_text())
    prints["perception"]["files"]["model.safetensors"] = "0" * 64
    (copy / "base_weights.json").write_text(json.dumps(prints))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy)
    ours = base_fingerprints(config)["perception"]
    assert (
        f"expected the base weights it was trained on (base_weights.json), got other files for perception: {ours['weights']} has "
        f"fingerprint {ours['files']['model.safetensors'][:12]}, it was trained on {ours['weights']} with {'0' * 12}."
    ) in str(caught.value)


def test_base_weights_may_lie_elsewhere(copy, config, tmp_path):
    moved = shutil.copytree(config.cognition.weights, tmp_path / "moved")
    loaded_config, _ = load_checkpoint(copy, overrides=[f"cognition.weights={moved}"])
    assert loaded_config.cognition.weights == str(moved)


def test_a_fingerprint_of_several_files_does_not_depend_on_their_order():
    files = {"b.safetensors": "1" * 64, "a.safetensors": "2" * 64}
    together = weights_fingerprint(files)
    assert together == weights_fingerprint(dict(sorted(files.items())))
    assert len(together) == 12
    assert together != weights_fingerprint({"a.safetensors": "2" * 64})


def test_the_protocols_of_the_run_lie_beside_the_weights(saved):
    protocols = json.loads((saved / "protocol.json").read_text())
    assert [protocol["id"] for protocol in protocols] == ["original", "deris"]
    assert protocols[0]["score_threshold"] == 0.9
    assert len(protocols[0]["fingerprint"]) == 8


def test_what_a_run_is_trained_on_travels_with_its_checkpoints(config, model, tmp_path):
    mix = training_mix(config.data)
    write_data_manifest(tmp_path, data_manifest(config.data, mix))
    save_weights(tmp_path / "best", model, config, {})
    text = (tmp_path / "best" / "data.json").read_text()
    assert config.data.root not in text
    found = json.loads(text)
    assert found["num_phrases"] == len(mix.records)
    assert found["datasets"]["refcoco"]["num_images"] == len({record.image_id for record in mix.records})
    assert len(found["datasets"]["refcoco"]["sha256"]) == 64
    assert data_manifest(config.data, training_mix(config.data)) == found
    fewer = dataclasses.replace(mix, records=mix.records[1:])
    other = data_manifest(config.data, fewer)
    assert other["datasets"]["refcoco"]["sha256"] != found["datasets"]["refcoco"]["sha256"]


def test_a_prepared_set_is_named_by_its_manifest(run_overrides, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (40, 30)).save(pictures / "a.png")
    line = {"image": "a.png", "phrase": "ring", "polygons": [[1, 1, 20, 1, 20, 20]], "split": "train"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line) + "\n")
    root = tmp_path / "root"
    command = ["data", "prepare", "--format", "jsonl", "--source", str(tmp_path / "mine.jsonl")]
    assert main([*command, "--images", str(pictures), "--out", str(root / "mine")]) == 0
    config = tiny_config(*run_overrides, f"data.root={root}", "data.train=[mine]", "data.eval=[]").data
    found = data_manifest(config, training_mix(config))["datasets"]["mine"]
    assert (found["num_phrases"], found["sha256_of"]) == (1, "manifest.json")
    assert found["sha256"] == hashlib.sha256((root / "mine" / "manifest.json").read_bytes()).hexdigest()


def test_a_folder_that_is_no_checkpoint_says_where_one_is(tmp_path, copy):
    shutil.copytree(copy, tmp_path / "run" / "checkpoint-7")
    with pytest.raises(CheckpointError, match=r"did you mean .*checkpoint-7\?"):
        load_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"got no config\.yaml, trainable\.safetensors, base_weights\.json"):
        load_checkpoint(tmp_path / "nothing")


def test_fingerprint_changes_with_one_changed_weight(tmp_path):
    tensor = torch.zeros(1 << 22)
    safetensors.torch.save_file({"w": tensor}, tmp_path / "a.safetensors")
    safetensors.torch.save_file({"w": tensor + 1e-3}, tmp_path / "b.safetensors")
    a, again, b = (file_digest(tmp_path / f"{name}.safetensors") for name in ("a", "a", "b"))
    assert a == again != b


def test_an_error_while_saving_leaves_the_old_folder_whole(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.yaml").write_text("old")

    def interrupted():
        with written_aside(tmp_path / "best") as partial:
            (partial / "config.yaml").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "config.yaml").read_text() == "old"


def test_a_kill_while_saving_leaves_the_old_folder_and_its_remains_are_removed(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    child = os.fork()
    if child == 0:
        with written_aside(tmp_path / "checkpoint-4") as partial:
            (partial / "config.yaml").write_text("half")
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".partial-checkpoint-4", "checkpoint-2"]
    assert checkpoint_folders.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    finish_replacements(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_replacing_keeps_only_the_new(tmp_path):
    for text in ("old", "new"):
        with written_aside(tmp_path / "best") as partial:
            (partial / text).write_text(text)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["new"]


def test_disk_full_is_a_clear_error_and_keeps_what_was_there(copy, config, model):
    before = (copy / "trainable.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond this: the disk is "full"
    try:
        with pytest.raises(
            FolderError, match=r"expected to write this folder, got .*checkpoints are intact\. Make room"
        ):
            save_weights(copy, model, config, {})
        with pytest.raises(FolderError):
            save_weights(copy.parent / "checkpoint-9", model, config, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (copy / "trainable.safetensors").read_bytes() == before
    assert [p.name for p in copy.parent.iterdir()] == ["best"]


def test_newest_are_kept_by_number_not_by_name(tmp_path):
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    checkpoint_folders.keep_newest(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "checkpoint-10", "checkpoint-9", "checkpoint-old"]


def test_another_config_is_refused_with_the_fields(saved, run_overrides):
    other = tiny_config(
        *run_overrides, "training.seed=7", "loopback.rounds=2", "training.log_every=3", "data.num_workers=1"
    )
    with pytest.raises(CheckpointError) as caught:
        check_same_run(saved, other)
    assert "2 fields differ" in str(caught.value)
    assert "loopback.rounds: 3 there, 2 now" in str(caught.value)
    assert "training.seed: 42 there, 7 now" in str(caught.value)


def test_a_checkpoint_cannot_name_code_to_import(copy):
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("backend: qwen2_ov", "backend: antigravity:Class"))
    with pytest.raises(ValueError, match=r"got the module path 'antigravity:Class', which could run any code"):
        load_checkpoint(copy)


def test_a_checkpoint_cannot_ask_for_downloaded_kernels(copy, config):
    asking = dataclasses.replace(
        config, perception=dataclasses.replace(config.perception, deformable_attention="hub_kernel")
    )
    save_weights(copy, build_model(config), asking, {})
    assert "hub_kernel" in (copy / checkpoint_folders.CONFIG_FILE).read_text()
    assert checkpoint_config(copy).perception.deformable_attention == "grid_sample"
    asked = checkpoint_config(copy, ["perception.deformable_attention=hub_kernel"])
    assert asked.perception.deformable_attention == "hub_kernel"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "[]",
            r"base_weights.json: expected a JSON file of a checkpoint, got 2 bytes that are not JSON \(expected an object, got \[\]\)",
        ),
        (
            '{"base_checkpoint": "elsewhere"}',
            "expected an object with the base weights of base_checkpoint, got 'elsewhere'",
        ),
    ],
)
def test_base_weights_of_another_form_are_named(tmp_path, content, says):
    (tmp_path / "base_weights.json").write_text(content)
    with pytest.raises(CheckpointError, match=says):
        recorded_base_checkpoint(tmp_path)
