"""Passes a rank's error message to its launcher, which prints it last.

Below the message of a rank that fails, torchrun and DeepSpeed's launcher print a screenful of their own. torchrun sets a file
for each rank in its environment and prints its content at the end; `training.launch` does the same for DeepSpeed's launcher.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from deris_llm.common.words import printable

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells, and after SIGTERM or SIGUSR1: the run can be resumed."""

HUNG = 124
"""Exit status of a run that made no progress for `training.hang_seconds`, as `timeout` ends a command."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""torchrun's environment variable: path of a JSON file with a `message` and a `timestamp` (seconds)."""

QUIET = "DERIS_LLM_LAUNCHER_SAYS_WHY"
"""Environment variable of a rank whose launcher prints its error file, so that the rank does not print the message too."""


def write_error_file(message: str) -> bool:
    """Writes why this rank stops for its launcher, if there is one. The first of several ranks with the same file wins.

    Returns:
        whether this rank should print the message: it is the first one, or no launcher reads it.
    """
    name = os.environ.get(ERROR_FILE)
    if not name:
        return True
    try:
        with open(name, "x", encoding="utf-8") as file:
            json.dump({"message": printable(message), "timestamp": int(time.time())}, file)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def read_error_file(file: Path) -> str:
    """Returns the message that a rank wrote, or an empty text."""
    return json.loads(file.read_text(encoding="utf-8"))["message"] if file.is_file() else ""
