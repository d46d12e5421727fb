"""Reads weight files of others without running anything in them.

torch's own files go through `torch.load(weights_only=True)`, safetensors through its library, and detectron2's pickles of
numpy arrays through a `RestrictedUnpickler`. Training scripts keep numpy scalars, arrays and `argparse.Namespace` beside
their weights, which `weights_only` refuses by default: `ALLOWED_NAMES` gives it stand-ins for them that build plain values.

Checked here, because `torch.load` does not: a zip must be laid out as `torch.save` does (nothing compressed, each storage as
long as its entry), and tensors that share storage must not add up to many times the size of the file.
"""

from __future__ import annotations

import mmap
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from deris_llm.common.unpickle import (
    ALLOWED_NAMES,
    DAMAGE,
    PickledArray,
    UnsafePickleError,
    pickle_end,
    restricted_load,
    shortened,
    shown,
)

STATE_KEYS = ("state_dict", "model", "module")
"""Where a state dict is in a file that holds more: DeRIS; BEiT-3 and detectron2; what DeepSpeed writes."""

_MAX_PICKLE = 64 * 2**20  # bytes of names and shapes; the longest key list in use takes 0.3 MB
_MAX_ARRAY_PICKLE = 16 * 2**30  # bytes
_MAX_NAME = 500  # characters
_MAX_SHARING = 8  # total size of all tensors over the size of the file; tied weights appear twice
_HALF = (torch.float16, torch.bfloat16)
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NOT_IN_TORCH = ("uint16", "uint32", "uint64")  # as weights; torch supports them in part
_SAFE_GLOBALS: list[Any] = [(value, name) for name, value in ALLOWED_NAMES.items()]
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80"
"""First bytes of torch's format before 1.6: the pickle of its magic number, then the next pickle."""


class WeightFileError(ValueError):
    """A weight file that cannot be used; the message says where, what was expected, what was found and what to do."""


class WeightFile(NamedTuple):
    """The contents of a weight file."""

    tensors: dict[str, Tensor]  # CPU; copy-on-write views of the file where its format allows
    ignored: tuple[str, ...]  # entries beside the state dict: optimizer, epoch, metrics, ...
    num_half: int  # tensors that were fp16 or bf16 in the file and are float32 now


def read_weight_file(path: str | Path, *, allow_half: bool = False) -> WeightFile:
    """Reads the state dict of a weight file.

    Args:
        path: a .pth, .pt, .bin or .zip written by torch.save (zip or legacy format), a .safetensors, or a .pkl of numpy
            arrays as detectron2 writes it. The content decides the format, not the file name.
        allow_half: accept fp16 and bf16 tensors and convert them to float32.

    Returns:
        the state dict under the first of `STATE_KEYS` that exists, or the whole file if it is a state dict. The prefix
        `module.` of distributed training is removed if every name has it.

    Raises:
        WeightFileError: the file does not exist, has another format, is cut off or damaged, holds no state dict, holds
            values that are not tensors, or holds half precision without `allow_half`.
        UnsafePickleError: the file asks for a class or function that is not allowed.
    """
    path = Path(path)
    found, ignored = _state_dict(path, _content(path))
    _check_total(path, found)
    tensors = {name: _as_tensor(value) for name, value in found.items()}
    strange = [
        f"{shortened(name)} ({_described(found[name])})"
        for name, value in tensors.items()
        if not (isinstance(value, Tensor) and isinstance(name, str) and name.isprintable() and len(name) <= _MAX_NAME)
    ]
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
    """Returns names and shapes of a weight file in Hugging Face form: tensors by name, with nothing around them.

    Raises:
        WeightFileError: see `read_weight_file`.
        UnsafePickleError: the file asks for a class or function that is not allowed.
    """
    if _format(path) == "safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (safetensors.SafetensorError, OSError) as error:
            _raise_damaged(path, error)
    content = _content(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightFileError(
            f"{path}: expected tensors by name, as save_pretrained writes them, got {_described(content)} with other entries; "
            "give the file that was published with the config."
        )
    return {name: tuple(tensor.shape) for name, tensor in content.items()}


def tensor_dtypes(path: Path) -> set[torch.dtype]:
    """Returns the floating-point types in a .safetensors that `tensor_shapes` has read."""
    with safetensors.safe_open(path, framework="pt") as file:
        names = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    return {dtype for dtype in map(_SAFETENSORS_DTYPES.get, names) if dtype is not None}


def _content(path: Path) -> Any:
    """Reads the whole file; what stands for arrays and settings of other libraries is a stand-in."""
    kind = _format(path)
    if kind == "safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            _raise_damaged(path, error)
    if kind == "pickle":
        return _array_pickle(path)
    extents = _zip_extents(path) if kind == "zip" else None
    content = _torch_load(path, is_zip=kind == "zip")
    tensors = [value for value in _state_dict(path, content)[0].values() if isinstance(value, Tensor)]
    if extents is None:
        _check_legacy_storages(path, tensors)
    else:
        _check_storages(path, tensors, extents)
    return content


def _torch_load(path: Path, *, is_zip: bool) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_SAFE_GLOBALS):
            warnings.simplefilter("ignore")  # about pickle protocols and typed storages
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        _raise_refused(path, error)


