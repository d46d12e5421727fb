"""Why a rank stops, said where a launcher's own lines do not bury it.

Below the message of a rank that fails, torchrun and DeepSpeed's launcher print a screenful of their own. torchrun names a
file for each rank in its environment and ends with what it finds there; `launch.launch` does the same for DeepSpeed's.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of torchrun: JSON of a `message` and a `timestamp` (seconds)."""


def leave_last_words(message: str) -> None:
    """Keeps why this rank stops for its launcher, where there is one; of ranks with the same file the first one counts."""
    if name := os.environ.get(ERROR_FILE):
        with contextlib.suppress(OSError), open(name, "x", encoding="utf-8") as file:
            json.dump({"message": message, "timestamp": int(time.time())}, file)


def last_words(file: Path) -> str:
    """What a rank left; empty where none did."""
    return json.loads(file.read_text(encoding="utf-8"))["message"] if file.is_file() else ""
