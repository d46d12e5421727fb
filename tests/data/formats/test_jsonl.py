"""A user's own JSONL: every form of a mask, and every way to get it wrong."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.data.sources import is_generalised, read_split, split_names

SQUARE = [[4, 5, 16, 5, 16, 25, 4, 25]]
OTHER = [[24, 5, 36, 5, 36, 25, 24, 25]]


def _masks(record: Any) -> list[np.ndarray]:
    return [decode_segmentation(i.segmentation, record.height, record.width) for i in record.instances]


def test_every_form_of_a_mask(world: Any) -> None:
    folder = world.images("a.png")
    square, other = (decode_segmentation(polygons, 30, 40) for polygons in (SQUARE, OTHER))
    Image.fromarray(square.astype(np.uint8) * 255).save(folder / "square.png")
    counts = {
        "size": [30, 40],
        "counts": [int(n) for n in np.diff(np.flatnonzero(np.diff(square.T.ravel(), prepend=2)))],
    }
    counts["counts"].append(1200 - sum(counts["counts"]))
    lines = [
        {"image": "a.png", "phrase": "p", "polygons": SQUARE},
        {"image": "a.png", "phrase": "p", "rle": encode_mask(square)},
        {"image": "a.png", "phrase": "p", "rle": counts},
        {"image": "a.png", "phrase": "p", "png": "square.png"},
        {"image": "a.png", "phrase": "p", "masks": [SQUARE]},
        {"image": "a.png", "phrase": "p", "masks": ["square.png"]},
        {"image": "a.png", "phrase": "p", "masks": [OTHER, "square.png"]},
        {"image": "a.png", "phrase": "p", "no_target": True},
    ]
    made = world.prepare(world.lines(*lines))
    records = read_split(world.root, "mine/train")
    for record in records[:6]:
        assert all(map(np.array_equal, _masks(record), [square]))
    assert all(map(np.array_equal, _masks(records[6]), [other, square]))
    assert records[7].is_no_target
    assert is_generalised(world.root, "mine")
    assert made.manifest["splits"]["train"]["num_no_target"] == 1
    assert any(file["file"] == "square.png" for file in made.manifest["source"]["files"])


def test_parts_of_one_split(world: Any) -> None:
    world.images("a.png")
    for part in (0, 1):
        lines = [{"image": "a.png", "phrase": f"{part} {k}", "polygons": SQUARE, "split": "train"} for k in range(2)]
        world.lines(*lines, file=f"part-{part}.jsonl")
    world.lines({"image": "a.png", "phrase": "v", "polygons": SQUARE}, file="val.ndjson")
    (world.folder / "._part-0.jsonl").write_bytes(b"\0\5\x16\7")  # of macOS
    world.prepare(world.folder)
    assert [(r.phrase_id, r.phrase) for r in read_split(world.root, "mine/train")] == [
        ("mine/train/part-0-1", "0 0"),
        ("mine/train/part-0-2", "0 1"),
        ("mine/train/part-1-1", "1 0"),
        ("mine/train/part-1-2", "1 1"),
    ]
    assert [r.phrase_id for r in read_split(world.root, "mine/val")] == ["mine/val/1"]


def test_parts_that_are_numbered(world: Any) -> None:
    world.images("a.png")
    for part in (0, 1):
        line = {"image": "a.png", "phrase": f"part {part}", "polygons": SQUARE}
        world.lines(line, file=f"train-0000{part}-of-00002.jsonl")
    made = world.prepare(world.folder)
    assert [(r.phrase_id, r.phrase) for r in read_split(world.root, "mine/train")] == [
        ("mine/train/train-00000-of-00002-1", "part 0"),
        ("mine/train/train-00001-of-00002-1", "part 1"),
    ]
    assert made.manifest["notes"] == []
    made = world.prepare(world.lines(line, file="photos.jsonl"), "photos")
    assert "no split is named train, which training reads, or val or test: photos. --val-share" in made.manifest["notes"][0]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_as_lines_are(world: Any, indent: int | None) -> None:
    world.images("a.png")
    entries = [{"image": "a.png", "phrase": "one", "polygons": SQUARE}, 7]
    (world.folder / "annotations.json").write_text("\ufeff\n " + json.dumps(entries, indent=indent), "utf-8")
    with pytest.raises(DataError, match=r"annotations\.json entry 2: expected an object {\.\.\.}, got int '7'"):
        world.prepare(world.folder)
    world.prepare(world.folder, skip_bad=True)
    assert [(r.phrase_id, r.phrase) for r in read_split(world.root, "mine/annotations")] == [
        ("mine/annotations/1", "one")
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"image": "a.png"},\n{"image', "expected JSON in UTF-8, got JSONDecodeError"),
        (b'{\n"image": "a.png",\n"phrase": "x"\n}', "got one object over several lines. Write each record on a line"),
        (b'{\n"text": ["x"],\n"shapes": []\n}', "several lines. mine.json looks like --format labelme."),
        ('{"image": "a.png"}'.encode("utf-16"), "expected UTF-8, got UTF-16"),
        (b"\x1f\x8b\x08\n", "got a zip or gzip archive. Unpack it"),
    ],
)
def test_files_that_are_no_lines(world: Any, content: bytes, message: str) -> None:
    world.folder.mkdir()
    (world.folder / "mine.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        world.prepare(world.folder)
    assert message in str(caught.value)
    assert str(world.folder / "mine.json") in str(caught.value)
    assert world.is_untouched()


def test_ids_splits_and_names_of_fields(world: Any) -> None:
    world.images("a.png", "b/c.png")
    world.lines(
        {"photo": "a.png", "captions": ["one", "two"], "raw": ["One.", "Two."], "polygons": SQUARE, "id": "x"},
        "",
        {"photo": "b/c.png", "captions": ["three"], "polygons": SQUARE, "split": "val", "category": "cat"},
        file="train.jsonl",
    )
    world.lines({"photo": "a.png", "captions": ["four"], "polygons": SQUARE, "image_id": "shared-1"}, file="dev.jsonl")
    world.prepare(world.folder, mapping={"image": "photo", "phrases": "captions"})
    assert split_names(world.root, "mine") == ("train", "val", "dev")
    assert [r.phrase_id for r in read_split(world.root, "mine/train")] == ["mine/train/x-0", "mine/train/x-1"]
    assert read_split(world.root, "mine/train", phrase_field="raw")[1].phrase == "Two."
    (record,) = read_split(world.root, "mine/val")
    assert (record.phrase_id, record.category) == ("mine/val/3", "cat")
    assert read_split(world.root, "mine/dev")[0].image_id == "shared-1"


def test_a_byte_order_mark_at_the_beginning_is_skipped(world: Any) -> None:
    world.images("a.png")
    line = json.dumps({"image": "a.png", "phrase": "à la carte", "polygons": SQUARE}, ensure_ascii=False)
    world.prepare(world.lines(b"\xef\xbb\xbf" + line.encode()))
    assert read_split(world.root, "mine/train")[0].phrase == "à la carte"


RLE = encode_mask(decode_segmentation(OTHER, 30, 40))


@pytest.mark.parametrize(
    ("line", "pairs"),
    [
        ({"text": ["one", "two"], "mask": [SQUARE, OTHER]}, "text:mask"),
        ({"text": ["one", "two"], "mask": [SQUARE[0], OTHER[0]]}, "text:mask"),  # a polygon each
        ({"text": ["one", "two"], "mask": [SQUARE, RLE]}, "text:mask"),
        ({"text": [["one"], ["two"]], "mask": [[SQUARE], ["other.png"]]}, "text:mask"),
        ({"phrases": ["one", "two"], "masks": [SQUARE, RLE]}, "phrases:masks"),
        ({"objects": [{"says": "one", "rle": SQUARE}, {"says": ["two"], "rle": RLE}]}, "objects.says:objects.rle"),
    ],
)
def test_pairs(world: Any, line: dict[str, Any], pairs: str) -> None:
    """The first phrase means the first mask; undeclared it is refused, for others mean that each phrase means all."""
    folder = world.images("a.png")
    Image.fromarray(decode_segmentation(OTHER, 30, 40).astype(np.uint8) * 255).save(folder / "other.png")
    source = world.lines({"image": "a.png", **line})
    made = world.prepare(source, mapping={"pairs": pairs})
    first, second = read_split(world.root, "mine/train")
    assert [(r.phrase_id, r.phrase) for r in (first, second)] == [("mine/train/1-0", "one"), ("mine/train/1-1", "two")]
    assert all(map(np.array_equal, _masks(first), [decode_segmentation(SQUARE, 30, 40)]))
    assert all(map(np.array_equal, _masks(second), [decode_segmentation(OTHER, 30, 40)]))
    assert len(first.instances) == len(second.instances) == 1
    assert any(f["file"] == "other.png" for f in made.manifest["source"]["files"]) == ("other.png" in str(line))


@pytest.mark.parametrize("field", ["masks", "polygons"])
def test_parallel_lists_are_refused_or_declared_common(world: Any, field: str) -> None:
    world.images("a.png")
    masks = [SQUARE, OTHER] if field == "masks" else [SQUARE[0], OTHER[0]]
    source = world.lines({"image": "a.png", "text": ["one", "two"], "mask": masks})
    mapping = {"phrases": "text", field: "mask"}
    ask = (
        r"line 1: expected a statement which of 2 phrases means which of 2 masks, got two lists: if the first phrase means the first "
        r"mask, give --mapping pairs=text:mask; if every phrase means all masks, give --mapping pairs=all"
    )
    with pytest.raises(DataError, match=ask):
        world.prepare(source, mapping=mapping)
    assert world.is_untouched()
    world.prepare(source, mapping={**mapping, "pairs": "all"})
    both = decode_segmentation(SQUARE, 30, 40) | decode_segmentation(OTHER, 30, 40)
    for record in read_split(world.root, "mine/train"):
        assert len(record.instances) == (2 if field == "masks" else 1)
        assert np.array_equal(np.any(_masks(record), axis=0), both)


def test_fields_of_pairs(world: Any) -> None:
    world.images("a.png")
    samples = [
        {"id": "p", "text": ["one", "two"], "raw": ["One", "Two"], "mask": SQUARE, "kind": "cat", "none": False},
        {"id": "q", "text": ["three"], "raw": ["Three"], "mask": None, "kind": "dog", "none": True},
    ]
    mapping = {"pairs": "s.text:s.mask", "raw": "s.raw", "category": "s.kind", "id": "s.id", "no_target": "s.none"}
    world.prepare(world.lines({"image": "a.png", "s": samples}), mapping=mapping)
    records = read_split(world.root, "mine/train", phrase_field="raw")
    assert [(r.phrase_id.rpartition("/")[2], r.phrase, r.category, r.is_no_target) for r in records] == [
        ("p-0", "One", "cat", False), ("p-1", "Two", "cat", False), ("q", "Three", "dog", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "pairs", "says"),
    [
        ({"text": ["a"], "mask": [SQUARE, OTHER]}, "text:mask", "as many phrases as masks, .*, got 1 and 2"),
        ({"text": "a", "mask": [SQUARE]}, "text:mask", "expected a list in `text`, as --mapping pairs says, got str 'a'"),
        ({"text": ["a"], "mask": [SQUARE]}, "text:masks", "expected a list in `masks`, .* got NoneType"),
        ({"text": ["a"], "mask": [None]}, "text:mask", "expected a mask, or a statement that there is no target"),
        ({"text": ["a", "b"], "mask": [SQUARE, OTHER], "id": ["x"]}, "text:mask", "for each of 2 pairs, got others: `id` has 1"),
        ({"text": [["a", "b"]], "mask": [[[*SQUARE], [*OTHER]]]}, "text:mask", "one phrase or one mask in each pair, got 2 and 2"),
        ({"text": ["a"], "mask": [SQUARE]}, "text", "expected PHRASES:MASKS or all, got neither"),
        ({"text": [["a"], ["b"]], "mask": [SQUARE]}, "", "got lists of texts: .* give --mapping pairs=text:mask"),
    ],
)
def test_bad_pairs(world: Any, line: dict[str, Any], pairs: str, says: str) -> None:
    world.images("a.png")
    mapping = {"pairs": pairs} if pairs else {"phrases": "text", "masks": "mask"}
    with pytest.raises(DataError, match=says):
        world.prepare(world.lines({"image": "a.png", **line}), mapping=mapping)
    assert world.is_untouched()


GOOD = {"image": "a.png", "phrase": "a thing", "polygons": SQUARE}

BROKEN = {
    "no JSON": (b'{"image": "a.png"', "expected an object of JSON in UTF-8, got JSONDecodeError"),
    "not UTF-8": (b'{"image": "a.png", "phrase": "caf\xe9"}', "in UTF-8, got UnicodeDecodeError"),
    "BOM inside": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "got JSONDecodeError: Unexpected UTF-8 BOM"),
    "a key twice": ('{"image": "a.png", "phrase": "x", "phrase": "y"}', "the key 'phrase' occurs twice; keep one of them"),
    "a list": ([1, 2], "expected an object {...}, got a list of 2, first int '1'"),
    "a number": (7, "expected an object {...}, got int '7'"),
    "deep": ("[" * 100_000, "expected an object of JSON in UTF-8, got RecursionError"),
    "no phrase": (
        {"image": "a.png", "polygons": SQUARE},
        "expected `phrase` or `phrases`, got a dict with image, polygons",
    ),
    "both": (
        {**GOOD, "phrases": ["x"]},
        "expected `phrase` or `phrases`, got a dict with image, phrase, polygons, phrases",
    ),
    "phrases no list": (
        {"image": "a.png", "phrases": "x", "polygons": SQUARE},
        "`phrases` to be a list of texts, got str 'x'",
    ),
    "no phrases": (
        {"image": "a.png", "phrases": [], "polygons": SQUARE},
        "`phrases` to be a list of texts, got list '[]'",
    ),
    "raw too short": (
        {"image": "a.png", "phrases": ["x", "y"], "raw": ["X"], "polygons": SQUARE},
        "expected `raw` to be as many texts as `phrases`, 2, got a list of 1",
    ),
    "empty phrase": ({**GOOD, "phrase": " \t"}, "expected a phrase 2 of some words, got str ' \\t'"),
    "phrase a number": ({**GOOD, "phrase": 5}, "expected a phrase 2 of some words, got int '5'"),
    "half a character": (
        '{"image": "a.png", "phrase": "\\ud800", "polygons": [[4,5,16,5,16,25]]}',
        "expected a phrase 2",
    ),
    "two masks": ({**GOOD, "png": "m.png"}, "expected one of masks, polygons, rle, png, got polygons and png"),
    "no mask": ({"image": "a.png", "phrase": "x"}, "expected a mask, or a statement that there is no target"),
    "masks empty": (
        {"image": "a.png", "phrase": "x", "masks": []},
        "expected a mask, or a statement that there is no target",
    ),
    "masks no list": (
        {"image": "a.png", "phrase": "x", "masks": {}},
        "expected `masks` to be a list of objects' masks",
    ),
    "mask and no target": ({**GOOD, "no_target": True}, "expected no mask where there is no target, got 1"),
    "no_target a text": ({**GOOD, "no_target": "no"}, "expected `no_target` to be true or false, got 'no'"),
    "two points": ({**GOOD, "polygons": [[1, 2, 3, 4]]}, "none of its polygons has three points"),
    "odd": ({**GOOD, "polygons": [[1, 2, 3, 4, 5, 6, 7]]}, "as an even count of numbers in a polygon, got 7"),
    "NaN": ('{"image": "a.png", "phrase": "x", "polygons": [[1, 2, NaN, 4, 5, 6]]}', "expected polygons [x0, y0"),
    "huge": ({**GOOD, "polygons": [[1, 2, 10**400, 4, 5, 6]]}, "expected polygons [x0, y0"),
    "far": ({**GOOD, "polygons": [[1, 2, 1e9, 4, 5, 6]]}, "expected polygons [x0, y0"),
    "outside": ({**GOOD, "polygons": [[100, 100, 200, 100, 200, 200]]}, "lie outside the image (40 x 30 px)"),
    "a coordinate null": (
        {**GOOD, "polygons": [[10, 10, None, 10, 40, 40]]},
        "expected polygons [x0, y0, x1, y1, ...] of numbers, got None as coordinate 2 of the polygon [10, 10, None, 10, 40, 40]",
    ),
    "several objects' polygons": ({**GOOD, "polygons": [SQUARE, OTHER]}, "several objects are given as `masks`"),
    "counts of floats": (
        {"image": "a.png", "phrase": "x", "rle": {"size": [30, 40], "counts": [0, 600.0, 600]}},
        "expected whole numbers from 0 as RLE counts, got float '600.0' as number 1 of 3",
    ),
    "an RLE of [w, h]": (
        {"image": "a.png", "phrase": "x", "masks": [{"size": [40, 30], "counts": [0, 1200]}], "width": 40, "height": 30},
        "[h, w] = [30, 40], got [40, 30]: height and width look exchanged",
    ),
    "far outside": (
        {**GOOD, "polygons": [[4, 5, 16, 5, 16, 300]]},
        "got y from 5 to 300, so that they lie outside the image (40 x 30 px): the annotation belongs to another image",
    ),
    "normalised": (
        {**GOOD, "polygons": [[0.1, 0.1, 1, 0, 1, 1]]},
        "coordinates look normalised; give --coordinates normalised",
    ),
    "an array of labels": (
        {"image": "a.png", "phrase": "x", "masks": [[[0] * 40] * 28 + [[1] * 40, [2] * 40]]},
        "expected 0 and one other value, got 2 and 1 besides 0 (a label map, or smooth edges)",
    ),
    "texts": ({**GOOD, "polygons": [["1", "2", "3", "4", "5", "6"]]}, "of numbers, got '1' as coordinate 0 of the polygon"),
    "RLE of another size": (
        {"image": "a.png", "phrase": "x", "rle": {"size": [3, 4], "counts": [12]}},
        "expected an RLE of the image's size [h, w] = [30, 40], got [3, 4]",
    ),
    "RLE too short": (
        {"image": "a.png", "phrase": "x", "rle": {"size": [30, 40], "counts": [3, 4]}},
        "expected RLE counts that sum to 30 x 40 = 1200 pixels, got [3, 4]",
    ),
    "RLE no text": (
        {"image": "a.png", "phrase": "x", "rle": {"size": [30, 40], "counts": "~~~"}},
        "expected a compressed RLE of 30 x 40 = 1200 pixels, got one of no valid form",
    ),
    "RLE nothing": (
        {"image": "a.png", "phrase": "x", "rle": {"size": [30, 40], "counts": [1200]}},
        "its RLE mask is empty",
    ),
    "RLE without size": ({"image": "a.png", "phrase": "x", "rle": {"counts": [1200]}}, "expected polygons"),
    "png absent": (
        {"image": "a.png", "phrase": "x", "png": "m.png"},
        "mask m.png: expected an image, got FileNotFoundError",
    ),
    "png a folder": (
        {"image": "a.png", "phrase": "x", "png": "folder"},
        "mask folder: expected an image, got IsADirectory",
    ),
    "png in colours": (
        {"image": "a.png", "phrase": "x", "png": "a.png"},
        "expected one channel, above 0 = inside, got mode RGB",
    ),
    "png small": (
        {"image": "a.png", "phrase": "x", "png": "small.png"},
        "mask small.png: expected 40 x 30 px, got 4 x 3 px",
    ),
    "png black": (
        {"image": "a.png", "phrase": "x", "png": "black.png"},
        "mask black.png: expected some pixels above 0, got none",
    ),
    "png outside": ({"image": "a.png", "phrase": "x", "png": "../m.png"}, "mask: expected a name relative to"),
    "the same mask twice": ({"image": "a.png", "phrase": "x", "masks": [SQUARE, SQUARE]}, "expected each object once"),
    "no image": ({"phrase": "x", "polygons": SQUARE}, "expected the name of an image, got None"),
    "image absent": ({**GOOD, "image": "b.png"}, "expected an image, got no file"),
    "image a folder": ({**GOOD, "image": "folder"}, "expected an image, got a folder"),
    "image empty": ({**GOOD, "image": "empty.png"}, "expected an image, got a file of 0 bytes"),
    "a misspelt mask": (
        {"image": GOOD["image"], "phrase": "x", "polygon": [[1, 1, 5, 1, 5, 5]]},
        "Did you mean `polygons` by `polygon`?",
    ),
    "a misspelt phrase": (
        {**{key: value for key, value in GOOD.items() if key != "phrase"}, "prhase": "x"},
        "Did you mean `phrase` by `prhase`?",
    ),
    "image a text": ({**GOOD, "image": "text.png"}, "expected an image, got UnidentifiedImageError"),
    "image cut off": ({**GOOD, "image": "cut.jpg"}, "expected a complete image, got OSError: image file is truncated"),
    "parent": ({**GOOD, "image": "../../etc/passwd"}, "that stays inside it, got '../../etc/passwd'"),
    "parent inside": ({**GOOD, "image": "folder/../../a.png"}, "that stays inside it, got 'folder/../../a.png'"),
    "absolute": ({**GOOD, "image": "/etc/passwd"}, "that stays inside it, got '/etc/passwd'"),
    "home": ({**GOOD, "image": "~/a.png"}, "that stays inside it, got '~/a.png'"),
    "drive": ({**GOOD, "image": "C:/a.png"}, "with / between folders, got 'C:/a.png'"),
    "backslash": ({**GOOD, "image": "..\\a.png"}, "that stays inside it, got '../a.png'"),
    "NUL": ({**GOOD, "image": "a.png\0.jpg"}, "with / between folders, got 'a.png\\x00.jpg'"),
    "link": ({**GOOD, "image": "link.png"}, "got 'link.png', a link to"),
    "a number as a name": ({**GOOD, "image": 12}, "expected the name of an image, got 12"),
    "size differs": (
        {**GOOD, "width": 41, "height": 30},
        "expected masks drawn for a.png, 40 x 30 px, got 41 x 30 px",
    ),
    "half a size": ({**GOOD, "width": 40}, "expected masks drawn for a.png, 40 x 30 px, got 40 x None px"),
    "sizes texts": (
        {**GOOD, "width": "40", "height": "30"},
        "expected masks drawn for a.png, 40 x 30 px, got '40' x '30' px",
    ),
    "duplicate id": ({**GOOD, "id": 1}, "expected each phrase id once in train, got 1 again"),
    "id a list": ({**GOOD, "id": [1]}, "expected a phrase id, a text or number, got a list of 1"),
    "split a path": ({**GOOD, "split": "../val"}, "expected the name of a split, letters and digits, got '../val'"),
    "split a number": ({**GOOD, "split": 3}, "expected the name of a split, letters and digits, got '3'"),
    "split too long": ({**GOOD, "split": "x" * 5000}, "expected the name of a split, letters and digits, got 'xxx"),
    "a name too long": ({**GOOD, "image": "x" * 5000}, "expected an image, got File name too long"),
    "a mask's name too long": ({"image": "a.png", "phrase": "x", "png": "x" * 5000}, "expected an image, got OSError"),
    "half a character in image_id": (
        '{"image": "b/b.png", "phrase": "x", "polygons": [[4,5,16,5,16,25]], "image_id": "\\ud800"}',
        "expected image_id to be a text or number, got '\\ud800'",
    ),
    "category a number": ({**GOOD, "category": 3}, "expected the category's name, got int '3'"),
    "image_id a list": (
        {**GOOD, "image": "b/b.png", "image_id": [3]},
        "expected image_id to be a text or number, got [3]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_lines(world: Any, case: str) -> None:
    line, expected = BROKEN[case]
    folder = world.images("a.png", "cut.jpg", "b/b.png")
    (folder / "folder").mkdir()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    Image.new("L", (4, 3), 1).save(folder / "small.png")
    Image.new("L", (40, 30)).save(folder / "black.png")
    Image.new("RGB", (40, 30)).save(folder.parent / "outside.png")
    os.symlink(folder.parent / "outside.png", folder / "link.png")
    source = world.lines(GOOD, line if isinstance(line, (str, bytes)) else json.dumps(line))
    with pytest.raises(DataError) as caught:
        world.prepare(source)
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "\n  - train.jsonl line 2: " in message
    assert expected in message, message
    assert "Repair or remove these records" in message
    assert world.is_untouched()
    world.prepare(source, skip_bad=True)  # the good ones are used, the others counted
    manifest = json.loads((world.root / "mine/manifest.json").read_text())
    kept = manifest["splits"]["train"]
    assert kept["num_phrases"] == 1
    assert [r.phrase for r in read_split(world.root, "mine/train")] == ["a thing"]


def test_a_mask_of_another_size_than_its_picture(world: Any) -> None:
    world.images("a.png")
    rle = {"size": [30, 41], "counts": [1000, 230]}
    with pytest.raises(DataError, match="line 2: .*expected an RLE of the image's size"):
        world.prepare(
            world.lines({**GOOD, "width": 40, "height": 30}, {"image": "a.png", "phrase": "y", "masks": [rle]})
        )


def test_two_pictures_of_one_id(world: Any) -> None:
    world.images("a.png", "b.png")
    source = world.lines({**GOOD, "image_id": 1}, {**GOOD, "image": "b.png", "image_id": 1})
    with pytest.raises(DataError, match="expected each image_id to be one image in one orientation, got '1' for b.png and another"):
        world.prepare(source)
    source = world.lines({**GOOD, "image_id": 1}, {**GOOD, "image_id": 2})
    with pytest.raises(DataError, match=r"expected one image_id of a\.png, got 1 and 2"):
        world.prepare(source)


def test_unusable_sources(world: Any, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"expected a \.jsonl file, .*, got nothing at this path\. Check"
    ):
        world.prepare(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"or of \*\.json that hold an array, got none\. Check the path"):
        world.prepare(tmp_path / "empty")
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"expected phrases, got none\. Check the file"):
        world.prepare(tmp_path / "train.jsonl")
    world.images("a.png")
    with pytest.raises(DataError, match=r"--mapping foto=\.\.\.: expected one of image, phrase"):
        world.prepare(world.lines(GOOD), mapping={"foto": "image"})
    with pytest.raises(
        DataError, match=r"expected a folder, got nothing there\. Name the folder of the images with --images"
    ):
        world.prepare(world.lines(GOOD), images=tmp_path / "no")
    assert world.is_untouched()


def test_a_pipe_among_the_files_is_named(world: Any) -> None:
    """It was passed over, as if its split did not exist."""
    folder = world.images("a.png")
    world.lines({"image": "a.png", "phrase": "p", "polygons": SQUARE}, file="val.jsonl")
    os.mkfifo(folder / "train.jsonl")
    with pytest.raises(DataError, match=r"train.jsonl: expected a file, got a link that leads nowhere, a pipe"):
        world.prepare(folder)
