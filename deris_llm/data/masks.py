"""COCO segmentations and boolean masks; all RLE goes through pycocotools."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as _pycocotools_mask

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
    if not np.isfinite(polygon).all():
        raise ValueError(
            f"COCO segmentation: expected finite coordinates, got {_short(polygon)}: correct the annotation file"
        )
    return [float(v) for v in polygon]


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
    counts = counts.encode("ascii", errors="replace") if isinstance(counts, str) else counts
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
