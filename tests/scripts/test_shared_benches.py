"""The benches of the shared prefix and of the 7B run at the smallest size: both sides equal, every column filled."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch

from deris_llm.config import PerceptionConfig
from deris_llm.data.synthetic.world import write_world
from deris_llm.models.perception import build_perception
from deris_llm.models.perception.deformable_attention import Formulation

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Loads a script of that name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    monkeypatch.setattr(module.logging, "disable", lambda _: None)
    module.main()


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch, bench: Callable[[str], ModuleType]) -> ModuleType:
    """bench_shared with a narrow model: the proportions are the bench's business, the program is the test's."""
    module = bench("shared")
    write = module.write_weights_folder

    def write_narrow(folder: Path, layers: int) -> None:
        write(folder, layers)
        shape = json.loads((folder / "config.json").read_text())
        shape["text_config"] |= {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
        shape["vision_config"] |= {
            "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 56,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(shape))

    monkeypatch.setattr(module, "write_weights_folder", write_narrow)
    return module


def test_shared_prefix(
    small_shape: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(small_shape, monkeypatch, "--phrases", "1", "3", "--layers", "1", "--repeats", "1")
    said = capsys.readouterr().out
    assert said.count("evaluation") == said.count("training step") == 2
    assert "best of 1" in said


def test_kernels_of_attention(small_shape: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of a GPU, in bf16; a CPU has the last of the three, and may refuse the others."""
    small_shape.write_weights_folder(tmp_path, layers=1)
    config, console = small_shape.bench_config(tmp_path), small_shape.Console(width=120)
    small_shape.bench_kernels(config, 3, 1, torch.device("cpu"), console)
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:4] for line in capsys.readouterr().out.splitlines() if "│" in line
    }
    assert all(float(cell) > 0 for cell in rows["MATH"])
    assert rows.keys() >= {"EFFICIENT_ATTENTION", "CUDNN_ATTENTION"}


def test_shared_prefix_over_a_split(
    small_shape: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_world(tmp_path, seed=3, num_train=2, num_val=2, num_test=2)
    tiny = ["perception.weights=builtin:tiny-mask2former", "perception.image_size=64", "loopback.dim_feedforward=64"]
    options = ["--layers", "1", "--split", "refcoco/val", "--data", str(tmp_path), "--max-images", "1"]
    run(small_shape, monkeypatch, *options, "--set", *tiny)
    said = capsys.readouterr().out
    assert "refcoco/val, 1 images" in said
    assert "masks that differ: 0 of" in said


def test_formulations_of_deformable_attention(bench: Callable[[str], ModuleType]) -> None:
    """The rows of a GPU; on a CPU each of them is computed as bags of rows, and transformers' module rounds less."""
    module = bench("perception")
    torch.manual_seed(0)
    config = PerceptionConfig(weights="builtin:tiny-mask2former", image_size=64)
    perception, _ = build_perception(config, rounds=1, num_queries=4, weights=False, dtype=torch.float32)
    names = get_args(Formulation)
    rows = module.formulations(perception, 64, 1, torch.device("cpu"), names=names)
    assert len(rows) == 2 * (len(names) + 1 + len(names) - 1)  # forward, training
    assert {row.name.partition(":")[0] for row in rows} == {"float32", "bfloat16"}
    assert not module.is_usable(torch.device("cpu"), "compiled")


def test_a_bench_asked_for_a_gpu_that_is_not_there(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run(bench("perception"), monkeypatch, "--device", "cuda")
    assert "--device cuda: expected a CUDA GPU, found none; leave it out" in capsys.readouterr().err


def test_the_7b_bench_at_tiny_size(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tiny", "--phrases", "2", "--repeats", "1", "--profile", "--budget-gib", "24"]
    few = [
        "--set",
        "training.images_per_device=1",
        "perception.activation_checkpointing=true",
        "criterion.num_points=64",
        "perception.image_size=64",
    ]
    module = bench("deris_7b")
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "SETTINGS", module.SETTINGS[-1:])
    run(module, monkeypatch, *options, *few)
    said = capsys.readouterr().out
    assert "tiny-refcoco on a CPU (says nothing about a GPU)" in said
    costs = said.partition("largest costs of a training step")[2].partition("within 24 GiB")[0]
    assert costs.count("%") == 3
    by_part = said.partition("a training step by part")[2].partition("largest costs")[0]
    parts = [line.split("│")[1].strip() for line in by_part.splitlines() if "│" in line]
    assert sorted(parts[:5]) == [
        "cognition.language_model", "cognition.multi_modal_projector", "cognition.vision_tower", "perception.backbone",
        "perception.pixel_decoder",
    ]  # fmt: skip
    assert parts[5:] == ["loopback", "rest of the forward pass", "criterion", "backward pass", "clipping, optimizer"]
    assert "planned: yes" in said


def test_the_true_shape_needs_a_gpu(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = bench("deris_7b")
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run(module, monkeypatch)
    assert "expected a CUDA GPU for the true shape, found none; --tiny runs the same program" in capsys.readouterr().err


def test_batch_statistics(
    bench: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    module = bench("batch_statistics")
    shared = torch.randn(6, 1, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = torch.randn(6, 5, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert module.likeness((shared + 0 * own).flatten(0, 1), 5) == pytest.approx(1)
    assert module.likeness((shared + own).flatten(0, 1), 5) == pytest.approx(0.5, abs=0.05)
    assert module.likeness(own.flatten(0, 1), 5) == pytest.approx(0, abs=0.05)
    write_world(tmp_path, seed=3, num_train=4, num_val=2, num_test=2)
    few = ["--phrases", "2", "--pictures", "2", "--set", f"data.root={tmp_path}", "criterion.num_points=64"]
    run(module, monkeypatch, "--config", "tiny-refcoco", *few)
    said = capsys.readouterr().out
    assert "all that trains" in said
    assert "objects in 2 phrases" in said
