"""A small world, tiny weights, and one job on two ranks that all tests of this folder read from."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deris_llm.data.synthetic.world import write_world
from deris_llm.testing import tiny_weights
from deris_llm.training.launch import free_port

ROOT = Path(__file__).parents[2]
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Runs:
    """Folders of training runs and what they said."""

    folder: Path
    said: str

    def losses(self, name: str, key: str = "loss") -> list[float]:
        state = json.loads((self.folder / name / "checkpoint-4" / "trainer_state.json").read_text())
        return [entry[key] for entry in state["log_history"] if "loss" in entry]

    def error(self, name: str) -> str:
        return (self.folder / name / "error.txt").read_text()


@pytest.fixture(scope="session")
def run_overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four steps of two pictures with two phrases each, every loss logged."""
    folder = tmp_path_factory.mktemp("small")
    write_world(folder / "world", seed=3, num_train=8, num_val=3, num_test=3)
    return [
        *tiny_weights(folder / "weights"),
        f"data.root={folder / 'world'}",
        "data.train=[refcoco]",
        "data.eval=[refcoco/val]",
        "data.phrases_per_image=2",
        "training.images_per_device=1",
        "training.max_steps=4",
        "training.save_every=2",
        "training.log_every=1",
        "training.eval_max_images=1",
        "training.warmup_ratio=0.5",
    ]


def deepspeed_json(stage: int | str) -> dict:
    """The shipped JSON of a ZeRO stage, with everything partitioned and released that a tiny model would otherwise keep whole."""
    content = json.loads((ROOT / "ds_configs" / f"zero{stage or 1}.json").read_text())
    if stage == 0:
        content["zero_optimization"]["stage"] = 0
    if "stage3_param_persistence_threshold" in content["zero_optimization"]:
        names = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters")
        content["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
    return content


@pytest.fixture(scope="session")
def two_ranks(run_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every ZeRO stage for four steps; resumed from step 2; another rate; a loss that becomes NaN."""
    folder = tmp_path_factory.mktemp("two_ranks")
    plan = [entry(f"zero{stage}", run_overrides, stage) for stage in STAGES]
    plan += [
        entry(f"zero{stage}_resumed", run_overrides, stage, resume_from=f"zero{stage}/checkpoint-2") for stage in (2, 3)
    ]
    bf16 = [*run_overrides, "training.precision=bf16", "cognition.gradient_checkpointing=true"]
    plan += [entry("bf16", bf16, 3), entry("bf16_resumed", bf16, 3, resume_from="bf16/checkpoint-2")]
    plan.append(entry("offload", run_overrides, "3_offload"))
    plan.append(entry("stage_changed", run_overrides, 1, resume_from="zero3/checkpoint-2"))
    plan.append(
        entry("other_config", [*run_overrides, "training.learning_rate=0.5"], 2, resume_from="zero2/checkpoint-2")
    )
    diverging = [
        *run_overrides,
        "training.max_steps=6",
        "training.save_every=1",
        "training.max_grad_norm=1e9",
        "training.warmup_ratio=0",
    ]
    plan.append(
        entry(
            "diverged", [*diverging, *(f"training.{n}learning_rate=1e18" for n in ("", "lora_", "pixel_decoder_"))], 2
        )
    )
    (folder / "plan.json").write_text(json.dumps(plan))
    return Runs(folder, run_worker(folder))


@pytest.fixture(scope="session")
def ranks_job() -> Callable[[Path, list[tuple[str, list[str], int | str, str]]], Runs]:
    """Trains (name, overrides, ZeRO stage, checkpoint to go on from) one after the other, in one job on two ranks."""

    def run(folder: Path, plan: list[tuple[str, list[str], int | str, str]]) -> Runs:
        (folder / "plan.json").write_text(json.dumps([entry(*each) for each in plan]))
        return Runs(folder, run_worker(folder))

    return run


def entry(name: str, overrides: list[str], stage: int | str, resume_from: str = "") -> dict:
    return {"name": name, "overrides": overrides, "deepspeed": deepspeed_json(stage), "resume_from": resume_from}


def run_worker(folder: Path) -> str:
    worker = str(Path(__file__).parent / "worker.py")
    command = ["--num_gpus", "2", "--master_port", str(free_port()), worker, str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "deepspeed.launcher.runner", *command],
        # Without TORCHDYNAMO_DISABLE, DeepSpeed's Muon, which nothing here uses, imports inductor: 5 CPU s a rank.
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=1700)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-8000:]
    return said
