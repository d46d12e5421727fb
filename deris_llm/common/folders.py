"""Writes and replaces folders so that an interruption never leaves an incomplete one under its final name.

A folder NAME is written as ``.partial-NAME``, which becomes ``.complete-NAME`` when everything in it is on disk. An existing
NAME is renamed to ``.replaced-NAME``; then the new folder gets its name and the old one is removed. So at any moment there is
a complete copy that `finish_replacements` restores: it deletes ``.partial-`` folders only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_PARTIAL, _COMPLETE, _REPLACED = ".partial-", ".complete-", ".replaced-"


class FolderError(ValueError):
    """A folder could not be written. Existing folders are untouched."""


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into. It gets its final name at the end of the block and is removed if the block fails.

    Args:
        folder: final name; an existing folder is replaced, and stays whole until then.

    Raises:
        FolderError: a file could not be written (disk full, no permission, ...).
    """
    partial, complete = _named(folder, _PARTIAL), _named(folder, _COMPLETE)
    try:
        if folder.is_file():
            raise NotADirectoryError(f"a file of that name: {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        finish_replacement(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            _wait_for_disk(path)
        partial.rename(complete)
        finish_replacement(folder)
    except BaseException as error:
        _restore(folder)
        if not isinstance(error, OSError):
            raise
        free = shutil.disk_usage(folder.parent).free / 2**20 if folder.parent.is_dir() else 0.0
        kept = f"it is complete in {complete}" if complete.exists() else "nothing of it was kept"
        raise FolderError(
            f"{folder}: expected to write this folder, got {error} ({free:,.0f} MiB free there); {kept}, and earlier folders and "
            f"checkpoints are intact. Make room or choose another place, then run the same command again"
        ) from error
    _wait_for_disk(folder.parent)


def finish_replacements(parent: Path) -> None:
    """Finishes interrupted writes in a folder: complete folders get their names, incomplete ones are removed."""
    for prefix in (_COMPLETE, _REPLACED):
        for path in sorted(parent.glob(f"{prefix}*")):
            logger.warning("%s: finishing a save that was interrupted", path)
            finish_replacement(parent / path.name.removeprefix(prefix))
    for path in parent.glob(f"{_PARTIAL}*"):
        logger.warning("removing %s: a save that never finished", path.name)
        _delete(path)


def finish_replacement(folder: Path) -> None:
    """Renames the complete copy of a folder to its final name and removes the copy that it replaces."""
    complete, replaced = _named(folder, _COMPLETE), _named(folder, _REPLACED)
    if complete.exists():
        if os.path.lexists(folder):
            if os.path.lexists(replaced):  # of an earlier replacement; `folder` is complete
                remove_folder(replaced)
            folder.rename(replaced)
        complete.rename(folder)
    if os.path.lexists(replaced):
        if folder.exists():
            with contextlib.suppress(OSError):  # the next start removes it
                remove_folder(replaced)
        else:
            replaced.rename(folder)


def complete_copy(folder: Path) -> Path:
    """Returns where a folder's newest complete copy is: under its own name, unless its replacement was interrupted."""
    if folder.exists():
        return folder
    return next((path for prefix in (_COMPLETE, _REPLACED) if (path := _named(folder, prefix)).exists()), folder)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file aside and renames it, so that readers see the old or the new file and never a part of one.

    A name that is not UTF-8 is escaped.
    """
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(aside, path)


def remove_folder(folder: Path) -> None:
    """Removes a folder. An interruption leaves no incomplete folder under its name."""
    partial = _named(folder, _PARTIAL)
    if os.path.lexists(partial):
        _delete(partial)
    _delete(folder.rename(partial))


def check_writable(folder: Path, where: str) -> None:
    """Creates a folder if needed and checks, before any slow work, that files can be written to it.

    Args:
        folder: of results.
        where: the option that names it, for the message.

    Raises:
        FolderError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise FolderError(
            f"{where} {folder}: expected a folder that can be written to, got {error}. Choose another place, or make room or "
            "change the permissions there"
        ) from error


def link_or_copy(source: str, target: str) -> None:
    """Makes a hard link, or a copy if the file system has none. For files that are never changed in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _named(folder: Path, prefix: str) -> Path:
    return folder.with_name(f"{prefix}{folder.name}")


def _restore(folder: Path) -> None:
    """Restores the previous folder after a failure as far as possible now; the next start does the rest."""
    replaced = _named(folder, _REPLACED)
    with contextlib.suppress(OSError):
        if not os.path.lexists(folder) and replaced.exists():
            replaced.rename(folder)
    shutil.rmtree(_named(folder, _PARTIAL), ignore_errors=True)


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def _wait_for_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_new_folder(out: Path) -> None:
    """Raises ValueError if the output folder exists and is not empty, or is a file."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(
            f"--out {out}: expected a new folder, got {'one that is not empty' if out.is_dir() else 'a file'}; "
            "choose another name, or remove it."
        )
