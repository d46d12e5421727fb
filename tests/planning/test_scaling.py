"""How a run scales; tests/training/test_training_runs.py compares the bytes with what ranks send."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from deris_llm.config import load_config
from deris_llm.planning.efficiency import model_to_count, work_of_run
from deris_llm.planning.plan import plan_cognition, plan_run, shape_batch
from deris_llm.planning.scaling import (
    GPUS,
    LATENCY,
    LINKS,
    PERSISTENT_ELEMENTS,
    STAGES,
    Scaling,
    Traffic,
    scaling_of,
    show_scaling,
    traffic_of_step,
)
from deris_llm.testing import tiny_config, tiny_weights

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(
        *tiny_weights(tmp_path_factory.mktemp("weights")), "training.accumulation=2", "data.root=nowhere"
    )


@pytest.fixture(scope="module")
def model(config):
    return model_to_count(config).train()


@pytest.fixture(scope="module")
def scaling(config, model) -> Scaling:
    plan = plan_run(config, gpus=8)
    return scaling_of(config, plan, work_of_run(config, plan, model=model), model=model)


def test_a_ring_sends_twice_what_is_summed_and_once_what_is_gathered():
    traffic = Traffic(2, all_reduced=800, spread=400, collectives=3)
    assert traffic.sent(1) == 0
    assert traffic.sent(4) == (2 * 800 + 400) * 3 / 4
    assert traffic.seconds(4, 1500.0) == pytest.approx(1 + 3 * 2 * LATENCY)
    assert traffic.seconds(1, 1500.0) == 0


def test_each_stage_sends_its_gradients_and_weights(config, model):
    batch = shape_batch(config, plan_cognition(config))
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    stages = traffic_of_step(model, batch, accumulation=2)
    assert [each.stage for each in stages] == list(STAGES)
    assert [(each.all_reduced, each.spread) for each in stages] == [
        (gradients, 0),
        (gradients, gradients),
        (2 * gradients, gradients),  # after every micro-batch
        (0, 2 * (weights + gradients)),  # a tiny model stays gathered until its backward pass
    ]
    released = traffic_of_step(model, batch, accumulation=2, reused=0, persistent=0)[3]
    assert 2 * (weights + gradients) < released.spread < 2 * (2 * weights + gradients)  # frozen towers have no backward


def test_more_communication_is_slower(scaling):
    by = {(point.stage, point.gpus, point.link): point for point in scaling.points}
    assert len(by) == len(STAGES) * len(GPUS) * len(LINKS)
    for stage in STAGES:
        for gpus in GPUS:
            rates = [by[stage, gpus, link].steps_per_second for link in LINKS]
            assert rates == sorted(rates, reverse=True)
            assert by[stage, gpus, "NVLink"].steps_per_second * scaling.step_seconds == pytest.approx(
                by[stage, gpus, "NVLink"].efficiency
            )
    assert by[3, 64, "100 Gb/s"].efficiency < by[2, 64, "100 Gb/s"].efficiency
    assert scaling.hidden_from["100 Gb/s"] > scaling.hidden_from["NVLink"]


def test_loading_is_shared_where_the_store_is(scaling):
    assert scaling.loading_seconds("local NVMe", 8) == scaling.loading_seconds("local NVMe", 512)
    assert scaling.loading_seconds("NFS, 10 Gb/s", 512) == 64 * scaling.loading_seconds("NFS, 10 Gb/s", 8)


@pytest.mark.parametrize("gpus", [1, 8])
def test_the_tables_fit_a_terminal(scaling, gpus):
    text = io.StringIO()
    show_scaling(dataclasses.replace(scaling, images_per_device=gpus), Console(file=text, width=80))
    said = text.getvalue()
    assert max(map(len, said.splitlines())) <= 80
    for words in ("ZeRO 2: steps/s", "ZeRO 3: steps/s", "512", "100 Gb/s", "local NVMe", "A checkpoint has"):
        assert words in said
    assert "…" not in said
    assert json.loads(json.dumps(scaling.to_json()))["traffic"][2]["sent"]["8"] > 0


def test_the_7b_sends_its_weights_twice_under_zero_3_and_its_lora_under_zero_2():
    config = load_config("deris-7b-refcoco")
    model = model_to_count(config).train()
    stages = traffic_of_step(model, shape_batch(config, plan_cognition(config)))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert 1.7 * weights < stages[3].spread < 2 * weights
    assert stages[2].all_reduced < 0.004 * weights


def test_constants_are_those_of_the_shipped_deepspeed_config():
    zero = json.loads((DS_CONFIGS / "zero3.json").read_text())["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == PERSISTENT_ELEMENTS
    assert "stage3_max_reuse_distance" not in zero  # DeepSpeed's default is REUSED_ELEMENTS
