"""COCO segmentations and boolean masks; all RLE goes through pycocotools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from PIL import Image, ImageFilter
from pycocotools import mask as _pycocotools_mask

from deris_llm.data.errors import describe

_SURELY_VISIBLE_PX = 16.0  # polygons of less area are drawn to see whether a pixel is left

_FARTHEST_PX = 100_000  # pycocotools walks along every edge, a step per fifth of a pixel

_SLACK = 0.5  # of a side: a drawing tool, an augmentation or an amodal outline may leave the picture by so much
_SLACK_PX = 32  # at least

_LOSSY = ("JPEG", "MPO", "JPEG2000")  # formats that may store other values than were written
_FLAT_GREY = (24, 231)  # compression takes flat black and white no farther than this
_MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B")

coco_mask: Any = _pycocotools_mask  # its type stubs know neither lists of polygons nor plain dictionaries

_ASK = (
    "expected polygons [[x0, y0, x1, y1, x2, y2, ...], ...] in px or an RLE {'size': [h, w], 'counts': list or string}"
)


class NoPixel(str):
    """A fault of a mask that is well formed and of this picture, but of which no pixel is drawn."""

    __slots__ = ()


def empty_rle(height: int, width: int) -> dict[str, Any]:
    """The mask that covers no pixel of a picture."""
    return {"size": [height, width], "counts": [height * width]}


def decode_segmentation(segmentation: object, height: int, width: int) -> np.ndarray:
    """Draws a COCO segmentation.

    Parts of one instance may overlap: they are joined, not counted twice. What lies outside the picture is cut off, so
    the mask can be empty.

    Args:
        segmentation: list of polygons, or an RLE whose counts are a list (crowd annotations) or a compressed string.
        height: of the picture, px.
        width: of the picture, px.

    Returns:
        bool (height, width).

    Raises:
        ValueError: the segmentation is malformed or its size is not the picture's.
    """
    return coco_mask.decode(segmentation_rle(segmentation, height, width)).astype(bool)


def segmentation_rle(segmentation: object, height: int, width: int) -> dict[str, Any]:
    """Checks a COCO segmentation and gives it as pycocotools' compressed RLE, without drawing it; see `decode_segmentation`.

    Returns:
        ``{"size": [h, w], "counts": bytes}``; overlapping parts are joined.

    Raises:
        ValueError: the segmentation is malformed or its size is not the picture's.
    """
    if isinstance(segmentation, dict):
        return _checked_rle(segmentation, height, width)
    if not isinstance(segmentation, (list, tuple)):
        raise ValueError(f"{_ASK}, got {_short(segmentation)}: correct the annotation file")
    polygons = [[float(v) for v in _checked_polygon(polygon)] for polygon in segmentation]
    if not polygons:
        raise ValueError(f"{_ASK}, got an empty list: give the annotation a mask or remove it")
    for polygon in polygons:
        _check_even(polygon)
    _reaches_out(polygons, height, width)
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def usable_segmentation(segmentation: object, height: int, width: int) -> tuple[object, str | None]:
    """Checks a COCO segmentation against its image's size in px.

    Polygons that reach a little over the border are clipped when they are decoded; one of which nothing is left, or that
    reaches so far that it cannot be of this image, is a fault. Parts of fewer than three points have no area and are left
    out, as long as another part shows something.

    Returns:
        the segmentation without its degenerate parts, and what makes it unusable (a `NoPixel` if only that) or None.
    """
    try:
        if isinstance(segmentation, dict):
            is_empty = coco_mask.area(_checked_rle(segmentation, height, width)) == 0
            return segmentation, NoPixel("its RLE mask is empty") if is_empty else None
        if not isinstance(segmentation, list) or not segmentation:
            return segmentation, f"expected polygons or RLE, got {describe(segmentation)}"
        parts = [polygon for polygon in map(_checked_polygon, segmentation) if len(polygon) >= 6]
        if not parts:
            return parts, NoPixel("none of its polygons has three points")
        for polygon in parts:
            _check_even(polygon)
        reaches_out = _reaches_out(parts, height, width)
        area = sum(map(_shoelace_area, parts))
        if area >= _SURELY_VISIBLE_PX and not reaches_out:
            return parts, None
        is_empty = coco_mask.area(segmentation_rle(parts, height, width)) == 0
    except ValueError as error:
        return segmentation, str(error)
    where = f"lie outside the image ({width} x {height} px)" if reaches_out else f"cover no pixel (area {area:.3g} px)"
    return parts, NoPixel(f"its polygons {where}") if is_empty else None


def polygons_in_px(polygons: list[Any], height: int, width: int) -> list[list[float]]:
    """Scales polygons whose coordinates are shares of the picture's sides.

    Raises:
        ValueError: they are malformed, or no such shares.
    """
    checked = [_checked_polygon(polygon) for polygon in polygons]
    if wrong := [v for polygon in checked for v in polygon if not -_SLACK <= v <= 1 + _SLACK]:
        raise ValueError(
            f"expected normalised coordinates, from 0 to 1, got {wrong[0]:g}: for px leave out --coordinates"
        )
    return [[v * (height if i % 2 else width) for i, v in enumerate(polygon)] for polygon in checked]


def picture_mask(file: Image.Image) -> tuple[np.ndarray, bool]:
    """Reads a mask that is stored as a picture of one channel.

    Returns:
        bool (h, w), True = inside; and whether the format is lossy, so that the mask was thresholded at half.

    Raises:
        ValueError: more than one channel, or more values than those of inside and outside.
    """
    is_lossy = file.format in _LOSSY
    if file.mode not in (("L",) if is_lossy else _MASK_MODES):
        raise ValueError(f"expected one channel, above 0 = inside, got mode {file.mode}")
    values = np.asarray(file)
    if not is_lossy:
        if file.mode == "P":
            _check_palette(file, values)
        return two_valued_mask(values), False
    # A label's area is flat, an edge between black and white never, whatever the compression does to it.
    lowest, highest = (np.asarray(file.filter(kind(3))) for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
    flat = (lowest >= _FLAT_GREY[0]) & (highest <= _FLAT_GREY[1]) & (highest - lowest <= 10)
    if flat.any():
        y, x = np.argwhere(flat)[0]
        raise ValueError(
            f"expected black and white in a lossy {file.format} file, got grey areas (value {values[y, x]} around x {x}, y {y}) "
            "as of a label map: give each object a mask of its own, as PNG"
        )
    return values >= 128, True


def _check_palette(file: Image.Image, values: np.ndarray) -> None:
    """Numbers of a palette mean what their colours show: programs that reduce colours may make the background 1.

    Raises:
        ValueError: by number another pixel is inside than by colour.
    """
    is_seen: np.ndarray = np.asarray(file.convert("RGB")).max(axis=-1) > 0
    wrong = np.not_equal(values != 0, is_seen)
    if wrong.any():
        y, x = map(int, np.argwhere(wrong)[0])
        raise ValueError(
            f"expected a palette whose first colour alone is black, got number {values[y, x]} shown "
            f"{'in colour' if is_seen[y, x] else 'black'} at x {x}, y {y}: which is inside is not clear; save the mask without a "
            "palette"
        )


def two_valued_mask(values: np.ndarray) -> np.ndarray:
    """A mask of an array that holds 0 and one other value.

    Raises:
        ValueError: it holds more.
    """
    largest = values.max()
    others = values[(values != 0) & (values != largest)]
    if len(others):
        raise ValueError(
            f"expected 0 and one other value, got {largest} and {others[0]} besides 0 (a label map, or smooth edges): give each "
            "object a mask of its own, of two values"
        )
    return values != 0


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Compresses a mask to COCO RLE that JSON can hold.

    Args:
        mask: bool (h, w).

    Returns:
        ``{"size": [h, w], "counts": str}``.
    """
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _checked_polygon(polygon: object) -> list[float]:
    if not isinstance(polygon, (list, tuple)):
        raise ValueError(f"{_ASK}, got the polygon {_short(polygon)}: correct the annotation file")
    wrong = next((i for i, value in enumerate(polygon) if not _is_coordinate(value)), None)
    if wrong is not None:
        value = polygon[wrong]
        is_nested = isinstance(value, (list, tuple, dict))
        what = f"finite coordinates of at most {_FARTHEST_PX:,} px" if _is_number(value) else "numbers"
        raise ValueError(
            f"expected polygons [x0, y0, x1, y1, ...] of {what}, got {_short(value)} as coordinate {wrong} of the polygon "
            f"{_short(polygon)}: "
            + (
                "a polygon is one list of numbers, several objects are named as `masks`"
                if is_nested
                else "correct the annotation file"
            )
        )
    return polygon if isinstance(polygon, list) else list(polygon)


