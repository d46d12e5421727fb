"""Reads pickles of plain data and runs nothing: REFER's ``refs(unc).p`` come from anywhere.

A pickle is a program. It can only call what it can name, so a reader that resolves no name at all builds nothing but
what the format's own opcodes build: None, bool, int, float, str, bytes, list, tuple, dict and set.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

MAX_PICKLE_BYTES = 512 * 2**20
"""REFER's largest file is about 40 MB."""


# What a damaged or hostile stream makes the unpickler raise; none of them comes from code of the file.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)


class UnsafePickleError(ValueError):
    """A pickle that asks for more than plain data."""


def load_plain_pickle(path: str | Path, *, max_bytes: int = MAX_PICKLE_BYTES) -> Any:
    """Reads a pickle that holds plain data only; nothing named inside it is imported or called.

    Text of Python 2 is read as UTF-8, else as Latin-1 (REFER's files were written by Python 2).

    Raises:
        UnsafePickleError: the file names a global (class or function), a persistent id or an extension code.
        ValueError: the file is too large or no whole pickle.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(
            f"{path}: expected a pickle of plain data of at most {max_bytes:,} bytes, got {size:,} bytes. "
            "Check that this is the annotation file (REFER's have about 40 MB at most)"
        )
    data = path.read_bytes()
    # A cached extension code would be handed out without asking find_class.
    copyreg.clear_extension_cache()
    try:
        return _loads(path, data, "utf-8")
    except UnicodeDecodeError:
        return _loads(path, data, "latin-1")


def _loads(path: Path, data: bytes, encoding: str) -> Any:
    try:
        return _PlainUnpickler(path, data, encoding).load()
    except (UnsafePickleError, UnicodeDecodeError):
        raise
    except _DAMAGE as error:
        raise ValueError(
            f"{path}: expected a whole pickle of plain data, got {len(data):,} bytes that break off or are damaged "
            f"({type(error).__name__}: {error}). Download or write the file again"
        ) from error


class _PlainUnpickler(pickle.Unpickler):
    """Resolves no name."""

    def __init__(self, path: Path, data: bytes, encoding: str) -> None:
        super().__init__(io.BytesIO(data), encoding=encoding)
        self._path = path

    def find_class(self, module: str, name: str, /) -> NoReturn:
        self._refuse(f"the global {module}.{name}")

    def persistent_load(self, pid: Any, /) -> NoReturn:
        self._refuse("a persistent id")

    def _refuse(self, what: str) -> NoReturn:
        raise UnsafePickleError(
            f"{self._path}: expected a pickle of plain lists, dicts, texts and numbers, got one that asks for {what}. "
            "It was refused before anything of it ran. Do not open it with pickle; get the file from its official "
            "source, or, if you made it, write it again with plain values (e.g. int(x) instead of numpy.int64)"
        )
