"""The answer to a phrase about an image at hand: it prints as one line, draws itself and saves its mask."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deris_llm.data.images import Picture, as_picture
from deris_llm.data.masks import encode_mask
from deris_llm.evaluation.answers import Rle
from deris_llm.evaluation.boxes import boxes_of_masks
from deris_llm.evaluation.overlays import draw_overlay, fitted
from deris_llm.models.postprocess import PhraseAnswer

_OVERLAY_WIDTHS_PX = (480, 1280)  # smaller images are enlarged, larger ones reduced
_NOTEBOOK_WIDTH_PX = 640  # an overlay of 1280 px takes megabytes in a notebook's file
_CAPTION_PX = 62
_VERDICT_RGB = {"found": (20, 110, 60), "best guess": (176, 116, 0), "nothing": (170, 40, 40)}


@dataclass(frozen=True, eq=False, repr=False)
class ImageAnswer(PhraseAnswer):
    """The model's answer to a phrase about an image.

    Nothing is drawn or compressed before it is asked for. The answer refers to the image as it was given: of a file it keeps
    the name and decodes it again to draw, so that many answers do not hold many images.
    """

    phrase: str = field(kw_only=True)
    source: Picture = field(kw_only=True)  # the image as it was given: a file, a PIL image or an array

    def __str__(self) -> str:
        """One line, e.g. `the red car: 3.1 % of the image, score 0.93, present 0.99`."""
        letters = "".join(letter if letter.isprintable() else " " for letter in self.phrase)
        said = {
            "found": f"{_percent(self.mask)} of the image",
            "best guess": f"{_percent(self.mask)} of the image, best guess below {self.score_threshold:g}",
            "nothing": "not in the image",
        }[self.verdict]
        return f"{' '.join(letters.split())}: {said}, score {self.score:.2f}, present {self.presence:.2f}"

    def __repr__(self) -> str:
        """The same line in brackets: arrays are not printed."""
        return f"ImageAnswer({self})"

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """Box around the mask: x0, y0, x1, y1 in px, x1 and y1 exclusive; None if the mask is empty."""
        boxes = boxes_of_masks(self.mask[None]).astype(int).tolist()
        return tuple(boxes[0]) if boxes else None

    @property
    def rle(self) -> Rle:
        """The mask in COCO's run-length encoding, `{"size": [h, w], "counts": text}`, which JSON and pycocotools take."""
        return encode_mask(self.mask)

    def to_json(self) -> dict[str, Any]:
        """Returns the answer as JSON objects of `deris-llm predict` and the demo have it, the mask as COCO RLE."""
        return {
            "phrase": self.phrase,
            "mask": self.rle,
            "score": round(self.score, 4),
            "presence": round(self.presence, 4),
            "says_target": self.says_target,
            "verdict": self.verdict,
            "boxes": boxes_of_masks(self.instance_masks).astype(int).tolist(),
        }

    def overlay(self, *, max_width_px: int = _OVERLAY_WIDTHS_PX[1]) -> Image.Image:
        """Draws the mask over the image, and below it the phrase with the verdict and scores.

        Args:
            max_width_px: larger images are reduced to it; images below 480 px are enlarged.

        Raises:
            ValueError: the file of the image cannot be read any more, or has another size now.
        """
        image = as_picture(self.source)
        height, width = self.mask.shape
        if abs(round(image.width * height / image.height) - width) > 1:
            raise ValueError(
                f"{_name_of(self.source)}: expected the image of the answer, {width} x {height} px or of the same proportions, "
                f"got {image.width} x {image.height} px; the image has changed: ask again."
            )
        return _captioned(image, self, max(max_width_px, _OVERLAY_WIDTHS_PX[0]))

    def save(self, path: str | Path) -> None:
        """Writes the mask as PNG with values 0 and 255, as `deris-llm predict` does; missing folders are made.

        Raises:
            ValueError: the name does not end in `.png`.
        """
        save_mask(self.mask, path)

    def _repr_png_(self) -> bytes:
        """The overlay, as notebooks show it."""
        file = io.BytesIO()
        self.overlay(max_width_px=_NOTEBOOK_WIDTH_PX).save(file, "PNG")
        return file.getvalue()


def about_image(answers: Iterable[PhraseAnswer], phrases: Iterable[str], source: Picture) -> list[ImageAnswer]:
    """Joins the model's answers with their phrases and the image."""
    return [
        ImageAnswer(**vars(answer), phrase=phrase, source=source)
        for answer, phrase in zip(answers, phrases, strict=True)
    ]


def save_mask(mask: np.ndarray, path: str | Path) -> None:
    """Writes a mask, bool (h, w), as PNG: 255 = inside, 0 = outside.

    Raises:
        ValueError: the name does not end in `.png`: other formats change values.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(
            f"{path}: expected a name that ends in .png, got {path.suffix or 'no ending'}; JPEG and others change the values of a mask."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def _captioned(image: Image.Image, answer: ImageAnswer, max_width_px: int) -> Image.Image:
    smallest = _OVERLAY_WIDTHS_PX[0]
    drawn = draw_overlay(image, answer.mask, None, width_px=min(max(image.width, smallest), max_width_px))
    page = Image.new("RGB", (max(drawn.width, smallest), drawn.height + _CAPTION_PX), "white")
    page.paste(drawn, ((page.width - drawn.width) // 2, 0))
    pen, large, small = ImageDraw.Draw(page), ImageFont.load_default(20), ImageFont.load_default(15)
    phrase = fitted(answer.phrase, large, page.width - 24, pen)
    pen.text((12, drawn.height + 7), phrase, fill=(20, 20, 30), font=large)
    said = {
        "found": f"found, {_percent(answer.mask)} of the image",
        "best guess": f"best guess, below the threshold {answer.score_threshold:g}",
        "nothing": "nothing",
    }[answer.verdict]
    line = f"{said}   |   score {answer.score:.2f}   |   presence {answer.presence:.2f}"
    pen.text((12, drawn.height + 35), line, fill=_VERDICT_RGB[answer.verdict], font=small)
    return page


def _percent(mask: np.ndarray) -> str:
    share = 100 * mask.mean()
    return f"{share:.1f} %" if share >= 0.05 else "< 0.1 %"


def _name_of(source: Picture) -> str:
    return str(source) if isinstance(source, (str, Path)) else "image"
