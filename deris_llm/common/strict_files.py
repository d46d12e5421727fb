"""Reads YAML and JSON, without surprises; most of it people write.

PyYAML reads YAML 1.1, where `no` is false, `010` is 8, `1:30` is 90, `2026-01-02` is a date and `4e-5` is text; like
Python's JSON it keeps the last of two equal keys. Here a repeated key is an error at every level, and the only plain
scalars that are not text are `true`, `false`, `null`, decimal numbers, `.inf` and `.nan` (YAML 1.2's core schema).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

_SCALARS = {  # tag -> (pattern of its plain scalars, their possible first letters)
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}


_MOST_VALUES = 100_000  # of a document with its aliases written out; a run config has a hundred
_MOST_BYTES = 4 * 2**20
_MOST_DIGITS = 4300  # Python's own limit


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # none of YAML 1.1's

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _num_values(node, {}) > _MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"its aliases stand for more than {_MOST_VALUES:,} values, or one for itself; write the values out",
                problem_mark=node.start_mark,
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):  # is refused later; as text it may be endless
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} occurs twice; keep one of them", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def _num_values(node: Any, known: dict[int, int]) -> int:
    """Counts the values of a node with its aliases written out: thirty lists that name the one before twice have a billion."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # until it is counted: a node inside itself has no end
        inside = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,)))
        known[id(node)] = min(1 + sum(_num_values(part, known) for part in parts), _MOST_VALUES + 1)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """Quotes text that a YAML 1.1 or 1.2 parser would read as another type."""


for _name, (_pattern, _first) in _SCALARS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str) -> Any:
    """Returns the content of a YAML document.

    Raises:
        ValueError: not YAML, or a repeated key; the message has line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:  # the last two: `!!bool x`, `!!timestamp x`
        raise ValueError(parse_reason(error)) from error


def dump_yaml(tree: Any) -> str:
    """Returns YAML that `parse_yaml` reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_json(text: str) -> Any:
    """Returns the content of a JSON document.

    Raises:
        ValueError: not JSON, a repeated key, or NaN or Infinity, which JSON does not have.
    """
    return json_of(text, object_pairs_hook=unique_keys, parse_constant=_no_constant)


def json_of(text: str | bytes, **options: Any) -> Any:
    """Returns the content of JSON that a program wrote: as `json.loads`, whose options it takes, but every fault is a ValueError.

    Raises:
        ValueError: not JSON, in another encoding, nested too deeply, or with a number that is too long.
    """
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(parse_reason(error)) from error


def parse_reason(error: Exception) -> str:
    """Returns what is wrong with a text, for what a parser of JSON or YAML raised."""
    if isinstance(error, RecursionError):
        return "expected some levels of brackets, got too many: they are nested too deeply"
    if "integer string conversion" in str(error):
        return f"expected numbers of at most {_MOST_DIGITS:,} digits, got a longer one"
    return " ".join(str(error).split())


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the dictionary of a JSON object; for `json.loads(object_pairs_hook=...)`.

    Raises:
        ValueError: a repeated key.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice; keep one of them")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"expected a finite number, got {name}")


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: no file, a folder, or not UTF-8; the caller adds the path to the message.
    """
    if path.is_dir():
        raise ValueError("expected a file, got a folder; name a file in it")
    if not path.is_file():
        raise ValueError(f"no such file; expected one at {path.absolute()}: correct the path")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(
            f"expected a file of at most {_MOST_BYTES:,} bytes, as people write them, got {size:,}; name another file"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected text in UTF-8, got byte {error.object[error.start]:#04x} at {error.start}; save it as UTF-8"
        ) from error
