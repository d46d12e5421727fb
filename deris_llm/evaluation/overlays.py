"""Images of answers: predicted mask and ground truth on the image, as contact sheets (PNG) and one HTML page."""

from __future__ import annotations

import bisect
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deris_llm.common.html import data_uri, environment
from deris_llm.data.images import load_image
from deris_llm.data.masks import decode_segmentation
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.truth import merged_truth
from deris_llm.structures import ReferringRecord

TILE_WIDTH_PX = 400
_MAX_SCALE = 3  # small images are enlarged up to this factor
PREDICTED_RGB = (255, 122, 0)
TRUTH_RGB = (0, 190, 255)
"""Orange and blue, which people who confuse colours tell apart; the truth's line is dashed besides."""
_PHRASE_RGB = (
    (255, 122, 0), (0, 150, 255), (0, 170, 90), (214, 60, 170), (250, 205, 0), (120, 80, 235), (230, 40, 50), (0, 190, 190),
    (150, 100, 40), (130, 160, 0),
)  # fmt: skip
_GAP_RGB = (8, 24, 48)  # between the dashes: they stand out on any image
_DASH_PX = 5
_TINT = 0.42
_CAPTION_PX = 74
_MARGIN_PX = 16
_COLUMNS = 4
_LEGEND_ROW_PX = 30
_LEGEND_ROWS = 10  # further phrases are counted

Rgb = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Case:
    """One answer that is shown."""

    kind: str  # "random", "best" or "worst"
    prediction: Answer
    record: ReferringRecord

    @cached_property
    def overlay(self) -> Image.Image:
        """The drawn image, RGB."""
        record = self.record
        image = load_image(record.image_path, size_hw=(record.height, record.width), exif=record.exif)
        predicted = decode_segmentation(self.prediction.mask, self.record.height, self.record.width)
        return draw_overlay(image, predicted, merged_truth(self.record))


def choose_cases(
    predictions: Sequence[Answer],
    records: Mapping[str, ReferringRecord],
    *,
    protocol: str,
    num_each: int = 4,
    seed: int = 0,
) -> list[Case]:
    """Random cases first (what to expect), then the worst and the best; each phrase once, images repeat only if they must.

    Args:
        predictions: of a split.
        records: by phrase id.
        protocol: whose IoU decides.
        num_each: cases of each of the three kinds.
        seed: of the random ones.
    """
    by_iou = sorted(predictions, key=lambda p: p.iou[protocol])
    shuffled = random.Random(seed).sample(by_iou, len(by_iou))
    cases: list[Case] = []
    seen: Counter[str] = Counter()  # cases by image: a new image is preferred
    for kind, ranking in (("random", shuffled), ("worst", by_iou), ("best", by_iou[::-1])):
        taken = {case.record.phrase_id for case in cases}
        for chosen in pick([p for p in ranking if p.phrase_id not in taken], num_each, seen):
            cases.append(Case(kind, chosen, records[chosen.phrase_id]))
    return cases


class OfImage(Protocol):
    """Something about an image."""

    @property
    def image_id(self) -> str: ...


Ranked = TypeVar("Ranked", bound=OfImage)


def pick(ranking: Iterable[Ranked], number: int, seen: Counter[str]) -> list[Ranked]:
    """The first of a ranking, but images that were shown less go before those that were shown more.

    Args:
        ranking: best first.
        number: wanted; fewer if there are no more.
        seen: how often each image was shown; counted on.
    """
    left = list(ranking)
    picked: list[Ranked] = []
    while left and len(picked) < number:
        position = min(range(len(left)), key=lambda i: seen[left[i].image_id])
        picked.append(left.pop(position))
        seen[picked[-1].image_id] += 1
    return picked


def draw_overlay(
    image: Image.Image, predicted: np.ndarray | None, truth: np.ndarray | None, *, width_px: int = TILE_WIDTH_PX
) -> Image.Image:
    """The image with the predicted mask tinted and outlined and the ground truth outlined by a dashed line.

    Args:
        image: RGB.
        predicted: bool (h, w) at the image's size; None draws none.
        truth: bool (h, w); None draws none.
        width_px: wanted width; small images are enlarged at most three times.

    Returns:
        RGB image.
    """
    scale = min(width_px / image.width, _MAX_SCALE)
    size = (round(image.width * scale), round(image.height * scale))
    canvas = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32).copy()
    if predicted is not None:
        paint_mask(canvas, resized_mask(predicted, size), PREDICTED_RGB)
    if truth is not None:
        edge = outline_of(resized_mask(truth, size))
        rows, columns = np.indices(edge.shape) // _DASH_PX
        dashes = (rows + columns) % 2 == 0
        canvas[edge & dashes] = TRUTH_RGB
        canvas[edge & ~dashes] = _GAP_RGB
    return Image.fromarray(canvas.round().astype(np.uint8))


