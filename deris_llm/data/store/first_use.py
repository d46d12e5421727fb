"""Prepares sources on first use and keeps the result: `prepared_once`.

    CACHE/KEY/NAME/    a prepared set, see `deris_llm.data.store.prepared`

CACHE is ROOT/.deris_llm or, if ROOT is read-only, a folder in the user's cache. KEY is a hash of the content of the source:
changed files are prepared again, moved ones are not.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deris_llm.common.folders import FolderError, written_aside
from deris_llm.common.terminal import console
from deris_llm.data.store.prepared import MANIFEST_FILE

if TYPE_CHECKING:
    from deris_llm.data.formats.base import PrepareOptions

logger = logging.getLogger(__name__)

CACHE_FOLDER = ".deris_llm"


def prepared_once(root: Path, name: str, key: str, options: Callable[[Path], PrepareOptions]) -> tuple[Path, bool]:
    """Finds a prepared set by name and key, or makes it.

    Args:
        root: the folder that holds the source.
        name: of the set.
        key: hash of the source's content and of what else the set depends on.
        options: the folder to write -> what to prepare.

    Returns:
        The folder of the set, and whether it was made now.

    Raises:
        DataError: the source cannot be used.
        FolderError: no cache can be written.
    """
    if (found := _found(root, name, key)) is not None:
        return found, False
    cache = _writable_cache(root)
    with _locked(cache / "lock"):
        if (found := _found(root, name, key)) is not None:  # another process may have prepared it meanwhile
            return found, False
        _prepare(root, name, cache / key, options)
    return cache / key / name, True


def _found(root: Path, name: str, key: str) -> Path | None:
    places = (cache / key / name for cache in _caches(root))
    return next((place for place in places if (place / MANIFEST_FILE).is_file()), None)


def _caches(root: Path) -> tuple[Path, Path]:
    of_user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / CACHE_FOLDER, of_user / "deris_llm" / "data"


def _writable_cache(root: Path) -> Path:
    in_root, of_user = _caches(root)
    problems = []
    for cache in (in_root, of_user):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=cache):
                pass
        except OSError as error:
            problems.append(str(error))
            continue
        if cache == of_user:
            logger.warning("%s is not writable (%s); prepared data go to %s", in_root, problems[0], of_user)
        return cache
    raise FolderError(
        f"{in_root} and {of_user}: expected one of them to be writable, for prepared data, got {'; '.join(problems)}. Make room "
        "or change the permissions, or set XDG_CACHE_HOME"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process of a machine prepare while the others wait."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks; `train` lets rank 0 go first anyway
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare(root: Path, name: str, folder: Path, options: Callable[[Path], PrepareOptions]) -> None:
    # The readers of all formats are needed here only; commands start faster without them.
    from deris_llm.data.store.prepare import prepare

    logger.info("preparing %s of %s, once; the result is kept in %s", name, root, folder.parent)
    with written_aside(folder) as partial, _progress(f"preparing {name} (once)") as on_progress:
        prepare(options(partial / name), on_progress=on_progress)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar on a terminal; a log has the line of `_prepare`."""
    from rich.progress import Progress  # slow to import, and needed here only

    with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda _, done, total: progress.update(task, completed=done, total=total)
