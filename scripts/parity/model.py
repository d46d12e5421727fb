"""Compares our model with what the public DeRIS code computed, array by array.

    python scripts/parity/model.py --fixtures DIR --model B_refcoco --losses

rebuilds the fixtures' weights and inputs, runs our model with `compat: deris-2025` and prints, for every array of
``parity_<model>.json``, the worst deviation over the array's standard deviation. The exit status is 1 when one is beyond
its tolerance or an array of the fixtures is not compared, 2 when the fixtures are unusable.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import each other as `scripts.*`

if TYPE_CHECKING:
    from deris_llm.models.deris import Deris

TOLERANCE = 1e-4
"""Of an array's deviation over its std. Rounding of the public code itself makes up to 1.3e-5 (a rerun in float64)."""
LOSS_TOLERANCE = 1e-4  # relative; measured worst 9.5e-7 in mode grid, 3e-6 in mode random
COST_TOLERANCE = 1e-4  # over the std of the costs
GRADIENT_TOLERANCE = 1e-3  # relative
GRADIENT_FLOOR = 1e-5
"""Gradients below this share of the total norm are compared with that: some are zero but for rounding (the biases of
attention keys, which shift all logits of a softmax alike)."""
EPILOG = """\
examples:
  python scripts/parity/model.py --fixtures tests/golden/parity --model B_refcoco
  python scripts/parity/model.py --fixtures tests/golden/parity --losses --json losses.json
  python scripts/parity/model.py --fixtures tests/golden/parity --metrics --similarity --preprocess

The fixtures' own recipe says how they were made; tests/golden/parity is the extract that the tests use.
"""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    group: str  # "arrays", "losses", "metrics", ...
    name: str
    deviation: float  # in the measure of the group; infinite where there is nothing to compare
    tolerance: float
    note: str = ""

    @property
    def is_equal(self) -> bool:
        return self.deviation <= self.tolerance


def compare_arrays(
    arrays: Mapping[str, np.ndarray],
    entries: Mapping[str, Mapping[str, Any]],
    references: Mapping[str, np.ndarray],
    tolerance: float,
) -> list[Row]:
    """Compares full arrays of ours with the stored parts of the public code's.

    Args:
        arrays: ours, by the fixtures' names.
        entries: ``entries`` of ``parity_<model>.json``: shape, slice, std and sums of each array.
        references: what ``parity_<model>.npz`` holds.
        tolerance: of the worst difference over the std; for masks of the share of cells that differ.

    Returns:
        a row per entry, and one for every stored array that has no entry.
    """
    rows = [_compared(name, arrays.get(name), entry, references, tolerance) for name, entry in entries.items()]
    strange = [name for name in references if name not in entries]
    return rows + [Row("arrays", name, math.inf, tolerance, "stored, but not described") for name in strange]


def _compared(
    name: str,
    ours: np.ndarray | None,
    entry: Mapping[str, Any],
    references: Mapping[str, np.ndarray],
    tolerance: float,
) -> Row:
    def differs(why: str) -> Row:
        return Row("arrays", name, math.inf, tolerance, why)

    if ours is None or name not in references:
        return differs("not compared: " + ("our model has no such array" if ours is None else "not in the .npz"))
    if list(ours.shape) != entry["full_shape"]:
        return differs(f"shape {list(ours.shape)}, expected {entry['full_shape']}")
    reference, every = references[name], entry.get("every", 1)
    if "packbits" in entry["slice"]:
        packed = np.packbits(ours, axis=-1).ravel()[::every]
        if packed.shape != reference.ravel().shape:
            return differs(f"{packed.size} packed bytes, expected {reference.size}")
        share = np.unpackbits(packed ^ reference.ravel()).mean() if packed.size else 0.0
        area = entry.get("area", entry.get("true_count"))
        if area is not None:
            counted = ours.reshape(len(area), -1).sum(axis=1) if isinstance(area, list) else ours.sum()
            share = max(share, np.abs(counted - np.asarray(area)).sum() / ours.size)
        return Row("arrays", name, float(share), tolerance, "share of differing cells")
    part = ours[parse_slice(entry["slice"])].astype(np.float64).ravel()[::every]
    stored = reference.astype(np.float64).ravel()
    if part.shape != stored.shape:
        return differs(f"{part.size} numbers in {entry['slice']}, expected {stored.size}")
    scale = entry.get("std") or float(stored.std()) or float(np.abs(stored).max()) or 1.0
    deviation = float(np.abs(part - stored).max()) / scale
    if "abs_sum" in entry:
        total = float(np.abs(ours.astype(np.float64)).sum())
        deviation = max(deviation, abs(total - entry["abs_sum"]) / max(entry["abs_sum"], 1e-12))
    return Row("arrays", name, deviation if math.isfinite(deviation) else math.inf, tolerance)


