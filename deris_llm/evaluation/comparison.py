"""Compares two methods on the same phrases: difference, its interval, a paired test, and how many phrases each wins."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deris_llm.common.folders import replace_text
from deris_llm.evaluation.intervals import NUM_FLIPS, differences, sign_flip_p_value
from deris_llm.evaluation.results import EvaluationResult

COMPARISON_FILE = "comparison.json"
_TEST = (
    "paired permutation test on the mean IoU by phrase: the sign of an image's (frames: a video's) whole difference flipped at "
    f"random, {NUM_FLIPS:,} times, two-sided"
)


def compare(
    first: EvaluationResult,
    second: EvaluationResult,
    protocols: Sequence[str],
    *,
    names: tuple[str, str],
    split: str,
    videos: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Compares two results of one split.

    Args:
        first: of all phrases of the split.
        second: of the same phrases.
        protocols: ids that both have; none may drop phrases.
        names: of the methods.
        split: its name.
        videos: phrase id -> its video, whose frames are drawn together as the phrases of an image are.

    Returns:
        ``names``, ``split``, ``n_phrases``, ``test`` and ``protocols``: by id ``metrics`` {metric: {"first", "second",
        "difference" (second - first, points), "interval" (95 %, bootstrap over images or videos)}}, ``p_value``, ``wins`` {"first",
        "second", "ties"} in phrases.
    """
    ids = [p.phrase_id for p in first.answers]
    assert ids == [p.phrase_id for p in second.answers], "results of the same records"
    images = [(videos or {}).get(p.phrase_id, p.image_id) for p in first.answers]
    found: dict[str, Any] = {}
    for name in protocols:
        one, other = first.ratios[name], second.ratios[name]
        main = next(iter(one))
        ious = one[main].above, other[main].above
        found[name] = {
            "metrics": {metric: change._asdict() for metric, change in differences(one, other, images).items()},
            "p_value": sign_flip_p_value(*ious, images),
            "wins": {
                "first": int((ious[0] > ious[1]).sum()),
                "second": int((ious[1] > ious[0]).sum()),
                "ties": int((ious[0] == ious[1]).sum()),
            },
        }
    return {"names": list(names), "split": split, "n_phrases": len(ids), "test": _TEST, "protocols": found}


def write_comparison(comparison: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes a comparison as JSON."""
    path = Path(folder) / COMPARISON_FILE
    replace_text(path, json.dumps(comparison, indent=1, ensure_ascii=False) + "\n")
    return path


def comparison_table(comparison: Mapping[str, Any]) -> RenderableType:
    """Returns a comparison for the terminal."""
    parts: list[RenderableType] = []
    for name, found in comparison["protocols"].items():
        title = f"{comparison['split']}, {comparison['n_phrases']:,} phrases, protocol {name}, percent"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
        for heading in ("", " first", " second", " second - first", " 95 %"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        for metric, change in found["metrics"].items():
            interval = change["interval"]
            values = [" -" if v is None else f" {v:.2f}" for v in (change["first"], change["second"])]
            moved = " -" if change["difference"] is None else f" {change['difference']:+.2f}"
            table.add_row(metric, *values, moved, f" {interval[0]:+.2f} to {interval[1]:+.2f}" if interval else " -")
        wins = found["wins"]
        parts += [
            table,
            Text(
                f"p = {found['p_value']:.4g} ({comparison['test']}). Better on {wins['first']:,} phrases: first; on "
                f"{wins['second']:,}: second; alike on {wins['ties']:,}."
            ),
        ]
    for which, name, notes in zip(
        ("first", "second"), comparison["names"], comparison.get("notes", ((), ())), strict=True
    ):
        parts.append(Text("; ".join([f"{which}: {name}", *notes])))
    return Group(*parts)
