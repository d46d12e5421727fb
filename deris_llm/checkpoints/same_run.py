"""Whether a checkpoint belongs to a run config: only fields that do not change what is learned may differ on resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deris_llm.checkpoints.layout import CONFIG_FILE, CheckpointError
from deris_llm.config import RunConfig, config_to_dict, fields_that_may_differ, load_config


def check_same_run(folder: Path, config: RunConfig) -> None:
    """Checks that a checkpoint belongs to this run config.

    Raises:
        CheckpointError: lists the fields that differ (except `fields_that_may_differ`) with both values.
    """
    fields = differing_fields(folder, config)
    if not fields:
        return
    differ = [f"  - {name}: {then!r} there, {now!r} now" for name, then, now in fields]
    listed = "\n".join(differ[:10] + ([f"  ... and {len(differ) - 10} more"] if len(differ) > 10 else []))
    number = "1 field differs" if len(differ) == 1 else f"{len(differ)} fields differ"
    longer = ""
    if any(name in ("training.max_steps", "training.epochs") for name, *_ in fields):
        longer = (
            f". To train further from these weights, start a new run: another --output, and "
            f"--set training.start_from={folder} (the schedule of this run ends at its own length)"
        )
    raise CheckpointError(
        f"{folder}: expected a checkpoint of this run config, got one of another; {number}\n{listed}\n"
        f"Set these fields to their saved values to resume, or give another --output to start a new run{longer}"
    )


def differing_fields(folder: Path, config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Returns name, saved value and present value of each config field that differs from a checkpoint's and may not."""
    saved, now = _flat(config_to_dict(load_config(folder / CONFIG_FILE))), _flat(config_to_dict(config))
    names = now.keys() - fields_that_may_differ()
    return [(name, saved.get(name), now[name]) for name in now if name in names and saved.get(name) != now[name]]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
