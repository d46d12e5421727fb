"""Compares the losses of two runs, step by step: `python scripts/rehearse/losses.py RUN OTHER [--steps N] [--tolerance T]`.

A run is a run folder; its newest checkpoint holds the losses. Exit status: 0 if the losses of all steps agree.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def losses_of(run: Path) -> dict[int, float]:
    """Returns the logged loss by step."""
    checkpoints = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    if not checkpoints:
        raise ValueError(
            f"{run}: expected a run folder with a checkpoint-STEP, found none; train with training.save_every"
        )
    history = json.loads(checkpoints[-1].read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the largest relative difference."""
    parser = argparse.ArgumentParser(description="Compares the losses of two runs, step by step.")
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="run folders")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest relative difference (default 0: equal)")
    parser.add_argument("--steps", type=int, help="compare the first N logged steps only (default: all of both)")
    arguments = parser.parse_args(argv)
    try:
        ours, others = (
            {s: x for s, x in losses_of(run).items() if s <= (arguments.steps or s)} for run in arguments.runs
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if ours.keys() != others.keys() or not ours:
        print(f"logged steps differ: {sorted(ours)} and {sorted(others)}")
        return 1
    difference = max(abs(ours[step] - others[step]) / abs(others[step]) for step in ours)
    print(f"losses of {len(ours)} steps: largest relative difference {difference:.1e}")
    return int(difference > arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