def _check_even(polygon: Sequence[float]) -> None:
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(
            f"expected at least 3 points as an even count of numbers in a polygon, got {len(polygon)} numbers "
            f"{_short(polygon)}: correct the annotation file"
        )


def _is_coordinate(value: object) -> bool:
    # Also false for NaN, and for integers that no float holds.
    return _is_number(value) and -_FARTHEST_PX <= value <= _FARTHEST_PX


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _reaches_out(polygons: Sequence[Sequence[float]], height: int, width: int) -> bool:
    """Whether a point lies outside the picture.

    Raises:
        ValueError: one lies so far outside that the polygons are not of this picture, or all lie in its first pixel.
    """
    reaches_out = False
    in_first_pixel, is_point = min(height, width) > 2, True
    for axis, (name, side) in enumerate((("x", width), ("y", height))):
        lowest = min(min(polygon[axis::2]) for polygon in polygons)
        highest = max(max(polygon[axis::2]) for polygon in polygons)
        if max(-lowest, highest - side) > max(_SLACK * side, _SLACK_PX):
            raise ValueError(
                f"expected polygons of this picture, got {name} from {lowest:g} to {highest:g}, so that they lie outside the "
                f"image ({width} x {height} px): the annotation belongs to another picture, or to this one at another size"
            )
        reaches_out |= lowest < 0 or highest > side
        in_first_pixel &= lowest >= -0.1 and highest <= 1.1
        is_point &= highest - lowest < 0.01
    if in_first_pixel and not is_point:
        raise ValueError(
            f"expected coordinates in px of a picture of {width} x {height} px, got all about 0 to 1: coordinates look "
            "normalised; give --coordinates normalised to `deris-llm data prepare`"
        )
    return reaches_out


