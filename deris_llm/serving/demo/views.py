"""What the demo shows, as functions of an inspection and the settings of the page. Nothing here runs the network.

Canvases are at most `DISPLAY_PX` on the longer side, so that time and traffic do not grow with the image.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deris_llm.evaluation.overlays import Rgb, colour_of, outline_of, paint_mask, paint_masks, resized_mask
from deris_llm.models.postprocess import PresenceUse, Selection
from deris_llm.serving.answers import ImageAnswer
from deris_llm.serving.inspection import Inspection
from deris_llm.serving.video_files import SavedVideo

DISPLAY_PX = 1024
_SMALLEST_PX = 640  # smaller images are enlarged, so that outlines and numbers stay fine
_THUMBNAIL_PX = 320
_NUMBER_PX = 27
_ONLY_FIRST, _ONLY_SECOND, _BOTH = (255, 122, 0), (0, 150, 255), (245, 245, 245)
_VERDICTS = {"found": "found", "best guess": "best guess, below the threshold", "nothing": "not in the image"}


@dataclass(frozen=True)
class Rule:
    """When a query joins an answer; see `answer_masks`. None = as the checkpoint says."""

    score_threshold: float | None = None
    selection: Selection | None = None
    presence: PresenceUse | None = None

    def answers(self, inspection: Inspection, *, max_side: int | None = DISPLAY_PX) -> list[ImageAnswer]:
        """Answers the phrases by this rule, with masks of at most `max_side` px."""
        return inspection.answers(
            score_threshold=self.score_threshold, selection=self.selection, presence=self.presence, max_side=max_side
        )


# -- answers ---------------------------------------------------------------------------------------------------------


def annotated_image(inspection: Inspection, answers: Sequence[ImageAnswer], chosen: int | None = None) -> Image.Image:
    """Draws all answers in one image: a colour and a number for each phrase.

    Args:
        inspection: of the image.
        answers: one per phrase.
        chosen: the phrase whose mask lies on top and has a double outline.
    """
    canvas = _canvas(inspection, DISPLAY_PX)
    size = (canvas.shape[1], canvas.shape[0])
    masks = [resized_mask(answer.mask, size) for answer in answers]
    paint_masks(canvas, masks, last=chosen)
    if chosen is not None and chosen < len(masks):
        _frame_mask(canvas, masks[chosen])
    image = _image(canvas)
    pen, taken = ImageDraw.Draw(image), []
    for phrase in range(len(masks)):
        if masks[phrase].any():
            taken.append(_free_xy(_innermost_xy(masks[phrase]), taken, image.width))
            _draw_number(pen, taken[-1], phrase + 1, colour_of(phrase))
    return image


def phrase_at(answers: Sequence[ImageAnswer], x: float, y: float) -> int | None:
    """Returns the phrase whose mask covers a point; of several the one with the smallest mask.

    Args:
        answers: one per phrase.
        x: 0..1 from the left.
        y: 0..1 from the top.
    """
    covering = [p for p, answer in enumerate(answers) if _is_inside(answer.mask, x, y)]
    return min(covering, key=lambda p: int(answers[p].mask.sum()), default=None)


def _is_inside(mask: np.ndarray, x: float, y: float) -> bool:
    height, width = mask.shape
    row, column = int(y * height), int(x * width)
    return 0 <= row < height and 0 <= column < width and bool(mask[row, column])


def legend(answers: Sequence[ImageAnswer], chosen: int | None = None) -> str:
    """Returns the list of phrases with colour, verdict, score and presence, as HTML."""
    rows = []
    for number, answer in enumerate(answers):
        several = f", {len(answer.query_index)} masks" if len(answer.query_index) > 1 else ""
        rows.append(
            f'<tr class="{"chosen" if number == chosen else ""}"><td><span class="number" style="background:'
            f'{_css(colour_of(number))}">{number + 1}</span></td>'
            f'<td class="phrase">{html.escape(answer.phrase)}<br><small>{_VERDICTS[answer.verdict]}{several}</small></td>'
            f"<td>{answer.score:.2f}</td><td>{answer.presence:.2f}</td></tr>"
        )
    head = "<tr><th></th><th>phrase</th><th>score</th><th>presence</th></tr>"
    return f'<table class="deris-table">{head}{"".join(rows)}</table>'


def video_legend(saved: SavedVideo) -> str:
    """Returns in how many frames of a video each phrase is found, with its colour and mean score, as HTML."""
    rows = "".join(
        f'<tr><td><span class="number" style="background:{_css(colour_of(number))}">{number}</span></td>'
        f'<td class="phrase">{html.escape(phrase)}<br><small>found in {saved.found[number]:,} of {saved.num_frames:,} frames'
        + (f", best guess in {saved.guessed[number]:,}" if saved.guessed[number] else "")
        + f"</small></td><td>{saved.scores.get(number, 0.0):.2f}</td></tr>"
        for number, phrase in enumerate(saved.phrases)
    )
    return f'<table class="deris-table"><tr><th></th><th>phrase</th><th>mean score</th></tr>{rows}</table>'


# -- rounds ----------------------------------------------------------------------------------------------------------


def round_pair(inspection: Inspection, phrase_index: int, round_index: int) -> tuple[Image.Image, Image.Image]:
    """Draws the best query's mask of a phrase in a round and in the next one.

    Raises:
        ValueError: there is no such round, or no next one.
    """
    if round_index == -1:
        round_index = inspection.num_rounds - 2
    return _round_image(inspection, phrase_index, round_index), _round_image(inspection, phrase_index, round_index + 1)


def _round_image(inspection: Inspection, phrase_index: int, round_index: int) -> Image.Image:
    query = inspection.best_queries(round_index)[phrase_index]
    (probs,) = inspection.mask_probs(phrase_index, round_index, queries=[query], max_side=DISPLAY_PX)
    canvas = _canvas(inspection, DISPLAY_PX)
    paint_mask(canvas, resized_mask(probs >= 0.5, (canvas.shape[1], canvas.shape[0])), colour_of(phrase_index))
    image = _image(canvas)
    score = inspection.referring_scores(round_index)[phrase_index, query]
    _draw_label(image, f"round {round_index}: query {query}, score {score:.2f}", is_right=bool(round_index % 2))
    return image


def score_chart(inspection: Inspection, chosen: int | None = None) -> str:
    """Returns the highest referring score of each phrase by round as a line chart, SVG."""
    rounds = [inspection.referring_scores(k).max(axis=1) for k in range(inspection.num_rounds)]
    left, top, width, height = 32, 12, 360, 130
    step = width / max(1, len(rounds) - 1)
    shapes = []
    for value in (0.0, 0.5, 1.0):
        y = top + height * (1 - value)
        shapes.append(f'<line x1="{left}" y1="{y}" x2="{left + width}" y2="{y}" class="grid"/>')
        shapes.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for k in range(len(rounds)):
        shapes.append(f'<text x="{left + k * step}" y="{top + height + 20}" text-anchor="middle">round {k}</text>')
    for phrase in sorted(range(len(inspection.phrases)), key=lambda p: p == chosen):
        points = " ".join(f"{left + k * step:.1f},{top + height * (1 - r[phrase]):.1f}" for k, r in enumerate(rounds))
        thick = 4 if phrase == chosen else 2
        title = html.escape(f"{inspection.phrases[phrase]}: " + ", ".join(f"{r[phrase]:.2f}" for r in rounds))
        shapes.append(
            f'<polyline points="{points}" fill="none" stroke="{_css(colour_of(phrase))}" stroke-width="{thick}" '
            f'stroke-linejoin="round"><title>{title}</title></polyline>'
        )
    return (
        f'<svg class="deris-chart" viewBox="0 0 {left + width + 30} {top + height + 30}" role="img" '
        f'aria-label="highest referring score by round">{"".join(shapes)}</svg>'
    )


# -- queries ---------------------------------------------------------------------------------------------------------


def query_images(
    inspection: Inspection, answer: ImageAnswer, phrase_index: int, round_index: int = -1
) -> list[tuple[Image.Image, str]]:
    """Draws the mask of every query of a phrase, with its number and score; those of the answer have a frame.

    Args:
        inspection: of the image.
        answer: to the phrase.
        phrase_index: of the phrase.
        round_index: of the round.
    """
    scores = inspection.referring_scores(round_index)[phrase_index]
    probs = inspection.mask_probs(phrase_index, round_index, max_side=_THUMBNAIL_PX)
    drawn = []
    for query in np.argsort(-scores, kind="stable").tolist():
        canvas = _canvas(inspection, _THUMBNAIL_PX)
        paint_mask(
            canvas, resized_mask(probs[query] >= 0.5, (canvas.shape[1], canvas.shape[0])), colour_of(phrase_index)
        )
        is_chosen = query in answer.query_index
        if is_chosen:
            for border, rgb in ((8, colour_of(phrase_index)), (2, (255, 255, 255))):
                canvas[:border], canvas[-border:], canvas[:, :border], canvas[:, -border:] = (rgb,) * 4
        drawn.append((_image(canvas), f"query {query}: {scores[query]:.2f}"))
    return drawn


# -- two checkpoints -------------------------------------------------------------------------------------------------


def difference_image(
    inspection: Inspection, answers: Sequence[ImageAnswer], others: Sequence[ImageAnswer], phrase_index: int
) -> Image.Image:
    """Draws where two checkpoints' answers to a phrase differ: white = both, orange = the first, blue = the second."""
    canvas = _canvas(inspection, DISPLAY_PX)
    canvas[:] = 0.45 * canvas + 40
    size = (canvas.shape[1], canvas.shape[0])
    ours, theirs = (resized_mask(found[phrase_index].mask, size) for found in (answers, others))
    for mask, rgb in ((ours & theirs, _BOTH), (ours & ~theirs, _ONLY_FIRST), (theirs & ~ours, _ONLY_SECOND)):
        paint_mask(canvas, mask, rgb)
    return _image(canvas)


