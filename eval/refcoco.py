"""Evaluates a checkpoint on RefCOCO, RefCOCO+ and RefCOCOg: `deris-llm eval`, whose options it takes, with their eight splits."""

from __future__ import annotations

import sys

from deris_llm.cli.main import main as deris_llm

SPLITS = (
    "refcoco/val", "refcoco/testA", "refcoco/testB",
    "refcoco+/val", "refcoco+/testA", "refcoco+/testB",
    "refcocog_umd/val", "refcocog_umd/test",
)  # fmt: skip


def main() -> int:
    """Runs `deris-llm eval`; options of the command line, also `--splits`, come after the default splits and win."""
    return deris_llm(["eval", "--splits", *SPLITS, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