def _raise_refused(path: Path, error: Exception) -> NoReturn:
    """Tells a file that asks for code from a damaged one, in one line instead of torch's page."""
    if isinstance(error, UnsafePickleError):
        reason = str(error)
    elif isinstance(error, pickle.UnpicklingError):
        reason = _torch_reason(str(error))
    else:
        _raise_damaged(path, error)
    raise UnsafePickleError(
        f"{path}: expected a file of tensors and plain values, got one that asks for {reason}. It was refused before anything of "
        "it was run. Do not open it with pickle; get the file from its official source."
    ) from None


def _torch_reason(message: str) -> str:
    """Returns what the file asked for, out of torch's page of advice: its last line before the link to the documentation."""
    reason = message.partition("\n\nCheck the documentation")[0].rstrip().rpartition("\n")[2]
    reason = reason.removeprefix("WeightsUnpickler error: ").strip()
    found = re.search(r"GLOBAL (\S+)", reason)
    text = f"the global {found[1]}" if found else f"what torch.load(weights_only=True) does not read ({reason})"
    return (text if text.isprintable() else ascii(text))[:300]


def _array_pickle(path: Path) -> Any:
    size = path.stat().st_size
    if size > _MAX_ARRAY_PICKLE:
        raise WeightFileError(
            f"{path}: expected a pickle of arrays of at most {_MAX_ARRAY_PICKLE:,} bytes, got {size:,}; give the file of a "
            "model's weights."
        )
    try:
        return restricted_load(path.read_bytes(), ALLOWED_NAMES)
    except UnsafePickleError as error:
        _raise_refused(path, error)
    except DAMAGE as error:
        _raise_damaged(path, error)


def _state_dict(path: Path, content: Any) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """Finds the state dict, and names what lies beside it."""
    if not isinstance(content, dict):
        raise WeightFileError(
            f"{path}: expected a dict of tensors, or one under {' or '.join(STATE_KEYS)}, got {_described(content)}; "
            "give the file of a model's weights."
        )
    entries = dict(dict.items(content))  # attributes of a pickled OrderedDict may shadow its methods
    key = next((key for key in STATE_KEYS if isinstance(entries.get(key), dict)), None)
    if key is not None:
        found = dict(dict.items(entries[key]))
        ignored = tuple(shown(other) for other in entries if other != key)
    elif any(isinstance(value, Tensor | PickledArray) for value in entries.values()):
        found, ignored = entries, ()
    else:
        raise WeightFileError(
            f"{path}: expected a dict of tensors, or one under {' or '.join(STATE_KEYS)}, got one with the keys "
            f"{', '.join(shortened(key) for key in list(entries)[:10]) or 'none'}; give the file of a model's weights."
        )
    if not found:
        raise WeightFileError(f"{path}: expected a state dict with tensors, got an empty one; download it again.")
    return found, ignored


