"""Scores anybody's predictions, lines of JSON or PNG masks, with eval's metrics: the same as `deris-llm score`."""

from __future__ import annotations

import sys

from deris_llm.cli.main import main as deris_llm


def main() -> int:
    """Hands the arguments on; `--help` explains them."""
    return deris_llm(["score", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
