"""Weight files of others: what is legitimate reads as torch reads it; what is hostile or broken runs nothing.

Every refusal is also held to bounded memory: the address space may grow by 1 GiB at most and the peak of resident memory
by 200 MiB, while the files here declare up to 10 GB and more.
"""

import argparse
import builtins
import collections
import contextlib
import functools
import importlib
import io
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from deris_llm.common.unpickle import UnsafePickleError, pickle_end
from deris_llm.common.weight_files import WeightFileError, read_weight_file

GIB = 2**30
TEN_GB = 10 * 10**9

_CALLED: list[str] = []


def canary(*_: Any) -> str:
    """A function that a hostile file calls by its importable name."""
    _CALLED.append("called")
    return "called"


class Calls:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "canary"


# -- bounded memory ---------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    line = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert line is not None
    return int(line[1]) * 1024


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """No more than 1 GiB of address space, and 200 MiB of resident memory at the peak, above what was there before."""
    if not sys.platform.startswith("linux"):
        yield
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmHWM")
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + GIB, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert _status("VmHWM") - before < 200 * 2**20


def refused(path: Path, *told: str, marker: Path | None = None) -> str:
    """Reads a file that must be refused: with a message that says where and all of `told`, and without any effect."""
    _CALLED.clear()
    with bounded_memory(), pytest.raises((WeightFileError, UnsafePickleError)) as error:
        read_weight_file(path)
    assert not _CALLED
    assert marker is None or not marker.exists()
    message = str(error.value)
    assert message.startswith(f"{path}: expected ")
    assert " got " in message
    assert "MemoryError" not in message
    for text in told:
        assert text in message
    return message


# -- files as hostile hands write them --------------------------------------------------------------------------------


def zip_file(path: Path, pickled: bytes, entries: dict[str, bytes] | None = None) -> Path:
    """A zip as torch.save lays it out, with this data.pkl."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for name, content in (entries or {}).items():
            archive.writestr(name, content)
    return path


def legacy_file(path: Path, pickled: bytes, *, keys: list[str] | None = None, storages: bytes = b"") -> Path:
    """torch's legacy format, with this pickle of the content."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, machine))
    path.write_bytes(head + pickled + pickle.dumps(keys or [], 2) + storages)
    return path


def array_file(path: Path, pickled: bytes) -> Path:
    """A bare pickle, as detectron2's."""
    path.write_bytes(pickled)
    return path


CONTAINERS: dict[str, Callable[[Path, bytes], Path]] = {"zip": zip_file, "legacy": legacy_file, "array": array_file}
containers = pytest.mark.parametrize("container", list(CONTAINERS))


class _Pickler(pickle.Pickler):
    """Writes `Stored` as torch's persistent ids; those of the legacy format have a sixth part, the view."""

    view: tuple[None, ...] = ()

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Stored):
            return None
        return (*obj.pid, *self.view) if isinstance(obj.pid, tuple) and len(obj.pid) == 5 else obj.pid


class Stored:
    def __init__(self, *pid: Any) -> None:
        self.pid = pid[0] if len(pid) == 1 else pid


def dumps(content: Any, protocol: int = 2, container: str = "zip") -> bytes:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol)
    pickler.view = (None,) if container == "legacy" else ()
    pickler.dump(content)
    return buffer.getvalue()


def tensor(storage: Any, offset: Any = 0, size: Any = (2,), stride: Any = (1,)) -> Calls:
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict())


def floats(numel: Any = 2, key: Any = "0") -> Stored:
    return Stored("storage", torch.FloatStorage, key, "cpu", numel)


# -- legitimate files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())


