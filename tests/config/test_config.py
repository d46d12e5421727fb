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
    with pytest.raises(ConfigError, match="circular: .*a.yaml -> .*b.yaml -> .*a.yaml"):
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
        ("training.seed=one", "training.seed: expected a whole number, got 'one'"),
        ("training.seed=true", "training.seed: expected a whole number, got True"),
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
        ("evaluation.score_threshold=1.5", "evaluation.score_threshold: expected a number in (0, 1), got 1.5"),
        ("data.train=refcoco", "got 'refcoco'; write [refcoco]"),
        ("evaluation.protocols=original, deris", "got 'original, deris'; write [original, deris]"),
        ("training.wandb=on", "training.wandb: expected true or false, got 'on'"),
        ("training.max_steps=1e5", "training.max_steps: expected a whole number, got 100000.0; write 100000"),
        ("training.seed=010", "training.seed: expected a whole number, got '010'"),
        ("training.seed=1:30", "training.seed: expected a whole number, got '1:30'"),
        ("training.seed=", "training.seed: expected a whole number, got nothing"),
        ("training.seed=4294967296", "training.seed: expected 0 or more and below 4,294,967,296, got 4294967296"),
        (
            "training.max_steps=0",
            "training.max_steps: expected more than 0, or -1 for as many as training.epochs says, got 0",
        ),
        ("training.warmup_ratio=1.0", "training.warmup_ratio: expected a number in [0, 1), got 1.0"),
        ("image_size=3", "did you mean perception.image_size or cognition.image_size?"),
        ("name=a/b", "name: expected the name of a folder"),
        ("name=", "name: expected text, got none"),
        ("data.root=", "data.root: expected text, got none"),
        ("cognition.weights= ", "cognition.weights: expected text, got none"),
        ("data.train=[]", "data.train: expected at least one dataset"),
        (
            "data.train=[refcoco/train]",
            "data.train: expected a dataset like refcoco, whose train split is used, got 'refcoco/train'",
        ),
        ("data.train=[refcoco, refcoco]", "data.train: 'refcoco' is listed 2 times"),
        ("data.eval=[refcoco/]", "data.eval: expected `dataset/split`"),
        ("training={seed: 1, seed: 2}", "the key 'seed' occurs twice"),
        ("training.betas=[0.9, {a: 1}]", "training.betas[1]: expected a number, got {'a': 1}"),
    ],
)
def test_errors_say_what_is_wrong(override, said):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny-refcoco", [override])
    assert said in str(caught.value)


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config("tiny-refcoco", ["training.sed=1", "data.train=3", "training.precision=fp8"])
    assert len(caught.value.problems) == 3


NUMBERS = [(name, default) for name, kind, default, *_ in iter_fields() if kind in (int, float)] + [
    ("training.betas", (0.9, 0.999)),
    ("training.decay_epochs", ()),
]


@pytest.mark.parametrize(("name", "default"), NUMBERS, ids=[name for name, _ in NUMBERS])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400", "-2", "99999999999999999999"])
def test_every_number_has_a_range(name, default, value):
    text = f"[{value}, 0.5]" if isinstance(default, tuple) else value
    is_float = isinstance(default, float)
    if is_float and value == "99999999999999999999" and not name.endswith("rate"):
        return  # large, but a number
    with pytest.raises(ConfigError, match=re.escape(name)):
        load_config("tiny-refcoco", [f"{name}={text}"])


