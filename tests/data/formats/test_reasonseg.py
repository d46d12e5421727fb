"""ReasonSeg as published: JSON beside JPEG in train, val and test; drawn as LISA draws, with pixels that no metric counts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deris_llm.data.check import check_data
from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.data.sources import is_generalised, read_split, split_names, split_notes
from deris_llm.evaluation.score import run_score

LARGE = [[4.9, 5], [20.2, 5], [20, 25], [4, 25]]
SMALL = [[8, 10], [12, 10], [12, 14], [8, 14]]
OTHER = [[24, 5], [36, 5], [36, 25], [24, 25]]


def _shape(label: str, points: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Keys as in the published files."""
    return {
        "label": label,
        "labels": [label],
        "shape_type": "polygon",
        "image_name": "1.jpg",
        "points": points,
        "group_id": None,
        "flags": {},
    }


def _write(world: Any, split: str, name: str, shapes: Sequence[Mapping[str, Any]], **more: Any) -> Path:
    folder: Path = world.folder / split
    world.images(f"{name}.jpg", folder=folder)
    content = {"text": ["something that barks", "what is alive"], "is_sentence": True, **more, "shapes": list(shapes)}
    (folder / f"{name}.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(more.pop("encoding", "utf-8")))
    return folder


def _masks(record: Any) -> tuple[np.ndarray, np.ndarray]:
    (instance,) = record.instances
    target = decode_segmentation(instance.segmentation, 30, 40)
    ignored = np.zeros_like(target) if record.ignored is None else decode_segmentation(record.ignored, 30, 40)
    return target, ignored


@pytest.fixture
def prepared(world: Any) -> Any:
    _write(world, "train", "1", [_shape("target", LARGE)])
    _write(world, "val", "2", [_shape("ignore", SMALL), _shape("Target", LARGE), _shape("flag", OTHER)])
    _write(world, "val", "3", [_shape("target", SMALL), _shape("ignored_part", LARGE), _shape("target", OTHER)])
    _write(world, "test", "4", [_shape("target", LARGE)], is_sentence=False, text=["dog"])
    _write(world, "test", "5", [_shape("target", OTHER)])
    world.prepare(world.folder, "reasonseg", format="labelme")
    return world


def test_splits_and_texts(prepared: Any) -> None:
    root = prepared.root
    assert split_names(root, "reasonseg") == ("train", "val", "test", "test_long", "test_short")
    found = {split: [r.phrase for r in read_split(root, f"reasonseg/{split}")] for split in split_names(root, "reasonseg")}
    assert found == {
        "train": ["something that barks", "what is alive"],
        "val": ["something that barks"] * 2,
        "test": ["dog", "something that barks"],
        "test_long": ["something that barks"],
        "test_short": ["dog"],
    }
    assert not is_generalised(root, "reasonseg")
    assert split_notes(root, "reasonseg/val") == (
        "images with pixels that no metric counts, as in LISA: 2",
        "further texts of an image that are not asked, as in LISA: 2",
    )
    assert split_notes(root, "reasonseg/test_short") == ()
    assert [c.known for c in check_data(root, ["reasonseg"])][1:3] == [(200, 200, 200), (779, 779, 779)]


def test_the_smaller_shape_covers_the_larger(prepared: Any) -> None:
    (inside_ignored, ignored), (inside_kept, around) = map(_masks, read_split(prepared.root, "reasonseg/val"))
    assert (ignored.sum(), inside_ignored.sum()) == (25, 17 * 21 - 25)  # outlines are inside; 4.9 px is cut to 4
    assert (inside_kept.sum(), around.sum()) == (25 + 13 * 21, 17 * 21 - 25)
    assert not (inside_ignored & ignored).any()


@pytest.mark.parametrize("protocol", ["original", "rela480", "deris"])
def test_ignored_pixels_count_neither_for_nor_against(prepared: Any, tmp_path: Path, protocol: str) -> None:
    records = read_split(prepared.root, "reasonseg/val")
    lines = []
    for record in records:
        target, ignored = _masks(record)
        lines.append({"phrase_id": record.phrase_id, "mask": encode_mask(target | ignored)})
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report, _ = run_score(
        tmp_path / "answers.jsonl",
        data_root=prepared.root,
        split="reasonseg/val",
        out=tmp_path / "out",
        protocols=(protocol,),
        pictures=False,
    )
    numbers = report["splits"]["reasonseg/val"][protocol]
    assert (numbers["mIoU"], numbers["oIoU"]) == (100, 100)
    assert report["notes"]["reasonseg/val"][0].startswith("images with pixels that no metric counts")


def test_cp1252(world: Any) -> None:
    _write(world, "val", "1", [_shape("target", LARGE)], text=["the dog’s café"], encoding="cp1252")
    world.prepare(world.folder, "reasonseg", format="labelme")
    assert read_split(world.root, "reasonseg/val")[0].phrase == "the dog’s café"


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"shapes": [_shape("target", [["a", "b"]])]}, r"shape 0: expected points \[\[x, y\], ...\]"),
        ({"shapes": [_shape("target", [[1, float("nan")], [2, 3]])]}, "shape 0: expected points"),
        ({"shapes": [_shape("target", [])]}, "shape 0: expected points"),
        ({"shapes": [{"label": "target"}]}, "shape 0: expected points .*got NoneType"),
        ({"shapes": [_shape("ignore", LARGE)]}, "its RLE mask is empty"),
        ({"shapes": [_shape("flag", LARGE)]}, "its RLE mask is empty"),
        ({"is_sentence": None}, "expected is_sentence to be true or false, got None"),
        ({"is_sentence": []}, r"expected is_sentence to be true or false, got \[\]"),
        ({"text": []}, "expected a phrase"),
        ({"text": [7]}, "expected a phrase"),
    ],
)
def test_spoilt_files(world: Any, spoilt: dict[str, Any], message: str) -> None:
    _write(world, "test", "1", spoilt.pop("shapes", [_shape("target", LARGE)]), **spoilt)
    with pytest.raises(DataError, match=message):
        world.prepare(world.folder, "reasonseg", format="labelme")


def test_a_broken_image_is_said_as_such(world: Any) -> None:
    folder = _write(world, "val", "1", [_shape("target", LARGE)])
    _write(world, "val", "2", [_shape("target", LARGE)])
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:400])
    with pytest.raises(DataError, match=r"val/1\.json: image .*1\.jpg"):
        world.prepare(world.folder, "reasonseg", format="labelme")
