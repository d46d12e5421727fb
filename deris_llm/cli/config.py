"""``deris-llm config list | show | fields | schema``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from deris_llm.cli.arguments import add_command, add_config_options, path

SCHEMA_EXAMPLE = """\
example: an editor with a YAML language server completes and checks run configs
  deris-llm config schema --out run-config.schema.json
and as the first line of my-run.yaml beside it
  # yaml-language-server: $schema=run-config.schema.json
"""


def add(commands: Any) -> None:
    """Adds the command."""
    group = add_command(commands, "config", "the shipped run configs and every field of them")
    kinds = group.add_subparsers(metavar="WHAT", required=True)
    add_command(kinds, "list", "the shipped run configs and what each is", run_list)
    show = add_command(kinds, "show", "a complete run config as YAML, with defaults and overrides applied", run_show)
    add_config_options(show)
    fields = add_command(kinds, "fields", "every field: type, default, meaning and range", run_fields)
    fields.add_argument("match", nargs="?", default="", help="only fields whose name contains this text")
    schema = add_command(
        kinds, "schema", "a JSON schema of run config files, for editors", run_schema, example=SCHEMA_EXAMPLE
    )
    schema.add_argument("--out", type=path, metavar="FILE", help="write to this file (default: print)")


def run_list(_: argparse.Namespace) -> int:
    """Lists the shipped run configs, each with what it is."""
    from rich.table import Table

    from deris_llm.common.terminal import console
    from deris_llm.config import about_config, config_names

    table = Table.grid(padding=(0, 2, 0, 0))
    for name in config_names():
        table.add_row(name, about_config(name))
    console().print(table)
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """Prints a complete run config."""
    from deris_llm.common.strict_files import dump_yaml
    from deris_llm.config import config_to_dict, load_config

    sys.stdout.write(dump_yaml(config_to_dict(load_config(arguments.config, arguments.set))))
    return 0


def run_fields(arguments: argparse.Namespace) -> int:
    """Prints every field with its type, default, meaning and range."""
    from rich.padding import Padding

    from deris_llm.common.terminal import console
    from deris_llm.config import iter_fields

    found = [field for field in iter_fields() if arguments.match in field.name]
    if not found:
        raise ValueError(
            f"config fields: expected part of a field's name, got {arguments.match!r}, which none contains"
        )
    shown = console()
    for field in found:
        shown.print(f"{field.name}: {field.type_text} = {field.default!r}")
        shown.print(Padding(f"{field.about}; in {field.bounds}" if field.bounds else field.about, (0, 0, 0, 4)))
    return 0


def run_schema(arguments: argparse.Namespace) -> int:
    """Writes the JSON schema of run config files."""
    from deris_llm.config import json_schema

    text = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    if arguments.out is None:
        sys.stdout.write(text)
        return 0
    arguments.out.write_text(text, encoding="utf-8")
    sys.stdout.write(
        f"written to {arguments.out}; begin a run config with the line\n# yaml-language-server: $schema={arguments.out}\n"
    )
    return 0
