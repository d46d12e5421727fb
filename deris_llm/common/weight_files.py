"""Reads weight files that come from anywhere, without running or believing anything in them.

torch's zip and legacy formats, safetensors, and detectron2's pickles of numpy arrays. `torch.load` is not used: it makes
a tensor as large as the file says, and `weights_only=True` refuses the metrics (numpy scalars) that training scripts
keep beside their weights. Here a file's pickle is first read into descriptions of tensors (`RestrictedUnpickler`; every
name in `weight_pickles.ALLOWED` resolves to a stand-in of ours), all sizes are checked against the bytes that are there,
and only the tensors of the state dict are made, as views of the mapped file. Entries that are not wanted (optimizer,
metrics, ...) are never made.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from deris_llm.common.unpickle import DAMAGE, RestrictedUnpickler, UnsafePickleError, pickle_end
from deris_llm.common.weight_pickles import ALLOWED, Array, Storage, TensorSpec, shortened, shown, storage_of

STATE_KEYS = ("state_dict", "model", "module")
"""Where a state dict is in a file that holds more: DeRIS; BEiT-3 and detectron2; what DeepSpeed writes."""

_MAX_PICKLE = 64 * 2**20  # of names and shapes; the longest key list in use makes 0.3 MB
_MAX_ARRAY_PICKLE = 16 * 2**30
_MAX_NAME = 500  # characters
_MAX_SHARING = 8  # how many times the file's size all tensors together may be; tied weights are there twice
_HALF = (torch.float16, torch.bfloat16)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_GUARD = "Do not open it with torch.load or pickle; get the file from its official source"


class WeightFileError(ValueError):
    """A weight file that cannot be used; says where, what was expected, what was found and what to do."""


class WeightFile(NamedTuple):
    """What was read of a weight file."""

    tensors: dict[str, Tensor]  # CPU; views of the file (copy on write) where its layout allows
    ignored: tuple[str, ...]  # entries beside the state dict that were not read: optimizer, epoch, metrics, ...
    num_half: int  # tensors that were fp16 or bf16 in the file and are float32 now


class _Content(NamedTuple):
    """A file, read into descriptions."""

    value: Any
    make: Callable[[Any], Tensor | None]  # description -> tensor; None for what is none


def read_weight_file(path: str | Path, *, allow_half: bool = False) -> WeightFile:
    """Reads the state dict of a weight file; nothing in the file is imported, called or believed.

    Args:
        path: a .pth, .pt, .bin or .zip that torch.save wrote (zip or legacy format), a .safetensors, or detectron2's
            .pkl of numpy arrays. What it is, its content says, not its name.
        allow_half: take fp16 and bf16 tensors, as float32.

    Returns:
        the state dict under the first of `STATE_KEYS` that is there, or the whole file where it is one. `module.` of distributed
        training is taken off where every name has it.

    Raises:
        WeightFileError: no such file, another kind of file, cut off or damaged, sizes that do not fit, no state dict,
            values in it that are no tensors, or half precision without `allow_half`.
        UnsafePickleError: its pickle asks for anything but tensors and plain values.
    """
    path = Path(path)
    data = _mapped(path)  # lives as long as a tensor that views it
    if _kind(path, data) == "safetensors":
        content, make = _safetensors_content(path)
    else:
        content, make = _torch_content(path, data)
    found, ignored = _state_dict(path, content)
    _check_total(path, found, len(data))
    tensors: dict[str, Tensor] = {}
    strange = []
    for name, value in found.items():
        tensor = make(value)
        if tensor is not None and isinstance(name, str) and name.isprintable() and len(name) <= _MAX_NAME:
            tensors[name] = tensor
        else:
            strange.append(f"{shortened(name)} ({_described(value)})")
    if strange:
        raise WeightFileError(
            f"{path}: expected a state dict of tensors by name, got {len(strange):,} other entries in it: "
            f"{', '.join(strange[:10])}; give the file of a model's weights."
        )
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    half = [name for name, tensor in tensors.items() if tensor.dtype in _HALF]
    if half and not allow_half:
        raise WeightFileError(
            f"{path}: expected weights in float32, got {len(half):,} of {len(tensors):,} tensors in half precision "
            f"(e.g. {half[0]}: {tensors[half[0]].dtype}), whose results differ from the published ones; give the float32 "
            "file, or --allow-half to convert them to float32."
        )
    tensors.update({name: tensors[name].float() for name in half})
    return WeightFile(tensors, ignored, len(half))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a weight file in Hugging Face form (tensors by name, nothing around them); reads no values.

    Raises:
        WeightFileError: see `read_weight_file`.
        UnsafePickleError: its pickle asks for anything but tensors and plain values.
    """
    data = _mapped(path)
    if _kind(path, data) == "safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (safetensors.SafetensorError, OSError) as error:
            _raise_damaged(path, error)
    content = _torch_content(path, data).value
    if not isinstance(content, dict) or not all(isinstance(value, TensorSpec) for value in content.values()):
        raise WeightFileError(
            f"{path}: expected tensors by name, as save_pretrained writes them, got {_described(content)} with other entries; "
            "give the file that was published with the config."
        )
    return {name: tuple(spec.size) for name, spec in content.items()}


