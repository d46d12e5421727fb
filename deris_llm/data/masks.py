"""COCO segmentations, mask images and boolean masks; all RLE goes through pycocotools."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from PIL import Image, ImageFilter
from pycocotools import mask as _pycocotools_mask

from deris_llm.common.words import shortened
from deris_llm.data.errors import describe

_FARTHEST_PX = 100_000  # pycocotools walks along every edge in steps of a fifth of a pixel

_SLACK = 0.5  # share of a side by which polygons of drawing tools, augmentations and amodal outlines may leave the image
_SLACK_PX = 32  # at least

_LOSSY = ("JPEG", "MPO", "JPEG2000")  # image formats that may store other values than were written
_FLAT_GREY = (24, 231)  # compression leaves flat black below and flat white above this range
_MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B")

coco_mask: Any = _pycocotools_mask  # its type stubs know neither lists of polygons nor plain dictionaries

_ASK = (
    "expected polygons [[x0, y0, x1, y1, x2, y2, ...], ...] in px or an RLE {'size': [h, w], 'counts': list or string}"
)


class NoPixelError(ValueError):
    """A mask that is well formed and belongs to this image, but covers no pixel of it."""


def decode_segmentation(segmentation: object, height: int, width: int) -> np.ndarray:
    """Draws a COCO segmentation as `segmentation_rle` does.

    Returns:
        bool (height, width).
    """
    return coco_mask.decode(segmentation_rle(segmentation, height, width)).astype(bool)


def segmentation_rle(segmentation: object, height: int, width: int) -> dict[str, Any]:
    """Checks a COCO segmentation and converts it to pycocotools' compressed RLE.

    Overlapping parts of one instance are joined. What lies outside the image is clipped, so the mask may be empty.

    Args:
        segmentation: list of polygons, or an RLE whose counts are a list (crowd annotations) or a compressed string, or a list
            of such RLEs (ReferIt, RRSIS-D).
        height: of the image, px.
        width: of the image, px.

    Returns:
        ``{"size": [h, w], "counts": bytes}``.

    Raises:
        ValueError: the segmentation is malformed, or its size is not the image's.
    """
    if (rle := _given_rle(segmentation, height, width)) is not None:
        return rle
    return _drawn(_checked_polygons(segmentation), height, width)[0]


def visible_rle(segmentation: object, height: int, width: int) -> dict[str, Any]:
    """As `segmentation_rle` for masks that must show something; parts of fewer than three points have no area and are dropped.

    Raises:
        NoPixelError: no pixel of the image is covered.
        ValueError: as `segmentation_rle`.
    """
    if (rle := _given_rle(segmentation, height, width)) is not None:
        if not coco_mask.area(rle):
            raise NoPixelError("its RLE mask is empty")
        return rle
    parts = [polygon for polygon in _checked_polygons(segmentation) if len(polygon) >= 6]
    if not parts:
        raise NoPixelError("none of its polygons has three points")
    rle, reaches_out = _drawn(parts, height, width)
    if not coco_mask.area(rle):
        where = f"lie outside the image ({width} x {height} px)" if reaches_out else "cover no pixel"
        raise NoPixelError(f"its polygons {where}")
    return rle


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Compresses a mask to COCO RLE that JSON can hold.

    Args:
        mask: bool (h, w).

    Returns:
        ``{"size": [h, w], "counts": str}``.
    """
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def polygons_in_px(polygons: list[Any], height: int, width: int) -> list[list[float]]:
    """Scales polygons whose coordinates are fractions of the image's sides.

    Raises:
        ValueError: they are malformed, or not such fractions.
    """
    checked = _checked_polygons(polygons)
    if wrong := [v for polygon in checked for v in polygon if not -_SLACK <= v <= 1 + _SLACK]:
        raise ValueError(
            f"expected normalised coordinates, from 0 to 1, got {wrong[0]:g}: for px leave out --coordinates"
        )
    return [[v * (height if i % 2 else width) for i, v in enumerate(polygon)] for polygon in checked]


