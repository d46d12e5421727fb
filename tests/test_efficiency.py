"""The efficiency table: what is counted from shapes is what runs; sharing shows; measuring says where."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deris_llm import efficiency
from deris_llm.cli import main
from deris_llm.config import load_config
from deris_llm.efficiency import Efficiency, PartCost, count_macs, efficiency_of, paper_numbers, show_efficiency
from deris_llm.model import build_model
from deris_llm.planning import plan_cognition, shape_batch
from deris_llm.testing import synthetic_batch, tiny_beit3, tiny_config, tiny_weights


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
    inputs = type(batch.cognition)(
        batch.cognition.pixel_values,
        shapes.cognition.input_ids,
        shapes.cognition.token_padding_mask,
        shapes.cognition.text_feature_mask,
    )
    batch = type(batch)(batch.perception_image, inputs, batch.image_index, batch.phrase_ids, batch.phrases)
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


def test_the_papers_numbers_stand_beside_deris_b() -> None:
    assert paper_numbers(load_config("deris-l-refcoco")) is None
    assert paper_numbers(load_config("deris-b-refcoco", ["loopback.rounds=2"])) is None
    paper = paper_numbers(load_config("deris-b-refcoco"))
    console = Console(file=io.StringIO(), width=140)
    show_efficiency(Efficiency(7, 2 * 10**8, (PartCost("loopback", 7, 2.0),), paper=paper), console)
    assert "the paper (Table 11, DeRIS-B): 37.1 GMACs, 235.9 M, 23.4 ms on its GPU" in console.file.getvalue()
