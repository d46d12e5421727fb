"""Writes a folder of example data, to copy and to replace: two images, five lines, every kind of mask, and a README."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from deris_llm.common.folders import check_new_folder, check_writable
from deris_llm.data.masks import encode_mask

_SIZE_WH = (160, 120)  # px
_SCALE = 4  # images are drawn larger and shrunk, for smooth edges
_SKY_RGB, _GROUND_RGB = (206, 226, 240), (196, 190, 176)

# Each object: colour, shape, box (x0, y0, x1, y1) in px.
_RED_BOX = ((200, 40, 40), "rectangle", (14, 56, 62, 98))
_BLUE_BALL = ((40, 80, 200), "ellipse", (98, 50, 146, 98))
_GREEN_BALL = ((50, 150, 60), "ellipse", (16, 30, 60, 74))
_LEFT_LEMON = ((240, 200, 40), "ellipse", (76, 60, 106, 84))
_RIGHT_LEMON = ((240, 200, 40), "ellipse", (116, 74, 146, 98))

_README = """\
# Data for deris-llm

Replace the images and lines of this folder by your own. Each line of `train.jsonl` is one phrase of one image:

| field | meaning |
| --- | --- |
| `image` | file, relative to this folder |
| `phrase` | what somebody says to mean the object or objects; free text |
| `polygons` | one object as its outline: `[[x0, y0, x1, y1, ...], ...]` in px, (0, 0) is the upper left corner; several parts of one object are several lists |
| `png` | one object as an image file of the same size: 0 is outside, one other value is inside |
| `rle` | one object as COCO's RLE: `{"size": [height, width], "counts": ...}` |
| `masks` | several objects: a list in which each is polygons, a file name or an RLE |
| `no_target` | `true`: the phrase names nothing in this image; such a line has no mask |

A line has exactly one of `polygons`, `png`, `rle`, `masks` and `no_target`. Further phrases of an image are further lines. Optional: `id`, `category`,
`width` and `height` (px, as annotated).

There is no `val.jsonl`: a tenth of the images, at least one, becomes val. Add `val.jsonl` (and `test.jsonl`) to choose them yourself.

```bash
deris-llm data prepare --format jsonl --source @ --out data/mine     # checks every line; `train --data` does this itself
NEXT```

Exports of LabelMe, CVAT, COCO and Roboflow need no conversion: `--data FOLDER` reads them (docs/data.md).
"""


def write_template(out: Path) -> None:
    """Writes the folder.

    Args:
        out: a new or empty folder.

    Raises:
        ValueError: the folder is not empty, or cannot be written to.
    """
    check_new_folder(out)
    check_writable(out, "--out")
    for folder in ("images", "masks"):
        (out / folder).mkdir()
    _draw(_RED_BOX, _BLUE_BALL).save(out / "images/box.png")
    _draw(_GREEN_BALL, _LEFT_LEMON, _RIGHT_LEMON).save(out / "images/lemons.png")
    for name, shape in (("ball", _BLUE_BALL), ("left_lemon", _LEFT_LEMON), ("right_lemon", _RIGHT_LEMON)):
        Image.fromarray(_mask(shape).astype(np.uint8) * 255).save(out / f"masks/{name}.png")
    lines = "".join(json.dumps(line) + "\n" for line in _lines())
    (out / "train.jsonl").write_text(lines, encoding="utf-8")
    commands = next_commands(out).replace("  deris-llm", "deris-llm")
    readme = _README.replace("@", shlex.quote(str(out / "train.jsonl"))).replace("NEXT", commands)
    (out / "README.md").write_text(readme, encoding="utf-8", errors="backslashreplace")


def next_commands(folder: Path) -> str:
    """Returns what to run on a folder of data, a command a line."""
    data = shlex.quote(str(folder))
    return (
        f"  deris-llm data show --data {data} --out page.html                  # do the masks fit? open it in a browser\n"
        f"  deris-llm train --config tiny-refcoco --data {data} --overfit 8    # does it learn a few images by heart? minutes on a CPU\n"
        f"  deris-llm plan --config deris-7b-refcoco --data {data}             # memory, steps and hours on your GPUs\n"
        f"  deris-llm train --config deris-7b-refcoco --data {data}\n"
    )


def _lines() -> list[dict[str, Any]]:
    x0, y0, x1, y1 = _RED_BOX[2]
    return [
        {"image": "images/box.png", "phrase": "the red box", "polygons": [[x0, y0, x1, y0, x1, y1, x0, y1]]},
        {"image": "images/box.png", "phrase": "the ball on the right", "png": "masks/ball.png"},
        {"image": "images/lemons.png", "phrase": "the green ball", "rle": encode_mask(_mask(_GREEN_BALL))},
        {
            "image": "images/lemons.png",
            "phrase": "both lemons",
            "masks": ["masks/left_lemon.png", "masks/right_lemon.png"],
        },
        {"image": "images/box.png", "phrase": "the dog", "no_target": True},
    ]


_Shape = tuple[tuple[int, int, int], str, tuple[int, int, int, int]]


def _draw(*shapes: _Shape) -> Image.Image:
    width, height = (side * _SCALE for side in _SIZE_WH)
    canvas = Image.new("RGB", (width, height), _SKY_RGB)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, height // 2, width, height), fill=_GROUND_RGB)
    for colour, kind, box in shapes:
        getattr(draw, kind)([side * _SCALE for side in box], fill=colour)
    return canvas.resize(_SIZE_WH, Image.Resampling.LANCZOS)


def _mask(shape: _Shape) -> np.ndarray:
    """Returns bool (h, w)."""
    _, kind, box = shape
    canvas = Image.new("L", (_SIZE_WH[0] * _SCALE, _SIZE_WH[1] * _SCALE))
    getattr(ImageDraw.Draw(canvas), kind)([side * _SCALE for side in box], fill=255)
    return np.asarray(canvas.resize(_SIZE_WH, Image.Resampling.BOX)) >= 128
