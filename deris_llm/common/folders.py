"""Folders that are whole under their final name, whatever is interrupted.

A folder NAME is written as ``.partial-NAME``, which becomes ``.complete-NAME`` when everything in it is on disk. Where NAME
exists, it is renamed to ``.replaced-NAME``; then the new folder gets its name and the old one is removed. So at every moment
a complete copy has a name that `finish_replacements` does not delete but puts back; only ``.partial-`` names are deleted.
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
    """A folder could not be written; what was there before is untouched."""


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write into; it gets its final name when the block is done, and disappears when the block fails.

    Args:
        folder: final name; a folder of that name is replaced, and stays whole until then.

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
            f"{folder}: expected to write this folder, got {error} ({free:,.0f} MiB free there); {kept} and "
            f"earlier folders, checkpoints too, are whole. Make room or choose another place, then start the same command again"
        ) from error
    _wait_for_disk(folder.parent)


def finish_replacements(parent: Path) -> None:
    """Ends what was interrupted in a folder: complete folders get their name, incomplete ones are removed."""
    for prefix in (_COMPLETE, _REPLACED):
        for path in sorted(parent.glob(f"{prefix}*")):
            logger.warning("%s: finishing a save that was interrupted", path)
            finish_replacement(parent / path.name.removeprefix(prefix))
    for path in parent.glob(f"{_PARTIAL}*"):
        logger.warning("removing %s: a save that never finished", path.name)
        _delete(path)


def finish_replacement(folder: Path) -> None:
    """Gives the complete copy of a folder its name, if it has another one; removes the copy that it replaces."""
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
    """Where a folder's newest complete copy is; its own name, unless its replacement was interrupted."""
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
    """Removes a folder; an interruption leaves nothing under its name that looks like a complete folder."""
    _delete(_renamed(folder, _named(folder, _PARTIAL)))


def check_writable(folder: Path, where: str) -> None:
    """Makes a folder if it is not there, and writes and removes a file in it; for before the work.

    Args:
        folder: that results will go to.
        where: what names it, for the message: `--output`.

    Raises:
        FolderError: it cannot be made or written to.
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
    """A hard link where the file system has them, else a copy; for files that are never changed in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _named(folder: Path, prefix: str) -> Path:
    return folder.with_name(f"{prefix}{folder.name}")


def _restore(folder: Path) -> None:
    """After a failure: the folder as it was, as far as this is possible now; the next start does the rest."""
    replaced = _named(folder, _REPLACED)
    with contextlib.suppress(OSError):
        if not os.path.lexists(folder) and replaced.exists():
            replaced.rename(folder)
    shutil.rmtree(_named(folder, _PARTIAL), ignore_errors=True)


def _renamed(path: Path, target: Path) -> Path:
    if os.path.lexists(target):
        _delete(target)
    return path.rename(target)


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
    """Refuses to write where something is.

    Raises:
        ValueError: a file of that name, or a folder that is not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(
            f"--out {out}: expected a new folder, got {'one that is not empty' if out.is_dir() else 'a file'}; "
            "choose another name, or remove it."
        )
