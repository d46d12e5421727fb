"""Tables as rows of overrides: those of `tables.yaml`, or of a file of one's own in the same form.

torch is not imported here, so that rows are listed without it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deris_llm.common.strict_files import parse_yaml
from deris_llm.config import RunConfig

CROSS = "@"  # in a row's name, before the values that --cross adds


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    label: str  # as the paper has it
    paper: Mapping[str, float]  # the paper's figures by name, percent unless the name says otherwise
    overrides: tuple[str, ...]  # of the run config
    evaluation: tuple[str, ...] = ()  # overrides at test alone
    not_run: str = ""  # why there is no such run; empty = there is


@dataclass(frozen=True)
class Comparison:
    """A table or figure of the paper, or a table of one's own."""

    name: str  # "table 7"
    title: str
    metrics: tuple[str, ...]  # of our reports
    rows: tuple[Row, ...]
    notes: str = ""


def comparison_names() -> tuple[str, ...]:
    """Names of all tables and figures."""
    return tuple(_tables())


def comparison(name: str, *, tiny: bool = False) -> Comparison:
    """Reads a table of `tables.yaml`.

    Args:
        name: of `comparison_names()`.
        tiny: for a config with the shipped tiny weights.

    Raises:
        ValueError: there is no such table.
    """
    tables = _tables()
    if name not in tables:
        raise ValueError(f"--table, --figure: expected one of {', '.join(tables)}, got {name}; take one of these")
    return _comparison(name, tables[name], tiny=tiny)


def comparison_of_file(path: Path, *, tiny: bool = False) -> Comparison:
    """Reads a table of one's own: an entry of `tables.yaml` as a file; `label` and `paper` of a row may be left out.

    Args:
        path: YAML; its name without ending names the table.
        tiny: as of `comparison`.

    Raises:
        ValueError: the file is not such a table.
    """
    entry = parse_yaml(path.read_text(encoding="utf-8"))
    try:
        rows = [{"label": row["name"], "paper": {}, **row} for row in entry["rows"]]
        defaults = {"title": path.stem, "metrics": ["N-acc", "gIoU", "cIoU"]}
        table = _comparison(path.stem, {**defaults, **entry, "rows": rows}, tiny=tiny)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"--rows-file {path}: expected `rows:`, a list of {{name: NAME, set: [A.B=VALUE, ...]}}, got a file where this fails: "
            f"{type(error).__name__}: {error}; correct it"
        ) from error
    names = [row.name for row in table.rows]
    if not names or len(set(names)) < len(names) or any(CROSS in name for name in names):
        raise ValueError(
            f"--rows-file {path}: expected rows with different names without {CROSS}, got {names}; correct it"
        )
    return table


def rows_of(table: Comparison, names: Sequence[str]) -> Comparison:
    """The table with these rows alone, in its own order.

    Raises:
        ValueError: a name that the table has not.
    """
    known = [row.name for row in table.rows]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"--rows: expected some of {', '.join(known)} ({table.name}), got {', '.join(unknown)}; take these"
        )
    return dataclasses.replace(table, rows=tuple(row for row in table.rows if row.name in names))


def crossed(table: Comparison, options: Sequence[str]) -> Comparison:
    """The table's rows once for each value of some fields.

    Args:
        table: any.
        options: ``A.B=V1,V2,...`` each; several options give all their combinations.

    Returns:
        rows named ``ROW@B=V1``, those with equal values together.

    Raises:
        ValueError: an option has no values, or a row sets its field.
    """
    fields = [_values(option) for option in options]
    rows = []
    for values in itertools.product(*(values for _, values in fields)):
        added = [(name, value) for (name, _), value in zip(fields, values, strict=True)]
        said = ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in added)
        rows += [_with(row, added, said) for row in table.rows]
    return dataclasses.replace(table, rows=tuple(rows)) if fields else table


def reference_of(row: str, reference: str, names: Sequence[str]) -> str | None:
    """The row that a row is compared with: the reference itself, or the reference with the row's values of --cross.

    Args:
        row: its name.
        reference: name of a row, with or without values.
        names: of all rows.

    Returns:
        a name; None = the row is its own reference.
    """
    _, mark, values = row.partition(CROSS)
    found = reference if reference in names else f"{reference}{mark}{values}"
    return None if found == row else found


def check_reference(table: Comparison, reference: str) -> None:
    """Raises a ValueError if --reference names no row."""
    names = [row.name for row in table.rows]
    known = list(dict.fromkeys(name.partition(CROSS)[0] for name in names))
    if reference not in (*known, *names):
        raise ValueError(
            f"--reference: expected one of {', '.join(known)} ({table.name}), got {reference}; take one of these"
        )


def is_tiny(config: RunConfig) -> bool:
    """Whether the run has the tiny weights that are shipped."""
    return config.perception.weights.startswith("builtin:")


@functools.cache
def _tables() -> dict[str, Any]:
    return parse_yaml(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))


def _comparison(name: str, table: Mapping[str, Any], *, tiny: bool) -> Comparison:
    rows = tuple(_row(row, tiny=tiny) for row in table["rows"])
    return Comparison(name, table["title"], tuple(table["metrics"]), rows, table.get("notes", ""))


def _row(row: Mapping[str, Any], *, tiny: bool) -> Row:
    overrides = row.get("tiny", row["set"]) if tiny else row["set"]
    reason = overrides if isinstance(overrides, str) else ""
    return Row(
        row["name"], row["label"], row["paper"], () if reason else tuple(overrides), tuple(row.get("eval", ())), reason
    )


def _values(option: str) -> tuple[str, list[Any]]:
    name, mark, text = option.partition("=")
    values = parse_yaml(f"[{text}]") if mark and text.strip() else []
    if not name.strip() or not isinstance(values, list) or not values:
        raise ValueError(f"--cross: expected A.B=V1,V2,..., got {option}; write e.g. loopback.num_queries=4,10,20")
    return name.strip(), values


def _with(row: Row, added: Sequence[tuple[str, Any]], said: str) -> Row:
    own = {override.partition("=")[0] for override in row.overrides}
    if twice := [name for name, _ in added if name in own]:
        raise ValueError(
            f"--cross: expected fields that no row sets, got {twice[0]}, which row {row.name} sets; leave it out"
        )
    overrides = (*row.overrides, *(f"{name}={json.dumps(value)}" for name, value in added))
    return dataclasses.replace(row, name=f"{row.name}{CROSS}{said}", label=f"{row.label}, {said}", overrides=overrides)