def comparison_table(answers: Sequence[ImageAnswer], others: Sequence[ImageAnswer], names: Sequence[str]) -> str:
    """Returns how two checkpoints answer each phrase and the IoU of their masks, as HTML; the largest difference first."""
    rows = []
    for number, (ours, theirs) in enumerate(zip(answers, others, strict=True)):
        iou = mask_iou(ours.mask, theirs.mask)
        cells = "".join(f"<td>{one.verdict} {one.score:.2f}</td>" for one in (ours, theirs))
        row = f'<td class="phrase">{number + 1}. {html.escape(ours.phrase)}</td>{cells}<td>{100 * iou:.0f} %</td>'
        rows.append((iou, f"<tr>{row}</tr>"))
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(row for _, row in sorted(rows, key=lambda item: item[0]))
    return f'<table class="deris-table"><tr><th>phrase</th>{heads}<th>IoU of the two</th></tr>{body}</table>'


def mask_iou(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the IoU of two masks, bool (h, w); 1 if both are empty."""
    union = int((ours | theirs).sum())
    return int((ours & theirs).sum()) / union if union else 1.0


# -- drawing ---------------------------------------------------------------------------------------------------------


def display_size(inspection: Inspection, longest_px: int = DISPLAY_PX) -> tuple[int, int]:
    """Returns width and height of the images that are drawn of an inspection."""
    width, height = inspection.image.size
    scale = min(max(width, height, _SMALLEST_PX), longest_px) / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _canvas(inspection: Inspection, longest_px: int) -> np.ndarray:
    """Returns the image as float32 (h, w, 3): not larger than this, and if smaller than `_SMALLEST_PX`, enlarged."""
    size = display_size(inspection, longest_px)
    return np.asarray(
        inspection.image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0), dtype=np.float32
    ).copy()


def _image(canvas: np.ndarray) -> Image.Image:
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))


def _frame_mask(canvas: np.ndarray, mask: np.ndarray) -> None:
    """Adds a white line around the outline of a mask."""
    around = cv2.dilate(outline_of(mask).astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    canvas[around & ~mask & ~outline_of(mask)] = 255


def _innermost_xy(mask: np.ndarray) -> tuple[int, int]:
    """Returns the point of a mask that is farthest from its border."""
    padded = np.pad(mask.astype(np.uint8), 1)
    row, column = np.unravel_index(int(cv2.distanceTransform(padded, cv2.DIST_L2, 3).argmax()), padded.shape)
    return int(column) - 1, int(row) - 1


def _free_xy(xy: tuple[int, int], taken: Sequence[tuple[int, int]], width: int) -> tuple[int, int]:
    """Moves the place of a number to the right of those that are there: several phrases may have the same mask."""
    x, y = xy
    while any(abs(x - other_x) < _NUMBER_PX and abs(y - other_y) < _NUMBER_PX for other_x, other_y in taken):
        x = x + _NUMBER_PX if x + 2 * _NUMBER_PX < width else _NUMBER_PX
        y = y if x > _NUMBER_PX else y + _NUMBER_PX
    return x, y


def _draw_number(pen: ImageDraw.ImageDraw, xy: tuple[int, int], number: int, rgb: Rgb) -> None:
    radius = _NUMBER_PX // 2
    pen.ellipse((xy[0] - radius, xy[1] - radius, xy[0] + radius, xy[1] + radius), fill=rgb, outline="white", width=2)
    pen.text(xy, str(number), fill=_ink_on(rgb), font=ImageFont.load_default(16), anchor="mm")


def _draw_label(image: Image.Image, text: str, *, is_right: bool) -> None:
    """Writes a text into a lower corner: left and right under an image slider."""
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    width = pen.textlength(text, font=font) + 16
    x = image.width - width - 8 if is_right else 8
    pen.rounded_rectangle((x, image.height - 38, x + width, image.height - 8), radius=6, fill=(20, 20, 30))
    pen.text((x + 8, image.height - 23), text, fill="white", font=font, anchor="lm")


def _ink_on(rgb: Rgb) -> str:
    return "black" if 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 150 else "white"


def _css(rgb: Rgb) -> str:
    return f"rgb({rgb[0]},{rgb[1]},{rgb[2]})"
