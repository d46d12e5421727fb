#!/usr/bin/env python
"""Fine-tunes a run config; started once per GPU by a launcher. `--help` has examples, `deris-llm train` writes the command."""

import sys

from deris_llm.training.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