def _torch_content(path: Path, data: mmap.mmap) -> _Content:
    return _zip_content(path, data) if _kind(path, data) == "zip" else _pickle_content(path, data)


# -- what kind of file ------------------------------------------------------------------------------------------------


def _mapped(path: Path) -> mmap.mmap:
    if not path.exists():
        raise WeightFileError(f"{path}: expected a weight file, got nothing of that name; correct the path.")
    if path.is_dir():
        raise WeightFileError(
            f"{path}: expected a weight file, got a folder; give the file in it (.pth, .pkl, .zip, .safetensors). "
            "A folder in Hugging Face form needs no conversion."
        )
    if path.stat().st_size == 0:
        raise WeightFileError(f"{path}: expected a weight file, got an empty one; download it again.")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _kind(path: Path, data: mmap.mmap) -> str:
    """`zip`, `pickle` or `safetensors`; refuses what is none of them with its name."""
    head = bytes(data[:512])
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", head)
        found = f"a git-lfs pointer ({int(size[1]):,} bytes are meant)" if size else "a git-lfs pointer"
        advice = "fetch the file itself, e.g. with `git lfs pull`."
    elif head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    elif len(data) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= len(data) - 8:
        return "safetensors"
    elif head.startswith(b"\x80"):
        return "pickle"
    elif text[:1] == b"<":
        found, advice = "an HTML or XML page", "the download gave a web page: log in or take the file's direct link."
    elif text[:1] in (b"{", b"["):
        found, advice = "a JSON text", "give the weights that belong to it."
    elif head[257:262] == b"ustar":
        found, advice = (
            "a tar archive",
            "unpack it and give the weight file inside (or torch's own format of before 2017: save it again).",
        )
    elif head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")):
        found, advice = "a compressed archive", "unpack it and give the weight file inside."
    elif path.suffix == ".safetensors":
        found, advice = "one whose header is damaged or cut off", "download it again."
    else:
        found = f"{len(data):,} bytes of another kind (they start with {head[:8]!r})"
        advice = "give a file that torch.save, safetensors or detectron2 wrote."
    raise WeightFileError(
        f"{path}: expected a weight file (torch's .pth, .pt, .bin or .zip, .safetensors, detectron2's .pkl), got {found}; "
        f"{advice}"
    )