def mask_of_image(file: Image.Image) -> tuple[np.ndarray, bool]:
    """Reads a mask that is stored as an image of one channel.

    Returns:
        bool (h, w), True = inside; and whether the format is lossy, so that the mask was thresholded at half.

    Raises:
        ValueError: it has more than one channel, or more values than one inside and one outside.
    """
    is_lossy = file.format in _LOSSY
    if file.mode not in (("L",) if is_lossy else _MASK_MODES):
        raise ValueError(f"expected one channel, above 0 = inside, got mode {file.mode}")
    values = np.asarray(file)
    if not is_lossy:
        if file.mode == "P":
            check_palette(file, values)
        return two_valued_mask(values), False
    # The area of a label is flat grey; an edge between black and white is not, whatever the compression does to it.
    lowest, highest = (np.asarray(file.filter(kind(3))) for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
    flat = (lowest >= _FLAT_GREY[0]) & (highest <= _FLAT_GREY[1]) & (highest - lowest <= 10)
    if flat.any():
        y, x = np.argwhere(flat)[0]
        raise ValueError(
            f"expected black and white in a lossy {file.format} file, got grey areas (value {values[y, x]} around x {x}, y {y}) "
            "as of a label map: give each object a mask of its own, as PNG"
        )
    return values >= 128, True


def check_palette(file: Image.Image, values: np.ndarray) -> None:
    """Checks that palette entry 0 alone is black: programs that reduce colours may make the background entry 1.

    Args:
        file: of mode P.
        values: its numbers, (h, w).

    Raises:
        ValueError: another entry that the image uses is black, or entry 0 is not.
    """
    is_seen: np.ndarray = np.asarray(file.convert("RGB")).max(axis=-1) > 0
    wrong = np.not_equal(values != 0, is_seen)
    if wrong.any():
        y, x = map(int, np.argwhere(wrong)[0])
        raise ValueError(
            f"expected a palette whose first colour alone is black, got number {values[y, x]} shown "
            f"{'in colour' if is_seen[y, x] else 'black'} at x {x}, y {y}: it is unclear which is inside; save the mask without a "
            "palette"
        )


def two_valued_mask(values: np.ndarray) -> np.ndarray:
    """The mask in an array that holds 0 and one other value.

    Raises:
        ValueError: the array holds more values.
    """
    largest = values.max()
    others = values[(values != 0) & (values != largest)]
    if len(others):
        raise ValueError(
            f"expected 0 and one other value, got {largest} and {others[0]} besides 0 (a label map, or smooth edges): give each "
            "object a mask of its own, of two values"
        )
    return values != 0


def _checked_polygons(segmentation: object) -> list[list[float]]:
    if not isinstance(segmentation, (list, tuple)):
        raise ValueError(f"{_ASK}, got {shortened(segmentation)}: correct the annotation file")
    if not segmentation:
        raise ValueError(f"{_ASK}, got an empty list: give the annotation a mask or remove it")
    return [_checked_polygon(polygon) for polygon in segmentation]


def _checked_polygon(polygon: object) -> list[float]:
    if not isinstance(polygon, (list, tuple)):
        raise ValueError(f"{_ASK}, got the polygon {shortened(polygon)}: correct the annotation file")
    if set(map(type, polygon)) <= {int, float}:
        with contextlib.suppress(OverflowError):  # an integer that no float holds
            values = np.array(polygon, float)
            if not len(values) or np.abs(values).max() <= _FARTHEST_PX:  # False for NaN too
                return values.tolist()
    wrong = next((i for i, value in enumerate(polygon) if not _is_coordinate(value)), None)
    if wrong is None:  # numbers of other types, such as NumPy's
        return [float(value) for value in polygon]
    value = polygon[wrong]
    what = f"finite coordinates of at most {_FARTHEST_PX:,} px" if _is_number(value) else "numbers"
    is_nested = isinstance(value, (list, tuple, dict))
    raise ValueError(
        f"expected polygons [x0, y0, x1, y1, ...] of {what}, got {shortened(value)} as coordinate {wrong} of the polygon "
        f"{shortened(polygon)}: "
        + ("a polygon is one list of numbers; several objects are given as `masks`" if is_nested else "correct the annotation file")
    )


def _is_coordinate(value: object) -> bool:
    return _is_number(value) and -_FARTHEST_PX <= value <= _FARTHEST_PX


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _drawn(polygons: list[list[float]], height: int, width: int) -> tuple[dict[str, Any], bool]:
    """The RLE of the joined polygons, and whether a point lies outside the image."""
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"expected at least 3 points as an even count of numbers in a polygon, got {len(polygon)} numbers "
                f"{shortened(polygon)}: correct the annotation file"
            )
    reaches_out = _reaches_out(polygons, height, width)
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)), reaches_out


