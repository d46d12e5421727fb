"""Counts referents that a run cannot learn: more per phrase than it has queries, or without a pixel at its image size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deris_llm.config import RunConfig
from deris_llm.data.masks import coco_mask, decode_segmentation, segmentation_rle
from deris_llm.models.preprocess import Resize, warp_mask
from deris_llm.structures import InstanceAnnotation, ReferringRecord

logger = logging.getLogger(__name__)

_SURELY_KEPT_CELLS = 64
"""A mask that covers as much as this many pixels of the warped image keeps some of them: only thin lines vanish."""


@dataclass(frozen=True)
class LostReferents:
    """Counts over the phrases of a training mix."""

    num_phrases: int
    num_phrases_of_too_many: int  # with more referents than there are queries
    most_objects: int  # of one phrase
    first_of_too_many: str  # phrase id; "" if there is none
    num_vanished: int  # distinct referents without a pixel in the warped mask
    num_phrases_of_vanished: int  # that name one of them
    first_of_vanished: str  # phrase id; "" if there is none


def lost_referents(
    records: Sequence[ReferringRecord], *, num_queries: int, image_size: int, resize: Resize
) -> LostReferents:
    """Counts the referents that a run with these settings cannot learn.

    Args:
        records: the training mix.
        num_queries: mask slots per phrase.
        image_size: side of the square that masks are warped to, px.
        resize: how masks are warped.
    """
    too_many: list[str] = []
    of_vanished: list[str] = []
    vanishes: dict[tuple[str, str, int], bool] = {}
    num_phrases = most = 0
    for record in records:
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
    """Counts the referents that a run cannot learn and logs warnings about them."""
    size = config.perception.image_size
    num_queries = config.loopback.num_queries
    found = lost_referents(records, num_queries=num_queries, image_size=size, resize=config.ways.resize)
    if found.num_phrases_of_too_many:
        logger.warning(
            "%s of %s training phrases name more objects than loopback.num_queries=%d (up to %d; first %s): each query learns one "
            "object, so the others of such a phrase are not learned; raise loopback.num_queries",
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
    """Whether warping removes every pixel of a mask; a mask that is empty before is another check's error."""
    height, width = record.height, record.width
    if height <= image_size and width <= image_size:
        return False  # warping enlarges: every pixel remains
    cell_px = max(height / image_size, 1) * max(width / image_size, 1)
    segmentation: Any = instance.segmentation
    is_compressed = isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), (str, bytes))
    rle = segmentation if is_compressed else segmentation_rle(segmentation, height, width)
    if coco_mask.area(rle) >= _SURELY_KEPT_CELLS * cell_px:
        return False
    mask = decode_segmentation(segmentation, height, width)
    return bool(mask.any()) and not warp_mask(mask, image_size, resize).any()
