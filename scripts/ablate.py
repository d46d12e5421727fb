#!/usr/bin/env python
"""Trains and evaluates the rows of a table of the paper, and prints the numbers beside the paper's; `--help` has examples."""

import sys

from deris_llm.ablation import main

if __name__ == "__main__":
    sys.exit(main())
