"""The efficiency table: what is counted from shapes is what runs; sharing shows; measuring says where."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deris_llm.cli.main import main
from deris_llm.config import load_config
from deris_llm.data.dataset import group_by_image
from deris_llm.data.mix import training_mix
from deris_llm.data.sampler import TrainingBatchSampler
from deris_llm.data.synthetic.world import write_world
from deris_llm.models.deris import build_model
from deris_llm.planning import efficiency
from deris_llm.planning.efficiency import (
    PEAKS,
    UTILISATIONS,
    Efficiency,
    PartCost,
    Work,
    count_macs,
    efficiency_of,
    paper_numbers,
    run_hours,
    show_efficiency,
    show_work,
    training_flops,
    work_of_run,
)
from deris_llm.planning.plan import expected_parts, plan_cognition, plan_run, shape_batch
from deris_llm.testing import synthetic_batch, tiny_config, tiny_weights
from tests.models.tiny_backends import tiny_beit3


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("backend", ["qwen2_ov", "beit3"])
def test_counted_from_shapes_is_what_a_real_forward_pass_multiplies(
    backend: str, overrides: list[str], tmp_path: Path
) -> None:
    more = tiny_beit3(tmp_path) if backend == "beit3" else []
    config = tiny_config(*overrides, *more, "training.images_per_device=2", "data.phrases_per_image=3")
    shapes = shape_batch(config, plan_cognition(config))
    on_meta = build_model(config, weights=False, device="meta").requires_grad_(False).eval()
    counted = count_macs(on_meta, shapes)
    batch = synthetic_batch(config, num_images=2, phrases_per_image=3)
    inputs = dataclasses.replace(shapes.cognition, pixel_values=batch.cognition.pixel_values)
    batch = dataclasses.replace(batch, cognition=inputs, targets=None)
    real = build_model(config).requires_grad_(False).eval()
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            real(batch)
        assert counted == count_macs(real, batch)
    assert 2 * sum(counted.values()) == counter.get_total_flops()
    assert min(counted.values()) > 0


def test_sharing_shows_where_it_is(overrides: list[str]) -> None:
    found = efficiency_of(tiny_config(*overrides, "data.max_tokens_per_image=60"), phrases=4)
    parts = {part.name: part for part in found.parts}
    for name in ("cognition.vision_tower", "perception.backbone", "perception.pixel_decoder"):
        assert parts[name].alone == pytest.approx(4 * parts[name].together)
    assert 1 < parts["loopback"].alone / parts["loopback"].together < 4
    assert 1 < parts["cognition.language_model"].alone / parts["cognition.language_model"].together < 4
    assert found.alone > found.together
    model = build_model(tiny_config(*overrides), weights=False, device="meta")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.measured is None


def test_measured_on_this_machine(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(*overrides)
    found = efficiency_of(config, phrases=2, measure=True, repeats=2)
    assert found.measured is not None
    assert found.measured.alone_ms > 0
    assert found.measured.machine
    console = Console(file=io.StringIO(), width=120)
    show_efficiency(found, console)
    assert f"measured on {found.measured.machine}" in console.file.getvalue()
    monkeypatch.setattr(efficiency, "_free_memory", lambda: 1000)
    refused = efficiency_of(config, phrases=2, measure=True)
    assert refused.measured is None
    assert "it needs about 0.0 GiB, 0.0 GiB are free on" in refused.not_measured


def test_the_plan_prints_it(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "tiny-refcoco", "--zero", "2", "--json", "--set", *overrides]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = printed["efficiency"]
    assert found["paper"] is None
    assert found["parameters"] == sum(part["total"] for part in printed["parts"])
    assert found["alone"] > found["together"] > 0
    assert printed["work"]["ratio"] > 1


def test_the_papers_numbers_stand_beside_deris_b() -> None:
    assert paper_numbers(load_config("deris-l-refcoco")) is None
    assert paper_numbers(load_config("deris-b-refcoco", ["loopback.rounds=2"])) is None
    paper = paper_numbers(load_config("deris-b-refcoco"))
    console = Console(file=io.StringIO(), width=140)
    show_efficiency(Efficiency(7, 2 * 10**8, (PartCost("loopback", 7, 2.0),), paper=paper), console)
    assert "the paper (Table 11, DeRIS-B): 37.1 GMACs, 235.9 M, 23.4 ms on its GPU" in console.file.getvalue()


@pytest.fixture(scope="module")
def world(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run on a few pictures with an uneven number of phrases."""
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, seed=3, num_train=12, num_val=1, num_test=1)
    return [*overrides, f"data.root={root}", "data.phrases_per_image=4", "training.images_per_device=1"]