def training_file(model: torch.nn.Module) -> dict[str, Any]:
    """All that a training script may keep beside its weights."""
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    model(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [15, 19])  # keeps a Counter
    state = model.state_dict()  # an OrderedDict with an attribute
    return {
        "epoch": 19, "lr": 1e-4, "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(),
        "best_miou": np.float64(80.1), "best_oiou": np.float32(79.0), "counts": np.arange(3), "flag": np.bool_(1),
        "shape": torch.Size([1, 2]), "dtype": torch.float32, "device": torch.device("cpu"), "names": {"a", "b"},
        "args": argparse.Namespace(lr=1e-4, name="x"),
        "state_dict": collections.OrderedDict((f"module.{name}", value) for name, value in state.items()),
    }  # fmt: skip


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_training_file_gives_its_state_dict_alone(tmp_path: Path, model: torch.nn.Module, is_zip: bool):
    torch.save(training_file(model), tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    found = read_weight_file(tmp_path / "a.pth")
    expected = model.state_dict()
    assert list(found.tensors) == list(expected)
    assert all(torch.equal(found.tensors[name], expected[name]) for name in expected)
    assert all(found.tensors[name].dtype == expected[name].dtype for name in expected)
    assert found.ignored == tuple(key for key in training_file(model) if key != "state_dict")
    assert found.num_half == 0


@pytest.mark.parametrize("is_zip", [True, False])
def test_views_strides_types_and_shared_storages_are_as_torch_reads_them(tmp_path: Path, is_zip: bool):
    grid = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": grid, "turned": grid.t(), "rows": grid[1:3], "column": grid[:, 2], "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 3), "parameter": torch.nn.Parameter(grid + 1),
        **{str(dtype): torch.arange(5).to(dtype) for dtype in (torch.int64, torch.int32, torch.uint8, torch.float64)},
        "bool": torch.tensor([True, False]),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    found = read_weight_file(tmp_path / "a.pth").tensors
    expected = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].stride() == value.stride() or not value.numel()
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickled_arrays(tmp_path: Path, protocol: int):
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {"a": grid, "columns first": np.asfortranarray(grid), "big": grid.astype(">f8"), "0d": np.array(3)}
    content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = read_weight_file(tmp_path / "a.pkl")
    assert found.ignored == ("__author__", "matching_heuristics")
    for name, array in arrays.items():
        assert torch.equal(found.tensors[name], torch.from_numpy(array.astype(array.dtype.newbyteorder("="))))


def test_arrays_of_older_numpy_are_read(tmp_path: Path):
    pickled = pickle.dumps({"model": {"a": np.ones(3, np.float32)}}, 2)
    older = pickled.replace(b"numpy._core.", b"numpy.core.")
    (tmp_path / "a.pkl").write_bytes(older)
    assert torch.equal(read_weight_file(tmp_path / "a.pkl").tensors["a"], torch.ones(3))


def test_safetensors_whatever_the_name(tmp_path: Path):
    safetensors.torch.save_file({"a": torch.ones(2, 3), "b": torch.zeros(1)}, tmp_path / "weights.bin")
    assert torch.equal(read_weight_file(tmp_path / "weights.bin").tensors["a"], torch.ones(2, 3))


def test_only_a_prefix_that_all_names_have_is_taken_off(tmp_path: Path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pth")
    assert list(read_weight_file(tmp_path / "a.pth").tensors) == ["module.a", "b"]


def test_half_precision_is_an_error_or_asked_for(tmp_path: Path):
    weights = {"a": torch.ones(2).half(), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(2)}
    torch.save(weights, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "2 of 3 tensors in half precision", "a: torch.float16", "--allow-half")
    found = read_weight_file(tmp_path / "a.pth", allow_half=True)
    assert found.num_half == 2
    assert all(value.dtype == torch.float32 for value in found.tensors.values())


def test_writing_into_the_tensors_leaves_the_file_alone(tmp_path: Path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    read_weight_file(tmp_path / "a.pth").tensors["a"].fill_(1.0)
    assert (tmp_path / "a.pth").read_bytes() == before


# -- files that are no weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n",
         ["a git-lfs pointer (123,456 bytes are meant)", "git lfs pull"]),
        ("a.pkl", b"\n<!DOCTYPE html><html>Sign in</html>", ["an HTML or XML page", "direct link"]),
        ("a.pth", b"", ["an empty one", "download it again"]),
        ("a.pth", b'{"a": 1}', ["a JSON text"]),
        ("a.safetensors", b'{"a": 1}', ["a JSON text"]),
        ("a.pth", b"\x1f\x8b\x08" + bytes(100), ["a compressed archive", "unpack"]),
        ("a.pth", b"hello, weights", ["14 bytes of another kind"]),
        ("a.safetensors", struct.pack("<Q", TEN_GB) + b'{"a"', ["header is damaged or cut off"]),
        ("a.safetensors", struct.pack("<Q", 3) + b'{"a' + bytes(8), ["damaged"]),
        ("a.pth", b"PK\x03\x04" + bytes(100), ["breaks off or is damaged"]),
        ("a.pth", b"\x80\x02}", ["breaks off or is damaged"]),
        ("a.pth", pickle.dumps([1, 2, 3], 2), ["a dict of tensors", "got list"]),
        ("a.pth", pickle.dumps({}, 2), ["got one with the keys none"]),
        ("a.pth", pickle.dumps({"epoch": 3, "miou": 0.5}, 2), ["state_dict or model", "'epoch', 'miou'"]),
        ("a.pth", pickle.dumps({"model": {}}, 2), ["got an empty one"]),
        ("a.pth", pickle.dumps({"model": {"a": 1.5, "b": "text"}}, 2), ["2 other entries", "'a' (float), 'b' (str)"]),
    ],
)  # fmt: skip
def test_what_is_no_weight_file_is_named(tmp_path: Path, name: str, content: bytes, told: list[str]):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, *told)


