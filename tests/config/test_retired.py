"""Configs of earlier versions lie in checkpoints: they load, or say what became of a field."""

import json
from pathlib import Path
from typing import Any

import pytest

from deris_llm.common.strict_files import dump_yaml
from deris_llm.config import ConfigError, config_names, load_config
from deris_llm.config.retired import RETIRED, SWITCHES

# Saved configs of commit c8f28f7, the last one with these fields: `save_config(load_config(NAME), ...)`; the first is
# complete, the others list dotted fields that differ from it.
SAVED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "golden" / "run_configs_c8f28f7.json").read_text(encoding="utf-8")
)
COMPLETE = "deris-7b-refcoco"
LATER = {"deris-7b-ytvos", "deris-l-mevis", "tiny-video"}  # did not exist at that commit


def saved_config(name: str) -> dict[str, Any]:
    tree = json.loads(json.dumps(SAVED[COMPLETE]))
    for field, value in ({} if name == COMPLETE else SAVED[name]).items():
        *groups, key = field.split(".")
        node = tree
        for group in groups:
            node = node[group]
        node[key] = value
    return tree


def test_there_is_a_saved_config_of_every_run_config():
    assert set(SAVED) == set(config_names()) - LATER


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_config_of_an_earlier_version_loads(name: str, tmp_path: Path):
    tree = saved_config(name)
    for field in (*RETIRED, *SWITCHES):
        *groups, key = field.split(".")
        node = tree
        for group in groups:
            node = node[group]
        assert key in node or key == "exclude_eval_images"
    (tmp_path / "config.yaml").write_text(dump_yaml(tree))
    assert load_config(tmp_path / "config.yaml") == load_config(name)


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        (
            "tiny-refcoco",
            "loopback.num_heads=4",
            "loopback.num_heads: this field was removed; expected 8 or no such line, got 4",
        ),
        (
            "tiny-refcoco",
            "data.conversion.max_tries=9",
            "data.conversion.max_tries: this field was removed; expected 50 or 51",
        ),
        ("tiny-refcoco", "criterion.importance_ratio=0.5", "expected 0.75 or no such line, got 0.5"),
        (
            "tiny-refcoco",
            "data.exclude_eval_images=false",
            "got False: to keep images of evaluation splits in the training mix, set",
        ),
        ("tiny-refcoco", "perception.resize=opencv", "perception.resize: this field was removed; expected antialias"),
        (
            "deris-b-refcoco",
            "perception.resize=antialias",
            "got 'antialias': under compat=deris-2025 it has this value",
        ),
        ("deris-b-refcoco", "loopback.presence_head=linear", "expected text_decoder or no such line, got 'linear'"),
        ("tiny-beit3-refcoco", "cognition.normalisation=imagenet", "expected half or no such line, got 'imagenet'"),
    ],
)
def test_another_value_of_a_retired_field_is_said(name: str, override: str, said: str):
    with pytest.raises(ConfigError) as caught:
        load_config(name, [override])
    assert said in str(caught.value)
    assert len(caught.value.problems) == 1


def test_values_that_change_nothing_are_dropped():
    retired = ["data.feature_cache=/kept/features", "data.exclude_eval_images=true", "data.conversion.max_tries=51"]
    assert load_config("tiny-refcoco", retired) == load_config("tiny-refcoco")
    by_image = ["loopback.presence_source=image"]
    assert load_config("deris-b-refcoco", [*by_image, "loopback.presence_head=linear"]) == load_config(
        "deris-b-refcoco", by_image
    )


def test_another_backend_keeps_only_the_fields_that_it_reads(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("base: deris-b-refcoco\nname: mine\ncognition: {backend: bert, weights: a/b}\n")
    config = load_config(tmp_path / "mine.yaml")
    assert (config.cognition.backend, config.cognition.tuning) == (
        "bert",
        "full",
    )  # inherited; beit3's drop_path is not
    with pytest.raises(ConfigError, match="drop_path=0.3 cannot take effect with cognition.backend=bert"):
        load_config(tmp_path / "mine.yaml", ["cognition.drop_path=0.3"])