def parse_slice(text: str) -> tuple[Any, ...]:
    """Reads numpy indexing such as ``[:, ::3, 5::16]`` or ``[..., ::2]`` without running it; any other text is the whole.

    Raises:
        ValueError: brackets that hold something else.
    """
    if not text.startswith("["):
        return (Ellipsis,)
    parts: list[Any] = []
    for part in text.strip("[]").split(","):
        numbers = part.strip().split(":")
        if part.strip() == "...":
            parts.append(Ellipsis)
        elif len(numbers) in (2, 3) and all(not n or n.lstrip("-").isdigit() for n in numbers):
            parts.append(slice(*(int(n) if n else None for n in numbers)))
        else:
            raise ValueError(f"slice {text!r}: expected parts like 5::16, : or ..., got {part.strip()!r}")
    return tuple(parts)


class _ModelChecks:
    """The fixtures of a model; it is built once for arrays and losses."""

    def __init__(self, folder: Path, model: str) -> None:
        from scripts.parity.arrays import DroppedHeads, build_parity_model
        from scripts.parity.recipe import MODELS, recipe_inputs, recipe_state_dict

        self.folder = folder
        self.name = model
        self.run_config = MODELS[model].run_config
        tensors, self.sha256 = recipe_state_dict(folder, model)
        self.heads = DroppedHeads(tensors)
        self.model: Deris = build_parity_model(self.run_config, tensors)
        self.inputs = recipe_inputs(MODELS[model].seeds)

    def array_rows(self, tolerance: float) -> list[Row]:
        """Arrays of the batch of two, and of each phrase alone where the fixtures have them."""
        from scripts.parity.arrays import UNION, forward_arrays, parity_batch

        described = _read_json(self.folder / f"parity_{self.name}.json")
        entries = described["entries"]
        rows = [
            Row("arrays", "weights_sha256", float(self.sha256 != described["weights_sha256"]), 0.0, "rebuilt weights"),
            *self._input_rows(),
        ]
        thresholds = [name.removeprefix(UNION) for name in entries if name.startswith(UNION)]
        arrays = forward_arrays(self.model, self.heads, parity_batch(self.inputs), thresholds=thresholds)
        for row in range(len(self.inputs.image)):
            prefix = f"b1_{row}_"
            if any(name.startswith(prefix) for name in entries):
                alone = forward_arrays(self.model, self.heads, parity_batch(self.inputs, slice(row, row + 1)))
                arrays |= {prefix + name: array for name, array in alone.items()}
        return rows + compare_arrays(arrays, entries, _read_npz(self.folder / f"parity_{self.name}.npz"), tolerance)

    def _input_rows(self) -> Iterable[Row]:
        import hashlib

        stored = _read_npz(self.folder / f"inputs_{self.name}.npz")
        texts = (("ref_expr_inds", self.inputs.token_ids), ("text_attention_mask", self.inputs.token_padding))
        for name, ours in texts:
            yield Row("arrays", name, float(not np.array_equal(ours, stored[name])), 0.0, "rebuilt inputs")
        for name, ours in (("img", self.inputs.image), ("img_mini", self.inputs.small_image)):
            digest = hashlib.sha256(np.ascontiguousarray(ours).tobytes()).digest()
            yield Row("arrays", name, float(digest != stored[f"{name}_sha256"].tobytes()), 0.0, "rebuilt inputs")

    def loss_rows(self) -> list[Row]:
        """Every case and mode of ``losses.json``."""
        import torch

        from deris_llm.config import load_config
        from deris_llm.losses.criterion import build_criterion
        from scripts.parity.arrays import forward_arrays, parity_batch
        from scripts.parity.losses import gradient_norms, grid_losses, random_losses, read_case

        cases = {name: case for name, case in _read_json(self.folder / "losses.json").items() if name != "_meta"}
        arrays = _read_npz(self.folder / "losses.npz")
        criterion = build_criterion(load_config(self.run_config))
        batch = parity_batch(self.inputs)
        output = self.model(batch)
        drawn = forward_arrays(self.model, self.heads, batch)
        boxes = [torch.from_numpy(drawn[f"r{i}_boxes"]) for i in range(len(output.rounds))]
        rows: list[Row] = []
        for name, expected in cases.items():
            letter, mode = name.split("_")
            case = read_case(arrays, letter, expected["refer_target_index"])
            losses = (grid_losses if mode == "grid" else random_losses)(criterion, output, boxes, case)
            for group, ours in (("raw", losses.raw), ("weighted", losses.weighted)):
                rows += [
                    Row("losses", f"{name}.{group}.{key}", _relative(ours.get(key), value), LOSS_TOLERANCE)
                    for key, value in expected[group].items()
                ]
            rows.append(
                Row(
                    "losses",
                    f"{name}.total",
                    _relative(float(losses.total.detach()), expected["total"]),
                    LOSS_TOLERANCE,
                )
            )
            is_same = losses.matching == expected["matching"]
            rows.append(Row("losses", f"{name}.matching", float(not is_same), 0.0, "identical pairs"))
            for number, of_output in enumerate(losses.costs):
                for phrase, ours in enumerate(of_output):
                    key = f"{name}_cost_out{number}_img{phrase}"
                    scale = float(arrays[key].std()) if arrays[key].size else 1.0
                    worst = float(np.abs(ours - arrays[key]).max()) / scale if ours.size else float(arrays[key].size)
                    rows.append(Row("losses", key, worst, COST_TOLERANCE, "over the std of the costs"))
            if "grad_l2" in expected:
                norms, total = gradient_norms(self.model, losses.total, expected["grad_l2"])
                rows += _gradient_rows(name, norms, total, expected)
        return rows