def test_tar_folder_and_nothing_are_named(tmp_path: Path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    refused(tmp_path / "a.tar", "a tar archive")
    refused(tmp_path, "got a folder")
    refused(tmp_path / "absent.pth", "got nothing of that name")


def test_names_that_upset_a_terminal_are_no_names(tmp_path: Path):
    torch.save({"a\x1b[2J": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pth")
    assert "\x1b" not in refused(tmp_path / "a.pth", r"'a\x1b[2J' (a tensor)")
    pickled = pickle.dumps({"model": {}}, 2)[:-1] + b"cos\x1b[2J\nsystem\n."
    assert "\x1b" not in refused(array_file(tmp_path / "b.pkl", pickled), "asks for the global")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.999])
def test_files_that_are_cut_off(tmp_path: Path, model: torch.nn.Module, is_zip: bool, keep: float):
    torch.save(training_file(model), tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: int(len(whole) * keep)])
    refused(tmp_path / "a.pth", "breaks off or is damaged", "download it again")


def test_ordinary_and_nested_archives(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
        archive.writestr("weights/model.pth", b"x")
    refused(tmp_path / "a.zip", "got one with readme.txt, weights/model.pth", "unpack it")
    with zipfile.ZipFile(tmp_path / "b.zip", "w"):
        pass
    refused(tmp_path / "b.zip", "nothing in it")


# -- code in pickles --------------------------------------------------------------------------------------------------


def attacks(marker: Path) -> dict[str, tuple[Any, str]]:
    """What a security engineer would try: name -> (object to pickle, what the message must name)."""
    code = f"open({str(marker)!r}, 'w').close()"
    system = Calls(os.system, f"touch {marker}")
    return {
        "os.system": (system, f"{os.system.__module__}.system"),
        "subprocess": (Calls(subprocess.Popen, ["touch", str(marker)]), "open"),
        "eval": (Calls(builtins.eval, code), "__builtin__.eval"),
        "exec": (Calls(builtins.exec, code), "__builtin__.exec"),
        "open": (Calls(io.open, str(marker), "w"), "open"),
        "getattr": (Calls(getattr, Calls(importlib.import_module, "os"), "system"), "__builtin__.getattr"),
        "import_module": (Calls(importlib.import_module, "antigravity"), "importlib.import_module"),
        "partial": (Calls(functools.partial, os.system, f"touch {marker}"), "functools.partial"),
        "loads": (Calls(pickle.loads, pickle.dumps(system)), "pickle.loads"),
        "torch.load": (Calls(torch.load, str(marker)), "torch.serialization.load"),
        "load_from_bytes": (Calls(torch.storage._load_from_bytes, pickle.dumps(system)), "_load_from_bytes"),
        "jit.load": (Calls(torch.jit.load, str(marker)), "torch.jit"),
        "numpy.load": (Calls(np.load, str(marker)), "numpy.load"),
        "memmap": (Calls(np.memmap, str(marker), "u1", "w+", 0, (8,)), "numpy.memmap"),
        "apply": (Calls(np.apply_along_axis, os.system, 0, [f"touch {marker}"]), "apply_along_axis"),
        "own function": (Calls(canary), "canary"),
        "own class": (Calls(Calls, canary), "Calls"),
        "sparse": (Calls(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, ()), "_rebuild_sparse_tensor"),
        "with state": (Calls(torch._utils._rebuild_parameter_with_state, torch.ones(1), False, {}, {}), "with_state"),
        "from type": (
            Calls(torch._tensor._rebuild_from_type_v2, canary, torch.Tensor, (), {}),
            "torch._tensor._rebuild_from_type_v2",
        ),
        "object dtype": (Calls(np.dtype, "O"), "numpy dtype 'O'"),
        "object scalar": (Calls(np._core.multiarray.scalar, np.dtype("O"), pickle.dumps(system)), "numpy dtype 'O8'"),
        "record dtype": (np.dtype([("a", "f4"), ("b", "O")]), "numpy dtype 'V12'"),
        "codecs to shell": (Calls(__import__("_codecs").encode, f"touch {marker}", "rot13"), "_codecs.encode with 'rot13'"),
        "codecs decode": (Calls(__import__("_codecs").decode, b"x", "zip"), "_codecs.decode"),
        "array of subclass": (Calls(np._core.multiarray._reconstruct, np.matrix, (0,), b"b"), "numpy.matrix"),
    }  # fmt: skip


@containers
@pytest.mark.parametrize("attack", list(attacks(Path("x"))))
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_that_a_pickle_names_is_run(tmp_path: Path, marker: Path, container: str, attack: str, protocol: int):
    payload, named = attacks(marker)[attack]
    path = CONTAINERS[container](tmp_path / "a.pth", pickle.dumps(payload, protocol))
    if container == "array":
        told = named.replace("__builtin__", "__builtin__" if protocol == 2 else "builtins")
    elif protocol == 4:
        told = "Unsupported operand"  # torch.load reads protocol 2, which torch.save writes
    else:
        told = {
            "sparse": "not enough values",  # torch's own function, called with the wrong arguments
            "with state": "_load_from_bytes",
            "from type": "canary",
            "codecs to shell": "got str",  # a text codec, which is harmless
        }.get(attack, named.removeprefix("__builtin__."))
    refused(path, told, marker=marker)


@containers
def test_code_deep_inside_is_found_before_anything_is_made(tmp_path: Path, marker: Path, container: str):
    deep: Any = Calls(os.system, f"touch {marker}")
    for _ in range(50):
        deep = {"a": [deep, (1, 2)]}
    content = {"state_dict": {"weight": np.ones(3, np.float32)}, "optimizer": {"state": {0: deep}}}
    refused(CONTAINERS[container](tmp_path / "a.pth", pickle.dumps(content, 2)), "system", marker=marker)


def test_the_samples_are_dangerous(tmp_path: Path, marker: Path):
    """The proof that the tests above test something: Python's own reader runs them."""
    _CALLED.clear()
    pickle.loads(pickle.dumps(attacks(marker)["own function"][0]))
    assert _CALLED
    pickle.loads(pickle.dumps(attacks(marker)["os.system"][0]))
    assert marker.exists()
    marker.unlink()
    with pytest.raises(UnsafePickleError):
        read_weight_file(zip_file(tmp_path / "a.pth", pickle.dumps(attacks(marker)["os.system"][0])))
    assert not marker.exists()


DAMAGED = "breaks off or is damaged"
OPERAND = "Unsupported operand"


@containers
@pytest.mark.parametrize(
    ("program", "by_torch", "by_ours"),
    [
        (b"\x80\x02(S'x'\nios\nsystem\n.", OPERAND, "os.system"),  # INST
        (b"\x80\x02(cos\nsystem\nS'x'\no.", "os.system", "os.system"),  # OBJ
        (b"\x80\x02cos\nsystem\n)\x81.", "os.system", "os.system"),  # NEWOBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", OPERAND, "os.system"),  # STACK_GLOBAL
        (b"\x80\x04\x8c\x05torch\x8c\x0a__import__\x93.", OPERAND, "torch.__import__"),
        (b"\x80\x02\x82\x01.", OPERAND, DAMAGED),  # extension registry
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__K\x01sb.",
            "Can only build",
            "torch._utils._rebuild_tensor_v2",
        ),
        (b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.", "Can only build", DAMAGED),
        (b"\x80\x02cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb.", "Can only build", DAMAGED),  # of the class
        (
            b"\x80\x02cnumpy._core.multiarray\nscalar\n}X\x01\x00\x00\x00aK\x01sb.",
            "Can only build",
            "a change of numpy's scalar",
        ),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", DAMAGED, "torch.FloatStorage"),  # a storage type is no function
        (b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb.", "Can only build", "torch.FloatStorage"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "got an array", "got an array"),  # an empty stand-in
        (b"\x80\x02ctypes\nFunctionType\nctypes\nCodeType\n)R}\x86R.", "types.FunctionType", "types.FunctionType"),
        (b"\x80\x02K\x01K\x02R.", "Trying to call", DAMAGED),
        (b"\x80\x02.", DAMAGED, DAMAGED),
        (
            b"\x80\x02]r\xff\xff\xff\xff.",
            "got list",
            "place 4,294,967,295 of its memo",
        ),  # 64 GB of memo in C's unpickler
        (b"\x80\x04\x8e" + struct.pack("<Q", TEN_GB) + b"x.", OPERAND, DAMAGED),  # bytes of 10 GB
        (b"\x80\x04\x8d" + struct.pack("<Q", TEN_GB) + b"x.", OPERAND, DAMAGED),  # text of 10 GB
        (b"\x80\x05\x96" + struct.pack("<Q", TEN_GB) + b"x.", OPERAND, DAMAGED),  # bytearray of 10 GB
        (b"\x80\x02\x8b\xff\xff\xff\x7f1.", OPERAND, DAMAGED),  # a number of 2 GB
        (b"\x80\x04\x95" + struct.pack("<Q", TEN_GB) + b"}.", OPERAND, DAMAGED),  # a frame of 10 GB
    ],
)
def test_programs_written_by_hand(tmp_path: Path, container: str, program: bytes, by_torch: str, by_ours: str):
    refused(CONTAINERS[container](tmp_path / "a.pth", program), by_ours if container == "array" else by_torch)


def test_attributes_of_a_state_dict_are_dropped_and_shadow_nothing(tmp_path: Path):
    state = collections.OrderedDict(a=np.ones(2, np.float32))
    state.values = "not callable"  # type: ignore[method-assign]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": state}, 2))
    assert torch.equal(read_weight_file(tmp_path / "a.pkl").tensors["a"], torch.ones(2))


def test_a_torchscript_archive_is_refused(tmp_path: Path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")  # type: ignore[attr-defined]
    refused(tmp_path / "a.pt", "a TorchScript archive, which is a program")


def test_a_pickled_module_is_refused(tmp_path: Path, model: torch.nn.Module):
    torch.save(model, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "torch.nn.modules.container.Sequential")
    torch.save({"model": model}, tmp_path / "b.pth")
    refused(tmp_path / "b.pth", "torch.nn.modules.container.Sequential")


# -- persistent ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize(
    "pid",
    [
        "storage", 7, ("module", 1, "file", "source"), ("storage",), ("storage", "FloatStorage", "0", "cpu", 2),
        ("storage", torch.FloatStorage, 0, "cpu", 2), ("storage", torch.FloatStorage, ["0"], "cpu", 2),
        ("storage", torch.FloatStorage, "0", "cpu", -2), ("storage", torch.FloatStorage, "0", "cpu", True),
        ("storage", torch.FloatStorage, "0", "cpu", 2.0), ("storage", torch.FloatStorage, "0", "cpu", "2"),
        ("storage", torch.FloatStorage, "0", "cpu", 2, ("0", 0)), ("storage", torch.FloatStorage, "0", "cpu", 2, 5),
        ("storage", torch.FloatStorage, "0", "cpu", 2, ("0", 1, 2)),
    ],
)  # fmt: skip
def test_odd_persistent_ids(tmp_path: Path, container: str, pid: Any):
    pickled = dumps({"model": {"a": tensor(Stored(pid))}}, container=container)
    refused(CONTAINERS[container](tmp_path / "a.pth", pickled))


def test_persistent_ids_in_a_file_of_arrays(tmp_path: Path):
    refused(array_file(tmp_path / "a.pkl", dumps({"model": {"a": Stored("0")}})), "a persistent id")


@pytest.mark.parametrize("key", ["../../etc/passwd", "1", "", "/etc/passwd", "0/../1"])
def test_storages_that_are_not_in_the_zip(tmp_path: Path, key: str):
    pickled = dumps({"model": {"a": tensor(floats(key=key))}})
    refused(zip_file(tmp_path / "a.pth", pickled, {"archive/data/0": bytes(8)}), "damaged")


# -- sizes that do not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        tensor(floats(TEN_GB // 4), size=(TEN_GB // 4,)),
        tensor(floats(3), size=(3,)),  # of a storage whose entry has 2 values
        tensor(floats(2), size=(TEN_GB,)),
        tensor(floats(2), size=(TEN_GB,), stride=(0,)),  # one value seen 10 GB times
        tensor(floats(2), size=(2,), stride=(5,)),
        tensor(floats(2), offset=1),
        tensor(floats(2), offset=-1),
        tensor(floats(2), size=(-1,)),
        tensor(floats(2), stride=(-1,)),
        tensor(floats(2), size=(2.0,)),
        tensor(floats(2), size=(1, 2), stride=(1,)),
        tensor("storage"),
        Calls(torch._utils._rebuild_parameter, "x", False, {}),
    ],
)
def test_tensors_larger_than_their_storage(tmp_path: Path, value: Any):
    refused(zip_file(tmp_path / "a.pth", dumps({"model": {"a": value}}), {"archive/data/0": bytes(8)}))
    storages = struct.pack("<q", 2) + bytes(8)
    pickled = dumps({"model": {"a": value}}, container="legacy")
    refused(legacy_file(tmp_path / "b.pth", pickled, keys=["0"], storages=storages))


