"""Reads run configs: YAML files with ``base:`` inheritance, plus ``a.b=value`` overrides; reports all problems at once."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deris_llm.common.strict_files import dump_yaml, parse_yaml, read_text
from deris_llm.common.words import shortened
from deris_llm.config.checks import contradictions
from deris_llm.config.compat import PRESETS
from deris_llm.config.retired import without, without_retired
from deris_llm.config.schema import (
    COGNITION_CONFIGS,
    LARGEST_INT,
    RunConfig,
    cognition_fields,
    cognition_tag,
    fields_of,
    iter_fields,
)

_RUN_CONFIG = TypeAdapter(RunConfig)
_OPTIONS = {option.name: option for option in iter_fields()}
_YAML_SUFFIXES = (".yaml", ".yml")


class ConfigError(ValueError):
    """All problems of a config, one per line."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.problems = problems
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(
            f"{where or '--config'}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the run config\n{listed}"
        )


def config_names() -> list[str]:
    """Returns the names of the shipped run configs."""
    return sorted(p.name.removesuffix(".yaml") for p in _runs().iterdir() if p.name.endswith(".yaml"))


def about_config(name: str) -> str:
    """Returns what a shipped run config is, in a few words: the beginning of the comment at its head."""
    lines = _runs().joinpath(f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    head = itertools.takewhile(lambda line: line.startswith("#"), lines)
    sentence = re.split(r"[.;](?:\s|$)", " ".join(line.lstrip("# ") for line in head))[0]
    return textwrap.shorten(sentence, 100, placeholder=" ...")


def _runs() -> Traversable:
    return resources.files("deris_llm.config").joinpath("runs")


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run config by shipped name or YAML path, applies ``a.b=value`` overrides and checks it.

    Args:
        name_or_path: a name of `config_names()` or the path of a YAML file; its ``base:`` is one of either.
        overrides: ``section.field=value``, the value in YAML syntax (``data.eval=[refcoco/val]``).

    Raises:
        ConfigError: all unknown keys (with the nearest name), wrong types, numbers out of range and contradictions.
    """
    problems: list[str] = []
    tree = apply_overrides(_read_tree(str(name_or_path), seen=()), overrides, problems)
    return config_from_dict(tree, where=str(name_or_path), problems=problems)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Returns the tree with ``section.field=value`` applied in order; unreadable ones are added to the problems.

    For a text field the value is taken literally unless it is quoted; other values are YAML. The value of a section is
    merged into the section.
    """
    for text in overrides:
        key, separator, value = text.partition("=")
        name, value = key.strip(), value.strip()
        if not separator or not name:
            problems.append(
                f"override {text!r}: expected section.field=value, e.g. training.learning_rate=1e-4; quote a value with spaces"
            )
            continue
        node: Any = value
        is_text = name in _OPTIONS and _OPTIONS[name].kind is str
        if not is_text or value[:1] in ("'", '"'):
            try:
                node = parse_yaml(value)
            except ValueError as error:
                problems.append(f"override {text!r}: the value is not YAML ({error})")
                continue
        for part in reversed(name.split(".")):
            node = {part: node}
        tree = _merged(tree, node)
    return tree


def config_from_dict(
    tree: dict[str, Any], *, where: str = "run config", problems: list[str] | None = None
) -> RunConfig:
    """Builds and checks a config from nested plain values, as `config_to_dict` returns them.

    Args:
        tree: the values.
        where: what the error names.
        problems: found earlier, reported together with the rest.

    Raises:
        ConfigError: all problems at once.
    """
    problems = [] if problems is None else problems
    tree = without_retired(tree, problems)
    if isinstance(tree, dict) and isinstance(compat := tree.get("compat"), str):
        tree = _merged(PRESETS.get(compat, {}), tree)
    try:
        config = _RUN_CONFIG.validate_python(tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems += [_problem(each) for each in errors]
        config = None if any(each["type"] not in _RANGES for each in errors) else _with_defaults(tree, errors)
    if config is not None:
        problems += contradictions(config)
    if config is None or problems:
        raise ConfigError(where, problems)
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns nested plain values (lists for tuples) of every field, defaults included."""
    return _RUN_CONFIG.dump_python(config, mode="json")


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of run config files, with the meaning of every field as its description."""
    schema = _RUN_CONFIG.json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "deris_llm run config"
    base = {"type": "string", "description": "shipped run config or .yaml file whose values this file changes"}
    schema["properties"] = {"base": base, **schema["properties"]}
    cognition, plugin = schema["properties"]["cognition"], schema["$defs"]["PluginCognition"]
    cognition["anyOf"] = cognition.pop("oneOf")  # a file that inherits its backend fits several backends
    plugin["properties"]["backend"]["not"] = {"enum": list(COGNITION_CONFIGS)}
    plugin["required"] = ["backend"]
    return schema


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes the complete config as YAML."""
    Path(path).write_text(dump_yaml(config_to_dict(config)), encoding="utf-8")


def _read_tree(name_or_path: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(name_or_path).expanduser()
    is_file = path.suffix.lower() in _YAML_SUFFIXES
    key = os.path.realpath(path) if is_file else name_or_path
    if key in seen:
        raise ConfigError(name_or_path, [f"`base:` is circular: {' -> '.join((*seen, key))}"])
    try:
        tree = parse_yaml(read_text(path) if path.exists() and is_file else _shipped_text(name_or_path))
    except ValueError as error:
        raise ConfigError(name_or_path, [str(error)]) from error
    if not isinstance(tree, dict) or not tree:
        got = "a file without any" if not tree else f"{type(tree).__name__} {shortened(tree)}"
        raise ConfigError(name_or_path, [f"expected fields, such as `base: tiny-refcoco`, got {got}"])
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            name_or_path,
            [
                f"base: expected the name of a run config or a .yaml file, got {_said(base)}; remove the line, or name one"
            ],
        )
    if is_file and Path(base).suffix.lower() in _YAML_SUFFIXES:
        base = str(path.parent / Path(base).expanduser())
    return _merged(_read_tree(base, (*seen, key)), tree)


def _shipped_text(name: str) -> str:
    if name in config_names():
        return resources.files("deris_llm.config").joinpath("runs", f"{name}.yaml").read_text(encoding="utf-8")
    inside = [path for path in (Path(name, "config.yaml"), Path(name, "best", "config.yaml")) if path.is_file()]
    if inside:
        raise ValueError(f"expected a run config, got a folder; did you mean {inside[0]}?")
    if not name.strip():
        raise ValueError(
            f"expected the name of a run config or a .yaml file, got none; shipped: {', '.join(config_names())}"
        )
    if Path(name).is_dir():
        raise ValueError("expected a run config, got a folder without config.yaml; name one, or a .yaml file")
    if Path(name).is_file():
        raise ValueError("expected a file that ends in .yaml, got another one; rename it if it is a run config")
    is_path = Path(name).suffix.lower() in _YAML_SUFFIXES
    near = difflib.get_close_matches(Path(name).stem if is_path else name, config_names(), n=1)
    what = f"file (looked for {Path(name).expanduser().absolute()})" if is_path else "run config"
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no such {what}; {hint}shipped: {', '.join(config_names())}; or give a .yaml path")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The values of two layers. One that changes the backend keeps only the fields that the new backend reads."""
    merged = dict(base)
    for key, value in over.items():
        mine = merged.get(key)
        if not isinstance(value, dict) or not isinstance(mine, dict):
            merged[key] = value
            continue
        if key == "cognition" and cognition_tag(mine) != cognition_tag(both := {**mine, **value}):
            mine = {name: field for name, field in mine.items() if name in cognition_fields(both)}
        merged[key] = _merged(mine, value)
    return merged


# -- errors ----------------------------------------------------------------------------------------------------------

_TYPES = {
    "int_type": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text that UTF-8 can hold",
    "tuple_type": "a list",
    "dataclass_type": "a group of fields",
}
_RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def _with_defaults(tree: dict[str, Any], errors: list[Any]) -> RunConfig:
    """The config with defaults for the numbers that are out of range, so that contradictions are found too."""
    for error in errors:
        *groups, key = (part for part in _path(error["loc"]) if isinstance(part, str))
        tree = without(tree, groups, [key])
    return _RUN_CONFIG.validate_python(tree)


def _path(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The place of an error without pydantic's name for the member of the union."""
    return (loc[0], *loc[2:]) if loc[0] == "cognition" and len(loc) > 1 else loc


def _problem(error: Mapping[str, Any]) -> str:
    """One error of pydantic as field, expected, got and what to do."""
    path = _path(error["loc"])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    kind, got = error["type"], error["input"]
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        return _unknown(*path, got=got, backend=error["loc"][1] if len(path) > 1 else "")
    option = _OPTIONS.get(name.partition("[")[0])
    if kind in _TYPES:
        return f"{name}: expected {_TYPES[kind]}, got {_said(got)}{_how_to_write(kind, got)}"
    if kind == "literal_error" and option is not None:
        return f"{name}: expected one of {', '.join(typing.get_args(option.kind))}, got {_said(got)}"
    if kind == "string_pattern_mismatch" and option is not None:
        return f"{name}: expected text, got none; remove the line for the default {option.default!r}"
    if kind in _RANGES and option is not None:
        too_large = isinstance(got, int) and got >= LARGEST_INT
        wanted = {"(0, inf)": "more than 0", "[0, inf)": "0 or more"}.get(option.bounds, f"a number in {option.bounds}")
        return f"{name}: expected {wanted}{f' and below {LARGEST_INT:,}' if too_large else ''}, got {got}"
    return f"{name}: {error['msg']}, got {_said(got)}"


def _unknown(*path: int | str, got: Any, backend: int | str) -> str:
    *groups, key = map(str, path)
    here = "".join(f"{group}." for group in groups)
    readers = (
        [name for name, kind in COGNITION_CONFIGS.items() if key in fields_of(kind)] if groups == ["cognition"] else []
    )
    if readers:
        return (
            f"{here}{key}={got} cannot take effect with cognition.backend={backend}, which does not read it: remove it, or set "
            f"cognition.backend={' or '.join(readers)}"
        )
    siblings = dict.fromkeys(name.removeprefix(here).partition(".")[0] for name in _OPTIONS if name.startswith(here))
    return f"{here}{key}: unknown field{_near_fields(key, here, list(siblings))}"


def _near_fields(key: str, prefix: str, here: list[str]) -> str:
    """Which field somebody meant, for a message."""
    if not prefix and key in _OPTIONS:
        return f"; in a file write {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
    close = difflib.get_close_matches(key, here, n=1, cutoff=0.5)
    near = [name for name in _OPTIONS if name.rsplit(".", 1)[-1] == key] or [f"{prefix}{name}" for name in close]
    return f"; did you mean {' or '.join(near)}?" if near else f"; fields here: {', '.join(here)}"


def _said(value: Any) -> str:
    return "nothing" if value is None else shortened(value)


def _how_to_write(kind: str, value: Any) -> str:
    """How to write a value of the right type, for a message; empty if that cannot be known."""
    if kind == "tuple_type" and isinstance(value, (str, int, float)):
        return f"; write [{value}]"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind == "string_type" and isinstance(value, (int, float)):
        return f"; as text write '{value}'"
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return f"; write {value[0]}"
    return ""
