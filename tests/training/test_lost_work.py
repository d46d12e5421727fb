"""What a run has trained is not lost: by an evaluation that fails, a damaged checkpoint, or other data."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deris_llm.checkpoints.layout import (
    FILES_TO_RESUME,
    CheckpointError,
    check_files,
    find_checkpoint,
    newest_undamaged,
)
from deris_llm.checkpoints.load import load_checkpoint
from deris_llm.checkpoints.state import read_state
from deris_llm.cli.main import main
from deris_llm.config import load_config
from deris_llm.data.mix import training_mix
from deris_llm.data.sources import read_split
from deris_llm.data.synthetic.world import write_world
from deris_llm.training.data_manifest import data_manifest, same_data
from deris_llm.training.inputs import check_phrases
from deris_llm.training.run import train


@pytest.fixture
def world(run_overrides, tmp_path):
    """A copy of the world, to spoil; and the overrides that name it."""
    root = next(text.partition("=")[2] for text in run_overrides if text.startswith("data.root="))
    copy = shutil.copytree(root, tmp_path / "world")
    return copy, [*run_overrides, f"data.root={copy}", "data.num_workers=1", "training.eval_max_images=0"]


def pictures_of(root: Path, split: str) -> list[Path]:
    return sorted({Path(record.image_path) for record in read_split(root, split)})


def test_an_evaluation_that_fails_costs_no_step(world, tmp_path):
    root, overrides = world
    config = load_config("tiny-refcoco", [*overrides, "data.check_images=never"])
    spoiled = pictures_of(root, "refcoco/val")[-1]
    whole = spoiled.read_bytes()
    spoiled.write_bytes(whole[: len(whole) // 2])
    output = tmp_path / "run"
    with pytest.raises(ValueError, match="the evaluation on training.eval_split=refcoco/val failed") as caught:
        train(config, output=output)
    said = str(caught.value)
    assert str(spoiled) in said
    assert "refcoco/val/" in said  # the phrase that needs it
    assert f"{output / 'checkpoint-4'} holds all training up to here" in said
    assert "Traceback" not in said
    assert (output / "checkpoint-4" / "optimizer.safetensors").is_file()
    saved = (output / "checkpoint-4" / "trainable.safetensors").read_bytes()

    spoiled.write_bytes(whole)  # set right: the same command evaluates, and trains no step more
    result = train(config, output=output)
    assert result.steps == 4
    assert result.metrics["n_images"] == 3
    assert result.best == output / "best"
    assert (output / "checkpoint-4" / "trainable.safetensors").read_bytes() == saved
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert state["best_metric"] == result.metrics["mIoU"]
    assert train(config, output=output) == result  # and now it is finished


# -- damaged checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(run_overrides, tmp_path_factory):
    """A run with checkpoint-2, checkpoint-4 and best."""
    output = tmp_path_factory.mktemp("trained") / "run"
    train(load_config("tiny-refcoco", run_overrides), output=output)
    return output


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "cut": content[:middle],
            "emptied": b"",
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        }[how]
    )


FILES = (
    "config.yaml", "trainable.safetensors", "base_weights.json", "data.json", "protocol.json", "checksums.json",
    "optimizer.safetensors", "state.pt", "trainer_state.json",
)  # fmt: skip


@pytest.mark.parametrize("how", ["cut", "emptied", "flipped", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_every_damaged_file_is_named_and_the_checkpoint_before_is_taken(trained, tmp_path, caplog, name, how):
    output = shutil.copytree(trained, tmp_path / "run")
    newest = output / "checkpoint-4"
    if how == "removed":
        (newest / name).unlink()
    else:
        spoil(newest / name, how)
    if (name, how) == ("checksums.json", "removed"):  # as a checkpoint of an earlier version: used unchecked
        assert newest_undamaged(output) == newest
        return
    with pytest.raises(CheckpointError) as caught:
        check_files(newest, "--resume ", to_resume=True)
    said = str(caught.value)
    assert said.startswith(f"--resume {newest}")
    assert name in said
    assert "(beside it: checkpoint-2, best)" in said
    assert "\n" not in said
    is_needed = name not in FILES_TO_RESUME
    if is_needed:
        with pytest.raises(CheckpointError, match=name):
            find_checkpoint(newest)  # what eval, predict, export and start_from ask
    else:
        assert find_checkpoint(newest).folder == newest
    assert newest_undamaged(output) == output / "checkpoint-2"
    assert (output / "damaged-checkpoint-4").is_dir()  # kept, for who can repair it
    assert "resuming from the previous one, checkpoint-2" in caplog.text


def test_all_checkpoints_damaged_is_an_error_and_nothing_is_renamed(trained, tmp_path):
    output = shutil.copytree(trained, tmp_path / "run")
    for step in (2, 4):
        spoil(output / f"checkpoint-{step}" / "state.pt", "cut")
    before = sorted(path.name for path in output.iterdir())
    with pytest.raises(CheckpointError, match=r"checkpoint-4: expected .* got state.pt of"):
        newest_undamaged(output)
    assert sorted(path.name for path in output.iterdir()) == before


def test_damage_without_hashes_is_named_too(trained, tmp_path):
    """Checkpoints of earlier versions have no checksums.json."""
    for name, read in (
        ("state.pt", read_state),
        ("base_weights.json", load_checkpoint),
        ("trainable.safetensors", load_checkpoint),
    ):
        for how in ("cut", "emptied"):
            folder = shutil.copytree(trained / "checkpoint-4", tmp_path / f"{how}-{name}")
            (folder / "checksums.json").unlink()
            spoil(folder / name, how)
            with pytest.raises(ValueError, match=rf"{name}: "):
                read(folder)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(trained, run_overrides, tmp_path):
    output = shutil.copytree(trained, tmp_path / "run")
    expected = (output / "checkpoint-4" / "trainable.safetensors").read_bytes()
    spoil(output / "checkpoint-4" / "optimizer.safetensors", "flipped")
    result = train(load_config("tiny-refcoco", run_overrides), output=output)
    assert result.checkpoint == output / "checkpoint-4"
    assert (result.checkpoint / "trainable.safetensors").read_bytes() == expected


# -- other data ------------------------------------------------------------------------------------------------------


def test_other_data_is_refused_by_name_count_and_hash_and_can_be_allowed(trained, run_overrides, tmp_path):
    output = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-4", "best"))
    write_world(tmp_path / "other", seed=4, num_train=8, num_val=3, num_test=3)
    config = load_config("tiny-refcoco", [*run_overrides, f"data.root={tmp_path / 'other'}"])
    with pytest.raises(CheckpointError) as caught:
        train(config, output=output)
    said = str(caught.value)
    before = json.loads((output / "checkpoint-2" / "data.json").read_text())["datasets"]["refcoco"]
    assert f"refcoco/train: {before['num_phrases']} phrases of 8 images (sha256 {before['sha256'][:12]}) there" in said
    assert said.count("(sha256 ") == 2
    assert "--allow-other-data" in said
    assert json.loads((output / "data.json").read_text())["datasets"]["refcoco"] == before  # nothing was written

    result = train(config, output=output, allow_other_data=True)
    recorded = json.loads((result.checkpoint / "data.json").read_text())
    assert recorded["resumed_on_other_data"] == [{"checkpoint": "checkpoint-2", "trained_on": {"refcoco": before}}]
    assert recorded["datasets"]["refcoco"]["sha256"] != before["sha256"]


def test_changed_masks_of_the_same_phrases_are_named_by_file(world, tmp_path):
    root, overrides = world
    config = load_config("tiny-refcoco", overrides).data
    (tmp_path / "data.json").write_text(json.dumps(before := data_manifest(config, training_mix(config))))
    assert sorted(before["datasets"]["refcoco"]["files"]) == ["refcoco/instances.json", "refcoco/refs(unc).p"]
    assert same_data(tmp_path, before) == before
    annotations = json.loads((root / "refcoco" / "instances.json").read_text())
    annotations["annotations"][0]["segmentation"] = [[1, 1, 30, 1, 30, 30]]
    (root / "refcoco" / "instances.json").write_text(json.dumps(annotations))
    with pytest.raises(
        CheckpointError, match=r"refcoco/train: .* there, .* now; other content in refcoco/instances\.json\n"
    ):
        same_data(tmp_path, data_manifest(config, training_mix(config)))


# -- inputs that cannot be used --------------------------------------------------------------------------------------


def test_broken_pictures_and_refused_phrases_are_named_before_the_first_step(world, tmp_path):
    root, overrides = world
    output = tmp_path / "run"
    spoiled = pictures_of(root, "refcoco/train")[0]
    content = spoiled.read_bytes()
    spoiled.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match=r"images of refcoco/train \(data.check_images=first-run\): 1 of 8 cannot"
    ) as caught:
        train(load_config("tiny-refcoco", overrides), output=output)
    assert f"  - {spoiled} (needed by refcoco/train/" in str(caught.value)
    assert "): expected a complete image" in str(caught.value)

    refs = root / "refcoco" / "refs(unc).p"
    entries = pickle.loads(refs.read_bytes())
    sentence = next(entry for entry in entries if entry["split"] == "val")["sentences"][0]
    sentence["sent"] = "the <image> ring"
    refs.write_bytes(pickle.dumps(entries, protocol=2))
    with pytest.raises(ValueError, match=r"phrases of refcoco/val: 1 of \d+ cannot be used") as caught:
        train(load_config("tiny-refcoco", [*overrides, "data.check_images=never"]), output=output)
    assert f"  - refcoco/val/{sentence['sent_id']} (" in str(caught.value)
    assert "the model's special token '<image>'" in str(caught.value)
    assert not list(output.glob("checkpoint-*"))


class Checker:
    """A processor that remembers in a file what it was asked."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("only asked")

    def refused(self, phrases, sizes):
        with self.file.open("a") as file:
            file.write(f"{self.name} {len(phrases)}\n")
        return {i: "too red" for i, phrase in enumerate(phrases) if "red" in phrase}