def _gradient_rows(
    case: str, norms: Mapping[str, float | None], total: float, expected: Mapping[str, Any]
) -> list[Row]:
    """Gradient norms by name; a parameter that our model lacks must have none, or exactly zero, there."""
    rows = [Row("losses", f"{case}.grad_total_norm", _relative(total, expected["grad_total_norm"]), GRADIENT_TOLERANCE)]
    floor = GRADIENT_FLOOR * expected["grad_total_norm"]
    for name, value in expected["grad_l2"].items():
        ours = norms[name]
        if ours is None:
            rows.append(Row("losses", f"{case}.grad.{name}", float(value or 0.0), 0.0, "not in our model"))
        else:
            deviation = math.inf if value is None else abs(ours - value) / max(value, floor)
            rows.append(Row("losses", f"{case}.grad.{name}", deviation, GRADIENT_TOLERANCE))
    return rows


def _relative(ours: float | None, expected: float) -> float:
    if ours is None or not math.isfinite(ours):
        return math.inf
    return abs(ours - expected) / abs(expected) if expected else abs(ours)


def run_checks(
    folder: Path, *, model: str | None, losses: bool, functions: Sequence[str], tolerance: float = TOLERANCE
) -> list[Row]:
    """Runs what is asked for.

    Args:
        folder: of the fixtures.
        model: whose arrays are compared; None = none.
        losses: compare those of ``losses.json``, whose model it names.
        functions: some of metrics, similarity, preprocess.
        tolerance: of the arrays.

    Raises:
        ValueError: a fixture is missing or of an unknown model.
        OSError: a fixture cannot be read.
    """
    from scripts.parity import functions as parity_functions

    rows: list[Row] = []
    for name in functions:
        found = getattr(parity_functions, f"check_{name}")(folder)
        rows += [Row(name, row.name, row.deviation, row.tolerance) for row in found]
    checks: dict[str, _ModelChecks] = {}

    def checks_of(name: str) -> _ModelChecks:
        _check_model(folder, name)
        if name not in checks:
            checks[name] = _ModelChecks(folder, name)
        return checks[name]

    if model is not None:
        rows += checks_of(model).array_rows(tolerance)
    if losses:
        rows += checks_of(_read_json(folder / "losses.json")["_meta"]["model"]).loss_rows()
    return rows