def _state_dict(path: Path, content: Any) -> tuple[Mapping[Any, Any], tuple[str, ...]]:
    """Finds the state dict, and names what lies beside it."""
    if not isinstance(content, dict):
        raise WeightFileError(
            f"{path}: expected a dict of tensors, or one under {' or '.join(STATE_KEYS)}, got {_described(content)}; "
            "give the file of a model's weights."
        )
    for key in STATE_KEYS:
        if isinstance(content.get(key), dict):
            found, ignored = content[key], tuple(shown(other) for other in content if other != key)
            break
    else:
        if not any(isinstance(value, Tensor | TensorSpec | Array) for value in content.values()):
            raise WeightFileError(
                f"{path}: expected a dict of tensors, or one under {' or '.join(STATE_KEYS)}, got one with the keys "
                f"{', '.join(shortened(key) for key in list(content)[:10]) or 'none'}; give the file of a model's weights."
            )
        found, ignored = content, ()
    if not found:
        raise WeightFileError(f"{path}: expected a state dict with tensors, got an empty one; download it again.")
    return found, ignored


def _check_total(path: Path, found: Mapping[Any, Any], file_size: int) -> None:
    """Refuses a file that names the same values so often that copies of them would fill memory."""
    total = sum(
        math.prod(value.size) * value.storage.dtype.itemsize if isinstance(value, TensorSpec) else len(value.raw or b"")
        for value in found.values()
        if isinstance(value, TensorSpec | Array)
    )
    if total > _MAX_SHARING * file_size:
        raise WeightFileError(
            f"{path}: expected tensors of at most {_MAX_SHARING} times the file's {file_size:,} bytes, got {total:,} bytes "
            f"in {len(found):,} tensors that share their values; give a file that torch.save wrote of a model."
        )


def _described(value: Any) -> str:
    if isinstance(value, TensorSpec):
        return "a tensor"
    if isinstance(value, Array):
        return f"an array of {value.dtype}"
    return type(value).__name__.lstrip("_")


def _unpickled(path: Path, data: bytes, *, storage: Callable[[object], Any] | None) -> Any:
    unpickler = RestrictedUnpickler(
        path, data, allowed=ALLOWED, expected="a file of tensors and plain values", advice=f"{_GUARD}.",
        storage=storage,
    )  # fmt: skip
    try:
        return unpickler.load()
    except UnsafePickleError:
        raise
    except DAMAGE as error:
        _raise_damaged(path, error)


def _raise_damaged(path: Path, error: Exception | str) -> NoReturn:
    detail = error if isinstance(error, str) else f"{type(error).__name__}: {error}"[:300]
    detail = detail if detail.isprintable() else ascii(detail)
    raise WeightFileError(
        f"{path}: expected a whole weight file, got one that breaks off or is damaged ({detail}); download it again."
    ) from (error if isinstance(error, Exception) else None)


# -- torch's zip format -----------------------------------------------------------------------------------------------


class _Extent(NamedTuple):
    start: int  # byte in the file
    length: int  # bytes


def _zip_content(path: Path, data: mmap.mmap) -> _Content:
    entries = _zip_entries(path, data)
    folders = {name.split("/")[0] for name in entries}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(folders) != 1 or len(pickles) != 1:
        listed = ", ".join(shown(name) for name in list(entries)[:10]) or "nothing in it"
        raise WeightFileError(
            f"{path}: expected a zip that torch.save wrote (one folder with data.pkl), got one with {listed}; if it is an "
            "ordinary archive, unpack it and give the weight file inside."
        )
    folder = next(iter(folders))
    order = entries.get(f"{folder}/byteorder")
    if order is not None and bytes(data[order.start : order.start + order.length]) != b"little":
        raise WeightFileError(
            f"{path}: expected little-endian values, got another byte order; save it again on such a machine."
        )
    extent = entries[pickles[0]]
    if extent.length > _MAX_PICKLE:
        raise WeightFileError(
            f"{path}: expected names and shapes of at most {_MAX_PICKLE:,} bytes, got {pickles[0]} of {extent.length:,} "
            "bytes; give the file of a model's weights."
        )
    pickled = bytes(data[extent.start : extent.start + extent.length])
    _checked_end(path, pickled)

    def storage(pid: object) -> Storage:
        found = storage_of(pid)
        name = f"{folder}/data/{found.key}"
        if name not in entries:
            raise UnsafePickleError(f"the storage {shortened(name)}, which the file does not have")
        if found.numel * found.dtype.itemsize > entries[name].length:
            raise UnsafePickleError(
                f"{found.numel:,} values of {found.dtype} ({found.numel * found.dtype.itemsize:,} bytes) of the storage "
                f"{shortened(name)}, which has {entries[name].length:,} bytes"
            )
        return found

    content = _unpickled(path, pickled, storage=storage)

    maker = _Maker(data)

    def make(value: Any) -> Tensor | None:
        if not isinstance(value, TensorSpec):
            return _made_array(value)
        return maker.made(value, entries[f"{folder}/data/{value.storage.key}"])

    return _Content(content, make)


