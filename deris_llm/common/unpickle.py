"""Reads pickles of plain data without running anything in them: REFER's `refs(unc).p`, arrays beside and in weights.

A pickle is a program that can only call what it can name. `restricted_load` resolves no name but those it is given, and those
to stand-ins that check their arguments, so a hostile file builds plain values or is refused.
"""

from __future__ import annotations

import codecs
import copyreg
import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from deris_llm.common.words import shortened

MAX_PICKLE_BYTES = 512 * 2**20
"""REFER's largest file has about 40 MB."""

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
"""What unpickling a damaged or hostile file raises; none of these comes from code in the file."""


class UnsafePickleError(ValueError):
    """A pickle that asks for more than plain data."""


def load_plain_pickle(path: str | Path, *, max_bytes: int = MAX_PICKLE_BYTES) -> Any:
    """Reads a pickle that holds plain data only: None, bool, numbers, text, bytes, lists, tuples, dicts and sets.

    Text of Python 2 is read as UTF-8, otherwise as Latin-1 (REFER's files were written by Python 2).

    Raises:
        UnsafePickleError: the file names a global (class or function), a persistent id or an extension code.
        ValueError: the file is too large or not a whole pickle.
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
        try:
            return restricted_load(data, {})
        except UnicodeDecodeError:
            return restricted_load(data, {}, encoding="latin-1")
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{path}: expected a pickle of plain lists, dicts, texts and numbers, got one that asks for {error}. It was refused "
            "before anything of it was run. Do not open it with pickle; get the file from its official source or, if you made it, "
            "write it again with plain values (e.g. int(x) instead of numpy.int64)"
        ) from None
    except DAMAGE as error:
        raise ValueError(
            f"{path}: expected a whole pickle of plain data, got {size:,} bytes that break off or are damaged "
            f"({type(error).__name__}: {error}). Download or write the file again"
        ) from error


def restricted_load(data: bytes, allowed: Mapping[str, Any], *, encoding: str = "utf-8") -> Any:
    """Unpickles bytes that hold one whole pickle.

    Args:
        data: the pickle.
        allowed: `module.name` -> what the name resolves to: a `StandIn`, a class of ours, or a constant.
        encoding: of text written by Python 2.

    Raises:
        UnsafePickleError: it asks for another name, a persistent id or an extension code; the message names what.
        ValueError: bytes follow its end. Other exceptions of `DAMAGE`: it breaks off or is damaged.
    """
    end = pickle_end(data)
    if end != len(data):
        raise ValueError(f"{len(data) - end:,} bytes follow its end")
    copyreg.clear_extension_cache()  # a cached extension code would be resolved without asking find_class
    return _RestrictedUnpickler(data, allowed, encoding).load()


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Mapping[str, Any], encoding: str) -> None:
        super().__init__(io.BytesIO(data), encoding=encoding)
        self._allowed = allowed

    def find_class(self, module: str, name: str, /) -> Any:
        wanted = f"{module}.{name}"
        if wanted not in self._allowed:
            raise UnsafePickleError(f"the global {wanted if wanted.isprintable() else ascii(wanted)}"[:200])
        return self._allowed[wanted]

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise UnsafePickleError("a persistent id")


# -- where a pickle ends ----------------------------------------------------------------------------------------------

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
"""Consecutive opcodes whose arguments have no length prefix; includes BINPUT, whose memo indices are 0 to 255."""

_PUT = re.compile(rb"p([0-9]{1,20})\n|r(.{4})", re.DOTALL)


def pickle_end(data: bytes) -> int:
    """Walks the opcodes of a pickle without running them.

    C's unpickler keeps its memo in an array as long as the largest index written into it, so a pickle of twenty bytes can
    make it fill 64 GB. Pickles number their memo consecutively, and an entry beyond 255 takes six bytes with its value.

    Returns:
        the offset after its end; `data` may go on.

    Raises:
        UnsafePickleError: a memo index that no pickle of this length needs.
        ValueError: it breaks off, or these are not opcodes.
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


# -- stand-ins for what lies in and beside weights --------------------------------------------------------------------


class StandIn:
    """A function of ours under a name that a pickle may use; it checks its arguments and cannot be changed (BUILD)."""

    __slots__ = ("_function", "_name")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        """Takes the name for messages, and the function."""
        self._name = name
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise UnsafePickleError(f"a change of {self._name}")


class _Dict(dict):
    """Stands for OrderedDict; the attributes that a pickle sets (`_metadata` of a state dict) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Drops the attributes."""


