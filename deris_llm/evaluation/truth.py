"""Ground-truth masks of phrases, at the image's own size and at the size at which a protocol compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from deris_llm.config.protocols import Protocol
from deris_llm.data.errors import check_has_truth
from deris_llm.data.masks import decode_segmentation
from deris_llm.models.preprocess import warp_mask
from deris_llm.structures import ReferringRecord


def merged_truth(record: ReferringRecord, crowds: Literal["left_out", "taken"] = "left_out") -> np.ndarray:
    """Union of a phrase's referents, bool (height, width) of the original image; all False for a no-target phrase."""
    return merged_truths([record], crowds)[0]


def merged_truths(records: Sequence[ReferringRecord], crowds: Literal["left_out", "taken"]) -> list[np.ndarray]:
    """Unions of the phrases' referents, bool (height, width), with or without crowds (`Protocol.crowds`)."""
    if crowds == "taken":
        records = [dataclasses.replace(each, instances=each.instances + each.crowds) for each in records]
    return [np.logical_or.reduce(masks, axis=0) for masks in decoded_referents(records)]


def decoded_referents(records: Sequence[ReferringRecord]) -> list[np.ndarray]:
    """Masks of each phrase's referents, bool (R, height, width); an instance that several phrases share is decoded once.

    Raises:
        DataError: a record has no truth.
    """
    decoded: dict[tuple[str, str, int], np.ndarray] = {}
    referents = []
    for record in records:
        check_has_truth(record, needed_for="metrics")
        masks = [np.zeros((0, record.height, record.width), dtype=bool)]
        for instance in record.instances:
            key = (record.dataset, record.image_id, instance.annotation_id)
            if key not in decoded:
                decoded[key] = decode_segmentation(instance.segmentation, record.height, record.width)[None]
            masks.append(decoded[key])
        referents.append(np.concatenate(masks))
    return referents


def without_ignored(protocol: Protocol, record: ReferringRecord, mask: np.ndarray) -> np.ndarray:
    """Removes the pixels that no metric counts from a truth or an answer.

    Args:
        protocol: at whose size the mask is.
        record: with the ignored pixels; most have none, and the mask is returned as it is.
        mask: bool, of `Protocol.size_hw`.
    """
    if record.ignored is None:
        return mask
    ignored = decode_segmentation(record.ignored, record.height, record.width)
    return mask & ~resampled_truth(protocol, ignored)


def resampled_truth(protocol: Protocol, mask: np.ndarray) -> np.ndarray:
    """Resizes a ground-truth mask, or a finished prediction, to the size at which a protocol compares.

    Args:
        protocol: says the size and the resampling.
        mask: bool (h, w) at the image's own size; returned as it is if the protocol compares there.

    Returns:
        bool, of `Protocol.size_hw`.
    """
    if protocol.fixed_px is None:
        return mask
    if protocol.truth_resampling == "nearest":
        return warp_mask(mask, protocol.fixed_px, "opencv")
    # Pillow itself, because where two pixels are equally near (every third column from 640 px to 480 px) its rounding decides.
    grey = Image.fromarray(np.ascontiguousarray(mask).view(np.uint8))
    return np.asarray(grey.resize((protocol.fixed_px, protocol.fixed_px), Image.Resampling.NEAREST)).view(bool)
