"""Draws images, or frames of videos side by side, with phrases and masks: a contact sheet, or a page that is one file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from deris_llm.data.masks import decode_segmentation
from deris_llm.common.html import data_uri, environment
from deris_llm.data.images import load_image
from deris_llm.structures import ReferringRecord

_COLOURS_RGB = ((230, 86, 20), (0, 120, 212), (0, 150, 100), (190, 50, 150), (200, 150, 0), (90, 90, 220))
"""Of the first, second, ... referent; told apart without red and green too."""

_PAGE_PX = 480  # longer side of an image on the page
_FRAME_PX = 240  # of a frame of a strip
_STRIP_FRAMES = 6


@dataclass(frozen=True, eq=False)
class Strip:
    """A sentence of a video in some of its frames, evenly spaced."""

    frames: tuple[ReferringRecord, ...]
    num_frames: int  # that the split has of the video

    @property
    def about(self) -> str:
        """The video, the frames that are shown and in how many of them the sentence names something."""
        first, numbers = self.frames[0], ", ".join(str(record.frame) for record in self.frames)
        if not first.has_truth:
            found = "the truth is not published"
        else:
            found = f"{sum(not record.is_no_target for record in self.frames)} with a target"
        return f"{first.video} expression {first.expression}: frames {numbers} of {self.num_frames:,}, {found}"


def some_sentences(
    records: Sequence[ReferringRecord], rows_by_sentence: Mapping[tuple[str, str], np.ndarray], count: int
) -> list[Strip]:
    """Returns at most ``count`` sentences, spread over a split, with `_STRIP_FRAMES` frames of each.

    Args:
        records: of the split.
        rows_by_sentence: `PreparedSplit.sentences`.
        count: at least 1.
    """
    groups = list(rows_by_sentence.values())
    count = min(count, len(groups))
    strips = []
    for rows in (groups[i * len(groups) // count] for i in range(count)):
        shown = rows[np.linspace(0, len(rows) - 1, min(_STRIP_FRAMES, len(rows))).round().astype(int)]
        strips.append(Strip(tuple(records[int(row)] for row in shown), len(rows)))
    return strips


def write_page(shown: Sequence[ReferringRecord | Strip], path: Path, *, split: str, num_phrases: int) -> None:
    """Writes an HTML page that needs no other file and no network.

    Args:
        shown: phrases of images, or sentences of videos, in this order.
        path: of the page.
        split: ``dataset/split``, for the title.
        num_phrases: phrases, or sentences, of the whole split.
    """
    template = environment("deris_llm.data").get_template("split.html.j2")
    cards = [_card(each) if isinstance(each, ReferringRecord) else _card_of_strip(each) for each in shown]
    unit = "sentences" if any(isinstance(each, Strip) for each in shown) else "phrases"
    page = template.render(split=split, num_phrases=num_phrases, unit=unit, cards=cards)
    path.write_text(page, "utf-8", "backslashreplace")


def _card(record: ReferringRecord) -> tuple[ReferringRecord, str, str | None, str, str | None]:
    """Returns what the template shows of a record: image and masks as data URIs, the image's file name, and None for a strip."""
    image = _image_of(record)
    image.thumbnail((_PAGE_PX, _PAGE_PX))
    mask = data_uri(_overlay(_masks(record), image.size), "PNG", optimize=True) if record.instances else None
    return record, data_uri(image, "JPEG", quality=85), mask, Path(record.image_path).name, None


def _card_of_strip(strip: Strip) -> tuple[ReferringRecord, str, str | None, str, str | None]:
    image, overlay = _side_by_side(strip)
    mask = data_uri(overlay, "PNG", optimize=True) if strip.frames[0].has_truth else None
    return strip.frames[0], data_uri(image, "JPEG", quality=85), mask, "", strip.about


def _side_by_side(strip: Strip) -> tuple[Image.Image, Image.Image]:
    """The frames in a row, RGB, and what lies over them, RGBA."""
    frames = [ImageOps.contain(_image_of(record), (_FRAME_PX, _FRAME_PX)) for record in strip.frames]
    size = (sum(frame.width + 4 for frame in frames) - 4, max(frame.height for frame in frames))
    image, overlay = Image.new("RGB", size, "white"), Image.new("RGBA", size)
    left = 0
    for frame, record in zip(frames, strip.frames, strict=True):
        image.paste(frame, (left, 0))
        overlay.paste(_overlay(_masks(record), frame.size), (left, 0))
        left += frame.width + 4
    return image, overlay


def strip_sheet(strips: Sequence[Strip]) -> Image.Image:
    """One row per sentence: the sentence, and the frames with everything but the referents darkened; RGB."""
    caption_px = 44
    rows = []
    for strip in strips:
        image, overlay = _side_by_side(strip)
        is_known = strip.frames[0].has_truth
        rows.append(Image.alpha_composite(image.convert("RGBA"), overlay).convert("RGB") if is_known else image)
    size = (max(row.width for row in rows) + 8, sum(row.height + caption_px + 8 for row in rows))
    sheet, top = Image.new("RGB", size, "white"), 0
    draw = ImageDraw.Draw(sheet)
    for strip, row in zip(strips, rows, strict=True):
        phrase = textwrap.shorten(strip.frames[0].phrase, size[0] // 8, placeholder=" ...")
        draw.text((4, top + 5), phrase, fill="black", font=ImageFont.load_default(15))
        draw.text((4, top + 26), strip.about, fill="#666666", font=ImageFont.load_default(11))
        sheet.paste(row, (4, top + caption_px))
        top += row.height + caption_px + 8
    return sheet


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
            _image_of(record),
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


def _image_of(record: ReferringRecord) -> Image.Image:
    return load_image(record.image_path, size_hw=(record.height, record.width), exif=record.exif)


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
