"""Keeps two processes from writing into the same folder, with a lock file that the writing process holds.

The lock is the system's (`flock`), not the file's existence: it ends with the process, however the process ends, so a file that
a killed process left behind blocks nobody. Between machines it depends on the shared file system: NFS (version 3 with its lock
daemon, or 4) and most cluster file systems pass locks on. Where locks are refused, a warning says so; where they are kept to
each machine, a file that another machine left behind is named in a warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deris_llm.common.folders import FolderError

logger = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds: a process that was just killed takes a moment to end
_held: set[int] = set()  # open files of this process


class InUseError(FolderError):
    """Another process writes to a folder."""


@contextlib.contextmanager
def locked(path: Path, where: str) -> Iterator[None]:
    """Holds the lock of a folder; no other process can hold it meanwhile. Processes that are forked inside do not hold it.

    Args:
        path: the lock file, in or beside the folder. It exists while the lock is held.
        where: the option and the folder, which begin the message.

    Raises:
        InUseError: another process still holds it after ten seconds.
        FolderError: the file cannot be created.
    """
    handle = _acquired(path, where)
    try:
        yield
    finally:
        if handle is not None:
            _held.discard(handle)
            with contextlib.suppress(OSError):
                path.unlink()  # before the lock ends: whoever opened this file meanwhile sees that it is gone
            os.close(handle)


def _acquired(path: Path, where: str) -> int | None:
    """Returns the open, locked file; None where the file system has no locks."""
    deadline, is_waiting = time.monotonic() + _PATIENCE, False
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise FolderError(
                f"{where}: expected to create the lock file {path}, got {error}. If no other process writes there, remove the "
                "file; otherwise choose another place"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(handle)
            os.close(handle)
            if time.monotonic() > deadline:
                raise InUseError(
                    f"{where}: expected a folder that no other process writes to, got one in use by {_described(holder)}. Wait for "
                    "that process or end it, or give another folder"
                ) from error
            if not is_waiting:
                logger.info("%s is in use by %s; waiting up to %.0f s", where, _described(holder), _PATIENCE)
            is_waiting = True
            time.sleep(0.2)
            continue
        except OSError as error:
            os.close(handle)
            logger.warning(
                "%s: its file system has no locks (%s): make sure that no second process writes there", where, error
            )
            return None
        if _is_current(handle, path):
            _write_holder(handle, where)
            _held.add(handle)
            return handle
        os.close(handle)  # its former holder removed the file


def _is_current(handle: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _write_holder(handle: int, where: str) -> None:
    """Writes who holds the lock, for the messages of others, and warns of a holder that did not end cleanly elsewhere."""
    before, host = _holder(handle), socket.gethostname()
    if before and before.get("host") != host:
        logger.warning(
            "%s was written to by %s, which did not end cleanly. If that process still runs, end it: the lock of this file system may "
            "not reach other machines",
            where,
            _described(before),
        )
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"process": os.getpid(), "host": host, "since": started, "command": command})
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)


def _holder(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    here = "this machine" if holder.get("host") == socket.gethostname() else holder.get("host")
    return f"process {holder.get('process')} on {here} (since {holder.get('since')}: {holder.get('command')})"


def _close_in_child() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
