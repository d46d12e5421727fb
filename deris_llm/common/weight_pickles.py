"""What the names in pickles of weights resolve to: stand-ins that check what they are given and make no tensor yet.

A pickle of weights asks for `torch._utils._rebuild_tensor_v2`, `numpy.dtype` and a few more (`ALLOWED`). None of them is
called; ours returns a description (`TensorSpec`, `Array`) once shapes, types and bytes agree, or refuses.
"""

from __future__ import annotations

import codecs
import math
import re
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from deris_llm.common.unpickle import StandIn, UnsafePickleError

_MAX_NUMBER = 2**62
_MAX_AXES = 8
_NOT_IN_TORCH = ("uint16", "uint32", "uint64")  # as weights; torch knows them in part


class _StorageType(NamedTuple):
    dtype: torch.dtype


class Storage(NamedTuple):
    """A run of values in the file."""

    dtype: torch.dtype
    key: str
    numel: int  # values that the pickle says it has
    start: int  # first value of it that a tensor sees (views of the legacy format), else 0


class TensorSpec(NamedTuple):
    """A tensor as its pickle describes it, checked against the size of its storage."""

    storage: Storage
    offset: int  # values from the storage's start
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Plain(dict):
    """What OrderedDict, Counter and their attributes become: a dict whose attributes nobody can set."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Drops attributes (`_metadata` of a state dict)."""


class _Settings:
    """What `argparse.Namespace` becomes (`args` beside the weights): nothing of it is kept.

    A class and no `StandIn`, since the opcode that makes it (NEWOBJ) takes classes only.
    """

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Drops the settings."""


class _NumpyType:
    """A numpy dtype of numbers; `BUILD` brings its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        """Takes the byte order of numpy's (version, order, subarray, names, fields, ...)."""
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise UnsafePickleError("a numpy dtype that is no plain number")
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(("<" if self.order == "=" else self.order) + self.code)


class Array:
    """A numpy array as its pickle describes it; made only once shape, type and bytes agree."""

    __slots__ = ("_tensor", "dtype", "is_fortran", "raw", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.float32)
        self.is_fortran = False
        self.raw: bytes | bytearray | None = None
        self._tensor: Tensor | None = None

    def fill(self, shape: object, kind: object, raw: object, *, is_fortran: bool) -> Array:
        sizes = _integers(shape, "a numpy array's shape")
        if not isinstance(kind, _NumpyType):
            raise UnsafePickleError("a numpy array without a plain dtype")
        if not isinstance(raw, bytes | bytearray):
            raise UnsafePickleError("a numpy array whose content is not bytes")
        if math.prod(sizes) * kind.dtype.itemsize != len(raw):
            raise UnsafePickleError(
                f"a numpy array of shape {sizes} and dtype {kind.dtype} ({math.prod(sizes) * kind.dtype.itemsize:,} bytes) "
                f"while it brings {len(raw):,} bytes"
            )
        self.shape, self.dtype, self.is_fortran, self.raw = sizes, kind.dtype, is_fortran, raw
        return self

    def __setstate__(self, state: object) -> None:
        """Takes numpy's (version, shape, dtype, is Fortran order, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnsafePickleError("a numpy array in an unknown form")
        self.fill(state[1], state[2], state[4], is_fortran=bool(state[3]))

    def tensor(self) -> Tensor | None:
        """Makes the tensor, once for all names it has; None where the pickle never filled it, or torch has no such type."""
        if self._tensor is None and self.raw is not None and self.dtype.name not in _NOT_IN_TORCH:
            values = np.frombuffer(self.raw, self.dtype).reshape(self.shape, order="F" if self.is_fortran else "C")
            self._tensor = torch.from_numpy(np.array(values, dtype=self.dtype.newbyteorder("="), order="C"))
        return self._tensor


def _integers(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(_is_count(item) for item in value):
        raise UnsafePickleError(f"{what} that is no list of whole numbers")
    if len(value) > _MAX_AXES:
        raise UnsafePickleError(f"{what} of {len(value):,} axes")
    return tuple(value)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _plain_dict(items: object = ()) -> _Plain:
    if isinstance(items, dict):
        return _Plain(items)
    if not isinstance(items, list | tuple) or not all(
        isinstance(item, list | tuple) and len(item) == 2 for item in items
    ):
        raise UnsafePickleError("a dict of something that is no list of pairs")
    return _Plain(tuple(item) for item in items)


def _plain_set(items: object = ()) -> set[Any]:
    if not isinstance(items, list | tuple):
        raise UnsafePickleError("a set of something that is no list")
    return set(items)


def _plain_tuple(items: object = ()) -> tuple[Any, ...]:
    if not isinstance(items, list | tuple):
        raise UnsafePickleError("a torch.Size of something that is no list")
    return tuple(items)


def _device(name: object, index: object = None) -> str:
    if not isinstance(name, str) or not (index is None or _is_count(index)):
        raise UnsafePickleError("a torch.device that is none")
    return name


def _encoded(text: object, encoding: object = "utf-8") -> bytes:
    """`_codecs.encode`, by which protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"_codecs.encode with {shortened(encoding)}")
    return codecs.latin_1_encode(text)[0]