def test_every_default_is_in_its_range():
    assert config_from_dict(config_to_dict(RunConfig())) == RunConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected fields, such as `base: tiny-refcoco`, got a file without any"),
        ("# nothing yet\n", "got a file without any"),
        ("{}\n", "got a file without any"),
        ("- base: tiny-refcoco\n", "expected fields, such as `base: tiny-refcoco`, got list"),
        ("tiny-refcoco\n", "got str 'tiny-refcoco'"),
        (
            "training:\n  seed: 1\ndata:\n  root: a\ntraining:\n  epochs: 2\n",
            "line 5, column 1: the key 'training' occurs twice",
        ),
        ("training:\n  seed: 1\n  seed: 1\n", "line 3, column 3: the key 'seed' occurs twice"),
        ("cognition: {lora: {r: 1, 'r': 2}}\n", "the key 'r' occurs twice"),
        ("training:\n", "training: expected a group of fields, got nothing"),
        ("base:\nname: a\n", "base: expected the name of a run config or a .yaml file, got nothing"),
        ("base: [tiny-refcoco]\n", "base: expected the name of a run config or a .yaml file, got ['tiny-refcoco']"),
        ("training.seed: 3\n", "training.seed: unknown field; in a file write training: {seed: ...}"),
        ("name: 7\n", "name: expected text, got 7; as text write '7'"),
        ("training: [1, 2\n", "line 2, column 1: expected ',' or ']'"),
        ("training: {seed: !!timestamp x}\n", "problem in the run config"),
        ("? [a]\n: 1\n", "found unhashable key"),
        ("name: !!python/object:os.system a\n", "could not determine a constructor"),
    ],
)
def test_files_that_are_no_run_config(text, said, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml")
    assert said in str(caught.value)
    assert str(tmp_path / "run.yaml") in str(caught.value)


def test_plain_words_of_a_file_are_what_they_look_like(tmp_path):
    text = "base: tiny-refcoco\nname: no\ndata: {root: 2026-01-02, train: [on, off]}\ntraining: {learning_rate: 4e-5, seed: 1_000}\n"
    (tmp_path / "Läufe 1.YAML").write_bytes(b"\xef\xbb\xbf" + text.encode())  # a byte order mark, as Windows writes
    config = load_config(tmp_path / "Läufe 1.YAML")
    assert (config.name, config.data.root, config.data.train) == ("no", "2026-01-02", ("on", "off"))
    assert (config.training.learning_rate, config.training.seed) == (4e-5, 1000)


@pytest.mark.parametrize(
    "name", ["4e-5", "no", "010", "12:30", "2026-01-02", "null", "~", "true", "a: b", "x #y", "1e5"]
)
def test_every_name_survives_the_saved_config(name, tmp_path):
    config = load_config("tiny-refcoco", [f"name={name}"])
    assert config.name == name
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_text_is_taken_as_it_is_and_home_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = ["data.root=~/my data #2", "cognition.prompt='<image>\n{phrase}: '", "name=2026"]
    config = load_config("tiny-refcoco", overrides)
    assert (config.data.root, config.name) == (f"{tmp_path}/my data #2", "2026")
    assert config.cognition.prompt == "<image> {phrase}: "  # YAML folds a line break in single quotes
    assert (
        load_config("tiny-refcoco", ['cognition.prompt="<image>\\n{phrase}"']).cognition.prompt == "<image>\n{phrase}"
    )


def test_an_override_of_a_section_keeps_its_other_fields():
    config = load_config("tiny-refcoco", ["training={epochs: 3}", "training.seed=5"])
    assert (config.training.epochs, config.training.seed) == (3, 5)
    assert config.training.images_per_device == load_config("tiny-refcoco").training.images_per_device == 4


def test_names_that_are_nearly_a_run_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "config.yaml").write_text("base: tiny-refcoco\n")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "utf16.yaml").write_bytes("base: tiny-refcoco".encode("utf-16"))
    (tmp_path / "notes.txt").write_text("base: tiny-refcoco")
    for name, said in (
        ("tiny-refcoco.yaml", r"did you mean 'tiny-refcoco'\?"),
        ("run", r"got a folder; did you mean run/best/config\.yaml\?"),
        ("folder.yaml", "expected a file, got a folder"),
        ("utf16.yaml", "expected text in UTF-8, got byte 0xff at 0; save it as UTF-8"),
        ("notes.txt", r"expected a file that ends in \.yaml"),
        ("compat/deris-2025", "no such run config"),
        ("", "expected the name of a run config or a .yaml file, got none"),
        (".", "got a folder without config.yaml"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(name)


def test_unknown_names_and_files():
    with pytest.raises(ConfigError, match="did you mean 'deris-7b-refcoco'"):
        load_config("deris-7b-refcocoo")
    with pytest.raises(ConfigError, match="no such file"):
        load_config("nowhere/run.yaml")


def test_lora_dropout_without_lora_is_a_contradiction():
    with pytest.raises(
        ConfigError, match=r"cognition\.lora\.dropout=0\.1 cannot take effect with cognition\.lora\.r=0"
    ):
        load_config("tiny-refcoco", ["cognition.lora.r=0", "cognition.lora.dropout=0.1"])


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config("tiny-refcoco").training.seed = 1  # type: ignore[misc]


def test_every_field_says_what_it_means_and_is_read_somewhere():
    package = Path(deris_llm.__file__).parent
    source = "\n".join(p.read_text() for p in package.rglob("*.py") if p.name != "config.py")
    fields = list(iter_fields(RunConfig))
    assert len(fields) > 50
    assert all(len(field.about) > 20 for field in fields)
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


def test_the_split_that_selects_follows_the_data():
    own = ("data.train=[mine]", "data.eval=[mine/dev, mine/test]")
    for changes, split in (
        ((), "refcoco/val"),
        (own, "mine/dev"),
        (("data.train=[mine]", "data.eval=[]"), "mine/val"),
        ((*own, "training.eval_split=mine/test"), "mine/test"),
    ):
        config = load_config("tiny-refcoco", changes)
        assert config.training.eval_split == split
        assert config_from_dict(config_to_dict(config)) == config  # a saved config says which split it was
    assert load_config("tiny-grefcoco").training.eval_split == "grefcoco/val"


@pytest.mark.parametrize("last", ["base: *a29", "data: {train: *a29}", "? *a29\n: 1", "name: &b [*b]"])
def test_anchors_that_explode_are_refused_at_once(last, tmp_path):
    lines = ["a0: &a0 [lol]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 30)), last]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="its aliases stand for more than 100,000 values"):
        load_config(tmp_path / "run.yaml")


def test_a_file_that_nobody_wrote_is_refused_before_it_is_parsed(tmp_path):
    (tmp_path / "run.yaml").write_text("#" * 5_000_000)
    with pytest.raises(ConfigError, match="expected a file of at most 4,194,304 bytes"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(("value", "says"), [("[" * 9999, "nested too deeply"), ("9" * 9999, "at most 4,300 digits")])
def test_values_that_no_parser_takes(value, says):
    with pytest.raises(ConfigError, match=says):
        load_config("tiny-refcoco", [f"training.epochs={value}"])
