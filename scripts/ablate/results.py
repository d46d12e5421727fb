"""The numbers of a table: per row, and per row against a reference, paired by world, backbone and seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from scripts.ablate.comparisons import Comparison, reference_of
from scripts.ablate.runs import Run, Unit, cpu_seconds, final_state, numbers_of

RIS_METRICS = ("mIoU", "oIoU", "Pr@0.9")  # of a split on which every phrase has a target
ORACLES = ("oracle_mIoU", "oracle_gIoU")  # of the best query, where the report has it
MOST_EXACT = 20  # pairs whose sign flips are all counted: half a million
NOTE = (
    "The paper's figures are of other data and another size (DeRIS-B on the real gRefCOCO val): what can be compared is the "
    "order of the rows, not their numbers."
)


def collect(
    table: Comparison,
    runs: Sequence[Run],
    not_run: Mapping[str, str],
    *,
    max_images: int = 0,
    reference: str | None = None,
) -> dict[str, Any]:
    """Gathers the numbers of all finished runs of a table.

    Args:
        table: from `comparison`.
        runs: from `expand`; those that are not trained and evaluated are left out.
        not_run: from `expand`.
        max_images: as it was evaluated.
        reference: row that the others are compared with, see `reference_of`.

    Returns:
        plain values: per row the paper's figures, each run's numbers (percent), their mean and, of two runs or more, their
        standard deviation (n - 1); with a reference also `paired`, see `paired_difference`.
    """
    from deris_llm.evaluation.report import library_versions

    config = runs[0].config
    metrics = table.metrics if config.training.eval_split.startswith("grefcoco/") else RIS_METRICS
    found = {row.name: _collected_runs(row.name, runs, metrics, max_images=max_images) for row in table.rows}
    measured = {name for each in found.values() for one in each for name in one["metrics"]}
    metrics = [*metrics, *(name for name in ORACLES if name in measured and name not in metrics)]
    rows = [
        {
            "name": row.name,
            "label": row.label,
            "paper": dict(row.paper),
            "not_run": not_run.get(row.name, ""),
            "runs": found[row.name],
            "mean": {name: statistics.fmean(all_of) for name, all_of in _values(found[row.name], metrics) if all_of},
            "std": {
                name: statistics.stdev(all_of) for name, all_of in _values(found[row.name], metrics) if len(all_of) > 1
            },
        }
        for row in table.rows
    ]
    for row in rows if reference else ():
        against = reference_of(row["name"], reference or "", list(found))
        if against in found:
            row["paired"] = {"reference": against} | {
                name: paired_difference(_by_unit(found[against], name), _by_unit(row["runs"], name)) for name in metrics
            }
    return {
        "comparison": table.name,
        "title": table.title,
        "split": config.training.eval_split,
        "max_images": max_images,
        "protocol": config.evaluation.protocols[0],
        "metrics": metrics,
        "note": NOTE if any(row.paper for row in table.rows) else "",
        "notes": table.notes,
        "reference": reference,
        "rows": rows,
        "versions": library_versions(),
    }


def paired_difference(first: Mapping[Any, float], second: Mapping[Any, float]) -> dict[str, Any]:
    """Compares two rows on what both were run with.

    Args:
        first: value by unit, of the reference.
        second: value by unit.

    Returns:
        n (pairs); mean of second - first; of two pairs or more std (n - 1), interval (95 %, paired t) and p_sign_flip, else
        None.
    """
    changes = [second[unit] - first[unit] for unit in first if unit in second]
    n = len(changes)
    found: dict[str, Any] = {"n": n, "mean": statistics.fmean(changes) if n else None}
    if n < 2:
        return found | {"std": None, "interval": None, "p_sign_flip": None}
    from scipy.stats import t  # takes a second

    std = statistics.stdev(changes)
    reach = float(t.ppf(0.975, n - 1)) * std / math.sqrt(n)
    interval = (found["mean"] - reach, found["mean"] + reach)
    return found | {"std": std, "interval": interval, "p_sign_flip": sign_flip_p(changes)}


def sign_flip_p(changes: Sequence[float]) -> float | None:
    """Two-sided exact sign-flip test: the share of all sign patterns whose sum is at least as far from 0.

    If two rows were equally good, either could have got either value of a pair. With n pairs p is at least 2 / 2^n:
    0.0625 for five, 0.0313 for six. None for more than `MOST_EXACT` pairs.
    """
    n = len(changes)
    if n > MOST_EXACT:
        return None
    sums = np.zeros(1)
    for change in changes[1:]:  # the first sign is fixed: a pattern and its opposite are equally far
        sums = np.concatenate([sums + change, sums - change])
    return float((np.abs(sums + changes[0]) >= abs(sum(changes)) - 1e-9).mean())


def results_table(results: Mapping[str, Any]) -> Table:
    """Our numbers, mean and deviation over the runs, beside the paper's."""
    paper = list(dict.fromkeys(name for row in results["rows"] for name in row["paper"]))
    table = Table(title=f"{results['comparison'].capitalize()}: {results['title']}")
    table.add_column("", overflow="fold")
    for name in (*results["metrics"], "runs", "phrases/s", "CPU min"):
        table.add_column(name, justify="right")
    for name in paper:
        table.add_column(f"paper: {name}", justify="right", style="dim")
    for row in results["rows"]:
        ours = [
            f"{row['mean'][name]:.2f}" + (f" ± {row['std'][name]:.2f}" if name in row["std"] else "")
            if name in row["mean"]
            else "-"
            for name in results["metrics"]
        ]
        speed = _mean(run["phrases_per_second"] for run in row["runs"])
        seconds = _mean(run["cpu_seconds"] for run in row["runs"])
        cited = [f"{row['paper'][name]:g}" if name in row["paper"] else "-" for name in paper]
        costs = ["-" if speed is None else f"{speed:.1f}", "-" if seconds is None else f"{seconds / 60:.1f}"]
        table.add_row(escape(row["label"]), *ours, str(len(row["runs"])), *costs, *cited)
    return table


