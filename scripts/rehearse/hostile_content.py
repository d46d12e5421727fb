"""Ways to spoil a file, by kind of file: `of_kind` lists them, each as a function of a valid file and a source of randomness.

A *wanton* one changes bytes or values at random, so what becomes of it may be valid. A *crafted* one is an attack or a file that
cannot be meant, and accepting it is a fault if it `must_fail`.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import gzip
import io
import json
import os
import pickle
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MEGABYTE = 10**6
ESCAPE = (
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred\r\x9b7mC1\x08\x7f"  # sets a title, clears the screen, colours, returns, deletes
)


class Spoiling(NamedTuple):
    """One way to spoil a file."""

    name: str
    apply: Callable[[Path, random.Random], None]
    is_wanton: bool = False  # it may be applied many times, with another result each time
    must_fail: bool = False  # accepting the result is a fault
    is_heavy: bool = False  # makes a file of about 100 MB


def of_kind(kind: str) -> list[Spoiling]:
    """The ways to spoil a file of a kind; those of any file last."""
    return [*_KINDS.get(kind, []), *(() if kind in _OURS else _ANY)]


# -- any file ----------------------------------------------------------------------------------------------------------


def _bytes(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    return lambda path, rng: _write(path, change(path.read_bytes(), rng))


def _write(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def _flipped(content: bytes, rng: random.Random) -> bytes:
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 1, 8, 64))):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(max(1, len(content)))]


def _overwritten(content: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(max(1, len(content))), rng.choice((1, 4, 8, 100))
    filling = rng.choice((b"\0", b"\xff", b"\x7f", b"9", b'"', b"\x1b", b"\n"))
    return content[:at] + filling * length + content[at + length :]


def _as_fifo(path: Path, _: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _as_folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _as_device(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _to_itself(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _beside(path: Path, _: random.Random) -> None:
    path.with_name(f"{ESCAPE}{path.suffix}").write_bytes(path.read_bytes())


_ANY = [
    Spoiling("a copy whose name has control characters", _beside),
    Spoiling("flipped bits", _bytes(_flipped), is_wanton=True),
    Spoiling("cut off", _bytes(_cut), is_wanton=True),
    Spoiling("overwritten", _bytes(_overwritten), is_wanton=True),
    Spoiling("empty", lambda path, _: _write(path, b"")),
    Spoiling("zeros", _bytes(lambda content, _: b"\0" * len(content))),
    Spoiling("twice", _bytes(lambda content, _: content * 2)),
    Spoiling("noise", lambda path, rng: _write(path, rng.randbytes(4096))),
    Spoiling("gzipped", _bytes(lambda content, _: gzip.compress(content))),
    Spoiling("a pipe", _as_fifo, must_fail=True),
    Spoiling("a folder", _as_folder, must_fail=True),
    Spoiling("an endless device", _as_device, must_fail=True),
    Spoiling("a link to itself", _to_itself, must_fail=True),
]

# -- text --------------------------------------------------------------------------------------------------------------

_TEXT = [
    Spoiling("byte order mark", _bytes(lambda content, _: codecs.BOM_UTF8 + content)),
    Spoiling("UTF-16", _bytes(lambda content, _: content.decode("utf-8", "replace").encode("utf-16"))),
    Spoiling("Latin-1 letters", _bytes(lambda content, _: content.replace(b"e", b"\xe9"))),
    Spoiling(
        "a NUL in the middle",
        _bytes(lambda content, _: content[: len(content) // 2] + b"\0" + content[len(content) // 2 :]),
    ),
]

TEXTS = (
    "",
    " ",
    ESCAPE,
    f"{ESCAPE}.png",
    "two\nlines\n",
    "error: forged\n",
    "../outside/secret.png",
    "../../outside/secret.png",
    "/etc/passwd",
    "~/secret.png",
    "a/../../outside/secret.png",
    "C:\\secret.png",
    "..\\outside\\secret.png",
    "file:///etc/passwd",
    "http://127.0.0.1:9/a.png",
    "nul\0byte",
    "\ud800",
    "<script>canary()</script>",
    "x" * 100_000,
    "%s%n{0}{0.__class__}",
    "-rf",
    "=cmd|'/c calc'!A0",
    "a" * 255,
    "\u202egnp.exe",
    "NaN",
    "1e999",
    "9" * 5000,
    "None",
)
"""Texts that a name, phrase or id must not be."""

VALUES = (
    None,
    True,
    False,
    -1,
    0,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
    1e308,
    -1e308,
    5e-324,
    1.5,
    float("nan"),
    float("inf"),
    float("-inf"),
    [],
    {},
    [[]],
    [None],
    [[[[[[[[[[]]]]]]]]]],
    {"": ""},
    {"size": [2**31, 2**31], "counts": "1"},
    {"size": [30, 40], "counts": "\x7f" * 9999},
    {"size": [30, 40], "counts": [1200] * 9},
    [[1e300] * 8],
    [[0, 0] * 4],
    list(range(1000)),
)
"""Values that stand in for a value of another type or range."""


def _nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a tree, the root's first."""
    yield path
    members = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in members:
        yield from _nodes(value, (*path, key))