def test_a_storage_that_takes_the_bytes_of_its_neighbour(tmp_path: Path):
    """torch.load believes the size in the pickle: three values where the entry has two."""
    pickled = dumps({"model": {"a": tensor(floats(3), size=(3,)), "b": tensor(floats(2, key="1"))}})
    path = zip_file(tmp_path / "a.pth", pickled, {"archive/data/0": bytes(8), "archive/data/1": bytes(8)})
    refused(path, "sizes that differ")


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_many_names_for_the_same_values_do_not_fill_memory(tmp_path: Path, container: str):
    """A thousand names for 1 MiB: views until somebody converts or copies them."""
    one = tensor(floats(2**18), size=(2**18,))
    pickled = dumps({"model": {f"a{number}": one for number in range(1000)}}, container=container)
    if container == "zip":
        path = zip_file(tmp_path / "a.pth", pickled, {"archive/data/0": bytes(2**20)})
    else:
        storages = struct.pack("<q", 2**18) + bytes(2**20)
        path = legacy_file(tmp_path / "a.pth", pickled, keys=["0"], storages=storages)
    refused(path, "1,048,576,000 bytes in 1,000 tensors that share their values")


def test_many_names_for_the_same_array_do_not_fill_memory(tmp_path: Path):
    array = np.zeros(2**18, np.float32)
    path = array_file(tmp_path / "a.pkl", pickle.dumps({"model": dict.fromkeys(map(str, range(1000)), array)}))
    refused(path, "1,000 tensors that share their values")
    path.write_bytes(pickle.dumps({"model": {"a": array, "b": array}}))
    found = read_weight_file(path).tensors
    assert found["a"].data_ptr() == found["b"].data_ptr()  # tied, as they were


