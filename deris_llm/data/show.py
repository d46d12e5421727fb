"""Draws images with their phrases and masks: a contact sheet, or a page that is one file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deris_llm.data.masks import decode_segmentation
from deris_llm.common.html import data_uri, environment
from deris_llm.data.images import load_image
from deris_llm.structures import ReferringRecord

_COLOURS_RGB = ((230, 86, 20), (0, 120, 212), (0, 150, 100), (190, 50, 150), (200, 150, 0), (90, 90, 220))
"""Of the first, second, ... referent; told apart without red and green too."""

_PAGE_PX = 480  # longer side of an image on the page

def write_page(records: Sequence[ReferringRecord], path: Path, *, split: str, num_phrases: int) -> None:
    """Writes an HTML page that needs no other file and no network.

    Args:
        records: what is shown, in this order.
        path: of the page.
        split: ``dataset/split``, for the title.
        num_phrases: of the whole split.
    """
    template = environment("deris_llm.data").get_template("split.html.j2")
    page = template.render(split=split, num_phrases=num_phrases, cards=[_card(record) for record in records])
    path.write_text(page, "utf-8", "backslashreplace")


def _card(record: ReferringRecord) -> tuple[ReferringRecord, str, str | None, str]:
    """Returns what the template shows of a record: image and masks as data URIs, and the image's file name."""
    image = load_image(record.image_path, size_hw=(record.height, record.width), exif=record.exif)
    image.thumbnail((_PAGE_PX, _PAGE_PX))
    mask = data_uri(_overlay(_masks(record), image.size), "PNG", optimize=True) if record.instances else None
    return record, data_uri(image, "JPEG", quality=85), mask, Path(record.image_path).name


def _overlay(masks: Sequence[np.ndarray], size: tuple[int, int]) -> Image.Image:
    """What lies over the picture: everything but the referents darkened, the referents tinted and outlined."""
    pixels = np.zeros((size[1], size[0], 4), np.uint8)
    pixels[..., 3] = 120
    for colour, mask in zip(_colours(len(masks)), masks, strict=True):
        shrunk = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) >= 128
        pixels[shrunk] = (*colour, 50)
        pixels[_border(shrunk)] = (*colour, 255)
    return Image.fromarray(pixels)


@dataclass(frozen=True, eq=False)
class Tile:
    """An image of a contact sheet."""

    image: Image.Image  # RGB
    phrase: str
    masks: Sequence[np.ndarray]  # bool (h, w) of the referents, at the image's size; none: no target


def contact_sheet(records: Sequence[ReferringRecord]) -> Image.Image:
    """Pictures with their phrase above and everything but the referents darkened."""
    tiles = (
        Tile(
            load_image(record.image_path, size_hw=(record.height, record.width), exif=record.exif),
            record.phrase,
            _masks(record),
        )
        for record in records
    )
    return sheet_of(tiles, len(records))


def sheet_of(
    tiles: Iterable[Tile], count: int, *, title: str = "", columns: int = 4, tile_px: int = 300
) -> Image.Image:
    """Arranges tiles in rows.

    Args:
        tiles: taken one at a time.
        count: their number.
        title: a line above them; "" = none.
        columns: tiles in a row.
        tile_px: side of the square that an image is scaled to.

    Returns:
        RGB image.
    """
    caption_px, title_px = 44, 30 if title else 0
    sheet = Image.new("RGB", (columns * tile_px, title_px + -(-count // columns) * (tile_px + caption_px)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    if title:
        draw.text((4, 6), title, fill="black", font=ImageFont.load_default(16))
    for i, tile in enumerate(tiles):
        left, top = (i % columns) * tile_px, title_px + (i // columns) * (tile_px + caption_px)
        scale = (tile_px - 8) / max(tile.image.size)
        size = (max(1, round(tile.image.width * scale)), max(1, round(tile.image.height * scale)))
        picture = tile.image.resize(size).convert("RGBA")
        shown = Image.alpha_composite(picture, _overlay(tile.masks, size)).convert("RGB")
        caption = textwrap.wrap(tile.phrase if len(tile.masks) else f"{tile.phrase} (no target)", 46)[:3]
        draw.multiline_text((left + 4, top + 2), "\n".join(caption), fill="black", font=font, spacing=1)
        sheet.paste(shown, (left + 4, top + caption_px))
    return sheet


def _masks(record: ReferringRecord) -> list[np.ndarray]:
    return [decode_segmentation(i.segmentation, record.height, record.width) for i in record.instances]


def _colours(count: int) -> list[tuple[int, int, int]]:
    return [_COLOURS_RGB[i % len(_COLOURS_RGB)] for i in range(count)]


def _border(mask: np.ndarray) -> np.ndarray:
    """The outermost two pixels of a mask."""
    core = mask
    for _ in range(2):
        padded = np.pad(core, 1)
        core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:] & core
    return mask & ~core
