"""Referents that a run cannot learn, counted before it starts: more than it has queries, or gone at its image size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from deris_llm.config import RunConfig
from deris_llm.data.masks import coco_mask, decode_segmentation
from deris_llm.data.store.record_views import in_order
from deris_llm.models.preprocess import Resize, warp_mask
from deris_llm.structures import InstanceAnnotation, ReferringRecord

logger = logging.getLogger(__name__)

_SURELY_KEPT_CELLS = 64
"""A mask whose area is that of so many pixels of the warped image keeps some: only thinner lines than these vanish."""


@dataclass(frozen=True)
class LostReferents:
    """Counts over the phrases of a training mix."""

    num_phrases: int
    num_phrases_of_too_many: int  # that name more objects than there are queries
    most_objects: int  # of one phrase
    first_of_too_many: str  # phrase id; empty where there is none
    num_vanished: int  # distinct objects without a pixel in the warped mask
    num_phrases_of_vanished: int  # that name one of them
    first_of_vanished: str  # phrase id; empty where there is none


def lost_referents(
    records: Sequence[ReferringRecord], *, num_queries: int, image_size: int, resize: Resize
) -> LostReferents:
    """Counts what a run with these settings cannot learn.

    Args:
        records: the training mix; records that are not in memory are built one by one.
        num_queries: mask slots per phrase.
        image_size: px, side of the square that masks are warped to.
        resize: how.
    """
    too_many: list[str] = []
    of_vanished: list[str] = []
    vanishes: dict[tuple[str, str, int], bool] = {}
    num_phrases = most = 0
    for record in in_order(records):
        num_phrases += 1
        most = max(most, len(record.instances))
        if len(record.instances) > num_queries:
            too_many.append(record.phrase_id)
        gone = False
        for instance in record.instances:
            key = (record.dataset, record.image_id, instance.annotation_id)
            if key not in vanishes:
                vanishes[key] = _vanishes(record, instance, image_size, resize)
            gone |= vanishes[key]
        if gone:
            of_vanished.append(record.phrase_id)
    return LostReferents(
        num_phrases=num_phrases,
        num_phrases_of_too_many=len(too_many),
        most_objects=most,
        first_of_too_many=next(iter(too_many), ""),
        num_vanished=sum(vanishes.values()),
        num_phrases_of_vanished=len(of_vanished),
        first_of_vanished=next(iter(of_vanished), ""),
    )


def warn_of_lost_referents(records: Sequence[ReferringRecord], config: RunConfig) -> LostReferents:
    """Counts them for a run, and warns where there are some."""
    size = config.perception.image_size
    num_queries = config.loopback.num_queries
    found = lost_referents(records, num_queries=num_queries, image_size=size, resize=config.perception.resize)
    if found.num_phrases_of_too_many:
        logger.warning(
            "%s of %s training phrases name more objects than loopback.num_queries=%d (up to %d; first %s): a query learns one "
            "object, the others of such a phrase stay unlearned; raise loopback.num_queries",
            f"{found.num_phrases_of_too_many:,}", f"{found.num_phrases:,}", num_queries, found.most_objects,
            found.first_of_too_many,
        )  # fmt: skip
    if found.num_vanished:
        logger.warning(
            "%s objects of %s training phrases have no pixel at perception.image_size=%d (first %s): their queries learn an "
            "empty mask; raise perception.image_size",
            f"{found.num_vanished:,}", f"{found.num_phrases_of_vanished:,}", size, found.first_of_vanished,
        )  # fmt: skip
    return found


def _vanishes(record: ReferringRecord, instance: InstanceAnnotation, image_size: int, resize: Resize) -> bool:
    """Whether nothing is left of a mask that has pixels (one without any is an error of the data, said elsewhere)."""
    height, width = record.height, record.width
    if height <= image_size and width <= image_size:
        return False  # warping enlarges: each pixel is some new pixel's
    cell_px = max(height / image_size, 1) * max(width / image_size, 1)
    if _area(instance.segmentation) >= _SURELY_KEPT_CELLS * cell_px:
        return False
    mask = decode_segmentation(instance.segmentation, height, width)
    return bool(mask.any()) and not warp_mask(mask, image_size, resize).any()


def _area(segmentation: object) -> float:
    """In px; of overlapping polygons the sum, 0 where it takes a decoder to know."""
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        return sum(counts[1::2]) if isinstance(counts, list) else float(coco_mask.area(segmentation))
    polygons = segmentation if isinstance(segmentation, (list, tuple)) else ()
    return sum(map(_polygon_area, polygons))


def _polygon_area(polygon: Sequence[float]) -> float:
    xs, ys = polygon[0::2], polygon[1::2]
    return abs(sum(x0 * y1 - x1 * y0 for x0, y0, x1, y1 in zip(xs, ys, [*xs[1:], *xs[:1]], [*ys[1:], *ys[:1]], strict=True))) / 2
