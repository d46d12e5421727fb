"""Image groups -> `ReferringBatch`: decodes each picture once and each instance mask once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from deris_llm.config import RunConfig
from deris_llm.data.dataset import ImageGroup
from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.transforms import Resize, load_image, perception_pixels, warp_mask
from deris_llm.structures import ReferringBatch, ReferringRecord, ReferringTargets

if TYPE_CHECKING:  # the loader's workers need no model library
    from deris_llm.cognition import CognitionProcessor


class ReferringCollator:
    """Runs in the loader's workers: picklable, holds no model.

    Args:
        config: its ``perception.image_size`` and ``perception.resize`` are those of perception image and masks.
        processor: the cognition backend's, from `build_processor`.
        with_targets: False leaves ``targets`` None (the answers are unknown or not needed).
    """

    def __init__(self, config: RunConfig, processor: CognitionProcessor, *, with_targets: bool = True) -> None:
        self.image_size = config.perception.image_size
        self.resize: Resize = config.perception.resize
        self.processor = processor
        self.with_targets = with_targets

    def __call__(self, groups: Sequence[ImageGroup]) -> ReferringBatch:
        images = [
            load_image(
                group.records[0].image_path,
                size_hw=(group.records[0].height, group.records[0].width),
                asked_by=[record.phrase_id for record in group.records],
            )
            for group in groups
        ]
        image_index = [i for i, group in enumerate(groups) for _ in group.records]
        phrases = tuple(record.phrase for group in groups for record in group.records)
        return ReferringBatch(
            perception_image=torch.stack([perception_pixels(image, self.image_size, self.resize) for image in images]),
            cognition=self.processor(images, phrases, image_index),
            image_index=torch.tensor(image_index),
            phrase_ids=tuple(record.phrase_id for group in groups for record in group.records),
            phrases=phrases,
            targets=referring_targets(groups, self.image_size, self.resize) if self.with_targets else None,
        )


def referring_targets(groups: Sequence[ImageGroup], image_size: int, resize: Resize) -> ReferringTargets:
    """Instance masks of all phrases, decoded at the original size, then warped.

    Phrases of an image that name the same instance share its decoding.
    """
    masks: list[np.ndarray] = []
    phrase_index: list[int] = []
    phrase = 0
    for group in groups:
        decoded: dict[tuple[str, int], np.ndarray] = {}
        for record in group.records:
            for instance in record.instances:
                # REFER's datasets share COCO's annotation ids, but nothing promises that theirs are the same polygons.
                key = (record.dataset, instance.annotation_id)
                if key not in decoded:
                    decoded[key] = _target_mask(record, instance.segmentation, image_size, resize)
                masks.append(decoded[key])
                phrase_index.append(phrase)
            phrase += 1
    stacked = np.stack(masks) if masks else np.zeros((0, image_size, image_size), dtype=bool)
    return ReferringTargets(masks=torch.from_numpy(stacked), phrase_index=torch.tensor(phrase_index, dtype=torch.int64))


def _target_mask(record: ReferringRecord, segmentation: object, image_size: int, resize: Resize) -> np.ndarray:
    try:
        mask = decode_segmentation(segmentation, record.height, record.width)
    except ValueError as error:
        raise DataError(f"{record.phrase_id} ({record.image_path}): its mask cannot be decoded: {error}") from error
    return warp_mask(mask, image_size, resize)
