"""Why a rank stops, said where a launcher's own lines do not bury it.

Below the message of a rank that fails, torchrun and DeepSpeed's launcher print a screenful of their own. torchrun names a
file for each rank in its environment and ends with what it finds there; `launch.launch` does the same for DeepSpeed's.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of torchrun: JSON of a `message` and a `timestamp` (seconds)."""

QUIET = "DERIS_LLM_LAUNCHER_SAYS_WHY"
"""Environment variable of a rank whose launcher prints its last words, so that the rank does not print them too."""


def leave_last_words(message: str) -> bool:
    """Keeps why this rank stops for its launcher, where there is one; of ranks with the same file the first one counts.

    Returns:
        whether this rank is to print it: it is the first one, or nobody collects.
    """
    name = os.environ.get(ERROR_FILE)
    if not name:
        return True
    try:
        with open(name, "x", encoding="utf-8") as file:
            json.dump({"message": message, "timestamp": int(time.time())}, file)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def last_words(file: Path) -> str:
    """What a rank left; empty where none did."""
    return json.loads(file.read_text(encoding="utf-8"))["message"] if file.is_file() else ""
