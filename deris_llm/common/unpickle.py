"""Reads pickles and runs nothing of them: REFER's ``refs(unc).p`` and everybody's weights come from anywhere.

A pickle is a program. It can only call what it can name. A reader that resolves no name builds nothing but what the
format's own opcodes build: None, bool, int, float, str, bytes, list, tuple, dict and set. A reader that resolves a few
names to stand-ins of ours (`RestrictedUnpickler`) adds what those stand-ins check and return.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

MAX_PICKLE_BYTES = 512 * 2**20
"""REFER's largest file is about 40 MB."""


# What a damaged or hostile stream makes the unpickler raise; none of them comes from code of the file.
DAMAGE = (
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


class StandIn:
    """What a name of a pickle resolves to: a function of ours that checks its arguments before it makes anything.

    The pickle cannot change it: it has no attributes, and the opcode that would set them (BUILD) is refused.
    """

    __slots__ = ("_function", "_name")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        """Takes the name that a message gives, and the function."""
        self._name = name
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise UnsafePickleError(f"a change of {self._name}")


class RestrictedUnpickler(pickle.Unpickler):
    """Resolves the names it is given, and no other."""

    def __init__(
        self,
        path: Path,
        data: bytes,
        *,
        allowed: Mapping[str, Any],
        expected: str,
        advice: str,
        encoding: str = "utf-8",
        storage: Callable[[object], Any] | None = None,
    ) -> None:
        """Prepares one pickle.

        Args:
            path: for messages.
            data: the pickle; see `pickle_end` for what must have been checked where a hostile one must not fill memory.
            allowed: `module.name` -> what it resolves to, a `StandIn` or a constant.
            expected: what the file should be, for the message of a refusal.
            advice: what to do instead, for the same.
            encoding: of texts of Python 2.
            storage: what a persistent id stands for; None refuses them.
        """
        super().__init__(io.BytesIO(data), encoding=encoding)
        self._path = path
        self._allowed = allowed
        self._expected = expected
        self._advice = advice
        self._storage = storage

    def load(self) -> Any:
        """Reads the pickle.

        Raises:
            UnsafePickleError: it asks for a name that is not allowed, a persistent id or an extension code, or uses what
                is allowed in another way than its writers do.
        """
        copyreg.clear_extension_cache()  # a cached extension code would be handed out without asking find_class
        try:
            return super().load()
        except UnsafePickleError as error:
            raise UnsafePickleError(
                f"{self._path}: expected {self._expected}, got one that asks for {error}. "
                f"It was refused before anything of it ran. {self._advice}"
            ) from None

    def find_class(self, module: str, name: str, /) -> Any:
        wanted = f"{module}.{name}"
        if wanted not in self._allowed:
            raise UnsafePickleError(f"the global {wanted if wanted.isprintable() else ascii(wanted)}"[:200])
        return self._allowed[wanted]

    def persistent_load(self, pid: Any, /) -> Any:
        if self._storage is None:
            raise UnsafePickleError("a persistent id")
        return self._storage(pid)


_LENGTHS = {pickletools.TAKEN_FROM_ARGUMENT1: (1, False), pickletools.TAKEN_FROM_ARGUMENT4: (4, True),
            pickletools.TAKEN_FROM_ARGUMENT4U: (4, False), pickletools.TAKEN_FROM_ARGUMENT8U: (8, False)}  # fmt: skip
"""How the length of an opcode's argument is written: bytes, signed."""

_PREFIXED = {
    op.code.encode("latin-1"): _LENGTHS[op.arg.n] for op in pickletools.opcodes if op.arg and op.arg.n in _LENGTHS
}
_LINE = rb"[^\n]*\n"
_PLAIN_RUN = re.compile(
    b"(?:"
    + b"|".join(
        re.escape(op.code.encode("latin-1"))
        + (
            _LINE * (1 + op.arg.name.endswith("_pair"))
            if op.arg and op.arg.n == pickletools.UP_TO_NEWLINE
            else b"." * (op.arg.n if op.arg else 0)
        )
        for op in pickletools.opcodes
        if op.name not in ("STOP", "PUT", "LONG_BINPUT") and not (op.arg and op.arg.n in _LENGTHS)
    )
    + b")*+",
    re.DOTALL,
)
"""Opcodes in a row whose arguments have no length of their own; BINPUT is among them, its places are 0 to 255."""

_PUT = re.compile(rb"p([0-9]{1,20})\n|r(.{4})", re.DOTALL)


def pickle_end(data: bytes) -> int:
    """Walks the opcodes of a pickle without running them.

    C's unpickler keeps its memo in an array as long as the largest index written into it: a pickle of twenty bytes can
    make it fill 64 GB. Pickles number their memo as they go, and a number beyond 255 takes six bytes with its value.

    Returns:
        the offset after its end; `data` may go on.

    Raises:
        UnsafePickleError: a memo index that no pickle of this length needs.
        ValueError: it breaks off, or these are no opcodes.
    """
    at = 0
    while True:
        run = _PLAIN_RUN.match(data, at)
        at = run.end() if run else at
        code = data[at : at + 1]
        if code == b".":
            return at + 1
        if code in _PREFIXED:
            width, signed = _PREFIXED[code]
            length = int.from_bytes(data[at + 1 : at + 1 + width], "little", signed=signed)
            at += 1 + width + length
            if length < 0 or at > len(data):
                raise ValueError(f"a value of {length:,} bytes that ends at {at:,} of {len(data):,} bytes")
        elif put := _PUT.match(data, at):
            place = int(put[1]) if put[1] else int.from_bytes(put[2], "little")
            if place > 1000 + at // 6:
                raise UnsafePickleError(f"place {place:,} of its memo after {at:,} bytes")
            at = put.end()
        else:
            raise ValueError(f"no opcode at {at:,} of {len(data):,} bytes")


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
    try:
        return _loads(path, data, "utf-8")
    except UnicodeDecodeError:
        return _loads(path, data, "latin-1")


def _loads(path: Path, data: bytes, encoding: str) -> Any:
    try:
        pickle_end(data)
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{path}: expected a pickle of plain lists, dicts, texts and numbers, got one that asks for {error}. Nothing of it was "
            "run. Get the file from its official source"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a whole pickle of plain data, got {len(data):,} bytes that break off or are damaged ({error}). "
            "Download or write the file again"
        ) from error
    unpickler = RestrictedUnpickler(
        path,
        data,
        allowed={},
        expected="a pickle of plain lists, dicts, texts and numbers",
        advice="Do not open it with pickle; get the file from its official source, or, if you made it, write it again "
        "with plain values (e.g. int(x) instead of numpy.int64)",
        encoding=encoding,
    )
    try:
        return unpickler.load()
    except (UnsafePickleError, UnicodeDecodeError):
        raise
    except DAMAGE as error:
        raise ValueError(
            f"{path}: expected a whole pickle of plain data, got {len(data):,} bytes that break off or are damaged "
            f"({type(error).__name__}: {error}). Download or write the file again"
        ) from error