class _Settings:
    """Stands for `argparse.Namespace` (`args` beside the weights); its content is dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Drops the settings."""


class NumpyType:
    """Stands for a numpy dtype of numbers; BUILD sets its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *_: object) -> None:
        """Takes numpy's type code, e.g. ``f4``."""
        if not isinstance(code, str) or not re.fullmatch(r"f[248]|[iu][1248]|b1", code):
            raise UnsafePickleError(f"the numpy dtype {shortened(code)}, which is not a plain number")
        self.code = code
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        """Takes the byte order from numpy's (version, order, subarray, names, fields, ...)."""
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise UnsafePickleError("a numpy dtype that is not a plain number")
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(("<" if self.order == "=" else self.order) + self.code)


class PickledArray:
    """Stands for a numpy array; `values` makes the array, whose shape and type agree with its bytes."""

    __slots__ = ("_raw", "_values", "dtype", "is_fortran", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.float32)
        self.is_fortran = False
        self._raw: bytes | bytearray | None = None
        self._values: np.ndarray | None = None

    def fill(self, shape: object, kind: object, raw: object, *, is_fortran: bool) -> PickledArray:
        if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in shape) or len(shape) > 8:
            raise UnsafePickleError(f"a numpy array of the shape {shortened(shape)}")
        if not isinstance(kind, NumpyType) or not isinstance(raw, bytes | bytearray):
            raise UnsafePickleError("a numpy array without a plain dtype and bytes")
        if math.prod(shape) * kind.dtype.itemsize != len(raw):
            raise UnsafePickleError(
                f"a numpy array of shape {shape} and dtype {kind.dtype} ({math.prod(shape) * kind.dtype.itemsize:,} bytes) "
                f"while it brings {len(raw):,} bytes"
            )
        self.shape, self.dtype, self.is_fortran, self._raw = shape, kind.dtype, is_fortran, raw
        return self

    def __setstate__(self, state: object) -> None:
        """Takes numpy's (version, shape, dtype, is Fortran order, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnsafePickleError("a numpy array in an unknown form")
        self.fill(state[1], state[2], state[4], is_fortran=bool(state[3]))

    @property
    def nbytes(self) -> int:
        return len(self._raw or b"")

    def values(self) -> np.ndarray | None:
        """Returns the array in native byte order, the same one at each call; None if the pickle never filled it."""
        if self._values is None and self._raw is not None:
            values = np.frombuffer(self._raw, self.dtype).reshape(self.shape, order="F" if self.is_fortran else "C")
            self._values = np.array(values, dtype=self.dtype.newbyteorder("="), order="C")
        return self._values


def _encoded(text: object, encoding: object = "utf-8") -> bytes:
    """`_codecs.encode`, by which protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"_codecs.encode with {shortened(encoding)}")
    return codecs.latin_1_encode(text)[0]


def _scalar(kind: object, raw: object) -> object:
    values = PickledArray().fill((), kind, raw, is_fortran=False).values()
    return None if values is None else values.item()


def _reconstruct(subtype: object, shape: object, typecode: object) -> PickledArray:
    """Numpy always calls it with these arguments and fills the array by BUILD."""
    if subtype is not PickledArray or shape != (0,) or typecode not in (b"b", "b"):
        raise UnsafePickleError("a numpy array in an unknown form")
    return PickledArray()


def _from_buffer(raw: object, kind: object, shape: object, order: object) -> PickledArray:
    return PickledArray().fill(shape, kind, raw, is_fortran=order == "F")


_CORES = ("numpy.core", "numpy._core")  # numpy 1 and 2
ALLOWED_NAMES: dict[str, Any] = {
    "collections.OrderedDict": _Dict,
    "argparse.Namespace": _Settings,
    "numpy.dtype": NumpyType,
    "numpy.ndarray": PickledArray,
    "_codecs.encode": StandIn("_codecs.encode", _encoded),
    **{f"{core}.multiarray.scalar": StandIn("numpy's scalar", _scalar) for core in _CORES},
    **{f"{core}.multiarray._reconstruct": StandIn("numpy's _reconstruct", _reconstruct) for core in _CORES},
    **{f"{core}.numeric._frombuffer": StandIn("numpy's _frombuffer", _from_buffer) for core in _CORES},
}
"""What a pickle of arrays may name, and what it gets instead. None of it is numpy's own."""


# -- values of a file in messages -------------------------------------------------------------------------------------


def shown(name: object) -> str:
    """Returns a name of the file for a message: as it is if a terminal can print it."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 80 else shortened(name)
