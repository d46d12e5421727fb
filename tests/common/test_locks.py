"""A folder has one writer; a writer that died blocks nobody."""

import multiprocessing
import os
import signal
import time

import pytest

from deris_llm.common import locks
from deris_llm.common.folders import FolderError
from deris_llm.common.locks import InUseError, locked


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE", 0.5)


def start_holder(path):
    """Starts a process that holds the lock until it is killed; returns its id once the lock is held."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(path, "--output run"):
            os.write(writing, b"1")
            time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    return child


def test_a_second_writer_is_refused_and_the_first_one_is_named(tmp_path):
    holder = start_holder(tmp_path / ".lock")
    try:
        with pytest.raises(InUseError) as caught, locked(tmp_path / ".lock", "--output run"):
            pass
        said = str(caught.value)
        assert said.startswith(
            "--output run: expected a folder that no other process writes to, got one in use by process "
        )
        assert f"process {holder} on this machine (since 20" in said
        assert "give another folder" in said
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert (tmp_path / ".lock").is_file()  # left behind by the killed process, and no obstacle
    with locked(tmp_path / ".lock", "--output run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ends_in_time_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE", 20.0)
    holder = start_holder(tmp_path / ".lock")
    killer = multiprocessing.get_context("fork").Process(target=lambda: (time.sleep(0.5), os.kill(holder, 9)))
    killer.start()
    with locked(tmp_path / ".lock", "--output run"):
        pass
    killer.join()
    os.waitpid(holder, 0)


def test_forked_loader_workers_do_not_keep_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    with locked(tmp_path / ".lock", "--output run"):
        worker = context.Process(target=time.sleep, args=(60,))
        worker.start()
    try:
        with locked(tmp_path / ".lock", "--output run"):
            pass
    finally:
        worker.kill()
        worker.join()


def test_a_file_that_another_machine_left_is_named(tmp_path, caplog):
    (tmp_path / ".lock").write_text(
        '{"process": 7, "host": "node9", "since": "2026-11-30 10:00:00", "command": "train.py"}'
    )
    with locked(tmp_path / ".lock", "--output run"):
        pass
    assert "--output run was written to by process 7 on node9 (since 2026-11-30 10:00:00: train.py)" in caplog.text


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with locked(tmp_path / ".lock", "--output run"):
        pass
    assert "--output run: its file system has no locks ([Errno 37] No locks available)" in caplog.text


def test_a_lock_file_that_cannot_be_created_is_named(tmp_path):
    with (
        pytest.raises(FolderError, match=r"--output run: expected to create the lock file .*none/\.lock, got "),
        locked(tmp_path / "none" / ".lock", "--output run"),
    ):
        pass