def _reaches_out(polygons: Sequence[Sequence[float]], height: int, width: int) -> bool:
    """Whether a point lies outside the image.

    Raises:
        ValueError: a point lies so far outside that the polygons belong to another image, or all lie in the first pixel.
    """
    reaches_out = False
    in_first_pixel, is_point = min(height, width) > 2, True
    for axis, (name, side) in enumerate((("x", width), ("y", height))):
        lowest = min(min(polygon[axis::2]) for polygon in polygons)
        highest = max(max(polygon[axis::2]) for polygon in polygons)
        if max(-lowest, highest - side) > max(_SLACK * side, _SLACK_PX):
            raise ValueError(
                f"expected polygons of this image, got {name} from {lowest:g} to {highest:g}, so that they lie outside the "
                f"image ({width} x {height} px): the annotation belongs to another image, or to this one at another size"
            )
        reaches_out |= lowest < 0 or highest > side
        in_first_pixel &= lowest >= -0.1 and highest <= 1.1
        is_point &= highest - lowest < 0.01
    if in_first_pixel and not is_point:
        raise ValueError(
            f"expected coordinates in px of an image of {width} x {height} px, got all about 0 to 1: coordinates look "
            "normalised; give --coordinates normalised to `deris-llm data prepare`"
        )
    return reaches_out


def _given_rle(segmentation: object, height: int, width: int) -> dict[str, Any] | None:
    """The checked RLE of a segmentation that is one or a list of several; None for polygons."""
    if isinstance(segmentation, dict):
        return _checked_rle(segmentation, height, width)
    if isinstance(segmentation, (list, tuple)) and segmentation and all(isinstance(part, dict) for part in segmentation):
        return coco_mask.merge([_checked_rle(part, height, width) for part in segmentation])
    return None


def _checked_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    counts = rle.get("counts")
    size = rle.get("size")
    if not isinstance(size, (list, tuple)) or not isinstance(counts, (list, str, bytes)):
        raise ValueError(f"{_ASK}, got {shortened(rle)}: correct the annotation file")
    if list(size) != [height, width]:
        why = "the annotation belongs to another image, or the image was resized"
        why = "height and width look exchanged" if list(size) == [width, height] else why
        raise ValueError(
            f"expected an RLE of the image's size [h, w] = [{height}, {width}], got {list(size)}: {why}"
        )
    if isinstance(counts, list):
        wrong = next((i for i, c in enumerate(counts) if not isinstance(c, int) or isinstance(c, bool) or c < 0), None)
        if wrong is not None:
            raise ValueError(
                f"expected whole numbers from 0 as RLE counts, got {describe(counts[wrong])} as number {wrong} of "
                f"{len(counts)}: correct the annotation file"
            )
        if sum(counts) != height * width:
            raise ValueError(
                f"expected RLE counts that sum to {height} x {width} = {height * width} pixels, got {shortened(counts)}, which "
                f"sum to {sum(counts)}: correct the annotation file"
            )
        return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    counts = counts.encode("utf-8", errors="surrogatepass") if isinstance(counts, str) else counts
    covered = _covered_pixels(counts)
    if covered != height * width:
        raise ValueError(
            f"expected a compressed RLE of {height} x {width} = {height * width} pixels, got one of "
            f"{'no valid form' if covered is None else f'{covered} pixels'}: {shortened(counts)}: correct the annotations"
        )
    return {"size": [height, width], "counts": counts}


def _covered_pixels(counts: bytes) -> int | None:
    """Pixels that a compressed RLE covers, None if it is malformed: pycocotools reads past the end of such a string."""
    runs: list[int] = []
    value = shift = 0
    for byte in counts:
        chunk = byte - 48
        if not 0 <= chunk < 64:
            return None
        value |= (chunk & 0x1F) << shift
        shift += 5
        if shift > 60:  # no image has a run of that length
            return None
        if not chunk & 0x20:
            if chunk & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)  # from the fourth on, runs are stored as differences
            if runs[-1] < 0:
                return None
            value = shift = 0
    return sum(runs) if shift == 0 else None
