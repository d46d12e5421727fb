"""Evaluates a checkpoint on RefCOCO, RefCOCO+ and RefCOCOg: the same as `deris-llm eval`."""

from __future__ import annotations

import argparse
import sys

from deris_llm.cli.main import main as deris_llm

SPLITS = (
    "refcoco/val", "refcoco/testA", "refcoco/testB",
    "refcoco+/val", "refcoco+/testA", "refcoco+/testB",
    "refcocog_umd/val", "refcocog_umd/test",
)  # fmt: skip


def main() -> int:
    """Parses and calls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="checkpoint folder of a run, e.g. runs/X/best"
    )
    parser.add_argument("--splits", nargs="+", default=SPLITS, metavar="SPLIT", help="default: all eight")
    parser.add_argument("--out", required=True, metavar="DIR", help="report.json, predictions and pictures go here")
    parser.add_argument(
        "--data-root", metavar="DIR", help="where the data is, if not where the checkpoint's config says"
    )
    arguments = parser.parse_args()
    command = ["eval", "--checkpoint", arguments.checkpoint, "--splits", *arguments.splits, "--output", arguments.out]
    return deris_llm(command + (["--set", f"data.root={arguments.data_root}"] if arguments.data_root else []))


if __name__ == "__main__":
    sys.exit(main())