def colour_of(phrase_index: int) -> Rgb:
    """Returns the colour of a phrase; after ten they repeat, and the numbers on the masks tell them apart."""
    return _PHRASE_RGB[phrase_index % len(_PHRASE_RGB)]


def paint_masks(canvas: np.ndarray, masks: Sequence[np.ndarray], *, last: int | None = None) -> None:
    """Paints a mask per phrase, each in the colour of its phrase; small masks lie on large ones.

    Args:
        canvas: see `paint_mask`.
        masks: P masks, bool (h, w).
        last: the phrase whose mask lies on top; None = the smallest.
    """
    for phrase in sorted(range(len(masks)), key=lambda p: (p == last, -int(masks[p].sum()))):
        paint_mask(canvas, masks[phrase], colour_of(phrase))


def paint_mask(canvas: np.ndarray, mask: np.ndarray, rgb: Rgb) -> None:
    """Tints and outlines a mask.

    Args:
        canvas: float32 (h, w, 3), 0 to 255; changed in place.
        mask: bool (h, w).
        rgb: its colour.
    """
    canvas[mask] = (1 - _TINT) * canvas[mask] + _TINT * np.array(rgb, dtype=np.float32)
    canvas[outline_of(mask)] = rgb


def draw_phrases(
    image: Image.Image, masks: Sequence[np.ndarray], rows: Sequence[tuple[str, str]], *, width_px: int, note: str = ""
) -> Image.Image:
    """Draws the masks of several phrases on an image, and below it a legend with a row per phrase.

    Width and height are even, as video codecs need. Images and legends of equal sizes give equal sizes.

    Args:
        image: RGB.
        masks: P masks, bool (h, w) at the image's size.
        rows: P pairs: the phrase, and what is said of it at the right.
        width_px: wanted width; small images are enlarged at most three times.
        note: of the image, in a last row.

    Returns:
        RGB image.
    """
    scale = min(width_px / image.width, _MAX_SCALE)
    size = (max(2, round(image.width * scale / 2) * 2), max(2, round(image.height * scale / 2) * 2))
    canvas = np.asarray(image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0), dtype=np.float32).copy()
    paint_masks(canvas, [resized_mask(mask, size) for mask in masks])
    shown = rows[:_LEGEND_ROWS]
    page = Image.new("RGB", (size[0], size[1] + _LEGEND_ROW_PX * (len(shown) + 1)), "white")
    page.paste(Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8)))
    pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(17), ImageFont.load_default(14)
    y = size[1] + _LEGEND_ROW_PX // 2
    for number, (phrase, said) in enumerate(shown):
        pen.rectangle((8, y - 9, 26, y + 9), fill=colour_of(number))
        width = pen.textlength(said, font=small)
        pen.text((size[0] - 8 - width, y), said, fill=(90, 90, 100), font=small, anchor="lm")
        text = fitted(phrase, font, max(0, size[0] - 34 - width - 20), pen)
        pen.text((34, y), text, fill=(20, 20, 30), font=font, anchor="lm")
        y += _LEGEND_ROW_PX
    more = f"and {len(rows) - len(shown)} more phrases; " if len(rows) > len(shown) else ""
    pen.text((8, y), fitted(more + note, small, size[0] - 16, pen), fill=(130, 130, 140), font=small, anchor="lm")
    return page


