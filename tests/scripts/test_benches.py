"""Every bench runs at tiny size; what it asserts, equal results, is then the test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["evaluation.py", "loader.py", "perception.py", "video_metrics.py"])
def test_quick_bench_finds_equal_results(name: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench" / name, "--quick"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ratio" in done.stdout
    assert not list(tmp_path.iterdir()), "a bench leaves nothing behind"


def test_requests_to_a_pipeline_in_all_ways_give_equal_scores(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench" / "serve.py", "--quick"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a phrase at a time" in done.stdout
    assert "over 4 requests" in done.stdout
