"""The JSON schema that editors read: complete, with descriptions, and true of the shipped run configs."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from deris_llm.cli.main import main
from deris_llm.common.strict_files import parse_yaml
from deris_llm.config import config_names, config_to_dict, iter_fields, json_schema, load_config

SCHEMA = json_schema()


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    return SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def variants(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [resolved(each) for each in node.get("anyOf", [node])]


def fields(node: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Dotted name -> schema of every field; those of all backends."""
    found: dict[str, dict[str, Any]] = {}
    for name, each in node["properties"].items():
        for variant in variants(each):
            group = "properties" in variant
            found |= fields(variant, f"{prefix}{name}.") if group else {f"{prefix}{name}": {**variant, **each}}
    return found


def fits(value: Any, node: dict[str, Any]) -> bool:
    """What of JSON Schema the shipped run configs need."""
    if "anyOf" in node:
        return any(fits(value, variant) for variant in variants(node))
    node = resolved(node)
    if "properties" in node:
        known = all(key in node["properties"] and fits(each, node["properties"][key]) for key, each in value.items())
        return known and all(key in value for key in node.get("required", ()))
    kinds = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list}
    return (
        isinstance(value, kinds[node["type"]])
        and (node["type"] == "boolean" or not isinstance(value, bool))
        and value in (node.get("enum", [value]))
        and value == node.get("const", value)
        and value not in node.get("not", {}).get("enum", ())
        and ("minimum" not in node or value >= node["minimum"])
        and ("exclusiveMinimum" not in node or value > node["exclusiveMinimum"])
        and ("maximum" not in node or value <= node["maximum"])
        and ("exclusiveMaximum" not in node or value < node["exclusiveMaximum"])
        and all(fits(each, node["items"]) for each in (value if node["type"] == "array" else ()))
    )


def test_it_has_every_field_with_its_meaning():
    found = fields(SCHEMA)
    assert set(found) == {field.name for field in iter_fields()} | {"base"}
    assert all(len(field["description"]) > 20 for field in found.values())
    assert all(len(group["description"]) > 10 for group in SCHEMA["properties"].values())
    assert found["training.seed"]["minimum"] == 0
    assert found["training.precision"]["enum"] == ["bf16", "fp32"]
    assert found["training.seed"].get("may_differ_on_resume") is None
    assert found["training.save_every"]["may_differ_on_resume"] is True


@pytest.mark.parametrize("name", config_names())
def test_shipped_run_configs_fit(name: str):
    text = resources.files("deris_llm.config").joinpath("runs", f"{name}.yaml").read_text(encoding="utf-8")
    assert fits(parse_yaml(text), SCHEMA)
    assert fits(config_to_dict(load_config(name)), SCHEMA)


@pytest.mark.parametrize(
    "text",
    [
        "training: {seed: 1.5}",
        "training: {sed: 1}",
        "cognition: {backend: bert, image_size: 224}",
        "cognition: {backend: 3}",
        "data: {train: refcoco}",
        "evaluation: {score_threshold: 1}",
    ],
)
def test_mistakes_do_not_fit(text: str):
    assert not fits(parse_yaml(text), SCHEMA)


def test_fields_of_the_backend_fit():
    assert fits(parse_yaml("cognition: {backend: beit3, image_size: 224}"), SCHEMA)
    assert fits(parse_yaml("cognition: {image_size: 224}"), SCHEMA)  # where the base sets the backend
    assert fits(parse_yaml("cognition: {backend: mine:Backend, image_size: 224, grid: 3}"), SCHEMA)


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    assert main(["config", "schema", "--out", str(tmp_path / "schema.json")]) == 0
    assert f"# yaml-language-server: $schema={tmp_path / 'schema.json'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "schema.json").read_text()) == SCHEMA
