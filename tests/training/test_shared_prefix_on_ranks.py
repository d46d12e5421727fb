"""Under ZeRO-2 and ZeRO-3, all phrases of an image at once are what they are one by one, without DeepSpeed."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import build_model
from deris_llm.structures import ReferringBatch
from deris_llm.testing import relative_difference, synthetic_batch, synthetic_images, tiny_config
from deris_llm.training.launch import free_port

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("shared_prefix_on_ranks.py")
ROOT = Path(__file__).parents[2]
STAGES = (2, 3)


def _one_by_one(overrides: list[str]) -> dict[str, Any]:
    """The same pictures and phrases, a forward and backward pass for each phrase, in this process."""
    spec = importlib.util.spec_from_file_location("shared_prefix_on_ranks", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    config = tiny_config(*overrides)
    torch.manual_seed(0)
    model = worker.with_drawn_lora(build_model(config).train())
    losses, values, processor = [0.0, 0.0], [], build_processor(config)
    for rank in (0, 1):
        batch = synthetic_batch(config, num_images=1, phrases_per_image=worker.NUM_PHRASES, seed=rank)
        for phrase in range(worker.NUM_PHRASES):
            alone = _one_phrase(processor, batch, phrase, synthetic_images(1, seed=rank))
            said = worker.values_of(model(alone), 0)
            loss = worker.loss_of(said)
            (loss / 2).backward()
            losses[rank] += loss.item()
            values += [said.detach()] if rank == 0 else []
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": losses, "values": torch.stack(values), "gradients": gradients}


def _one_phrase(processor: Any, batch: ReferringBatch, phrase: int, images: list[Image.Image]) -> ReferringBatch:
    """A phrase alone, at its own length."""
    row = slice(phrase, phrase + 1)
    return replace(
        batch,
        cognition=processor(images, batch.phrases[row], [0]),
        image_index=batch.image_index[row],
        phrases_per_image=tuple(torch.bincount(batch.image_index[row], minlength=len(batch.perception_image)).tolist()),
        phrase_ids=batch.phrase_ids[row],
        phrases=batch.phrases[row],
    )


@pytest.fixture(scope="module")
def found(run_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shared_prefix")
    overrides = [*run_overrides, "cognition.gradient_checkpointing=true"]
    sizes = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    stages = {}
    for stage in STAGES:
        content = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        if stage == 3:  # everything is partitioned that a tiny model would otherwise keep whole
            content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        stages[f"zero{stage}"] = content | sizes | {"bf16": {"enabled": False}, "gradient_clipping": 0.0}
    (folder / "case.json").write_text(json.dumps({"overrides": overrides, "deepspeed": stages}))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        said, _ = process.communicate(timeout=250)
        assert process.returncode == 0, said[-5000:]
    results = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in stages}
    return results | {"one_by_one": _one_by_one(overrides)}


@pytest.mark.parametrize("stage", STAGES)
def test_values_and_losses_are_those_of_one_phrase_at_a_time(found: dict[str, Any], stage: int) -> None:
    shared, alone = found[f"zero{stage}"], found["one_by_one"]
    assert relative_difference(shared["values"], alone["values"]) < 2e-6  # measured 1.0e-7
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_the_sum_of_those_of_one_phrase_at_a_time(found: dict[str, Any], stage: int) -> None:
    shared, alone = found[f"zero{stage}"]["gradients"], found["one_by_one"]["gradients"]
    assert shared.keys() == alone.keys()
    lora = [name for name in alone if ".lora_" in name]
    assert len(lora) == 16
    assert min(float(alone[name].abs().max()) for name in lora) > 1e-6
    differences = {name: relative_difference(shared[name], alone[name]) for name in lora}
    assert max(differences.values()) < 2e-5  # measured 1.2e-6
