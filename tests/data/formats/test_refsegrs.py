"""RefSegRS as published: lines of an image number and a phrase, images and masks as TIFF."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.sources import is_generalised, read_split, split_names, split_notes


def _write(folder: Path, lines: dict[str, str], masks: dict[str, np.ndarray]) -> Path:
    for split, text in lines.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"output_phrase_{split}.txt").write_text(text, encoding="utf-8")
    for name, mask in masks.items():
        for below, pixels in (("images", np.full((*mask.shape[:2], 3), int(name) % 255, np.uint8)), ("masks", mask)):
            (folder / below).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / below / f"{name}.tif")
    return folder


def _road(value: int = 255) -> np.ndarray:
    mask = np.zeros((32, 32), np.uint8)
    mask[4:9] = value
    return mask


def test_the_published_layout(world: Any) -> None:
    smooth = _road()
    smooth[9] = (20, 60) * 16  # public loaders take what is above 50
    lines = {"train": "1361 paved road\n7 car \n\n", "val": "8 road along the trees\n", "test": "1361 road\r\n1361 the road\r\n"}
    _write(world.folder, lines, {"1361": _road(), "7": smooth, "8": np.zeros((32, 32), np.uint8)})
    world.prepare(world.folder, "refsegrs", format="refsegrs")
    root = world.root
    assert split_names(root, "refsegrs") == ("train", "val", "test")
    assert not is_generalised(root, "refsegrs")
    train, test = (read_split(root, f"refsegrs/{split}") for split in ("train", "test"))
    assert [record.phrase for record in train] == ["paved road", "car"]
    assert [record.phrase_id for record in test] == ["refsegrs/test/1361-1", "refsegrs/test/1361-2"]
    areas = [decode_segmentation(r.instances[0].segmentation, 32, 32).sum() for r in (*train, *read_split(root, "refsegrs/val"))]
    assert areas == [5 * 32, 5 * 32 + 16, 0]
    assert split_notes(root, "refsegrs/val")[0].startswith("referents that draw no pixel: 1;")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("paved road", "line 1: expected the number of an image and a phrase, got 'paved road'"),
        ("7", "line 1: expected the number of an image and a phrase, got '7'"),
        ("8 car", r"line 1: image .*8.tif: expected an image, got no file"),
        ("9 car", r"line 1: mask 9.tif: expected one channel, got mode RGB"),
        ("10 car", r"line 1: mask 10.tif: expected an image, got FileNotFoundError"),
        ("11 car", r"line 1: expected an RLE of the image's size \[h, w\] = \[20, 32\], got \[32, 32\]"),
    ],
)
def test_what_is_wrong_is_said(world: Any, line: str, message: str) -> None:
    _write(world.folder, {"test": f"{line}\n7 road\n"}, {"7": _road(), "9": np.dstack([_road()] * 3), "10": _road(), "11": _road()})
    (world.folder / "masks" / "10.tif").unlink()
    Image.new("RGB", (32, 20)).save(world.folder / "images" / "11.tif")
    with pytest.raises(DataError, match=message):
        world.prepare(world.folder, "refsegrs", format="refsegrs")


def test_other_folders_are_refused(world: Any) -> None:
    world.folder.mkdir()
    with pytest.raises(DataError, match="expected RefSegRS' folder with output_phrase_train.txt"):
        world.prepare(world.folder, format="refsegrs")
    _write(world.folder, {"val": "1 road\n"}, {})
    with pytest.raises(DataError, match="expected the folders images and masks in it"):
        world.prepare(world.folder, format="refsegrs")
