"""A short campaign of hostile input with a fixed seed; `scripts/rehearse/hostile.py` is the whole one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.rehearse.hostile import table
from scripts.rehearse.hostile_child import Outcome
from scripts.rehearse.hostile_readers import READERS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/rehearse/hostile.py"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it forks processes and reads /proc")


def test_no_fault_in_a_short_campaign():
    readers = ["refer pickle", "coco", "jsonl", "run config", "overrides"]
    command = [sys.executable, SCRIPT, "--light", "--inputs", "12", "--seed", "17", "--readers", *readers]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | 60 |" in done.stdout


def test_the_table_counts_what_became_of_the_inputs():
    found = [("coco", Outcome(kind)) for kind in ("clear error", "accepted", "hang", "clear error")]
    assert table([*found, ("jsonl", Outcome("terminal"))]).splitlines()[2:] == [
        "| coco | 4 | 2 | 1 | 1 |", "| jsonl | 1 | 0 | 0 | 1 |", "| all | 5 | 2 | 1 | 2 |"
    ]  # fmt: skip


def test_every_reader_has_a_name_of_its_own():
    assert len({reader.name for reader in READERS}) == len(READERS) >= 33
