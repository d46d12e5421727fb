"""Image groups -> `ReferringBatch`: decodes each picture once, or reads its cached features, and each instance mask once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deris_llm.config import RunConfig
from deris_llm.data.dataset import ImageGroup
from deris_llm.data.errors import DataError
from deris_llm.data.feature_cache import CachedFeatures, FeatureCache, Picture
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.images import load_image
from deris_llm.models.preprocess import Resize, perception_pixels, warp_mask
from deris_llm.structures import CognitionInputs, ReferringBatch, ReferringRecord, ReferringTargets

if TYPE_CHECKING:  # the loader's workers need no model library
    from deris_llm.models.cognition import CognitionProcessor


class ReferringCollator:
    """Runs in the loader's workers: picklable, holds no model.

    Args:
        config: its ``perception.image_size`` and ``perception.resize`` are those of perception image and masks.
        processor: the cognition backend's, from `build_processor`.
        with_targets: False leaves ``targets`` None (the answers are unknown or not needed).
        features: what it keeps of a picture stands in the batch instead of the pixels.
    """

    def __init__(
        self,
        config: RunConfig,
        processor: CognitionProcessor,
        *,
        with_targets: bool = True,
        features: FeatureCache | None = None,
    ) -> None:
        self.image_size = config.perception.image_size
        self.resize: Resize = config.perception.resize
        self.processor = processor
        self.with_targets = with_targets
        self.features = features
        self.has_perception = config.loopback.structure != "cognition_centric"

    def __call__(self, groups: Sequence[ImageGroup]) -> ReferringBatch:
        image_index = [i for i, group in enumerate(groups) for _ in group.records]
        phrases = tuple(record.phrase for group in groups for record in group.records)
        perception_image, pyramid, cognition = self._seen(groups, phrases, image_index)
        return ReferringBatch(
            perception_image=perception_image,
            cognition=cognition,
            image_index=torch.tensor(image_index),
            phrase_ids=tuple(record.phrase_id for group in groups for record in group.records),
            phrases=phrases,
            targets=referring_targets(groups, self.image_size, self.resize) if self.with_targets else None,
            perception_pyramid=pyramid,
        )

    def _seen(
        self, groups: Sequence[ImageGroup], phrases: Sequence[str], image_index: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...], CognitionInputs]:
        """Perception image, pyramid and the backend's inputs; pictures are decoded where somebody reads their pixels."""
        pictures = [_picture(group) for group in groups]
        cached = CachedFeatures() if self.features is None else self.features.read(pictures)
        has_image = not cached.pyramid and (self.has_perception or self.features is None)
        images = [_decoded(picture) for picture in pictures] if has_image or cached.vision is None else []
        image = torch.zeros(len(groups), 3, 0, 0)
        if has_image:
            image = torch.stack([perception_pixels(each, self.image_size, self.resize) for each in images])
        processor: Any = self.processor  # a `FeatureProcessor`, where the cache has kept vision
        try:
            if cached.vision is None:
                return image, cached.pyramid, processor(images, phrases, image_index)
            return image, cached.pyramid, processor.with_features(cached.vision, phrases)
        except ValueError as error:
            raise self._named(error, groups, images) from error

    def _named(self, error: ValueError, groups: Sequence[ImageGroup], images: Sequence[Image.Image]) -> ValueError:
        """The processor's error with the id and the file of the phrase that it is about; finds it by asking one by one."""
        for group, image in zip(groups, images, strict=False):  # without pictures where features are cached
            for record in group.records:
                try:
                    self.processor([image], [record.phrase], [0])
                except ValueError as alone:
                    return DataError(f"{record.phrase_id} ({record.image_path}): {alone}")
        return error


def _picture(group: ImageGroup) -> Picture:
    first = group.records[0]
    asked_by = tuple(record.phrase_id for record in group.records)
    return Picture(first.image_path, (first.height, first.width), asked_by, first.exif)


def _decoded(picture: Picture) -> Image.Image:
    return load_image(picture.path, size_hw=picture.size_hw, exif=picture.exif, asked_by=picture.asked_by)


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