def _check_model(folder: Path, name: str) -> None:
    from scripts.parity.recipe import MODELS

    if name not in MODELS:
        raise ValueError(f"--model: expected one of {', '.join(MODELS)}, got {name!r}; see the fixtures' recipe")
    absent = [file for file in (f"keys_{name}.json", f"inputs_{name}.npz") if not (folder / file).is_file()]
    if absent:
        raise ValueError(
            f"--fixtures {folder}: expected the fixtures of {name}, got no {', '.join(absent)}; give the folder that holds them"
        )


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: expected a parity fixture, got no such file; give the folder of the fixtures")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a parity fixture, got no such file; give the folder of the fixtures")
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python scripts/parity/model.py",
        description="Compares our model and functions with what the public DeRIS code computed (parity fixtures).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fixtures", type=Path, required=True, metavar="DIR", help="folder of the fixtures")
    parser.add_argument("--model", metavar="NAME", help="compare all arrays of B_refcoco, B_grefcoco or L_refcoco")
    parser.add_argument("--losses", action="store_true", help="compare losses, matching and gradient norms")
    parser.add_argument("--metrics", action="store_true", help="compare RES, GRES and GREC metrics")
    parser.add_argument("--similarity", action="store_true", help="compare phrase similarity and conversion")
    parser.add_argument("--preprocess", action="store_true", help="compare pictures, masks and cleaned phrases")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help=f"of an array's worst deviation over its std (default {TOLERANCE:g})",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every comparison as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparisons and prints a table.

    Returns:
        0 all within tolerance, 1 something is not, 2 unusable arguments or fixtures.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    functions = [name for name in ("metrics", "similarity", "preprocess") if getattr(arguments, name)]
    if arguments.model is None and not arguments.losses and not functions:
        parser.error("say what to compare: --model NAME, --losses, --metrics, --similarity, --preprocess")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries greet on stdout
            rows = run_checks(
                arguments.fixtures,
                model=arguments.model,
                losses=arguments.losses,
                functions=functions,
                tolerance=arguments.tolerance,
            )
    except (ValueError, OSError, KeyError) as error:
        sys.stderr.write(f"error: {type(error).__name__ + ': ' if isinstance(error, KeyError) else ''}{error}\n")
        return 2
    _show(rows)
    if arguments.json is not None:
        report = {"rows": [asdict(row) | {"is_equal": row.is_equal} for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1, allow_nan=True) + "\n", encoding="utf-8")
    return int(not all(row.is_equal for row in rows))


def _show(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    for group in dict.fromkeys(row.group for row in rows):
        of_group = [row for row in rows if row.group == group]
        table = Table(
            Column(group, overflow="fold"), Column("deviation", justify="right"), Column("tolerance", justify="right"), "", "",
        )  # fmt: skip
        for row in _listed(of_group):
            mark = "equal" if row.is_equal else "[bold red]DIFFERS[/]"
            table.add_row(row.name, f"{row.deviation:.1e}", f"{row.tolerance:.0e}", mark, row.note)
        console.print(table)
        worst = max(of_group, key=lambda row: row.deviation / max(row.tolerance, 1e-30))
        num_equal = sum(row.is_equal for row in of_group)
        console.print(
            f"{group}: {num_equal} of {len(of_group)} equal; nearest to its tolerance: {worst.name} "
            f"({worst.deviation:.1e} of {worst.tolerance:.0e})\n",
            highlight=False,
        )


def _listed(rows: Sequence[Row]) -> list[Row]:
    """All rows, but of the thousands of gradients only those that differ and the five nearest to it."""
    gradients = sorted((row for row in rows if ".grad." in row.name), key=lambda row: -row.deviation)
    left_out = {row.name for row in gradients[5:] if row.is_equal}
    return [row for row in rows if row.name not in left_out]


if __name__ == "__main__":
    sys.exit(main())