def _numpy_type(code: object, *_: object) -> _NumpyType:
    if not isinstance(code, str) or not re.fullmatch(r"f[248]|[iu][1248]|b1", code):
        raise UnsafePickleError(f"the numpy dtype {shortened(code)}, which is no plain number")
    return _NumpyType(code)


def _numpy_scalar(kind: object, raw: object) -> object:
    array = Array().fill((), kind, raw, is_fortran=False)
    return np.frombuffer(array.raw or b"", array.dtype)[0].item()


def _numpy_array(subtype: object, shape: object, typecode: object) -> Array:
    """`_reconstruct`, which numpy always calls with these arguments and fills by BUILD."""
    if subtype != "numpy.ndarray" or shape != (0,) or typecode not in (b"b", "b"):
        raise UnsafePickleError("a numpy array in an unknown form")
    return Array()


def _numpy_from_buffer(raw: object, kind: object, shape: object, order: object) -> Array:
    return Array().fill(shape, kind, raw, is_fortran=order == "F")


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> TensorSpec:
    """`_rebuild_tensor_v2`: requires_grad, hooks and metadata are dropped."""
    if not isinstance(storage, Storage):
        raise UnsafePickleError("a tensor whose storage is none")
    if not _is_count(offset):
        raise UnsafePickleError("a tensor whose offset is no whole number")
    sizes, strides = _integers(size, "a tensor's shape"), _integers(stride, "a tensor's stride")
    if len(sizes) != len(strides):
        raise UnsafePickleError("a tensor whose shape and stride differ in length")
    last = offset + sum((length - 1) * step for length, step in zip(sizes, strides, strict=True))
    numel = math.prod(sizes)
    if numel and (last >= storage.numel or numel > storage.numel):
        raise UnsafePickleError(
            f"a tensor of shape {sizes}, stride {strides} and offset {offset:,} in a storage of {storage.numel:,} values"
        )
    return TensorSpec(storage, offset, sizes, strides)


def _parameter(tensor: object, *_: object) -> TensorSpec:
    """`_rebuild_parameter`: a parameter is its tensor."""
    if not isinstance(tensor, TensorSpec):
        raise UnsafePickleError("a parameter of something that is no tensor")
    return tensor


_STORAGE_TYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _plain_dict,
    "collections.Counter": _plain_dict,
    "builtins.set": _plain_set,
    "__builtin__.set": _plain_set,  # protocol 2 gives names of Python 2
    "torch.Size": _plain_tuple,
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "_codecs.encode": _encoded,
    "numpy.dtype": _numpy_type,
    **{
        f"numpy.{core}.multiarray.{name}": function
        for core in ("core", "_core")
        for name, function in (("scalar", _numpy_scalar), ("_reconstruct", _numpy_array))
    },
    **{f"numpy.{core}.numeric._frombuffer": _numpy_from_buffer for core in ("core", "_core")},
}
ALLOWED: dict[str, Any] = {
    **{name: StandIn(name, function) for name, function in _FUNCTIONS.items()},
    "argparse.Namespace": _Settings,
    "numpy.ndarray": "numpy.ndarray",
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in _STORAGE_TYPES.items()},
    **{f"torch.{name}": f"torch.{name}" for name in _DTYPES},
}
"""All that a pickle of weights may name, and what it gets instead. Nothing here is torch's or numpy's own."""


def storage_of(pid: object) -> Storage:
    """What torch's persistent ids stand for: ("storage", type, key, location, values[, view])."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
        raise UnsafePickleError(f"the persistent id {shortened(pid)}")
    kind, key, numel = pid[1], pid[2], pid[4]
    if not isinstance(kind, _StorageType) or not isinstance(key, str) or not _is_count(numel):
        raise UnsafePickleError(f"the persistent id {shortened(pid)}")
    start = 0
    if len(pid) == 6 and pid[5] is not None:  # the legacy format's view: (key, offset, size)
        if not isinstance(pid[5], tuple) or len(pid[5]) != 3:
            raise UnsafePickleError(f"the persistent id {shortened(pid)}")
        start, length = _integers(pid[5][1:], "a storage's view")
        if start + length > numel:
            raise UnsafePickleError(f"values {start:,} to {start + length:,} of a storage of {numel:,} values")
        numel = length
    return Storage(kind.dtype, key, numel, start)


def shown(name: object) -> str:
    """A name of the file for a message: as it is where it cannot upset a terminal."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 80 else shortened(name)


def shortened(value: object) -> str:
    """A value of the file for a message, in at most about 80 characters.

    Python's own repr of thirty tuples that hold each other twice has a billion parts.
    """
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if -(10**20) < x < 10**20 else f"a number of {x.bit_length():,} bits"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 60, 60