def _get(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _swapped(tree: Any, rng: random.Random) -> Any:
    """The tree with one value swapped, removed, renamed or repeated."""
    path = rng.choice(list(_nodes(tree)))
    if not path:
        return rng.choice((*VALUES, *TEXTS, [tree], {"a": tree}))
    parent, key = _get(tree, path[:-1]), path[-1]
    how = rng.random()
    if how < 0.1:
        del parent[key]
    elif how < 0.15 and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = parent.pop(key)
    elif how < 0.2 and isinstance(parent, list):
        parent.append(parent[key])
    elif isinstance(parent[key], str) and how < 0.85:
        parent[key] = rng.choice(TEXTS)
    else:
        parent[key] = rng.choice((*VALUES, *TEXTS))
    return tree


def _named(tree: Any, text: str) -> Any:
    """The tree with every text replaced, but not the keys."""
    if isinstance(tree, dict):
        return {key: _named(value, text) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_named(value, text) for value in tree]
    return text if isinstance(tree, str) else tree


def _json(change: Callable[[Any, random.Random], Any]) -> Callable[[Path, random.Random], None]:
    return lambda path, rng: _write(path, json.dumps(change(json.loads(path.read_bytes()), rng)))


def _deep_value(content: bytes, rng: random.Random) -> bytes:
    """A value that a parser takes, but perhaps not who prints or walks through it."""
    depth = rng.choice((300, 900, 950, 980))
    return re.sub(
        rb"(?<=[\[ :])\d+\b|\"[^\"]*\"(?!:)", b"[" * depth + b"]" * depth, content, count=rng.choice((1, 1, 3))
    )


def _repeated_key(content: bytes, _: random.Random) -> bytes:
    return re.sub(rb'("[^"]+"): ', rb"\1: null, \1: ", content, count=1)


def _nested(opening: str, closing: str) -> Callable[[Path, random.Random], None]:
    return lambda path, _: _write(path, opening * 100_000 + closing * 100_000)


def _large_json(path: Path, _: random.Random) -> None:
    _write(path, b"[" + b"0," * (50 * MEGABYTE - 2) + b"0]")


_JSON = [
    Spoiling("swapped value", _json(_swapped), is_wanton=True),
    Spoiling("control characters in every text", _json(lambda tree, _: _named(tree, ESCAPE))),
    Spoiling("a path outside as every text", _json(lambda tree, _: _named(tree, "../outside/secret.png"))),
    Spoiling("a repeated key", _bytes(_repeated_key)),
    Spoiling("hundreds of brackets as a value", _bytes(_deep_value), is_wanton=True),
    Spoiling("100,000 brackets", _nested("[", "]"), must_fail=True),
    Spoiling("100,000 objects", _nested('{"a":', "}"), must_fail=True),
    Spoiling(
        "a number of 100,000 digits", _bytes(lambda content, _: re.sub(rb"\b\d+\b", b"9" * 100_000, content, count=1))
    ),
    Spoiling("NaN", _bytes(lambda content, _: re.sub(rb"(?<=[\[ :])\d+\b", b"NaN", content, count=1))),
    Spoiling("Infinity", _bytes(lambda content, _: re.sub(rb"(?<=[\[ :])\d+\b", b"-Infinity", content))),
    Spoiling("JSON of 100 MB", _large_json, must_fail=True, is_heavy=True),
    *_TEXT,
]


def _line(change: Callable[[Any, random.Random], Any]) -> Callable[[Path, random.Random], None]:
    def apply(path: Path, rng: random.Random) -> None:
        lines = path.read_bytes().splitlines()
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(change(json.loads(lines[number]), rng)).encode()
        _write(path, b"\n".join(lines) + b"\n")

    return apply


_JSONL = [
    Spoiling("swapped value", _line(_swapped), is_wanton=True),
    Spoiling("control characters in every text", _line(lambda tree, _: _named(tree, ESCAPE))),
    Spoiling(
        "a path outside as every text", _line(lambda tree, _: _named(tree, "../outside/secret.png")), must_fail=True
    ),
    Spoiling("a repeated key", _bytes(_repeated_key), must_fail=True),
    Spoiling("hundreds of brackets as a value", _bytes(_deep_value), is_wanton=True),
    Spoiling("100,000 brackets", _nested("[", "]"), must_fail=True),
    Spoiling("NaN", _bytes(lambda content, _: re.sub(rb"(?<=[\[ :])\d+\b", b"NaN", content, count=1))),
    Spoiling(
        "a line of 100 MB",
        lambda path, _: _write(path, b'{"image": "' + b"a" * 100 * MEGABYTE + b'"}'),
        must_fail=True,
        is_heavy=True,
    ),
    *_TEXT,
]


def _attribute(content: bytes, rng: random.Random) -> bytes:
    places = list(re.finditer(rb'="([^"]*)"', content))
    place = rng.choice(places)
    text = rng.choice((*TEXTS, "-1", "1e400", "9" * 30, "0;0;0", "nan,nan;1,1;2,2;0,3", "1,2,3;4"))
    value = re.sub(r'[<&"]', "_", text).encode("utf-8", "surrogatepass")
    return content[: place.start(1)] + value + content[place.end(1) :]


def _doctype(body: bytes) -> Callable[[bytes, random.Random], bytes]:
    return lambda content, _: b"<!DOCTYPE a [" + body + b"]>" + content.replace(b'label="', b'label="&b;', 1)


_LAUGHS = b'<!ENTITY a0 "ha">' + b"".join(b'<!ENTITY a%d "%s">' % (n + 1, b"&a%d;" % n * 10) for n in range(12))

_XML = [
    Spoiling("swapped attribute", _bytes(_attribute), is_wanton=True),
    Spoiling("entities that explode", _bytes(_doctype(_LAUGHS + b'<!ENTITY b "&a12;">')), must_fail=True),
    Spoiling("an entity of another file", _bytes(_doctype(b'<!ENTITY b SYSTEM "file:///etc/passwd">')), must_fail=True),
    Spoiling(
        "UTF-16 with a document type",
        _bytes(lambda content, rng: _doctype(_LAUGHS)(content, rng).decode().encode("utf-16")),
        must_fail=True,
    ),
    Spoiling("100,000 elements in each other", _nested("<a>", "</a>"), must_fail=True),
    Spoiling("an encoding of its own", _bytes(lambda content, _: b'<?xml version="1.0" encoding="rot13"?>' + content)),
    Spoiling("100 MB of blanks", _bytes(lambda content, _: b" " * 100 * MEGABYTE + content), is_heavy=True),
    *_TEXT,
]


def _yaml(text: str) -> Callable[[Path, random.Random], None]:
    return lambda path, _: _write(path, text)


def _anchors(form: str, joined: str, first: str) -> str:
    """A YAML document whose thirty values name the one before nine times each."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {form % joined.join([f'*a{n - 1}'] * 9)}" for n in range(1, 30)]
    return "\n".join(lines) + "\n"


def _appended(text: str) -> Callable[[Path, random.Random], None]:
    return _bytes(lambda content, _: content.rstrip() + b"\n" + text.encode("utf-8", "surrogatepass") + b"\n")


def _yaml_field(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode().splitlines()
    number = rng.choice([n for n, line in enumerate(lines) if re.search(r": \S", line)] or [0])
    key = lines[number].partition(": ")[0]
    value = rng.choice((*TEXTS, *VALUES))
    said = json.dumps(value) if rng.random() < 0.7 or not isinstance(value, str) else value
    lines[number] = f"{key}: {said}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


_LAUGHING = _anchors("[%s]", ", ", "[lol, lol]")
_YAML = [
    Spoiling("swapped value", _bytes(_yaml_field), is_wanton=True),
    Spoiling("anchors that explode", _yaml(_LAUGHING), must_fail=True),
    Spoiling(
        "anchors that explode in a list of texts",
        _yaml(_LAUGHING + "base: tiny-refcoco\ndata:\n  train: *a29\n"),
        must_fail=True,
    ),
    Spoiling("anchors that explode in a name", _yaml(_LAUGHING + "base: *a29\n"), must_fail=True),
    Spoiling("anchors that explode in a merge", _yaml(_anchors("{<<: [%s]}", ", ", "{x: 1, y: 2}")), must_fail=True),
    Spoiling("anchors that explode in a key", _yaml(_LAUGHING + "? *a29\n: 1\n"), must_fail=True),
    Spoiling("an anchor in itself", _yaml("base: tiny-refcoco\ndata: &a\n  train: *a\n"), must_fail=True),
    Spoiling("a mapping in itself", _yaml("&a\ndata: *a\nname: x\n"), must_fail=True),
    Spoiling("a tag that calls", _yaml("name: !!python/object/apply:os.system ['touch canary']\n"), must_fail=True),
    Spoiling("a tag that imports", _yaml("name: !!python/module:evil\n"), must_fail=True),
    Spoiling("100,000 brackets", _nested("[", "]"), must_fail=True),
    Spoiling("100,000 brackets in a field", _yaml("name: " + "[" * 100_000), must_fail=True),
    Spoiling("a key that is a list", _yaml("? [1, 2]\n: 3\n"), must_fail=True),
    Spoiling("a key with control characters", _appended(json.dumps(ESCAPE) + ": 1"), must_fail=True),
    Spoiling("a base outside", _yaml("base: ../../outside/secret.yaml\n"), must_fail=True),
    Spoiling("itself as base", _yaml("base: config.yaml\n"), must_fail=True),
    Spoiling("an endless base", _yaml("base: /dev/zero.yaml\n"), must_fail=True),
    Spoiling("a repeated key", _appended("training: {}\ntraining: {}"), must_fail=True),
    Spoiling(
        "a number of 100,000 digits",
        _yaml(f"base: tiny-refcoco\ntraining:\n  epochs: {'9' * 100_000}\n"),
        must_fail=True,
    ),
    Spoiling("two documents", _appended("---\nname: b"), must_fail=True),
    Spoiling("YAML of 100 MB", _yaml("#" + "a" * 100 * MEGABYTE), must_fail=True, is_heavy=True),
    *_TEXT,
]

# -- pickles -----------------------------------------------------------------------------------------------------------

EXECUTED = "executed"
"""The file that an executed input makes in the working directory."""


class _Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _pickled(make: Callable[[], bytes]) -> Callable[[Path, random.Random], None]:
    return lambda path, _: _write(path, make())


def _calling() -> bytes:
    return pickle.dumps(_Calls(os.system, f"touch {EXECUTED}"))


def _evaluating() -> bytes:
    return pickle.dumps(_Calls(eval, f"open({EXECUTED!r}, 'w')"), protocol=2)


def _entwined(depth: int = 40) -> bytes:
    """A list of two equal lists of two equal lists ...: 2^40 parts for whoever prints it."""
    value: Any = ["x"]
    for _ in range(depth):
        value = [value, value]
    return pickle.dumps(value)


def _in_itself(kind: type) -> Callable[[], bytes]:
    def make() -> bytes:
        value: Any = kind()
        if isinstance(value, list):
            value.append(value)
        else:
            value["ref_id"] = value
        return pickle.dumps([value])

    return make


def _swapped_pickle(path: Path, rng: random.Random) -> None:
    tree = json.loads(json.dumps(pickle.loads(path.read_bytes())))  # lists for tuples; the file is ours
    _write(path, pickle.dumps(_swapped(tree, rng), protocol=rng.choice((0, 2, 4))))


def _deep_pickle() -> bytes:
    return b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."


def _hash_bomb() -> bytes:
    """A set whose elements hash alike, and a frozenset of frozensets, whose hashing is deep."""
    return b"\x80\x04" + b"(" * 100_000 + b"\x91" * 100_000 + b"."


_PICKLE_CALLS = [
    Spoiling("a pickle that calls", _pickled(_calling), must_fail=True),
    Spoiling("a pickle that evaluates", _pickled(_evaluating), must_fail=True),
    Spoiling("a global in text form", _pickled(lambda: b"cos\nsystem\n(S'touch executed'\ntR."), must_fail=True),
    Spoiling("a global with control characters", _pickled(lambda: b"cos\n\x1b[2J\x07\n."), must_fail=True),
    Spoiling("an instance opcode", _pickled(lambda: b"(S'touch executed'\nios\nsystem\n."), must_fail=True),
    Spoiling("a persistent id", _pickled(lambda: b"\x80\x02X\x01\x00\x00\x00aQ."), must_fail=True),
    Spoiling("an extension code", _pickled(lambda: b"\x80\x02\x82\x01."), must_fail=True),
    Spoiling(
        "a value of 4 GB in 20 bytes",
        _pickled(lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**32) + b"abc."),
        must_fail=True,
    ),
    Spoiling("a memo of 4 billion places", _pickled(lambda: b"\x80\x02]r\xff\xff\xff\xff."), must_fail=True),
    Spoiling(
        "a number of 40 MB",
        _pickled(lambda: b"\x80\x02\x8b" + struct.pack("<I", 4 * 10**7) + b"\x7f" * 4 * 10**7 + b"."),
        must_fail=True,
    ),
    Spoiling("lists that hold each other twice", _pickled(_entwined), must_fail=True),
    Spoiling("a list in itself", _pickled(_in_itself(list)), must_fail=True),
    Spoiling("a dict in itself", _pickled(_in_itself(dict)), must_fail=True),
    Spoiling("200,000 lists in each other", _pickled(_deep_pickle), must_fail=True),
    Spoiling("100,000 sets in each other", _pickled(_hash_bomb), must_fail=True),
]
_PICKLE = [Spoiling("swapped value", _swapped_pickle, is_wanton=True), *_PICKLE_CALLS]

# -- images ------------------------------------------------------------------------------------------------------------


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", binascii.crc32(name + content))


def png(width: int, height: int, *more: bytes, pixels: bytes = b"", bits: int = 8, colours: int = 0) -> bytes:
    """A PNG file that declares a size, whatever its pixels are."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def _png_bomb() -> bytes:
    row = b"\0" + b"\0" * 8_000  # 64 megapixels that take 64 KB
    return png(8_000, 8_000, pixels=zlib.compress(row * 8_000, 9))


def _text_bomb() -> bytes:
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 200 * MEGABYTE, 9))
    profile = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 200 * MEGABYTE, 9))
    return png(40, 30, text, profile, pixels=zlib.compress((b"\0" + b"\0" * 40) * 30))