def test_values_whose_text_is_huge_are_shown_in_short(tmp_path: Path):
    laughs: Any = "ha"
    for _ in range(40):  # 2 ** 40 times ha
        laughs = [laughs, laughs]
    for content in (
        Stored("storage", laughs),
        Stored("storage", torch.FloatStorage, laughs, "cpu", 2),
        {"model": {"a": tensor(floats(), offset=laughs)}},
        {"model": {"a": Calls(__import__("_codecs").encode, "x", laughs)}},
        {"model": {"a": laughs}},
        {2**100_000: 1},
    ):
        for container in (zip_file, legacy_file):
            name = "zip" if container is zip_file else "legacy"
            assert len(refused(container(tmp_path / "a.pth", dumps(content, container=name)))) < 1000
    refused(array_file(tmp_path / "a.pkl", dumps({"model": {"n" * 10**6: 1}})), "nnn...")


@pytest.mark.parametrize("size", [(2**62,), (2**40, 2**40), (2**100_000,)])
def test_numbers_beyond_all_sizes(tmp_path: Path, size: tuple[int, ...]):
    pickled = dumps({"model": {"a": tensor(floats(), size=size, stride=(1,) * len(size))}})
    assert len(refused(zip_file(tmp_path / "a.pth", pickled, {"archive/data/0": bytes(8)}))) < 1000


