import dataclasses
import re
from pathlib import Path

import pytest

import deris_llm
from deris_llm.config import (
    ConfigError,
    RunConfig,
    config_from_dict,
    config_names,
    config_to_dict,
    iter_fields,
    load_config,
    save_config,
)


@pytest.mark.parametrize("name", config_names())
def test_every_run_config_loads_and_round_trips(name, tmp_path):
    config = load_config(name)
    assert config.name == name
    save_config(config, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config


def test_the_paper_values_of_the_7b():
    config = load_config("deris-7b-refcoco")
    assert (config.cognition.lora.r, config.cognition.lora.alpha) == (8, 16)
    assert config.training.learning_rate == config.training.lora_learning_rate == 4e-5
    assert (config.training.epochs, config.training.precision) == (10, "bf16")
    assert config.training.images_per_device * config.data.phrases_per_image == 4  # phrases a GPU
    assert (config.loopback.rounds, config.loopback.num_queries) == (3, 10)
    assert config.cognition.gradient_checkpointing


def test_base_is_inherited_and_overridden():
    base, sibling = load_config("deris-7b-refcoco"), load_config("deris-0.5b-refcoco")
    assert sibling.cognition.weights != base.cognition.weights
    assert sibling.cognition.prompt == base.cognition.prompt
    assert sibling.training == base.training


def test_base_of_a_file_is_a_shipped_name_or_a_file_beside_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: tiny-refcoco\nname: mine\ntraining: {seed: 5}\n")
    (tmp_path / "longer.yaml").write_text("base: mine.yaml\nname: longer\ntraining: {epochs: 7}\n")
    config = load_config(tmp_path / "longer.yaml")
    assert (config.name, config.training.seed, config.training.epochs) == ("longer", 5, 7)
    assert config.perception.weights == load_config("tiny-refcoco").perception.weights


def test_base_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="goes round in a circle"):
        load_config(tmp_path / "a.yaml")


def test_overrides():
    config = load_config(
        "tiny-refcoco",
        [
            "training.learning_rate=1e-4",
            "data.eval=[refcoco/val]",
            "cognition.lora.r=2",
            "training.wandb=true",
            "name=x",
        ],
    )
    assert config.training.learning_rate == 1e-4
    assert config.data.eval == ("refcoco/val",)
    assert config.cognition.lora.r == 2
    assert config.training.wandb is True
    assert config.name == "x"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.learning_rte=1", "training.learning_rte: unknown field; did you mean training.learning_rate?"),
        ("learning_rate=1", "learning_rate: unknown field; did you mean training.learning_rate?"),
        ("trainig.seed=1", "trainig: unknown field; did you mean training?"),
        ("training.seed=one", "training.seed: expected int, got 'one'"),
        ("training.seed=true", "training.seed: expected int, got True"),
        ("training.epochs=many", "training.epochs: expected a number, got 'many'"),
        ("training.precision=fp16", "training.precision: expected one of bf16, fp32, got 'fp16'"),
        (
            "perception.deformable_attention=triton",
            "perception.deformable_attention: expected one of grid_sample, compiled, hub_kernel, got 'triton'",
        ),
        ("data.train=refcoco", "data.train: expected a list, got 'refcoco'"),
        ("training=3", "training: expected a group of fields, got 3"),
        ("training.seed", "expected section.field=value"),
        ("perception.image_size=100", "expected a positive multiple of 32"),
        ("cognition.prompt=Where is {phrase}?", "expected <image> exactly once"),
        ("cognition.prompt_order=text_first", "contradicts cognition.prompt"),
        ("data.eval=[val]", "expected `dataset/split`"),
        ("training.accumulation=0", "training.accumulation: expected more than 0, got 0"),
        ("evaluation.score_threshold=1.5", "expected a probability"),
    ],
)
def test_errors_say_what_is_wrong(override, said):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny-refcoco", [override])
    assert said in str(caught.value)


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config("tiny-refcoco", ["training.sed=1", "data.root=3", "training.precision=fp8"])
    assert len(caught.value.problems) == 3


def test_unknown_names_and_files():
    with pytest.raises(ConfigError, match="did you mean 'deris-7b-refcoco'"):
        load_config("deris-7b-refcocoo")
    with pytest.raises(ConfigError, match="no such file"):
        load_config("nowhere/run.yaml")


def test_lora_dropout_without_lora_is_a_contradiction():
    with pytest.raises(ConfigError, match=r"cognition\.lora\.dropout has no effect"):
        load_config("tiny-refcoco", ["cognition.lora.r=0", "cognition.lora.dropout=0.1"])


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config("tiny-refcoco").training.seed = 1  # type: ignore[misc]


def test_every_field_says_what_it_means_and_is_read_somewhere():
    package = Path(deris_llm.__file__).parent
    source = "\n".join(p.read_text() for p in package.rglob("*.py") if p.name != "config.py")
    fields = list(iter_fields(RunConfig))
    assert len(fields) > 50
    assert all(len(about) > 20 for *_, about in fields)
    fields = [field for field in fields if field[0] != "compat"]  # config.py itself reads it, before there is a config
    unread = [name for name, *_ in fields if not re.search(rf"\.{name.rsplit('.', 1)[-1]}\b", source)]
    assert unread == []


def test_grefcoco_needs_a_selection_that_can_say_no_target():
    for change in ("data.eval=[refcoco/val, grefcoco/testA]", "training.eval_split=grefcoco/val"):
        with pytest.raises(ConfigError, match=r"N-acc on grefcoco/\w+ is 0: set evaluation.selection=threshold"):
            load_config("tiny-refcoco", [change])
        for cure in ("evaluation.selection=threshold", "evaluation.presence=gate"):
            load_config("tiny-refcoco", [change, cure])


@pytest.mark.parametrize(
    "override",
    [
        "data.conversion.rate=1.5",
        "data.conversion.threshold=0",
        "data.conversion.min_words=-1",
        "data.conversion.max_tries=0",
        "data.conversion.mode=letters",
    ],
)
def test_conversion_is_checked(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        load_config("tiny-refcoco", [override])


def test_the_paper_values_of_gres():
    config = load_config("deris-7b-grefcoco")
    conversion = config.data.conversion
    assert (conversion.rate, conversion.threshold, conversion.min_words, conversion.mode) == (0.15, 0.6, 2, "words")
    assert (config.loopback.num_queries, config.cognition.max_phrase_tokens) == (20, 50)
    assert config.training == dataclasses.replace(
        load_config("deris-7b-refcoco").training, epochs=6, eval_split="grefcoco/val"
    )