def _check_total(path: Path, found: Mapping[Any, Any]) -> None:
    """Refuses a file that names the same values so often that copies of them would fill memory."""
    sizes = [value.nbytes for value in found.values() if isinstance(value, Tensor | PickledArray)]
    if sum(sizes) > _MAX_SHARING * path.stat().st_size:
        raise WeightFileError(
            f"{path}: expected tensors of at most {_MAX_SHARING} times the file's {path.stat().st_size:,} bytes, got "
            f"{sum(sizes):,} bytes in {len(sizes):,} tensors that share their values; give a file that torch.save wrote of a model."
        )


def _as_tensor(value: Any) -> Any:
    """Returns the tensor of a numpy array that the file filled and torch has a type for; other values as they are."""
    if isinstance(value, PickledArray) and value.dtype.name not in _NOT_IN_TORCH:
        array = value.values()
        return value if array is None else torch.from_numpy(array)
    return value


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, PickledArray):
        return f"an array of {value.dtype}"
    return type(value).__name__.lstrip("_")


def _raise_damaged(path: Path, error: Exception | str) -> NoReturn:
    detail = error if isinstance(error, str) else f"{type(error).__name__}: {error}".partition("\n")[0][:300]
    detail = detail if detail.isprintable() else ascii(detail)
    raise WeightFileError(
        f"{path}: expected a whole weight file, got one that breaks off or is damaged ({detail}); download it again."
    ) from (error if isinstance(error, Exception) else None)


def _raise_bad_layout(path: Path, what: str) -> NoReturn:
    raise WeightFileError(
        f"{path}: expected a zip as torch.save writes it, got one in which {what}; nothing was unpacked. "
        "Get the file from its official source."
    )


# -- formats ----------------------------------------------------------------------------------------------------------


