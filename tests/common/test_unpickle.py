"""A pickle that wants to run something runs nothing; REFER's plain ones read as they are."""

import builtins
import copyreg
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest

from deris_llm.common.unpickle import UnsafePickleError, load_plain_pickle, pickle_end

PLAIN = [
    {
        "ref_id": 3,
        "sent_ids": [1, 2],
        "sent": "café",
        "score": 0.5,
        "none": None,
        "yes": True,
        "raw": b"x",
        "pair": (1, 2),
    }
]


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


class _Calls:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _marks(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_data_comes_back(tmp_path: Path, protocol: int) -> None:
    assert load_plain_pickle(_write(tmp_path / "refs.p", pickle.dumps(PLAIN, protocol))) == PLAIN


def test_sets_of_newer_protocols_are_plain(tmp_path: Path) -> None:
    assert load_plain_pickle(_write(tmp_path / "refs.p", pickle.dumps({"ids": {1, 2}}, 4))) == {"ids": {1, 2}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("café".encode(), "café"), ("café".encode("latin-1"), "café"), (b"plain", "plain")],
)
@pytest.mark.parametrize("protocol", [0, 2])
def test_python2_text(tmp_path: Path, text: bytes, expected: str, protocol: int) -> None:
    # Python 2 wrote str as STRING (protocol 0) or SHORT_BINSTRING (2), unicode as UNICODE or BINUNICODE.
    if protocol == 0:
        data = b"(lp0\n(dp1\nS'sent'\np2\nS'" + repr(text)[2:-1].encode() + b"'\np3\nsS'raw'\np4\nVwei\\u00df\np5\nsa."
    else:
        data = b"\x80\x02]}(U\x04sentU" + bytes([len(text)]) + text + b"U\x03rawX\x05\x00\x00\x00wei\xc3\x9fua."
    assert load_plain_pickle(_write(tmp_path / "refs(unc).p", data)) == [{"sent": expected, "raw": "weiß"}]


def _hostile(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> (pickle that would create the marker, what the message must name)."""
    touch = f"touch {marker}"
    system = pickle.dumps(_Calls(os.system, touch), 2)
    return {
        "os.system": (b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.", "os.system"),
        "posix.system": (system, f"{os.system.__module__}.system"),
        "stack_global": (pickle.dumps(_Calls(os.system, touch), 4), f"{os.system.__module__}.system"),
        "eval": (pickle.dumps(_Calls(builtins.eval, _marks(marker)), 4), "builtins.eval"),
        "python2 eval": (pickle.dumps(_Calls(builtins.eval, _marks(marker)), 0), "eval"),
        "exec in a dict in a list": (
            pickle.dumps([{"refs": [1, _Calls(builtins.exec, _marks(marker))]}], 4),
            "builtins.exec",
        ),
        "as a key": (
            b"\x80\x02}cos\nsystem\n(X" + len(touch).to_bytes(4, "little") + touch.encode() + b"tRK\x01s.",
            "os.system",
        ),
        "getattr": (pickle.dumps(_Calls(getattr, _Calls(__import__, "os"), "system"), 4), "builtins.getattr"),
        "dotted name": (b"\x80\x04\x8c\x02os\x8c\x0cpath.os.pipe\x93.", "os.path.os.pipe"),
        "inst": (b"(S'" + touch.encode() + b"'\nios\nsystem\n.", "os.system"),
        "obj": (b"(cos\nsystem\nS'" + touch.encode() + b"'\no.", "os.system"),
        "newobj": (
            b"\x80\x02csubprocess\nPopen\nX" + len(touch).to_bytes(4, "little") + touch.encode() + b"\x85\x81.",
            "subprocess.Popen",
        ),
        "build": (b"\x80\x02cos\nenviron\n}X\x04\x00\x00\x00evilK\x01sb.", "os.environ"),
        "class without call": (b"\x80\x02cbuiltins\nobject\n.", "builtins.object"),
        "codec": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R.", "_codecs.encode"),
    }


@pytest.mark.parametrize("name", sorted(_hostile(Path("marker"))))
def test_nothing_of_a_hostile_pickle_runs(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    data, named = _hostile(marker)[name]
    path = _write(tmp_path / "refs(unc).p", data)
    with pytest.raises(UnsafePickleError, match="refused before anything of it was run") as caught:
        load_plain_pickle(path)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "stack_global", "eval", "exec in a dict in a list", "inst", "obj"])
def test_those_pickles_do_run_elsewhere(tmp_path: Path, name: str) -> None:
    """Shows that the test above could fail: plain ``pickle.load`` runs them."""
    marker = tmp_path / "marker"
    data, _ = _hostile(marker)[name]
    pickle.loads(data)
    assert marker.exists()


@pytest.mark.parametrize("data", [b"Psome id\n.", b"\x80\x02X\x01\x00\x00\x00aQ."])
def test_persistent_ids_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UnsafePickleError, match="persistent id"):
        load_plain_pickle(_write(tmp_path / "refs.p", data))


def test_extension_codes_are_refused_even_when_cached(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    copyreg.add_extension("builtins", "eval", 0xF0)
    try:
        text = _marks(marker).encode()
        data = b"\x80\x02\x82\xf0X" + len(text).to_bytes(4, "little") + text + b"\x85R."
        pickle.loads(b"\x80\x02\x82\xf0.")  # fills the cache of extension codes
        with pytest.raises(UnsafePickleError, match="builtins.eval"):
            load_plain_pickle(_write(tmp_path / "refs.p", data))
        assert not marker.exists()
        pickle.loads(data)
        assert marker.exists()
    finally:
        copyreg.remove_extension("builtins", "eval", 0xF0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02]",
        b"garbage",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        pickle.dumps(PLAIN)[:-9],
        b"\x80\x02\x82\xef.",
        b"}}s.",
    ],
)
def test_damaged_files_are_named(tmp_path: Path, data: bytes) -> None:
    path = _write(tmp_path / "refs(umd).p", data)
    with pytest.raises(ValueError, match="Download or write the file again") as caught:
        load_plain_pickle(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"\x80\x02]r\xff\xff\xff\xff.", b"(lp8000000000\n."])
def test_a_memo_that_would_fill_memory_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(
        UnsafePickleError, match=r"a\.p: expected a pickle of plain .*, got one that asks for place .* memo"
    ):
        load_plain_pickle(_write(tmp_path / "a.p", data))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_end_is_found_in_every_protocol(protocol: int) -> None:
    refs = [{**PLAIN[0], "ref_id": n, "sent": f"the {n}. man\n\x00 left of a \u2014" * (n % 9)} for n in range(3000)]
    data = pickle.dumps([refs, 2**70, -(2**3000), 1 << 20, "x" * 70000, b"." * 300, bytearray(b"p9"), {1, 2}], protocol)
    assert pickle_end(data) == pickle_end(data + b"more") == len(data)
    assert [op.name for op, _, at in pickletools.genops(data) if at == len(data) - 1] == ["STOP"]


def test_size_limit(tmp_path: Path) -> None:
    path = _write(tmp_path / "refs.p", pickle.dumps(PLAIN))
    with pytest.raises(ValueError, match="at most 10 bytes"):
        load_plain_pickle(path, max_bytes=10)


def test_deep_nesting_reads(tmp_path: Path) -> None:
    depth = 100_000
    value = load_plain_pickle(_write(tmp_path / "refs.p", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."))
    levels = 1
    while value:
        value, levels = value[0], levels + 1
    assert levels == depth
