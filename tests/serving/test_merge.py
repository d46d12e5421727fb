"""LoRA folded into full weights: the same answers from a folder that needs nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from deris_llm.checkpoints.fingerprints import base_checkpoint
from deris_llm.checkpoints.load import load_checkpoint, restore_first_weights, with_files_of
from deris_llm.checkpoints.save import save_full_checkpoint, save_weights
from deris_llm.cli.main import main
from deris_llm.config import load_config
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import build_model
from deris_llm.serving.merge import merge_checkpoint
from deris_llm.serving.pipeline import DerisPipeline
from deris_llm.testing import relative_difference, synthetic_batch, synthetic_images, tiny_config, tiny_weights
from tests.models.tiny_backends import tiny_beit3, tiny_bert_weights, tiny_qwen_vl_weights, tiny_vilt_weights


def trained_model(config):
    """Trained tensors away from where they start: LoRA's B, which starts at zero, too."""
    torch.manual_seed(4)
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def overrides(weights):
    return [*tiny_weights(weights), "cognition.lora.dropout=0.1"]


@pytest.fixture(scope="module")
def config(overrides):
    return tiny_config(*overrides)


@pytest.fixture(scope="module")
def model(config):
    return trained_model(config)


@pytest.fixture(scope="module")
def run(config, model, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    save_weights(output / "best", model, config, {"mIoU": 12.5})
    return output


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge_checkpoint(run, folder)
    return folder


def differences(ours, theirs):
    return [
        relative_difference(getattr(a, name), getattr(b, name))
        for a, b in zip(ours.rounds, theirs.rounds, strict=True)
        for name in ("mask_logits", "referring_logits")
    ]


def test_the_answers_are_the_same(merged, config, model):
    loaded_config, loaded = load_checkpoint(merged)
    assert loaded_config.cognition.lora.r == 0
    assert loaded_config.loopback == config.loopback
    assert not [name for name, _ in loaded.named_modules() if "lora" in name]
    batch = synthetic_batch(config)
    with torch.no_grad():
        ours, theirs = loaded(batch), model(batch)
    assert max(differences(ours, theirs)) < 1e-5  # measured 1.5e-6
    assert relative_difference(ours.presence_logit, theirs.presence_logit) < 1e-5


def test_lora_had_something_to_say(config, model, merged):
    """The test above compares nothing otherwise."""
    _, loaded = load_checkpoint(merged)
    base = build_model(config).state_dict()
    name = "cognition.model.language_model.layers.0.self_attn.q_proj"
    moved = loaded.state_dict()[f"{name}.weight"] - base[f"{name}.base_layer.weight"]
    assert moved.abs().max() > 1e-2
    untouched = name.replace("q_proj", "q_proj.base_layer.bias")
    torch.testing.assert_close(loaded.state_dict()[f"{name}.bias"], base[untouched], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp32")]
)
def test_streaming_equals_merging_the_whole_model(stored, dtype, weights, overrides, model, tmp_path):
    """Bit for bit, whatever precision the base weights have in their files."""
    llava = shutil.copytree(weights / "llava", tmp_path / "llava")
    tensors = safetensors.torch.load_file(llava / "model.safetensors")
    safetensors.torch.save_file(
        {name: t.to(stored) for name, t in tensors.items()}, llava / "model.safetensors", {"format": "pt"}
    )
    config = tiny_config(*overrides, f"cognition.weights={llava}")
    save_weights(tmp_path / "best", model, config, {})
    merge_checkpoint(tmp_path / "best", tmp_path / "merged", dtype=dtype)
    _, whole = load_checkpoint(tmp_path / "best")
    for name, module in list(whole.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            whole.set_submodule(name, module.get_base_layer())
    for parameter in whole.parameters():
        parameter.data = parameter.data.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    save_full_checkpoint(tmp_path / "whole", whole, config)
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "whole"))
    assert ours == theirs
    read = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in whole.state_dict().items())