def write_contact_sheet(cases: Sequence[Case], path: str | Path, *, title: str, protocol: str) -> None:
    """One PNG with all cases, their phrases and IoU."""
    tiles = [tile_of(case, protocol) for case in cases]
    columns = min(_COLUMNS, max(len(tiles), 1))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    header = 64
    width = columns * (TILE_WIDTH_PX + _MARGIN_PX) + _MARGIN_PX
    sheet = Image.new("RGB", (width, header + sum(heights) + _MARGIN_PX * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN_PX, 16), title, fill=(20, 20, 30), font=ImageFont.load_default(24))
    x = width - _MARGIN_PX - 330
    for label, colour in (("prediction", PREDICTED_RGB), ("ground truth", TRUTH_RGB)):
        draw.rectangle((x, 22, x + 20, 40), fill=colour)
        if label == "ground truth":
            draw.rectangle((x + 7, 22, x + 13, 40), fill=_GAP_RGB)
        draw.text((x + 28, 20), label, fill=(60, 60, 70), font=ImageFont.load_default(18))
        x += 160
    y = header
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (_MARGIN_PX + column * (TILE_WIDTH_PX + _MARGIN_PX), y))
        y += height + _MARGIN_PX
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def write_page(cases_by_split: Mapping[str, Sequence[Case]], path: str | Path, *, title: str, protocol: str) -> None:
    """Writes one HTML page that holds its images itself and needs no network."""
    splits = [
        (
            split,
            [
                (case, data_uri(case.overlay, "JPEG", quality=90), f"rgb{_badge_rgb(case.prediction.iou[protocol])}")
                for case in cases
            ],
        )
        for split, cases in cases_by_split.items()
    ]
    page = (
        environment("deris_llm.evaluation")
        .get_template("overlays.html.j2")
        .render(
            title=title,
            protocol=protocol,
            predicted=f"rgb{PREDICTED_RGB}",
            truth=f"rgb{TRUTH_RGB}",
            gap=f"rgb{_GAP_RGB}",
            splits=splits,
        )
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, "utf-8", "backslashreplace")


def tile_of(case: Case, protocol: str) -> Image.Image:
    """Returns the drawn image with its IoU, phrase, kind and phrase id, RGB."""
    overlay = case.overlay
    tile = Image.new("RGB", (TILE_WIDTH_PX, overlay.height + _CAPTION_PX), (244, 244, 247))
    tile.paste(overlay, ((TILE_WIDTH_PX - overlay.width) // 2, 0))
    draw = ImageDraw.Draw(tile)
    iou = case.prediction.iou[protocol]
    badge, font = f"IoU {iou:.1f}", ImageFont.load_default(17)
    badge_width = draw.textlength(badge, font=font) + 16
    draw.rounded_rectangle((8, 8, 8 + badge_width, 34), radius=6, fill=_badge_rgb(iou))
    draw.text((16, 11), badge, fill="white", font=font)
    y = overlay.height + 6
    for line in _wrapped(case.prediction.phrase, ImageFont.load_default(17), TILE_WIDTH_PX - 16, draw):
        draw.text((8, y), line, fill=(20, 20, 30), font=ImageFont.load_default(17))
        y += 21
    about = f"{case.kind} | {case.prediction.phrase_id}"
    draw.text((8, overlay.height + _CAPTION_PX - 19), about, fill=(130, 130, 140), font=ImageFont.load_default(13))
    return tile


def fitted(text: str, font: Font, width_px: float, draw: ImageDraw.ImageDraw) -> str:
    """The text in one line; what does not fit ends in an ellipsis. Takes milliseconds however long the text is."""
    whole = " ".join(text.split())
    shown = whole[: int(width_px)]  # letters are wider than a pixel
    if shown == whole and draw.textlength(whole, font=font) <= width_px:
        return whole
    room = width_px - draw.textlength("...", font=font)
    lengths = range(len(shown) + 1)
    number = bisect.bisect_right(lengths, room, key=lambda n: draw.textlength(shown[:n], font=font)) - 1
    return f"{shown[: max(number, 0)]}..."


def _wrapped(text: str, font: Font, width_px: float, draw: ImageDraw.ImageDraw) -> list[str]:
    """At most two lines; what does not fit ends in an ellipsis."""
    words = " ".join(text.split())[: 4 * int(width_px)].split(" ")
    first = words.pop(0)
    while words and draw.textlength(f"{first} {words[0]}", font=font) <= width_px:
        first = f"{first} {words.pop(0)}"
    return [fitted(line, font, width_px, draw) for line in (first, " ".join(words)) if line]


def resized_mask(mask: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
    """Returns a mask, bool (h, w), at another size, with smooth borders."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(grey.resize(size_wh, Image.Resampling.BILINEAR)) >= 128


def outline_of(mask: np.ndarray) -> np.ndarray:
    """Both sides of every border, two pixels wide."""
    outline = np.zeros_like(mask)
    rows, columns = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    outline[1:] |= rows
    outline[:-1] |= rows
    outline[:, 1:] |= columns
    outline[:, :-1] |= columns
    return outline


def _badge_rgb(iou: float) -> tuple[int, int, int]:
    return (28, 132, 80) if iou >= 70 else (176, 116, 0) if iou >= 50 else (190, 40, 50)
