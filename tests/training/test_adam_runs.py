"""The public hyper-parameters (Adam with AMSGrad, epochs schedule) on two ranks under every ZeRO stage, and resumed."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from deris_llm.checkpoints.layout import CheckpointError
from deris_llm.checkpoints.load import load_checkpoint
from deris_llm.checkpoints.save import save_full_checkpoint
from deris_llm.config import load_config
from deris_llm.models.deris import build_model
from deris_llm.testing import tiny_config
from deris_llm.training.run import train
from tests.models.tiny_backends import tiny_beit3

pytestmark = pytest.mark.slow  # one job on two ranks, about a minute on two idle cores

TOLERANCE = 1e-6  # of losses and norms between stages; measured: see tests/training/test_training_runs.py
# Measured: ZeRO-3 bit-equal, ZeRO-1 and 2 to 1e-6 where a gradient is no rounding noise (see there).
SAME = {"rtol": 1e-6, "atol": 1e-6}
NOISE = 1e-8
STAGES = (0, 1, 2, 3, "3_offload")
RESUMED = (2, 3)


@pytest.fixture(scope="module")
def public(run_overrides):
    """Two optimizer steps an epoch; the rate is halved in the first and a tenth after the second."""
    return [
        *run_overrides,
        "training.optimizer=adam",
        "training.betas=[0.9, 0.98]",
        "training.eps=1e-9",
        "training.amsgrad=true",
        "training.weight_decay=0",
        "training.max_grad_norm=0.15",
        "training.schedule=epochs",
        "training.warmup_ratio=0",
        "training.first_epoch_factor=0.5",
        "training.decay_epochs=[2]",
        "training.images_per_device=8",
        "training.max_steps=6",
        "training.save_every=3",
    ]


@pytest.fixture(scope="module")
def deris(public, tmp_path_factory):
    """The public model at tiny size: BEiT-3 trained whole, with stochastic depth; every switch of its preset."""
    return [
        *public,
        *tiny_beit3(tmp_path_factory.mktemp("beit3")),
        "compat=deris-2025",
        "cognition.drop_path=0.1",
        "training.cognition_learning_rate=5e-4",
    ]


@pytest.fixture(scope="module")
def released(public, tmp_path_factory):
    """A full checkpoint to start from."""
    config = tiny_config(*public)
    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("released") / "full"
    save_full_checkpoint(folder, build_model(config), config)
    return folder


@pytest.fixture(scope="module")
def two_ranks(public, deris, released, tmp_path_factory, ranks_job):
    return ranks_job(
        tmp_path_factory.mktemp("adam"),
        [(f"zero{stage}", public, stage, "") for stage in STAGES]
        + [(f"zero{stage}_resumed", public, stage, f"zero{stage}/checkpoint-3") for stage in RESUMED]
        + [(f"deris{stage}", deris, stage, "") for stage in (2, 3)]
        + [(f"deris{stage}_resumed", deris, stage, f"deris{stage}/checkpoint-3") for stage in (2, 3)]
        + [(f"start{stage}", [*public, f"training.start_from={released}"], stage, "") for stage in (2, 3)],
    )


@pytest.fixture(scope="module")
def one_process(public, tmp_path_factory):
    """The same steps without DeepSpeed: one rank, two micro-batches."""
    config = load_config("tiny-refcoco", [*public, "training.accumulation=2"])
    return train(config, output=tmp_path_factory.mktemp("one") / "run")


def tensors(folder, name):
    return safetensors.torch.load_file(folder / name)


def log(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def test_the_rate_is_constant_within_an_epoch(one_process):
    entries = log(one_process.checkpoint)
    assert [entry["epoch"] for entry in entries] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    factors = [0.5, 1.0, 1.0, 0.1, 0.1, 0.1]  # logged after the schedule's step: the rate of the step that follows
    for group, rate in (("lora", 1e-3), ("pixel_decoder", 5e-4), ("other", 1e-3)):
        said = [entry[f"learning_rate/{group}"] for entry in entries]
        assert said == pytest.approx([factor * rate for factor in factors])


@pytest.mark.parametrize("stage", STAGES)
def test_zero_stages_and_one_process_agree(two_ranks, one_process, stage):
    ours, expected = log(two_ranks.folder / f"zero{stage}" / "checkpoint-6"), log(one_process.checkpoint)
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in expected], rel=TOLERANCE)
    for key in expected[0]:
        if key.startswith("learning_rate/"):
            assert [entry[key] for entry in ours] == [entry[key] for entry in expected]


@pytest.mark.parametrize("stage", STAGES)
def test_every_moment_is_kept(two_ranks, stage):
    folder = two_ranks.folder / f"zero{stage}" / "checkpoint-6"
    moments, trainable = tensors(folder, "optimizer.safetensors"), tensors(folder, "trainable.safetensors")
    kinds = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert moments.keys() == {f"{kind}/{name}" for kind in kinds for name in trainable}
    now, largest = (torch.cat([moments[f"{k}/{n}"].flatten() for n in trainable]) for k in kinds[1:])
    assert bool((largest >= now).all())
    assert float((largest > now).float().mean()) > 0.01  # so that losing it would show


@pytest.mark.parametrize("run", [*(f"zero{stage}" for stage in RESUMED), "deris2", "deris3"])
def test_three_steps_and_resume_are_six_straight(two_ranks, run):
    resumed, straight = (two_ranks.folder / name / "checkpoint-6" for name in (f"{run}_resumed", run))
    for key in ("loss", "grad_norm", "learning_rate/other"):
        ours, expected = ([entry[key] for entry in log(folder)] for folder in (resumed, straight))
        assert ours == pytest.approx(expected, rel=1e-7)
    moments = tensors(straight, "optimizer.safetensors")
    torch.testing.assert_close(tensors(resumed, "optimizer.safetensors"), moments, **SAME)
    now, expected = (tensors(folder, "trainable.safetensors") for folder in (resumed, straight))
    counts = {name: moments[f"max_exp_avg_sq/{name}"].sqrt() > NOISE for name in expected}
    ours, theirs = (torch.cat([each[name][counts[name]] for name in expected]) for each in (now, expected))
    torch.testing.assert_close(ours, theirs, **SAME)
    assert len(ours) > 0.9 * sum(tensor.numel() for tensor in now.values())


def test_the_public_model_trains_the_same_under_zero_2_and_3(two_ranks):
    entries = [log(two_ranks.folder / f"deris{stage}" / "checkpoint-6") for stage in (2, 3)]
    losses = [[entry["loss"] for entry in run] for run in entries]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert [entry["learning_rate/cognition"] for entry in entries[0]] == pytest.approx(
        [factor * 5e-4 for factor in (0.5, 1.0, 1.0, 0.1, 0.1, 0.1)]
    )


def test_one_process_resumes_bit_equal(one_process, public, tmp_path):
    shutil.copytree(one_process.output / "checkpoint-3", tmp_path / "checkpoint-3")
    resumed = train(load_config("tiny-refcoco", [*public, "training.accumulation=2"]), output=tmp_path)
    for name in ("optimizer.safetensors", "trainable.safetensors"):
        torch.testing.assert_close(
            tensors(resumed.checkpoint, name), tensors(one_process.checkpoint, name), rtol=0, atol=0
        )


def test_a_missing_moment_is_a_clear_error(one_process, public, tmp_path):
    folder = shutil.copytree(one_process.output / "checkpoint-3", tmp_path / "checkpoint-3")
    (folder / "checksums.json").unlink()
    moments = {
        name: tensor
        for name, tensor in tensors(folder, "optimizer.safetensors").items()
        if not name.startswith("max_exp_avg_sq/")
    }
    safetensors.torch.save_file(moments, folder / "optimizer.safetensors", {"step": "3.0"})
    with pytest.raises(CheckpointError) as caught:
        train(load_config("tiny-refcoco", [*public, "training.accumulation=2"]), output=tmp_path)
    number = len(moments) // 2
    assert (
        f"expected exp_avg, exp_avg_sq, max_exp_avg_sq of every trainable parameter, got a file without {number}"
        in str(caught.value)
    )
    assert str(caught.value).count("  - max_exp_avg_sq/") == 10
    assert f"training.start_from={folder}" in str(caught.value)


@pytest.mark.parametrize("stage", (2, 3))
def test_starting_from_a_full_checkpoint_on_two_ranks(two_ranks, released, stage):
    _, start = load_checkpoint(released)
    _, trained = load_checkpoint(two_ranks.folder / f"start{stage}" / "checkpoint-6")
    trains = {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    before, after = start.state_dict(), trained.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name not in trains)
    changes = torch.cat([(before[name] - after[name]).flatten() for name in trains]).abs()
    assert 0 < float(changes.max()) < 0.01  # 6 steps of at most 1e-3: it began where `released` is
    losses = [[entry["loss"] for entry in log(two_ranks.folder / f"start{s}" / "checkpoint-6")] for s in (2, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert losses[0] != pytest.approx([e["loss"] for e in log(two_ranks.folder / "zero2" / "checkpoint-6")], rel=1e-3)