def _zip_entries(path: Path, data: mmap.mmap) -> dict[str, _Extent]:
    """Where each entry's bytes are; nothing is unpacked.

    Raises:
        UnsafePickleError: a TorchScript archive.
        WeightFileError: cut off, compressed, encrypted, overlapping or reaching beyond the file, or a name that leaves
            its folder.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        _raise_damaged(path, error)
    if any(info.filename.split("/", 1)[-1].startswith(("constants.pkl", "code/")) for info in infos):
        raise UnsafePickleError(
            f"{path}: expected a file of tensors, got a TorchScript archive, which is a program; nothing of it ran. "
            "Give the model's state dict, saved with torch.save."
        )
    entries: dict[str, _Extent] = {}
    for info in infos:
        where = f"its entry {shortened(info.filename)}"
        parts = info.orig_filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in info.orig_filename:
            _raise_hostile(path, f"{where} has a name that leads out of its folder")
        if info.filename in entries:
            _raise_hostile(path, f"{where} is there twice")
        if info.flag_bits & 0x1:
            _raise_hostile(path, f"{where} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            _raise_hostile(
                path, f"{where} is compressed ({info.compress_size:,} bytes that become {info.file_size:,}), which torch.save never does"
            )  # fmt: skip
        header = bytes(data[info.header_offset : info.header_offset + 30])
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            _raise_damaged(path, f"{where} has no header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + name_length + extra_length
        if start + info.file_size > end:
            _raise_hostile(
                path, f"{where} has {info.file_size:,} bytes at {start:,} in a file whose entries end at {end:,}"
            )
        entries[info.filename] = _Extent(start, info.file_size)
    reached = 0
    for extent in sorted(entry for entry in entries.values() if entry.length):
        if extent.start < reached:
            _raise_hostile(path, "its entries overlap")
        reached = extent.start + extent.length
    return entries


def _raise_hostile(path: Path, what: str) -> NoReturn:
    raise WeightFileError(
        f"{path}: expected a zip as torch.save writes it, got one in which {what}; nothing was unpacked. "
        "Get the file from its official source."
    )


# -- pickles: torch's legacy format, detectron2's arrays --------------------------------------------------------------


def _pickle_content(path: Path, data: mmap.mmap) -> _Content:
    head = bytes(data[: 2**10])
    try:
        first = pickle_end(head)
        is_legacy = _unpickled(path, head[:first], storage=None) == _LEGACY_MAGIC
    except (UnsafePickleError, *DAMAGE):  # not a short pickle: then it is one of arrays, read below
        is_legacy = False
    if is_legacy:
        return _legacy_content(path, data, first)
    if len(data) > _MAX_ARRAY_PICKLE:
        raise WeightFileError(
            f"{path}: expected a pickle of arrays of at most {_MAX_ARRAY_PICKLE:,} bytes, got {len(data):,}; give the file "
            "of a model's weights."
        )
    pickled = bytes(data)
    end = _checked_end(path, pickled)
    if end != len(pickled):
        _raise_damaged(path, f"{len(pickled) - end:,} bytes follow its end")
    return _Content(_unpickled(path, pickled, storage=None), _made_array)


def _legacy_content(path: Path, data: mmap.mmap, position: int) -> _Content:
    """After the magic number: protocol, machine, the content, the storages' keys; then each storage's length and bytes."""
    parts = []
    declared: dict[str, Storage] = {}

    def storage(pid: object) -> Storage:
        found = storage_of(pid)
        if found.numel * found.dtype.itemsize > len(data):
            raise UnsafePickleError(
                f"{found.numel:,} values of {found.dtype} ({found.numel * found.dtype.itemsize:,} bytes) in a file of "
                f"{len(data):,} bytes"
            )
        if declared.setdefault(found.key, found).dtype != found.dtype:
            raise UnsafePickleError(f"the storage {shortened(found.key)} with two types")
        return found

    for number in range(4):
        window = bytes(data[position : position + _MAX_PICKLE])
        end = _checked_end(path, window)
        parts.append(_unpickled(path, window[:end], storage=storage if number == 2 else None))
        position += end
    protocol, machine, content, keys = parts
    if protocol != _LEGACY_PROTOCOL or not isinstance(machine, dict) or not machine.get("little_endian", False):
        raise WeightFileError(
            f"{path}: expected torch's legacy format, protocol {_LEGACY_PROTOCOL}, little-endian, got protocol "
            f"{shortened(protocol)} of {shortened(machine)}; save it again with a current torch."
        )
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(declared):
        _raise_damaged(path, "its list of storages is not that of its tensors")
    extents: dict[str, _Extent] = {}
    for key in keys:
        numel = int.from_bytes(data[position : position + 8], "little", signed=True)
        length = numel * declared[key].dtype.itemsize
        if position + 8 > len(data) or numel < 0 or position + 8 + length > len(data):
            _raise_damaged(path, f"storage {shortened(key)} of {numel:,} values at byte {position:,} of {len(data):,}")
        extents[key] = _Extent(position + 8, length)
        position += 8 + length
    maker = _Maker(data)

    def make(value: Any) -> Tensor | None:
        if not isinstance(value, TensorSpec):
            return _made_array(value)
        extent = extents[value.storage.key]
        if (value.storage.start + value.storage.numel) * value.storage.dtype.itemsize > extent.length:
            _raise_damaged(
                path, f"storage {shortened(value.storage.key)} has {extent.length:,} bytes, too few for its tensors"
            )
        return maker.made(value, extent)

    return _Content(content, make)


def _checked_end(path: Path, pickled: bytes) -> int:
    try:
        return pickle_end(pickled)
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{path}: expected a file of tensors and plain values, got one that asks for {error}. "
            f"It was refused before anything of it ran. {_GUARD}."
        ) from None
    except DAMAGE as error:
        _raise_damaged(path, error)


# -- tensors ----------------------------------------------------------------------------------------------------------


class _Maker:
    """Makes tensors of checked descriptions: views of the mapped file, or of a copy where a place is not aligned."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._copies: dict[tuple[int, torch.dtype], Tensor] = {}  # by byte in the file; one for all tensors in it

    def made(self, spec: TensorSpec, extent: _Extent) -> Tensor:
        dtype = spec.storage.dtype
        if math.prod(spec.size) == 0:
            return torch.empty(spec.size, dtype=dtype)
        offset = spec.storage.start + spec.offset
        if extent.start % dtype.itemsize == 0:
            count = extent.length // dtype.itemsize
            flat = torch.frombuffer(self._data, dtype=dtype, count=count, offset=extent.start)
            return flat.as_strided(spec.size, spec.stride, offset)
        if (extent.start, dtype) not in self._copies:
            raw = torch.frombuffer(self._data, dtype=torch.uint8, count=extent.length, offset=extent.start).clone()
            self._copies[extent.start, dtype] = raw[: extent.length // dtype.itemsize * dtype.itemsize].view(dtype)
        return self._copies[extent.start, dtype].as_strided(spec.size, spec.stride, offset)


def _made_array(value: Any) -> Tensor | None:
    return value.tensor() if isinstance(value, Array) else None


def _safetensors_content(path: Path) -> _Content:
    try:
        return _Content(safetensors.torch.load_file(path), lambda value: value)
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError, ValueError) as error:
        _raise_damaged(path, error)