def _shoelace_area(polygon: list[float]) -> float:
    xs, ys = polygon[0::2], polygon[1::2]
    return (
        abs(sum(x * y1 - x1 * y for x, y, x1, y1 in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True))) / 2
    )


def _checked_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    counts = rle.get("counts")
    size = rle.get("size")
    if not isinstance(size, (list, tuple)) or not isinstance(counts, (list, str, bytes)):
        raise ValueError(f"{_ASK}, got {_short(rle)}: correct the annotation file")
    if list(size) != [height, width]:
        why = "the annotation belongs to another picture or the picture was resized"
        why = "height and width look exchanged" if list(size) == [width, height] else why
        raise ValueError(
            f"expected an RLE of the picture's size [h, w] = [{height}, {width}], got {list(size)}: {why}"
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
                f"expected RLE counts that sum to {height} x {width} = {height * width} pixels, got {_short(counts)}, which "
                f"sum to {sum(counts)}: correct the annotation file"
            )
        return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    counts = counts.encode("utf-8", errors="surrogatepass") if isinstance(counts, str) else counts
    covered = _covered_pixels(counts)
    if covered != height * width:
        raise ValueError(
            f"expected a compressed RLE of {height} x {width} = {height * width} pixels, got one of "
            f"{'no valid form' if covered is None else f'{covered} pixels'}: {_short(counts)}: correct the annotations"
        )
    return {"size": [height, width], "counts": counts}


def _covered_pixels(counts: bytes) -> int | None:
    """Pixels a compressed RLE runs over, None if its text is not one; pycocotools reads past the end of a bad one."""
    runs: list[int] = []
    value = shift = 0
    for byte in counts:
        chunk = byte - 48
        if not 0 <= chunk < 64:
            return None
        value |= (chunk & 0x1F) << shift
        shift += 5
        if shift > 60:  # no picture has a run of that length
            return None
        if not chunk & 0x20:
            if chunk & 0x10:
                value -= 1 << shift
            runs.append(
                value + runs[-2] if len(runs) > 2 else value
            )  # from the third on, runs are stored as differences
            if runs[-1] < 0:
                return None
            value = shift = 0
    return sum(runs) if shift == 0 else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
