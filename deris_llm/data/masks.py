"""COCO segmentations and boolean masks; all RLE goes through pycocotools."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as _pycocotools_mask

from deris_llm.data.errors import describe

_SURELY_VISIBLE_PX = 16.0  # polygons of less area are drawn to see whether a pixel is left

_FARTHEST_PX = 100_000  # pycocotools walks along every edge, a step per fifth of a pixel

coco_mask: Any = _pycocotools_mask  # its type stubs know neither lists of polygons nor plain dictionaries

_ASK = (
    "expected polygons [[x0, y0, x1, y1, x2, y2, ...], ...] in px or an RLE {'size': [h, w], 'counts': list or string}"
)


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
        raise ValueError(f"COCO segmentation: {_ASK}, got {_short(segmentation)}: correct the annotation file")
    polygons = [_checked_polygon(polygon) for polygon in segmentation]
    if not polygons:
        raise ValueError(f"COCO segmentation: {_ASK}, got an empty list: give the annotation a mask or remove it")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def usable_segmentation(segmentation: object, height: int, width: int) -> tuple[object, str | None]:
    """Checks a COCO segmentation against its image's size in px.

    Polygons that reach over the border are clipped when they are decoded; only one of which nothing is left is a fault.
    Parts of fewer than three points have no area and are left out, as long as another part shows something.

    Returns:
        the segmentation without its degenerate parts, and what makes it unusable or None.
    """
    if isinstance(segmentation, dict):
        return segmentation, _fault_of_decoding(segmentation, height, width, "its RLE mask is empty")
    if not isinstance(segmentation, list) or not segmentation:
        return segmentation, f"expected polygons or RLE, got {describe(segmentation)}"
    area = 0.0
    reaches_out = False
    parts: list[list[float]] = []
    for polygon in segmentation:
        if not isinstance(polygon, list) or not all(map(_is_coordinate, polygon)):
            return segmentation, f"expected polygons [x0, y0, x1, y1, …] in px, got {describe(polygon)}"
        if len(polygon) < 6:
            continue
        parts.append(polygon)
        xs, ys = polygon[0::2], polygon[1::2]
        reaches_out |= min(xs) < 0 or min(ys) < 0 or max(xs) > width or max(ys) > height
        # The shoelace formula; an odd number of coordinates is left to the decoder's message.
        area += (
            abs(sum(x * y1 - x1 * y for x, y, x1, y1 in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=False)))
            / 2
        )
    if not parts:
        return parts, "none of its polygons has three points"
    odd = any(len(polygon) % 2 for polygon in parts)
    if area >= _SURELY_VISIBLE_PX and not reaches_out and not odd:
        return parts, None
    where = f"lie outside the image ({width} x {height} px)" if reaches_out else f"cover no pixel (area {area:.3g} px)"
    return parts, _fault_of_decoding(parts, height, width, f"its polygons {where}")


def _fault_of_decoding(segmentation: object, height: int, width: int, empty: str) -> str | None:
    try:
        return None if coco_mask.area(segmentation_rle(segmentation, height, width)) > 0 else empty
    except ValueError as error:
        return str(error)


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
    if not isinstance(polygon, (list, tuple)) or not all(isinstance(v, (int, float)) for v in polygon):
        raise ValueError(f"COCO segmentation: {_ASK}, got the polygon {_short(polygon)}: correct the annotation file")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(
            f"COCO segmentation: expected at least 3 points as an even count of numbers in a polygon, got "
            f"{len(polygon)} numbers {_short(polygon)}: correct the annotation file"
        )
    if not all(map(_is_coordinate, polygon)):
        raise ValueError(
            f"COCO segmentation: expected finite coordinates of at most {_FARTHEST_PX:,} px, got {_short(polygon)}: correct "
            "the annotation file"
        )
    return [float(v) for v in polygon]


def _is_coordinate(value: object) -> bool:
    # Also false for NaN, and for integers that no float holds.
    return isinstance(value, (int, float)) and -_FARTHEST_PX <= value <= _FARTHEST_PX


def _checked_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    counts = rle.get("counts")
    size = rle.get("size")
    if not isinstance(size, (list, tuple)) or not isinstance(counts, (list, str, bytes)):
        raise ValueError(f"COCO segmentation: {_ASK}, got {_short(rle)}: correct the annotation file")
    if list(size) != [height, width]:
        raise ValueError(
            f"COCO segmentation: expected an RLE of the picture's size [h, w] = [{height}, {width}], got {list(size)}: "
            f"the annotation belongs to another picture or the picture was resized"
        )
    if isinstance(counts, list):
        if any(not isinstance(c, int) or c < 0 for c in counts) or sum(counts) != height * width:
            raise ValueError(
                f"COCO segmentation: expected RLE counts that sum to {height} x {width} = {height * width} pixels, got "
                f"{_short(counts)}: correct the annotation file"
            )
        return coco_mask.frPyObjects(rle, height, width)
    counts = counts.encode("utf-8", errors="surrogatepass") if isinstance(counts, str) else counts
    covered = _covered_pixels(counts)
    if covered != height * width:
        raise ValueError(
            f"COCO segmentation: expected a compressed RLE of {height} x {width} = {height * width} pixels, got one of "
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
