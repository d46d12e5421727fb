"""Evaluates a checkpoint on gRefCOCO (a phrase names none, one or several): `deris-llm eval`, whose options it takes."""

from __future__ import annotations

import sys

from deris_llm.cli.main import main as deris_llm

SPLITS = ("grefcoco/val", "grefcoco/testA", "grefcoco/testB")


def main() -> int:
    """Runs `deris-llm eval`; options of the command line, also `--splits`, come after the default splits and win."""
    return deris_llm(["eval", "--splits", *SPLITS, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
