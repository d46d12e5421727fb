"""A short campaign of `scripts/rehearse/faults.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_five_rounds_end_as_the_undisturbed_run():
    faults = ["sigterm", "kill-in-save", "flipped-byte", "stopped-rank", "one-rank-fails-in-evaluation"]
    command = [
        sys.executable,
        "scripts/rehearse/faults.py",
        "--rounds",
        "5",
        "--seed",
        "1",
        "--ranks",
        "2",
        "--zero",
        "3",
    ]
    done = subprocess.run(
        [*command, "--faults", *faults],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "5 rounds (seed 1), 5 passed, 0 failed" in done.stdout
