"""QLoRA: the frozen linears of the language model in 4 bits, LoRA beside them."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from deris_llm.checkpoints.load import load_checkpoint
from deris_llm.checkpoints.save import save_weights
from deris_llm.config import ConfigError
from deris_llm.models import pretrained as weights
from deris_llm.models.deris import Deris, build_model, trainable_names
from deris_llm.planning.plan import NF4_BYTES, plan_run
from deris_llm.testing import relative_difference, synthetic_batch, tiny_config
from deris_llm.training.deepspeed_config import contradictions
from deris_llm.training.run import train
from tests.models.tiny_backends import tiny_qwen_vl_weights

NF4 = "cognition.quantization=nf4"
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra `gpu` has it)"
)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, there is none on this machine"),
        ],
    ),
]


@pytest.fixture(params=["qwen2_ov", "qwen_vl"])
def options(request: pytest.FixtureRequest, overrides: list[str], tmp_path: Path) -> list[str]:
    more = tiny_qwen_vl_weights(tmp_path / "qwen") if request.param == "qwen_vl" else []
    return [*overrides, *more, "cognition.lora.targets=[q_proj, down_proj]"]


def linears_in_4_bits(model: nn.Module) -> dict[str, nn.Module]:
    found = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    found = {name: module for name, module in found.items() if not hasattr(module, "base_layer")}  # peft's have one
    for module in found.values():  # its kernel for some CPUs computes in bf16 and takes widths from 64
        module.support_avx512bf16_for_cpu = False
    return found


def woken(model: Deris) -> Deris:
    """With LoRA that has an effect."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@needs_bitsandbytes
@pytest.mark.parametrize("device", DEVICES)
def test_it_computes_what_its_unpacked_weights_compute(options: list[str], device: str) -> None:
    import bitsandbytes

    torch.manual_seed(0)
    packed = woken(build_model(tiny_config(*options, NF4), device=device))
    torch.manual_seed(0)
    plain = woken(build_model(tiny_config(*options), device=device))
    quantised = linears_in_4_bits(packed)
    assert all("language_model.layers" in name for name in quantised)
    assert len(quantised) == 2 * 7  # layers x linears
    assert all(module.weight.dtype == torch.uint8 for module in quantised.values())
    for name, module in quantised.items():
        unpacked = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        target = plain.get_submodule(name).weight
        assert 0 < relative_difference(unpacked, target) < 1  # scales of few blocks are coarse
        target.data.copy_(unpacked)
    batch = synthetic_batch(tiny_config(*options)).to(device)
    with torch.no_grad():
        ours, reference = packed.eval()(batch), plain.eval()(batch)
    assert relative_difference(ours.presence_logit, reference.presence_logit) < 1e-4
    assert relative_difference(ours.final.mask_logits, reference.final.mask_logits) < 1e-4


@needs_bitsandbytes
@pytest.mark.parametrize("device", DEVICES)
def test_lora_trains_beside_it_and_alone_is_saved(options: list[str], device: str, tmp_path: Path) -> None:
    config = tiny_config(*options, NF4, "cognition.gradient_checkpointing=true")
    torch.manual_seed(0)
    model = woken(build_model(config, device=device)).train()
    torch.manual_seed(0)
    assert trainable_names(model) == trainable_names(build_model(tiny_config(*options), device=device))
    assert len(linears_in_4_bits(model)) == 14
    output = model(synthetic_batch(config).to(device))
    (output.presence_logit.square().sum() + sum(one.mask_logits.square().mean() for one in output.rounds)).backward()
    lora = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert len(lora) == 2 * 2 * 2
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in lora.values())
    save_weights(tmp_path / "best", model, config, {})
    assert not any("base_layer" in name for name in trainable_names(model))
    assert (tmp_path / "best" / "trainable.safetensors").stat().st_size < 3_000_000
    _, loaded = load_checkpoint(tmp_path / "best", device)
    assert len(linears_in_4_bits(loaded)) == 14
    batch = synthetic_batch(config).to(device)
    with torch.no_grad():
        assert torch.equal(loaded(batch).presence_logit, model.eval()(batch).presence_logit)
    _, unpacked = load_checkpoint(tmp_path / "best", device, overrides=["cognition.quantization=none"])
    assert not linears_in_4_bits(unpacked)
    assert trainable_names(unpacked) == trainable_names(model)


def test_without_bitsandbytes_it_says_what_to_install(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="expected the package bitsandbytes, which is not installed; `pip install"):
        build_model(tiny_config(*overrides, NF4))


def test_training_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cognition.quantization=nf4: expected a CUDA GPU for training, found none"):
        train(tiny_config(NF4), output=tmp_path)


def test_weights_of_a_full_checkpoint_are_refused(overrides: list[str]) -> None:
    with pytest.raises(ValueError, match="expected base weights that are read from a folder or the hub, got a full"):
        build_model(tiny_config(*overrides, NF4), weights=False)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("cognition.tuning=full", "quantization=nf4 contradicts cognition.tuning=full: weights in 4 bits cannot train"),
        ("cognition.backend=beit3", "quantization=nf4 cannot take effect with cognition.backend=beit3"),
    ],
)
def test_contradictions_are_told(option: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(NF4, option)
    assert said in str(caught.value)


def test_zero_3_cannot_partition_it() -> None:
    config = tiny_config(NF4)
    (found,) = contradictions({"zero_optimization": {"stage": 3}}, config, num_ranks=1)
    assert "quantization is nf4, whose packed weights cannot be partitioned; use ds_configs/zero2.json" in found
    assert contradictions({"zero_optimization": {"stage": 2}}, config, num_ranks=1) == []


def test_the_plan_counts_4_bits(overrides: list[str]) -> None:
    plain = plan_run(tiny_config(*overrides), stages=("2",))
    packed = plan_run(tiny_config(*overrides, NF4), stages=("2", "3"))
    assert [row.stage for row in packed.memory] == ["2"]
    linears = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # of float32
    saved = plain.memory[0].weights - packed.memory[0].weights
    assert saved == pytest.approx(linears * (4 - NF4_BYTES), abs=1)
    assert packed.memory[0].activations == plain.memory[0].activations + 4 * 32 * 64
    assert packed.parts == plain.parts