def test_it_needs_nothing_but_its_folder(merged, run, tmp_path, monkeypatch, weights):
    """Not even the architectures that the base weights had."""
    folder = shutil.copytree(merged, tmp_path / "elsewhere")
    picture = synthetic_images(1)[0]
    expected = DerisPipeline.from_pretrained(run)(picture, ["the red circle"])[0]
    weights.rename(weights.with_name("away"))
    try:
        pipeline = DerisPipeline.from_pretrained(folder)
    finally:
        weights.with_name("away").rename(weights)
    (answer,) = pipeline(picture, ["the red circle"])
    assert answer.score == pytest.approx(expected.score, abs=1e-5)
    assert (answer.mask != expected.mask).mean() < 1e-3
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= {"config.yaml", "model.safetensors", "base_weights.json", "metrics.json"}
    assert files >= {"processor/cognition/config.json", "processor/cognition/tokenizer.json"}
    assert "processor/perception/config.json" in files
    assert not [name for name in files if name.startswith("processor") and name.endswith(("safetensors", "index.json"))]


def test_in_bf16_says_what_is_lost(run, merged, tmp_path):
    done = merge_checkpoint(run / "best", tmp_path / "half", dtype="bf16")
    assert done.num_linears == 8
    assert done.by_merging.referring_score < 1e-5
    assert done.by_rounding is not None
    assert 1e-5 < done.by_rounding.referring_score < 0.1  # measured 3e-3
    saved = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    whole = safetensors.torch.load_file(merged / "model.safetensors")
    assert saved.keys() == whole.keys()
    assert {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert (tmp_path / "half" / "config.yaml").read_text() == (merged / "config.yaml").read_text()
    assert DerisPipeline.from_pretrained(tmp_path / "half")(synthetic_images(1)[0], ["ring"])


def test_a_backbones_statistics_are_kept(weights, tmp_path):
    """Batch norm's running mean and variance are buffers; a full checkpoint with LoRA can be merged too."""
    config = tiny_config(*tiny_weights(weights), "perception.backbone=timm:resnet10t")
    model = build_model(config, weights=False).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_mean" in name or "lora_B" in name:
                tensor.normal_(std=0.1)
    save_full_checkpoint(tmp_path / "full", model, config)
    merge_checkpoint(tmp_path / "full", tmp_path / "merged", dtype="bf16")
    saved = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    means = {name: tensor for name, tensor in model.state_dict().items() if "running_mean" in name}
    assert len(means) > 5
    for name, tensor in means.items():
        assert torch.equal(saved[name], tensor)


@pytest.mark.parametrize("kind", ["beit3", "qwen_vl", "vilt", "bert"])
def test_every_backend_brings_what_its_processor_reads(kind, tmp_path):
    overrides = tiny_weights(tmp_path / "weights")
    make = {"qwen_vl": tiny_qwen_vl_weights, "vilt": tiny_vilt_weights, "bert": tiny_bert_weights, "beit3": tiny_beit3}
    overrides += make[kind](tmp_path / "weights" / kind)
    if kind == "beit3":
        spm = tmp_path / "weights" / "mine.spm"
        (tmp_path / "weights" / kind / "beit3" / "beit3.spm").rename(spm)
        overrides += ["cognition.tuning=lora", f"cognition.tokenizer={spm}"]
    config = tiny_config(*overrides)
    model = trained_model(config)
    save_weights(tmp_path / "best", model, config, {})
    expected = synthetic_batch(config)
    done = merge_checkpoint(tmp_path / "best", tmp_path / "merged")
    assert done.num_linears > 0
    shutil.rmtree(tmp_path / "weights")
    loaded_config, loaded = load_checkpoint(tmp_path / "merged")
    batch = synthetic_batch(loaded_config)
    torch.testing.assert_close(batch.cognition.pixel_values, expected.cognition.pixel_values, rtol=0, atol=0)
    assert torch.equal(batch.cognition.input_ids, expected.cognition.input_ids)
    with torch.no_grad():
        assert max(differences(loaded(batch), model(expected))) < 1e-5  # measured 2.1e-6


def test_a_run_starts_from_it_with_lora_of_its_own(merged, config, model, weights, tmp_path):
    """As `train` does; the weights of its config are not there."""
    start = tiny_config(
        *tiny_weights(weights), "cognition.weights=no/such-weights", f"training.start_from={merged}", "training.seed=1"
    )
    base = base_checkpoint(start)
    assert base == merged
    used = with_files_of(base, start)
    fresh = build_model(used, weights=False).eval()
    restore_first_weights(fresh, start)
    batch = synthetic_batch(used, processor=build_processor(used))
    with torch.no_grad():
        assert max(differences(fresh(batch), model(batch))) < 1e-5  # its LoRA starts with B = 0
    trained = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in trained)

    save_weights(tmp_path / "run" / "best", fresh, start, {})  # and its checkpoint stands on the merged one
    recorded = json.loads((tmp_path / "run" / "best" / "base_weights.json").read_text())
    assert recorded["checkpoint"]["weights"] == str(merged)
    _, loaded = load_checkpoint(tmp_path / "run" / "best")
    with torch.no_grad():
        assert max(differences(loaded(batch), fresh(batch))) < 1e-6
    merge_checkpoint(tmp_path / "run", tmp_path / "again")
    with torch.no_grad():
        assert max(differences(load_checkpoint(tmp_path / "again")[1](batch), model(batch))) < 1e-5