def test_prepared_sets_keep_which_tokenizer_was_asked(run_overrides, tmp_path):
    Image.new("RGB", (80, 60)).save(tmp_path / "0.png")
    Image.new("RGB", (60, 80)).save(tmp_path / "1.png")

    def prepare(name: str, phrase: str) -> None:
        lines = [
            {"image": f"{i}.png", "phrase": phrase, "polygons": [[5, 5, 40, 5, 40, 40]], "split": split}
            for i, split in enumerate(("train", "val"))
        ]
        (tmp_path / "source.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = ["--format", "jsonl", "--source", str(tmp_path / "source.jsonl"), "--images", str(tmp_path)]
        assert main(["data", "prepare", *source, "--out", str(tmp_path / "data" / name)]) == 0

    def check(name: str, tokenizer: str) -> None:
        changes = [f"data.root={tmp_path / 'data'}", f"data.train=[{name}]", f"data.eval=[{name}/val]"]
        config = load_config("tiny-refcoco", [*run_overrides, *changes])
        assert config.training.eval_split == f"{name}/val"  # the first of data.eval
        mix = training_mix(config.data)
        inputs = {"train": mix.records, "val": read_split(config.data.root, f"{name}/val")}
        check_phrases(config, Checker(tmp_path / "asked", tokenizer), inputs, data_manifest(config.data, mix))

    prepare("good", "blue cup")
    check("good", "A")
    check("good", "A")  # known
    check("good", "B")  # another tokenizer
    assert (tmp_path / "asked").read_text().splitlines() == ["A 1", "A 1", "B 1", "B 1"]
    prepare("bad", "red cup")
    for _ in range(2):  # what is refused is not taken for checked
        with pytest.raises(ValueError, match=r"phrases of train: 1 of 1 cannot be used\n  - bad/train/.*: too red"):
            check("bad", "A")
