"""Evaluates a checkpoint on gRefCOCO (a phrase names none, one or several): the same as `deris-llm eval`."""

from __future__ import annotations

import argparse
import sys

from deris_llm.cli.main import main as deris_llm

SPLITS = ("grefcoco/val", "grefcoco/testA", "grefcoco/testB")


def main() -> int:
    """Parses and calls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="checkpoint folder of a run, e.g. runs/X/best"
    )
    parser.add_argument("--splits", nargs="+", default=SPLITS, metavar="SPLIT", help="default: all three")
    parser.add_argument("--out", required=True, metavar="DIR", help="report.json, predictions and pictures go here")
    parser.add_argument(
        "--data-root", metavar="DIR", help="where the data is, if not where the checkpoint's config says"
    )
    parser.add_argument(
        "--presence", choices=("none", "multiply", "gate"), help="how presence decides, if not as the config says"
    )
    arguments = parser.parse_args()
    command = ["eval", "--checkpoint", arguments.checkpoint, "--splits", *arguments.splits, "--output", arguments.out]
    changes = [f"data.root={arguments.data_root}"] if arguments.data_root else []
    changes += [f"evaluation.presence={arguments.presence}"] if arguments.presence else []
    return deris_llm(command + (["--set", *changes] if changes else []))


if __name__ == "__main__":
    sys.exit(main())