def _format(path: Path) -> str:
    """Returns `zip`, `legacy`, `pickle` or `safetensors` by the first bytes; anything else is refused by its name."""
    if not path.exists():
        raise WeightFileError(f"{path}: expected a weight file, got nothing of that name; correct the path.")
    if path.is_dir():
        raise WeightFileError(
            f"{path}: expected a weight file, got a folder; give the file in it (.pth, .pkl, .zip, .safetensors). "
            "A folder in Hugging Face form needs no conversion."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if size > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head.startswith(_LEGACY_MAGIC):
        return "legacy"
    if head.startswith(b"\x80"):
        return "pickle"
    if not head:
        found, advice = "an empty one", "download it again."
    elif head.startswith(b"version https://git-lfs"):
        lfs_size = re.search(rb"size (\d+)", head)
        found = f"a git-lfs pointer ({int(lfs_size[1]):,} bytes are meant)" if lfs_size else "a git-lfs pointer"
        advice = "fetch the file itself, e.g. with `git lfs pull`."
    elif text[:1] == b"<":
        found, advice = (
            "an HTML or XML page",
            "the download gave a web page: log in or use the direct link of the file.",
        )
    elif text[:1] in (b"{", b"["):
        found, advice = "a JSON text", "give the weights that belong to it."
    elif head[257:262] == b"ustar":
        found, advice = "a tar archive", "unpack it and give the weight file inside."
    elif head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")):
        found, advice = "a compressed archive", "unpack it and give the weight file inside."
    elif path.suffix == ".safetensors":
        found, advice = "one whose header is damaged or cut off", "download it again."
    else:
        found = f"{size:,} bytes of another kind (they start with {head[:8]!r})"
        advice = "give a file written by torch.save, safetensors or detectron2."
    raise WeightFileError(
        f"{path}: expected a weight file (torch's .pth, .pt, .bin or .zip, .safetensors, detectron2's .pkl), got {found}; "
        f"{advice}"
    )


class _Extent(NamedTuple):
    start: int  # byte in the file
    length: int  # bytes


def _zip_extents(path: Path) -> set[_Extent]:
    """Returns where the storages of a zip lie, after checking that it is laid out as `torch.save` does.

    Raises:
        WeightFileError: cut off, compressed, encrypted, overlapping or reaching beyond the file, or an entry whose name
            leaves its folder.
        UnsafePickleError: a TorchScript archive.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
            headers = []
            for info in infos:
                file.seek(info.header_offset)
                headers.append(file.read(30))
            order = [
                archive.read(info) for info in infos if info.filename.endswith("/byteorder") and info.file_size < 99
            ]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error, RuntimeError) as error:
        _raise_damaged(path, error)
    names = [info.filename for info in infos]
    if any(name.split("/", 1)[-1].startswith(("constants.pkl", "code/")) for name in names):
        raise UnsafePickleError(
            f"{path}: expected a file of tensors, got a TorchScript archive, which is a program; nothing of it was run. "
            "Give the model's state dict, saved with torch.save."
        )
    extents: dict[str, _Extent] = {}
    for info, header in zip(infos, headers, strict=True):
        parts = info.orig_filename.replace("\\", "/").split("/")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30])) if len(header) == 30 else end
        if ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in info.orig_filename:
            what = "has a name that leads out of its folder"
        elif info.filename in extents:
            what = "is there twice"
        elif info.flag_bits & 0x1:
            what = "is encrypted"
        elif info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            what = f"is compressed ({info.compress_size:,} bytes that become {info.file_size:,}), which torch.save never does"
        elif header[:4] != b"PK\x03\x04":
            what = "has no header"
        elif start + info.file_size > end:
            what = f"has {info.file_size:,} bytes at {start:,} in a file whose entries end at {end:,}"
        else:
            extents[info.filename] = _Extent(start, info.file_size)
            continue
        _raise_bad_layout(path, f"its entry {shortened(info.filename)} {what}")
    by_place = sorted(extent for extent in extents.values() if extent.length)
    if any(left.start + left.length > right.start for left, right in zip(by_place, by_place[1:], strict=False)):
        _raise_bad_layout(path, "its entries overlap")
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len({name.split("/")[0] for name in names}) != 1 or len(pickles) != 1:
        listed = ", ".join(name if name.isprintable() else shortened(name) for name in names[:10]) or "nothing in it"
        raise WeightFileError(
            f"{path}: expected a zip that torch.save wrote (one folder with data.pkl), got one with {listed}; if it is an "
            "ordinary archive, unpack it and give the weight file inside."
        )
    if extents[pickles[0]].length > _MAX_PICKLE:
        _raise_bad_layout(path, f"{pickles[0]} has {extents[pickles[0]].length:,} bytes, more than {_MAX_PICKLE:,}")
    if order and order[0] != b"little":
        raise WeightFileError(
            f"{path}: expected little-endian values, got another byte order; save the file again on a little-endian machine."
        )
    return set(extents.values())


def _check_storages(path: Path, tensors: Sequence[Tensor], extents: set[_Extent]) -> None:
    """Refuses tensors whose storage is not exactly one entry of the zip: `torch.load` believes any size in the pickle."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    places = {_Extent(s.data_ptr(), s.nbytes()) for s in storages if s.nbytes()}
    if not places:
        return
    first = min(places)
    bases = {first.start - extent.start for extent in extents if extent.length == first.length}
    if not any({_Extent(place.start - base, place.length) for place in places} <= extents for base in bases):
        size = max(place.length for place in places)
        raise WeightFileError(
            f"{path}: expected tensors whose storages are entries of the zip, got sizes that differ (up to {size:,} bytes); "
            "the file is damaged or forged, get it from its official source."
        )


def _check_legacy_storages(path: Path, tensors: Sequence[Tensor]) -> None:
    """Refuses a legacy file that lists fewer storages than its tensors have: `torch.load` would leave the others unset."""
    at = 0
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for _ in range(4):  # magic number, protocol, machine, content; then the list of storages
                at += pickle_end(data[at : at + _MAX_PICKLE])
            window = data[at : at + _MAX_PICKLE]
        listed = restricted_load(window[: pickle_end(window)], {})
    except (UnsafePickleError, *DAMAGE) as error:
        _raise_damaged(path, error)
    used = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.untyped_storage().nbytes()}
    if len(used) > len(listed):
        _raise_damaged(path, f"{len(used):,} storages in use, {len(listed):,} in the file")