def test_a_run_costs_what_its_batches_cost(world: list[str]) -> None:
    """Against every batch of an epoch, counted by itself."""
    config = load_config("tiny-refcoco", [*world, "training.epochs=3", "cognition.gradient_checkpointing=true"])
    plan = plan_run(config, stages=("2",))
    work = work_of_run(config, plan)
    groups = group_by_image(training_mix(config.data).records)
    batches = list(TrainingBatchSampler(groups, phrases_per_image=4, images_per_device=1))
    sizes = [len(selection.phrases) for (selection,) in batches]
    assert len(set(sizes)) > 1
    assert work.images == plan.epoch.total_steps == 3 * len(sizes)
    assert work.phrases_per_image == sum(sizes) / len(sizes) < 4

    by_size = {
        size: training_flops(load_config("tiny-refcoco", [*world, f"data.phrases_per_image={size}"]))
        for size in {1, *sizes}
    }
    assert work.flops == pytest.approx(3 * sum(by_size[size] for size in sizes), rel=1e-2)  # measured 4e-3; a 7B 3e-5
    assert work.flops_one_by_one == pytest.approx(3 * sum(sizes) * by_size[1])
    assert work.ratio == work.flops_one_by_one / work.flops > 1
    assert (
        1 < work.flops_with_repeats / work.flops < 4 / 3
    )  # of three parts, forward and twice that back, one again at most


def test_one_phrase_at_a_time_shares_nothing(world: list[str]) -> None:
    config = load_config("tiny-refcoco", [*world, "data.phrases_per_image=1", "training.max_steps=7"])
    work = work_of_run(config, plan_run(config, gpus=2, stages=("2",)))
    assert (work.images, work.phrases_per_image, work.ratio) == (7 * 2 * config.training.accumulation, 1, 1)
    assert work.flops == work.flops_with_repeats == work.images * training_flops(config)


def test_parts_are_estimated_where_only_counts_are_known(world: list[str]) -> None:
    sizes = group_by_image(training_mix(load_config("tiny-refcoco", world).data).records).sizes.tolist()
    for per_image in (1, 2, 4, 7):
        parts = sum(-(-size // per_image) for size in sizes)
        assert expected_parts(sum(sizes), len(sizes), per_image) == pytest.approx(parts, rel=0.1)
    assert expected_parts(321_327, 21_899, 1) == 321_327
    assert expected_parts(10, 0, 4) == 3


@pytest.mark.parametrize(("gpus", "width"), [(1, 80), (8, 80), (64, 120)])
def test_hours_fit_the_terminal(gpus: int, width: int) -> None:
    assert run_hours(3600 * 989e12 * 0.4 * 8, 989, 0.4, 8) == pytest.approx(1)
    work = Work(885_440, 3.63, 1.99e19, 2.67e19, 6.87e19, gpus)
    file = io.StringIO()
    show_work(work, Console(file=file, width=width))
    said = file.getvalue()
    assert max(map(len, said.splitlines())) <= width
    assert "…" not in said
    rows = [line for line in said.splitlines() if "H100" in line]
    for row, flops in zip(rows, (work.flops, work.flops_one_by_one), strict=True):
        one = [run_hours(flops, PEAKS["H100"], share, 1) for share in UTILISATIONS]
        assert [float(cell.split("/")[0]) for cell in row.split("│")[3:6]] == pytest.approx(one, rel=0.03)
    told = " ".join(said.split())
    assert "19.90 EFLOP (26.70 EFLOP with recomputation)" in told
    assert "one at a time 68.70 EFLOP: 3.45 times as much" in told
