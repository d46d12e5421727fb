"""`python -m deris_llm.cli`."""

import sys

from deris_llm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
