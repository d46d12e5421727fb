"""Out of memory: the message names the fields that lower it; nothing else is touched.

Memory really runs out here: a field asks for terabytes, or the process may not grow.
"""

import functools
import json
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deris_llm.checkpoints.load import checkpoint_config, load_checkpoint
from deris_llm.checkpoints.same_run import check_same_run
from deris_llm.checkpoints.save import save_weights
from deris_llm.cli.main import main
from deris_llm.common.error_file import ERROR_FILE, read_error_file, write_error_file
from deris_llm.config import config_names, load_config
from deris_llm.data.synthetic.world import write_world
from deris_llm.evaluation import evaluator
from deris_llm.models.deris import build_model
from deris_llm.models.out_of_memory import (
    DoesNotFitError,
    evaluation_cures,
    explains_out_of_memory,
    host_cures,
    killed_message,
    loading_cures,
    training_cures,
)
from deris_llm.serving.pipeline import DerisPipeline
from deris_llm.testing import synthetic_images, tiny_config, tiny_weights
from deris_llm.training.__main__ import main as train_on_this_rank

PROTOCOL = "id: large\nsize: fixed\nfixed_px: 4096\ntruth_resampling: nearest\n"
ALL_QUERIES = (
    "evaluation.score_threshold=0.001"  # each mask is 64 MiB; how many there are depends on the random weights
)
ROOM = 48 * 2**20  # less than one mask: what was freed before in pieces makes no room for it
ON_CPU = pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux",
    reason="the machine's own memory runs out; CUDA reserves more addresses than the process may have here",
)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run with few pictures that ends after two steps."""
    folder = tmp_path_factory.mktemp("small")
    write_world(folder / "world", seed=3, num_train=2, num_val=1, num_test=1)
    return [
        *tiny_weights(folder / "weights"),
        f"data.root={folder / 'world'}",
        "data.train=[refcoco]",
        "data.eval=[refcoco/val]",
        "data.allow_leakage=true",
        "training.images_per_device=1",
        "training.max_steps=2",
        "training.save_every=1",
        "training.eval_every=2",
        "training.eval_max_images=1",
    ]


@pytest.fixture
def checkpoint(overrides: list[str], tmp_path: Path) -> Path:
    config = tiny_config(*overrides)
    save_weights(tmp_path / "run" / "best", build_model(config).eval(), config, {})
    return tmp_path / "run" / "best"


def limit_room(num_bytes: int) -> None:
    """From here on this process may have so much more than now; its end lifts the limit (`in_a_child`)."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, hard))


def limit_room_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same once an evaluation starts, when everything is loaded."""
    check_records = evaluator.check_records

    def checked(*arguments: Any) -> None:
        check_records(*arguments)
        limit_room(ROOM)

    monkeypatch.setattr(evaluator, "check_records", checked)


def in_a_child(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test in a fork: oneDNN of torch 2.11 computes nothing more in a process where it once got no memory."""

    @functools.wraps(test)
    def forked(**fixtures: Any) -> None:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                test(**fixtures)
                status = 0
            except BaseException:
                os.write(writer, traceback.format_exc()[-4000:].encode())
            finally:
                os._exit(status)
        os.close(writer)
        with open(reader, encoding="utf-8") as told:
            said = told.read()
        assert os.waitpid(child, 0)[1] == 0, said or "killed"

    return forked


def train(output: Path, *more: str) -> int:
    """As a rank does, without a launcher."""
    return train_on_this_rank(["--config", "tiny-refcoco", "--output", str(output), "--set", *more])