def _gif_bomb() -> bytes:
    head = b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + b"\xf0\0\0" + b"\0" * 6
    return head + b"," + struct.pack("<HHHH", 0, 0, 65_000, 65_000) + b"\0\x02\x02\x4c\x01\0;"


def _tiff(width: int, height: int) -> bytes:
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 2**30, 8),
        (279, 4, 2**30, 8),
    ]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + b"\0" * 4  # fmt: skip


_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n(executed) (w) file closefile\nshowpage\n%%EOF\n"
_SVG = (
    b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>canary()</script></svg>'
)
_PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(canary())>>>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
_HEIC = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + struct.pack(">I", 2**31 - 1) + b"meta" + b"\0" * 99
_WMF = b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhH", 0, 0, 400, 300, 96) + b"\0" * 6 + b"\1\0\x09\0\0\3" + b"\0" * 60
_M3U8 = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n../outside/secret.ts\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
_CONCAT = b"ffconcat version 1.0\nfile '../outside/secret.png'\nfile '/etc/passwd'\n"


def _made(content: bytes | Callable[[], bytes]) -> Callable[[Path, random.Random], None]:
    return lambda path, _: _write(path, content if isinstance(content, bytes) else content())


def _linked_out(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to(next(parent for parent in path.parents if (parent / "outside").is_dir()) / "outside" / "secret.png")


IMAGE_KINDS = [
    Spoiling("SVG", _made(_SVG), must_fail=True),
    Spoiling("PDF", _made(_PDF), must_fail=True),
    Spoiling("HEIC with a box of 2 GB", _made(_HEIC), must_fail=True),
    Spoiling("PostScript, which a program would run", _made(_EPS), must_fail=True),
    Spoiling("a Windows metafile", _made(_WMF), must_fail=True),
    Spoiling("PNG of 2 billion pixels a side", _made(png(2**31 - 1, 2**31 - 1)), must_fail=True),
    Spoiling("PNG of 0 pixels", _made(png(0, 0)), must_fail=True),
    Spoiling("PNG with chunks that explode", _made(_text_bomb), is_heavy=True),
    Spoiling("PNG of 64 megapixels in 64 KB", _made(_png_bomb), is_heavy=True),
    Spoiling("PNG with an interlaced size it lacks", _made(png(40, 30, pixels=zlib.compress(b"\0"))), must_fail=True),
    Spoiling("GIF of 65,000 pixels a side", _made(_gif_bomb), must_fail=True),
    Spoiling("TIFF with a billion strips", _made(_tiff(40, 30)), must_fail=True),
    Spoiling("TIFF of 4 billion pixels a side", _made(_tiff(2**32 - 1, 2**32 - 1)), must_fail=True),
    Spoiling(
        "JPEG of 65,535 pixels a side",
        _made(
            b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\3\1\x22\0\2\x11\1\3\x11\1\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0?\0"
        ),
        must_fail=True,
    ),
    Spoiling("a playlist of other files", _made(_M3U8), must_fail=True),
    Spoiling("a list of other files", _made(_CONCAT), must_fail=True),
]
_IMAGE = [*IMAGE_KINDS, Spoiling("a link out of the folder", _linked_out, must_fail=True)]

# -- weights -----------------------------------------------------------------------------------------------------------


def _safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _header(change: Callable[[dict[str, Any], random.Random], Any]) -> Callable[[Path, random.Random], None]:
    def apply(path: Path, rng: random.Random) -> None:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        _write(path, _safetensors(change(json.loads(content[8 : 8 + length]), rng), content[8 + length :]))

    return apply


def _renamed_tensor(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    name = rng.choice([name for name in header if name != "__metadata__"])
    return {(rng.choice(TEXTS[:-4]) if key == name else key): value for key, value in header.items()}


def _negative_length(content: bytes, rng: random.Random) -> bytes:
    return struct.pack("<Q", rng.choice((2**64 - 1, 2**63, len(content), 0, 1, 10**8))) + content[8:]


_SAFETENSORS = [
    Spoiling("swapped value in the header", _header(_swapped), is_wanton=True),
    Spoiling("another name", _header(_renamed_tensor), is_wanton=True, must_fail=True),
    Spoiling("another length of the header", _bytes(_negative_length), is_wanton=True, must_fail=True),
    Spoiling("a header of 16 EB", _made(_safetensors(b"{}", length=2**64 - 1)), must_fail=True),
    Spoiling(
        "a tensor of 4 EB", _made(_safetensors({"a": _entry([2**62], 0, 2**62, "U8")}, b"\0" * 8)), must_fail=True
    ),
    Spoiling(
        "a shape that overflows", _made(_safetensors({"a": _entry([2**32, 2**32], 0, 8)}, b"\0" * 8)), must_fail=True
    ),
    Spoiling(
        "tensors that overlap",
        _made(_safetensors({"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}, b"\0" * 12)),
        must_fail=True,
    ),
    Spoiling("no tensors", _made(_safetensors({})), must_fail=True),
    Spoiling("100,000 brackets as header", _made(_safetensors(b"[" * 100_000)), must_fail=True),
    Spoiling("a header in a header", _made(_safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000)), must_fail=True),
    Spoiling("a pickle that calls", _pickled(_calling), must_fail=True),
]


def _torch_zip(pickled: bytes, *, more: dict[str, bytes] | None = None, compressed: bool = False) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, content in {"archive/data.pkl": pickled, "archive/version": b"3\n", **(more or {})}.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _storage_of(nbytes: int) -> bytes:
    """A tensor whose storage declares a size, in an archive without it."""
    return (
        b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
        + b"\x8a\x06" + struct.pack("<Q", nbytes)[:6] + b"tQK\0(" + b"\x8a\x06" + struct.pack("<Q", nbytes)[:6] + b"tK\x01\x85\x89)tRs."
    )  # fmt: skip


def _zip_bomb() -> bytes:
    return _torch_zip(b"\0" * 200 * MEGABYTE, compressed=True)


def _overlapping_zip() -> bytes:
    """Entries of one content at one place, thousands of times."""
    content = bytearray(_torch_zip(b"\x80\x02}.", more={f"archive/data/{n}": b"" for n in range(1000)}))
    return bytes(content).replace(b"archive/data/9", b"archive/data/1")


_TORCH = [
    *(spoiling for spoiling in _PICKLE_CALLS),
    Spoiling("a call in a zip", _made(lambda: _torch_zip(_calling())), must_fail=True),
    Spoiling("an evaluation in a zip", _made(lambda: _torch_zip(_evaluating())), must_fail=True),
    Spoiling("lists that hold each other twice, in a zip", _made(lambda: _torch_zip(_entwined())), must_fail=True),
    Spoiling("200,000 lists in each other, in a zip", _made(lambda: _torch_zip(_deep_pickle())), must_fail=True),
    Spoiling("a storage of 10 GB in a zip without it", _made(lambda: _torch_zip(_storage_of(10**10))), must_fail=True),
    Spoiling("a zip bomb", _made(_zip_bomb), must_fail=True, is_heavy=True),
    Spoiling("entries of one name", _made(_overlapping_zip), must_fail=True),
    Spoiling(
        "an entry that leaves its folder",
        _made(lambda: _torch_zip(b"\x80\x02}.", more={"../../outside/evil": b"x"})),
        must_fail=True,
    ),
    Spoiling(
        "a program",
        _made(
            lambda: _torch_zip(
                b"\x80\x02}.", more={"archive/code/a.py": b"import os", "archive/constants.pkl": b"\x80\x02)."}
            )
        ),
        must_fail=True,
    ),
    Spoiling("an ordinary zip", _made(lambda: _torch_zip(b"", more={f"{ESCAPE}/x": b""})), must_fail=True),
    Spoiling(
        "a numpy array of 8 EB",
        _made(
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\1btR(K\1\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x0f\x85cnumpy\ndtype\n(U\2f8K\0K\1tR(K\3U\1<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89U\0tb."
        ),
        must_fail=True,
    ),
    Spoiling("a web page", _made(b"<!DOCTYPE html><html>log in</html>"), must_fail=True),
    Spoiling(
        "a pointer of git-lfs",
        _made(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99999999999999999999\n"),
        must_fail=True,
    ),
]

# -- the table ---------------------------------------------------------------------------------------------------------

_OVERRIDES = (
    "data.train=" + "[" * 5000,
    "training.epochs=" + "9" * 5000,
    "a.b.c.d=1",
    "=1",
    ".=1",
    "..=",
    "training=1",
    "training=[1]",
    "data.train={a: &a [*a]}",
    "name=" + ESCAPE,
    "x.y=" + ESCAPE,
    f"{ESCAPE}=1",
    "training.learning_rate=.nan",
    "training.learning_rate=1e999",
    "training.output=" + "\0",
    "data.root=\ud800",
    "cognition.backend=os:system",
    "cognition.backend=evil:Backend",
    "evaluation=!!python/object/apply:os.system ['touch executed']",
    "training.seed=1e3",
    ".".join(["a"] * 5000) + "=1",
    "training.epochs=true",
    "training.epochs={}",
    "data.eval=[1, 2]",
    "perception.image_size=-0",
    "perception.image_size=99999999999",
    "loopback.num_queries=4294967297",
    "training.epochs=1\n2",
    "data.train=[*a]",
    "criterion=null",
)


def _override(path: Path, rng: random.Random) -> None:
    _write(path, json.dumps([rng.choice(_OVERRIDES)]))


def _overrides() -> list[Spoiling]:
    """One for each text given to --set, which the reader takes out of a file of a list of texts."""
    return [
        Spoiling(f"--set {ascii(text)[1:40]}", lambda path, _, text=text: _write(path, json.dumps([text])))
        for text in _OVERRIDES
    ]


def _request(content: dict[str, Any], *, must_fail: bool = True) -> Spoiling:
    return Spoiling(
        f"{json.dumps(content)[1:60]}", lambda path, _: _write(path, json.dumps(content)), must_fail=must_fail
    )


_REQUESTS = [
    Spoiling("swapped value", _json(_swapped), is_wanton=True),
    *(_request({"image": "a.png", "phrases": [text]}, must_fail=not text.strip()) for text in TEXTS),
    *(_request({"image": text, "phrases": ["dog"]}) for text in TEXTS if text != "../outside/secret.png"),
    *(_request({"image": "a.png", "phrases": value}) for value in (None, [], 5, [5], [None], {}, ["a"] * 10_000)),
    *(_request({"image": value, "phrases": ["dog"]}) for value in (None, [], 5, {"path": "/etc/passwd"}, True)),
    *(
        _request({"image": "a.png", "phrases": ["dog"], "score": value})
        for value in (float("nan"), "x", -1, 2, None, [], 10**400)
    ),
]


def spoil_pattern(name: str) -> Callable[[Path, random.Random], None]:
    """Writes a base64 mask of LabelMe that explodes; `name` is the key."""

    def apply(path: Path, _: random.Random) -> None:
        tree = json.loads(path.read_bytes())
        tree["shapes"][0] |= {"shape_type": "mask", name: base64.b64encode(png(2**31 - 1, 2**31 - 1)).decode()}
        _write(path, json.dumps(tree))

    return apply


_OURS = ("overrides", "request")
"""Kinds that only carry what a shell or a browser sends: their files are ours, and valid JSON."""

_KINDS: dict[str, list[Spoiling]] = {
    "json": _JSON,
    "jsonl": _JSONL,
    "labelme": [Spoiling("a mask of 4 EB inside", spoil_pattern("mask")), *_JSON],
    "xml": _XML,
    "yaml": _YAML,
    "text": _TEXT,
    "pickle": _PICKLE,
    "image": _IMAGE,
    "given image": IMAGE_KINDS,  # one that a user names, who may name a link
    "safetensors": _SAFETENSORS,
    "torch": _TORCH,
    "overrides": _overrides(),
    "request": _REQUESTS,
}
