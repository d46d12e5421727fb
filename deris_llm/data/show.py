"""Pictures with their phrases and masks, to be looked at: a contact sheet, or a page that is one file."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deris_llm.data.masks import decode_segmentation
from deris_llm.data.images import load_image
from deris_llm.structures import ReferringRecord

_COLOURS_RGB = ((230, 86, 20), (0, 120, 212), (0, 150, 100), (190, 50, 150), (200, 150, 0), (90, 90, 220))
"""Of the first, second, ... referent; told apart without red and green too."""

_PAGE_PX = 480  # longer side of a picture on the page

_STYLE = """
:root { color-scheme: light dark; --back: #fafaf8; --card: #fff; --text: #1c1c1a; --soft: #6b6b66; --line: #e3e3de }
@media (prefers-color-scheme: dark) {
  :root { --back: #181817; --card: #222220; --text: #ecece8; --soft: #a0a09a; --line: #3a3a36 } }
* { box-sizing: border-box }
body { margin: 0; padding: 28px; background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif }
h1 { margin: 0 0 2px; font-size: 22px } header p { margin: 0 0 14px; color: var(--soft) }
label { cursor: pointer; user-select: none; color: var(--soft) }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 18px; margin-top: 18px }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden }
.picture { position: relative; height: 250px; background: #8883 }
.picture img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain }
figcaption { padding: 10px 12px 12px } .phrase { font-weight: 600; overflow-wrap: anywhere }
.about { color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere }
.none { display: inline-block; padding: 0 7px; border-radius: 9px; background: #8883; font-size: 12px; font-weight: 600 }
body:has(#masks:not(:checked)) .mask { display: none }
"""


def write_page(records: Sequence[ReferringRecord], path: Path, *, split: str, num_phrases: int) -> None:
    """Writes an HTML page that needs no other file and no network.

    Args:
        records: what is shown, in this order.
        path: of the page.
        split: ``dataset/split``, for the title.
        num_phrases: of the whole split.
    """
    cards = "\n".join(map(_card, records))
    title = html.escape(split)
    content = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head>
<body><header><h1>{title}</h1>
<p>{len(records):,} of {num_phrases:,} phrases, evenly spaced over the split; each referent has a colour of its own</p>
<label><input type="checkbox" id="masks" checked> show the masks</label></header>
<main>
{cards}
</main></body></html>
"""
    path.write_text(content, encoding="utf-8")


def _card(record: ReferringRecord) -> str:
    image = load_image(record.image_path, size_hw=(record.height, record.width), exif=record.exif)
    image.thumbnail((_PAGE_PX, _PAGE_PX))
    overlay = _overlay(record, image.size) if record.instances else None
    mask = f'<img class="mask" alt="mask" src="{_data_uri(overlay, "PNG")}">' if overlay is not None else ""
    said = '<span class="none">no target</span> ' if record.is_no_target else ""
    several = f"{len(record.instances)} referents · " if len(record.instances) > 1 else ""
    category = f"{html.escape(record.category)} · " if record.category else ""
    about = f"{several}{category}{record.width} x {record.height} px"
    return (
        f'<figure><div class="picture"><img alt="" src="{_data_uri(image, "JPEG")}">{mask}</div>'
        f'<figcaption><div class="phrase">{said}{html.escape(record.phrase)}</div><div class="about">{about}<br>'
        f"{html.escape(record.phrase_id)}<br>{html.escape(Path(record.image_path).name)}</div></figcaption></figure>"
    )


def _overlay(record: ReferringRecord, size: tuple[int, int]) -> Image.Image:
    """What lies over the picture: everything but the referents darkened, the referents tinted and outlined."""
    pixels = np.zeros((size[1], size[0], 4), np.uint8)
    pixels[..., 3] = 120
    for colour, mask in zip(_colours(len(record.instances)), _masks(record), strict=True):
        shrunk = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) >= 128
        pixels[shrunk] = (*colour, 50)
        pixels[_border(shrunk)] = (*colour, 255)
    return Image.fromarray(pixels)


def _data_uri(image: Image.Image, format_name: str) -> str:
    stream = io.BytesIO()
    image.save(stream, format=format_name, **({"quality": 85} if format_name == "JPEG" else {"optimize": True}))
    return f"data:image/{format_name.lower()};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def contact_sheet(records: Sequence[ReferringRecord], *, columns: int = 4, tile_px: int = 300) -> Image.Image:
    """Pictures with their phrase above and everything but the referents darkened."""
    caption_px = 44
    rows = -(-len(records) // columns)
    sheet = Image.new("RGB", (columns * tile_px, rows * (tile_px + caption_px)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for i, record in enumerate(records):
        left, top = (i % columns) * tile_px, (i // columns) * (tile_px + caption_px)
        picture = load_image(record.image_path, size_hw=(record.height, record.width), exif=record.exif)
        scale = (tile_px - 8) / max(picture.size)
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        overlay = _overlay(record, picture.size)
        shown = Image.alpha_composite(picture.convert("RGBA"), overlay).convert("RGB")
        caption = textwrap.wrap(record.phrase if record.instances else f"{record.phrase} (no target)", 46)[:3]
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