@ON_CPU
@in_a_child
def test_a_training_step_that_does_not_fit(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    resource.setrlimit(resource.RLIMIT_AS, (2**35, resource.getrlimit(resource.RLIMIT_AS)[1]))  # of the child alone
    assert train(tmp_path / "run", *overrides, "criterion.num_points=4000000000") == 1
    said = capsys.readouterr().err
    told = said[said.index("rank 0: error: ") :]
    assert told.startswith("rank 0: error: training ran out of memory: expected a batch to fit, got: ")
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate" in told.splitlines()[0]
    assert "  - criterion.num_points (now 4000000000): points at which masks are compared\n" in told
    assert told.splitlines()[-1] == "  - `deris-llm plan` says what each choice needs, before it runs"
    assert told == read_error_file(tmp_path / "error.json") + "\n"  # what `deris-llm train` says at the very end
    assert "Traceback" not in said
    assert not list((tmp_path / "run").glob("checkpoint*"))


@ON_CPU
@in_a_child
def test_an_evaluation_in_training_that_does_not_fit_leaves_a_whole_checkpoint(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_room_of_evaluation(monkeypatch)
    (tmp_path / "large.yaml").write_text(PROTOCOL)
    overrides = [*overrides, f"evaluation.protocols=[{tmp_path / 'large.yaml'}]", ALL_QUERIES]
    assert train(tmp_path / "run", *overrides) == 1
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # to read the checkpoint again
    said = capsys.readouterr().err
    assert "rank 0: error: evaluation ran out of memory: expected a batch to fit, got: " in said
    assert "  - evaluation.max_phrases_per_batch=80 (now 160)\n" in said
    assert "Traceback" not in said
    there = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert there == [
        "checkpoint-1",
        "checkpoint-2",
        "config.yaml",
        "data.json",
        "inputs.png",
        "tensorboard",
    ]  # saved first
    lower = tiny_config(*overrides, "evaluation.max_phrases_per_batch=80", "evaluation.images_per_device=8")
    check_same_run(tmp_path / "run" / "checkpoint-1", lower)  # the run may go on with what it was told
    assert load_checkpoint(tmp_path / "run" / "checkpoint-1")[0].evaluation.images_per_device == 16


@ON_CPU
@in_a_child
def test_an_evaluation_that_does_not_fit(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")  # evaluate in this process, as a rank of torchrun
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    (tmp_path / "large.yaml").write_text(PROTOCOL)
    command = [
        "eval",
        "--checkpoint",
        str(checkpoint),
        "--protocol",
        str(tmp_path / "large.yaml"),
        "--set",
        ALL_QUERIES,
    ]
    limit_room_of_evaluation(monkeypatch)
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    told = said[said.index("error: evaluation ran out of memory: expected a batch to fit, got: ") :]
    assert told == read_error_file(tmp_path / "error.json") + "\n(`deris-llm --debug ...` shows where)\n"
    assert "data.max_tokens_per_image (now no limit)" in told
    assert not (tmp_path / "out").exists()


@ON_CPU
@in_a_child
def test_a_picture_that_does_not_fit(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """numpy or Pillow says it, not torch."""
    pipeline = DerisPipeline.from_pretrained(checkpoint, overrides=["perception.image_size=8192"])
    picture = synthetic_images(1)[0]
    told = r"evaluation ran out of memory: .*(Unable to allocate [\d.]+ [MG]iB|MemoryError \(of this machine)"
    limit_room(2**25)
    with pytest.raises(DoesNotFitError, match=told) as caught:
        pipeline(picture, ["ring"])
    assert "data.num_workers" not in str(caught.value)  # there are none


def test_a_model_that_does_not_fit(checkpoint: Path) -> None:
    config = checkpoint_config(checkpoint)
    with pytest.raises(DoesNotFitError) as caught, explains_out_of_memory(config, loading=True):
        torch.empty(2**50)
    told = str(caught.value)
    assert told.startswith("loading ran out of memory: expected the model to fit, got: ")
    for cure in ("cognition.quantization=nf4 (now none)", "training.precision=bf16 (now fp32)", "zero3_offload.json"):
        assert cure in told


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "MemoryError (of this machine, not a GPU)"),
        (MemoryError("std::bad_alloc"), "std::bad_alloc"),
        (RuntimeError("could not create a primitive"), "could not create a primitive"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"),
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (torch.OutOfMemoryError("XPU: no room\nmore"), "XPU: no room\n"),
        (
            MemoryError(
                "Caught MemoryError in DataLoader worker process 0.\n  File x\nnumpy: Unable to allocate 9 GiB\n"
            ),
            "numpy: Unable to allocate 9 GiB\n",
        ),
    ],
)
def test_who_says_that_memory_ran_out(error: Exception, reason: str) -> None:
    config = tiny_config("data.num_workers=5", "evaluation.compare_workers=2")
    with pytest.raises(DoesNotFitError) as caught, explains_out_of_memory(config):
        raise error
    assert f"to fit, got: {reason}" in str(caught.value)
    for cure in ("data.num_workers=2 (now 5)", "evaluation.compare_workers=0 (now 2)"):
        assert (cure in str(caught.value)) == isinstance(error, MemoryError)


@pytest.mark.parametrize("name", config_names())
def test_what_is_advised_can_be_set(name: str) -> None:
    config = load_config(name, ["data.num_workers=4", "evaluation.compare_workers=1"])
    cures = [*training_cures(config), *evaluation_cures(config), *loading_cures(config), *host_cures(config, ranks=2)]
    settings = re.findall(r"[a-z_]+\.[a-z_.]+=\w+", "\n".join(cures))
    assert len(settings) >= 4
    for setting in settings:
        load_config(name, [setting])
    limits_tokens = any("max_tokens_per_image" in cure for cure in cures)
    assert limits_tokens == (config.cognition.backend in ("qwen2_ov", "qwen_vl"))


def test_a_rank_that_was_killed() -> None:
    told = killed_message(tiny_config("data.num_workers=4"), ranks=2)
    for cure in ("data.num_workers=2 (now 4)", "fewer ranks on this machine (--gpus, now 2)"):
        assert f"  - {cure}" in told
    assert ("training.images_per_device=" in told) != torch.cuda.is_available()


def test_the_first_rank_to_stop_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    assert read_error_file(file) == ""
    write_error_file("nobody listens")
    monkeypatch.setenv(ERROR_FILE, str(file))
    write_error_file("rank 1: error: one\ntwo")
    write_error_file("rank 0: error: what came of it")
    assert read_error_file(file) == "rank 1: error: one\ntwo"
    assert json.loads(file.read_text())["timestamp"] > 0  # torchrun asks for it


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
    for text in ("shapes differ", "could not create a primitive descriptor for a convolution"):
        with pytest.raises(RuntimeError, match=text) as caught, explains_out_of_memory(tiny_config()):
            raise RuntimeError(text)
        assert not isinstance(caught.value, DoesNotFitError)