@pytest.mark.parametrize("numel", [3, TEN_GB, 2**62, -1])
def test_legacy_storages_larger_than_the_file(tmp_path: Path, numel: int):
    pickled = dumps({"model": {"a": tensor(floats())}}, container="legacy")
    storages = struct.pack("<q", numel) + bytes(8)
    refused(legacy_file(tmp_path / "a.pth", pickled, keys=["0"], storages=storages), "breaks off or is damaged")


def test_legacy_storages_smaller_than_their_tensors_or_of_other_names(tmp_path: Path):
    pickled = dumps({"model": {"a": tensor(floats())}}, container="legacy")
    one = struct.pack("<q", 1) + bytes(4)
    refused(legacy_file(tmp_path / "a.pth", pickled, keys=["0"], storages=one), "damaged")
    refused(legacy_file(tmp_path / "b.pth", pickled, keys=["1"], storages=one), "damaged")
    refused(legacy_file(tmp_path / "c.pth", pickled, keys=["0", "0"], storages=one), "damaged")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b"K\x03K\x05\x86", b"J\xff\xff\xff\x7fK\x05\x86", "(42,949,672,940 bytes) while it brings 60 bytes"),
        (b"K\x03K\x05\x86", b"J\xff\xff\xff\xffK\x05\x86", "shape (-1, 5)"),
        (b"\x8c\x02f4", b"\x8c\x02O8", "numpy dtype 'O8'"),
        (b"\x8c\x02f4", b"\x8c\x02V4", "numpy dtype 'V4'"),
        (b"\x8c\x02f4", b"\x8c\x02f8", "(120 bytes) while it brings 60 bytes"),
    ],
)
def test_arrays_that_differ_from_their_bytes(tmp_path: Path, old: bytes, new: bytes, told: str):
    pickled = pickle.dumps({"model": {"a": np.zeros((3, 5), np.float32)}}, 4)
    assert pickled.count(old) == 1
    (tmp_path / "a.pkl").write_bytes(pickled.replace(old, new))
    refused(tmp_path / "a.pkl", told)


