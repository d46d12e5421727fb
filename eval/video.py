"""Evaluates a checkpoint on MeViS, Ref-YouTube-VOS and Ref-DAVIS17: `deris-llm eval`, whose options it takes, with three splits."""

from __future__ import annotations

import sys

from deris_llm.cli.main import main as deris_llm

SPLITS = ("mevis/valid_u", "ref-ytvos/valid", "ref-davis/val")


def main() -> int:
    """Runs `deris-llm eval`; options of the command line, also `--splits`, come after the default splits and win."""
    return deris_llm(["eval", "--splits", *SPLITS, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
