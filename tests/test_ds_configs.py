"""Every DeepSpeed JSON with every run config, through transformers' and DeepSpeed's own parsers."""

import json
import re
from pathlib import Path

import pytest

from deris_llm.config import config_names, load_config
from deris_llm.training.deepspeed_config import contradictions, read_deepspeed_config
from deris_llm.training.trainer import training_arguments

FOLDER = Path(__file__).parents[1] / "ds_configs"
NAMES = ("zero1", "zero2", "zero3", "zero3_offload")


def test_the_shipped_ones_are_all_here():
    assert sorted(p.stem for p in FOLDER.glob("*.json")) == list(NAMES)


@pytest.mark.parametrize("run", config_names())
@pytest.mark.parametrize("name", NAMES)
def test_every_one_loads_with_every_run_config(name, run, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    config = load_config(run, ["training.accumulation=3"])
    content = read_deepspeed_config(FOLDER / f"{name}.json", config, num_ranks=1)
    filled = HfTrainerDeepSpeedConfig(content)
    try:
        arguments = training_arguments(config, tmp_path, None)
        filled.trainer_config_process(arguments)
        assert filled.mismatches == []
        assert "auto" not in json.dumps(filled.config)
        parsed = DeepSpeedConfig(filled.config)
    finally:
        unset_hf_deepspeed_config()
    assert parsed.zero_optimization_stage == int(name[4])
    assert parsed.train_micro_batch_size_per_gpu == config.training.images_per_device
    assert parsed.gradient_accumulation_steps == 3
    assert parsed.gradient_clipping == config.training.max_grad_norm
    assert parsed.bfloat16_config.enabled == (config.training.precision == "bf16")
    assert parsed.optimizer_name is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": {"type": "AdamW"}}, '"optimizer": the run config decides it (adamw with training.betas'),
        ({"scheduler": {"type": "WarmupLR"}}, '"scheduler": the run config decides it (training.schedule'),
        ({"train_batch_size": 64}, '"train_batch_size": 64 in the JSON, but training.images_per_device x'),
        ({"train_micro_batch_size_per_gpu": 3}, "training.images_per_device is 4"),
        ({"gradient_accumulation_steps": 2}, "training.accumulation is 1"),
        ({"gradient_clipping": 0.5}, "training.max_grad_norm is 1.0"),
        ({"bf16": {"enabled": True}}, "but training.precision is fp32"),
        ({"fp16": {"enabled": True}}, '"fp16.enabled": True in the JSON, but training.precision is fp32'),
        ({"zero_optimization": {"stage": 7}}, "expected 0, 1, 2 or 3, got 7"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            '"zero_force_ds_cpu_optimizer": false',
        ),
    ],
)
def test_contradictions_name_both(change, said):
    content = json.loads((FOLDER / "zero2.json").read_text()) | change
    found = contradictions(content, load_config("tiny-refcoco"), num_ranks=2)
    assert len(found) == 1
    assert said in found[0]


def test_equal_numbers_are_no_contradiction():
    content = json.loads((FOLDER / "zero2.json").read_text())
    content |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0}
    assert contradictions(content, load_config("tiny-refcoco"), num_ranks=2) == []


def test_bf16_needs_its_section_and_zero():
    found = contradictions({"zero_optimization": {"stage": 0}}, load_config("deris-7b-refcoco"), num_ranks=1)
    assert len(found) == 2
    assert all("training.precision is bf16" in problem for problem in found)


def test_unreadable_files(tmp_path):
    config = load_config("tiny-refcoco")
    with pytest.raises(ValueError, match=r"found none there; .*ds_configs has .*zero2\.json"):
        read_deepspeed_config(FOLDER / "zero4.json", config, num_ranks=1)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON, got"):
        read_deepspeed_config(tmp_path / "broken.json", config, num_ranks=1)
    (tmp_path / "bad.json").write_text('{"optimizer": {}, "fp16": {"enabled": true}}')
    with pytest.raises(ValueError, match="2 problems"):
        read_deepspeed_config(tmp_path / "bad.json", config, num_ranks=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}', "the key 'zero_optimization' occurs twice"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "the key 'stage' occurs twice"),
        ('{"gradient_clipping": NaN}', "expected a finite number, got NaN"),
        ('{"zero_optimisation": {"stage": 2}}', '"zero_optimisation": unknown; did you mean "zero_optimization"?'),
        ('{"zero_optimization": 2}', '"zero_optimization": expected an object {...}, got 2'),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": true}}', '"zero_optimization.offload_optimizer": expected an object'),
        ('{"bf16": true}', '"bf16": expected an object {...}, got True'),
        ('{"zero_optimization": {"stage": true}}', "expected 0, 1, 2 or 3, got True"),
        ("", "Expecting value"),
        ("[]", "expected a JSON object, got list"),
    ],
)  # fmt: skip
def test_a_json_that_says_something_else_than_it_seems(text, said, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_deepspeed_config(path, load_config("tiny-refcoco"), num_ranks=1)
    assert f"--deepspeed {path}" in str(caught.value)
    with pytest.raises(ValueError, match="expected a JSON file, found none there"):
        read_deepspeed_config(tmp_path, load_config("tiny-refcoco"), num_ranks=1)
