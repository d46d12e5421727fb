"""A run in which nothing moves ends, and the rank that stopped is named. The ranks here are processes without a model."""

import os
import signal
import time

import pytest

from deris_llm.common.error_file import ERROR_FILE, HUNG, read_error_file
from deris_llm.training.watchdog import Watchdog


def start_rank(folder, rank, behave, *, seconds=2.0):
    """Forks a rank that computes steps for a second, then behaves."""
    child = os.fork()
    if child:
        return child
    os.environ[ERROR_FILE] = str(folder / f"error-{rank}.json")
    watchdog = Watchdog(folder, seconds, rank=rank, num_ranks=2)
    with watchdog.watching():
        for step in range(10):
            watchdog.tick(f"computing step {step + 1}")
            time.sleep(0.1)
        behave(watchdog)
    os._exit(0)


def status_of(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait(watchdog):
    watchdog.tick("computing step 11")
    time.sleep(60)


def test_a_stopped_process_is_named(tmp_path):
    (tmp_path / "checkpoint-8").mkdir()
    waiting = start_rank(tmp_path, 0, wait)
    stopped = start_rank(tmp_path, 1, lambda _: os.kill(os.getpid(), signal.SIGSTOP))
    try:
        assert status_of(waiting) == HUNG == 124
    finally:
        os.kill(stopped, signal.SIGKILL)
        os.waitpid(stopped, 0)
    said = read_error_file(tmp_path / "error-0.json").splitlines()
    assert (
        said[0]
        == "computing step 11: expected progress within 2 s (training.hang_seconds), got none; the run was ended"
    )
    assert said[1].startswith(f"  - rank 1 does not run (process {stopped} on ")
    assert said[1].endswith("; last seen computing step 10)")
    assert said[2].startswith(f"  - rank 0 waits computing step 11 (process {waiting} on ")
    assert "it resumes from" in said[3]
    assert "checkpoint-8" in said[3]
    assert "time.sleep" not in said[3]
    assert "test_watchdog.py" in (tmp_path / "hang-rank-0.txt").read_text()  # where the rank stood


def test_a_rank_that_lives_but_does_not_go_on_is_named(tmp_path):
    ranks = [start_rank(tmp_path, 0, wait), start_rank(tmp_path, 1, lambda _: time.sleep(60))]
    assert [status_of(rank) for rank in ranks] == [HUNG, HUNG]
    for rank in (0, 1):
        said = read_error_file(tmp_path / f"error-{rank}.json")
        if "rank 1 has stopped" in said:
            return
    pytest.fail(said)


@pytest.mark.parametrize("seconds", [0, 30])
def test_a_run_that_ends_or_is_not_watched_leaves_nothing(tmp_path, seconds):
    assert status_of(start_rank(tmp_path, 0, lambda _: None, seconds=seconds)) == 0
    assert list(tmp_path.iterdir()) == []
