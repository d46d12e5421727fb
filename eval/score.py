"""Scores anybody's predictions, lines of JSON or PNG masks, with eval's metrics: `deris-llm score`, whose options it takes."""

from __future__ import annotations

import sys

from deris_llm.cli.main import main as deris_llm


def main() -> int:
    """Runs `deris-llm score`; `--help` lists its options."""
    return deris_llm(["score", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