def test_base_weights_that_moved_and_a_backend_of_ones_own(run, weights, tmp_path):
    moved = shutil.copytree(weights / "llava", tmp_path / "moved")
    source = shutil.copytree(run / "best", tmp_path / "best", ignore=shutil.ignore_patterns("checksums.json"))
    text = (source / "config.yaml").read_text()
    (source / "config.yaml").write_text(text.replace(str(weights / "llava"), "no/where"))
    module = "deris_llm.models.cognition.qwen2_ov:Qwen2OneVision"
    merge_checkpoint(
        source, tmp_path / "merged", overrides=[f"cognition.weights={moved}", f"cognition.backend={module}"]
    )
    with pytest.raises(ValueError, match="which could run any code"):
        load_checkpoint(tmp_path / "merged")
    load_checkpoint(tmp_path / "merged", allow_module=True)


def test_lora_on_weights_in_4_bits_is_added_to_whole_ones(run, tmp_path, capsys):
    source = shutil.copytree(run / "best", tmp_path / "best", ignore=shutil.ignore_patterns("checksums.json"))
    text = (source / "config.yaml").read_text()
    (source / "config.yaml").write_text(text.replace("quantization: none", "quantization: nf4"))
    assert main(["convert", "merge", str(source), "--out", str(tmp_path / "merged")]) == 0
    assert "WARNING: the run had its base weights in 4 bits" in capsys.readouterr().out
    assert load_config(tmp_path / "merged" / "config.yaml").cognition.quantization == "none"


def test_the_command(run, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["convert", "merge", str(run), "--out", str(out), "--dtype", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "merged 8 linear layers with LoRA" in said
    assert "rounding to bf16 changed mask logits by" in said
    assert load_config(out / "config.yaml").cognition.lora.r == 0
    assert main(["convert", "merge", str(run), "--out", str(out)]) == 2
    assert "expected a new folder, got one that is not empty" in capsys.readouterr().err
    assert main(["convert", "merge", str(tmp_path / "nothing"), "--out", str(tmp_path / "new")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_is_not_finite_is_not_merged(config, tmp_path):
    model = trained_model(config)
    name = next(name for name, _ in model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = float("nan")
    save_weights(tmp_path / "best", model, config, {})
    with pytest.raises(ValueError, match="NaNs"):
        merge_checkpoint(tmp_path / "best", tmp_path / "merged")
    assert not Path(tmp_path / "merged").exists()