def paired_table(results: Mapping[str, Any]) -> Table:
    """The differences to the reference: mean ± deviation, 95 % interval, p of the sign-flip test."""
    table = Table(title=f"Differences to {results['reference']}, paired by world, backbone and seed")
    table.add_column("", overflow="fold")
    for name in ("against", "pairs", *results["metrics"]):
        table.add_column(name, justify="right")
    for row in results["rows"]:
        if paired := row.get("paired"):
            pairs = max(paired[name]["n"] for name in results["metrics"])
            cells = [_difference(paired[name]) for name in results["metrics"]]
            table.add_row(escape(row["name"]), escape(paired["reference"]), str(pairs), *cells, end_section=True)
    return table


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What the tables must not be read without."""
    images = f"{results['max_images']} images of " if results["max_images"] else ""
    lines = [
        f"Ours: {results['config']} on {images}{results['split']}, protocol {results['protocol']}, percent; mean ± standard "
        "deviation over the runs.",
        f"Paper: {results['comparison'].capitalize()}. {results['note']}" if results["note"] else "",
        "Differences: mean ± standard deviation of the pairs, 95 % interval by paired t, p of the exact sign-flip test."
        if results["reference"]
        else "",
        results["notes"],
    ]
    lines += [f"Not run: {row['label']}: {row['not_run']}" for row in results["rows"] if row["not_run"]]
    return [line for line in lines if line]


def _collected_runs(name: str, runs: Iterable[Run], metrics: Sequence[str], *, max_images: int) -> list[dict[str, Any]]:
    found = (_collected(run, metrics, max_images=max_images) for run in runs if run.row.name == name)
    return [one for one in found if one is not None]


def _collected(run: Run, metrics: Sequence[str], *, max_images: int) -> dict[str, Any] | None:
    numbers, state = numbers_of(run, max_images=max_images), final_state(run.folder)
    if numbers is None or state is None:
        return None
    speeds = [entry["phrases_per_second"] for entry in state["log_history"] if "phrases_per_second" in entry]
    oracles = [name for name in ORACLES if numbers.get(name) is not None]
    return {
        "seed": run.unit.seed,
        "world": run.unit.world,
        "backbone": run.unit.backbone,
        "folder": run.folder.name,
        "steps": state["global_step"],
        "phrases_per_second": statistics.median(speeds) if speeds else None,  # shorter than log_every
        "cpu_seconds": cpu_seconds(run),
        "metrics": {name: numbers.get(name) for name in dict.fromkeys((*metrics, *oracles))},
        "n_phrases": numbers["n_phrases"],
    }


def _values(runs: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[tuple[str, list[float]]]:
    return [(name, list(_by_unit(runs, name).values())) for name in metrics]


def _by_unit(runs: Sequence[Mapping[str, Any]], metric: str) -> dict[Unit, float]:
    return {
        Unit(run["seed"], run["world"], run["backbone"]): run["metrics"][metric]
        for run in runs
        if run["metrics"].get(metric) is not None
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _difference(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "-"
    if found["interval"] is None:
        return f"{found['mean']:+.2f}"
    low, high = found["interval"]
    p = found["p_sign_flip"]
    return "\n".join(
        [
            f"{found['mean']:+.2f} ± {found['std']:.2f}",
            f"[{low:+.2f}, {high:+.2f}]",
            f"p {p:.3f}" if p is not None else "p -",
        ]
    )