def test_an_array_that_is_never_filled_is_no_tensor(tmp_path: Path):
    content = {"model": {"a": np.ones(1), "b": Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b")}}
    refused(array_file(tmp_path / "a.pkl", pickle.dumps(content, 2)), "'b' (an array of float32)")


# -- zips -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["archive/../../../etc/x", "/etc/passwd", "../x", "archive/data/../../x", r"..\x", r"archive\..\x", "C:/x"]
)
def test_names_that_lead_out_of_the_folder(tmp_path: Path, name: str):
    zip_file(tmp_path / "a.pth", dumps({"model": {}}), {name: b"x"})
    refused(tmp_path / "a.pth", "has a name that leads out of its folder", "nothing was unpacked")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pth"]


def test_compressed_entries_are_no_torch_file(tmp_path: Path):
    """100 MB of zeros in 100 kB."""
    pickled = dumps({"model": {"a": tensor(floats(25 * 10**6), size=(25 * 10**6,))}})
    zip_file(tmp_path / "a.pth", pickled)
    with zipfile.ZipFile(tmp_path / "a.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**8))
    assert (tmp_path / "a.pth").stat().st_size < 200_000
    refused(tmp_path / "a.pth", "is compressed", "that become 100,000,000")


def central(data: bytes, name: bytes, offset: int, value: bytes) -> bytes:
    """Overwrites a field of an entry in the central directory."""
    start = data.rindex(name) - 46
    assert data[start : start + 4] == b"PK\x01\x02"
    return data[: start + offset] + value + data[start + offset + len(value) :]


def test_an_entry_that_says_it_has_10_gb(tmp_path: Path):
    values = 2 * 10**9 // 4
    zip_file(
        tmp_path / "a.pth",
        dumps({"model": {"a": tensor(floats(values), size=(values,))}}),
        {"archive/data/0": bytes(8)},
    )
    data = (tmp_path / "a.pth").read_bytes()
    two_gb = struct.pack("<II", 2 * 10**9, 2 * 10**9)  # compressed, uncompressed
    (tmp_path / "a.pth").write_bytes(central(data, b"archive/data/0", 20, two_gb))
    refused(tmp_path / "a.pth", "2,000,000,000 bytes at")

    extra = struct.pack("<HHQQ", 1, 16, TEN_GB, TEN_GB)  # zip64: the true sizes of an entry that says 2**32 - 1
    name = b"archive/data/0"
    start = data.rindex(name) - 46
    entry = bytearray(data[start : start + 46])
    entry[20:28] = b"\xff" * 8
    entry[30:32] = struct.pack("<H", len(extra))
    changed = data[:start] + bytes(entry) + name + extra + data[start + 46 + len(name) :]
    size = struct.unpack("<I", changed[-10:-6])[0] + len(extra)
    changed = changed[:-10] + struct.pack("<I", size) + changed[-6:]
    (tmp_path / "b.pth").write_bytes(changed)
    with zipfile.ZipFile(tmp_path / "b.pth") as archive:
        assert archive.getinfo("archive/data/0").file_size == TEN_GB
    refused(tmp_path / "b.pth", "10,000,000,000 bytes at")


def test_entries_that_overlap_or_are_there_twice_or_are_encrypted(tmp_path: Path):
    zip_file(tmp_path / "a.pth", dumps({"model": {}}), {"archive/data/0": bytes(8), "archive/data/1": bytes(8)})
    data = (tmp_path / "a.pth").read_bytes()
    first = data.index(b"archive/data/0") - 30
    shared = central(data, b"archive/data/1", 42, struct.pack("<I", first))  # both entries at the same place
    (tmp_path / "b.pth").write_bytes(shared)
    refused(tmp_path / "b.pth", "its entries overlap")
    (tmp_path / "c.pth").write_bytes(central(data, b"archive/data/1", 8, b"\x01\x00"))
    refused(tmp_path / "c.pth", "is encrypted")
    (tmp_path / "d.pth").write_bytes(data.replace(b"archive/data/1", b"archive/data/0"))
    refused(tmp_path / "d.pth", "is there twice")
    (tmp_path / "e.pth").write_bytes(central(data, b"archive/data/1", 42, struct.pack("<I", 3)))
    refused(tmp_path / "e.pth", "has no header")


def test_two_folders_or_no_pickle(tmp_path: Path):
    refused(zip_file(tmp_path / "a.pth", dumps({}), {"other/data.pkl": dumps({})}), "one folder with data.pkl")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("archive/data/0", bytes(8))
    refused(tmp_path / "b.pth", "one folder with data.pkl")


def test_other_byte_order_is_told(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", dumps({"model": {}}))
        archive.writestr("archive/byteorder", b"big")
    refused(tmp_path / "a.pth", "little-endian")


@pytest.mark.parametrize("kind", ["zip", "legacy", "array", "safetensors"])
def test_damage_anywhere_is_an_error_or_harmless(tmp_path: Path, model: torch.nn.Module, kind: str):
    """A few bytes changed at random places of a good file: tensors of bounded size, or one of our errors; never another."""
    path = tmp_path / "a.pth"
    if kind == "array":
        arrays = {name: value.detach().numpy() for name, value in model.state_dict().items()}
        path.write_bytes(pickle.dumps({"model": arrays}, 4))
    elif kind == "safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save(training_file(model), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    outcomes = collections.Counter()
    for _ in range(150):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        with bounded_memory():
            try:
                tensors = read_weight_file(path, allow_half=True).tensors
                assert sum(value.numel() for value in tensors.values()) < len(whole)
                outcomes["read"] += 1
            except (WeightFileError, UnsafePickleError) as error:
                outcomes["refused" if str(error).startswith(f"{path}: expected ") else str(error)] += 1
    assert set(outcomes) == {"read", "refused"}


def test_where_a_pickle_ends():
    program = pickle.dumps({"a": [1, 2]}, 2)
    assert pickle_end(program + b"rest of the file") == len(program)
    with pytest.raises(ValueError):
        pickle_end(program[:-1])


def test_a_file_of_names_is_json_safe(tmp_path: Path, model: torch.nn.Module):
    """What was ignored can be written into the account of a conversion."""
    torch.save({**training_file(model), 3: "number", ("t", 1): 2}, tmp_path / "a.pth")
    ignored = read_weight_file(tmp_path / "a.pth").ignored
    assert json.loads(json.dumps(ignored))[-2:] == ["3", "('t', 1)"]
