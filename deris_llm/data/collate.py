"""The one place where a `ReferringBatch` is built: for training, evaluation, serving, merging and planning.

Letters as in `deris_llm.structures`: I images, P phrases, T instances, H W pixels of the perception image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deris_llm.config import RunConfig
from deris_llm.data.errors import DataError, check_has_truth
from deris_llm.data.images import load_image
from deris_llm.data.masks import decode_segmentation
from deris_llm.models.preprocess import Resize, perception_pixels, warp_mask
from deris_llm.structures import CognitionInputs, ReferringBatch, ReferringRecord, ReferringTargets

if TYPE_CHECKING:  # loader workers do not import the model libraries
    from deris_llm.data.dataset import ImageGroup
    from deris_llm.models.cognition import CognitionProcessor


def referring_batch(
    perception_image: Tensor,
    cognition: CognitionInputs,
    phrases: Sequence[str],
    image_index: Sequence[int],
    *,
    phrase_ids: Sequence[str] | None = None,
    targets: ReferringTargets | None = None,
) -> ReferringBatch:
    """Assembles a batch from tensors that are already preprocessed.

    Args:
        perception_image: float (I, 3, H, W).
        cognition: from the backend's processor.
        phrases: P texts.
        image_index: P numbers in 0..I-1, non-decreasing: the image of each phrase.
        phrase_ids: P names; by default "0", "1", ...
        targets: None if the answers are unknown.
    """
    return ReferringBatch(
        perception_image=perception_image,
        cognition=cognition,
        image_index=torch.tensor(image_index, dtype=torch.int64),
        phrases_per_image=tuple(np.bincount(image_index, minlength=len(perception_image)).tolist()),
        phrase_ids=tuple(map(str, range(len(phrases))) if phrase_ids is None else phrase_ids),
        phrases=tuple(phrases),
        targets=targets,
    )


class ReferringCollator:
    """Makes batches of image groups, or of images and phrases. Picklable and without a model: it runs in loader workers.

    Args:
        config: its ``perception.image_size`` and ``ways.resize`` apply to the perception image and to masks.
        processor: of the cognition backend, from `build_processor`.
        with_targets: False leaves ``targets`` None.
    """

    def __init__(self, config: RunConfig, processor: CognitionProcessor, *, with_targets: bool = True) -> None:
        self.image_size = config.perception.image_size
        self.resize: Resize = config.ways.resize
        self.processor = processor
        self.with_targets = with_targets

    def __call__(self, groups: Sequence[ImageGroup]) -> ReferringBatch:
        """Decodes each image and each instance mask of the groups once.

        Raises:
            DataError: an image cannot be read, a mask cannot be decoded, or the processor refuses a phrase.
        """
        images = [_load_image_of(group) for group in groups]
        records = [record for group in groups for record in group.records]
        image_index = [i for i, group in enumerate(groups) for _ in group.records]
        phrases, phrase_ids = [record.phrase for record in records], [record.phrase_id for record in records]
        targets = referring_targets(groups, self.image_size, self.resize) if self.with_targets else None
        try:
            return self.batch(images, phrases, image_index, phrase_ids=phrase_ids, targets=targets)
        except ValueError as error:
            raise self._named(error, records, [images[i] for i in image_index]) from error

    def batch(
        self,
        images: Sequence[Image.Image],
        phrases: Sequence[str],
        image_index: Sequence[int],
        *,
        phrase_ids: Sequence[str] | None = None,
        targets: ReferringTargets | None = None,
    ) -> ReferringBatch:
        """Preprocesses I images and P phrases for both branches.

        Args:
            images: RGB, at their original size.
            phrases: see `referring_batch`, as for the following.
            image_index: the image of each phrase.
            phrase_ids: names of the phrases.
            targets: None if the answers are unknown.

        Raises:
            ValueError: the processor refuses a phrase or an image.
        """
        pixels = torch.stack([perception_pixels(image, self.image_size, self.resize) for image in images])
        cognition = self.processor(images, phrases, image_index)
        return referring_batch(pixels, cognition, phrases, image_index, phrase_ids=phrase_ids, targets=targets)

    def _named(
        self, error: ValueError, records: Sequence[ReferringRecord], images: Sequence[Image.Image]
    ) -> ValueError:
        """Finds the phrase that the processor refuses, by asking one by one, and names its id and file in the error."""
        for record, image in zip(records, images, strict=True):
            try:
                self.processor([image], [record.phrase], [0])
            except ValueError as alone:
                return DataError(f"{record.phrase_id} ({record.image_path}): {alone}")
        return error


def _load_image_of(group: ImageGroup) -> Image.Image:
    first = group.records[0]
    asked_by = tuple(record.phrase_id for record in group.records)
    return load_image(first.image_path, size_hw=(first.height, first.width), exif=first.exif, asked_by=asked_by)


def referring_targets(groups: Sequence[ImageGroup], image_size: int, resize: Resize) -> ReferringTargets:
    """Decodes the instance masks of all phrases at the original size and warps them to the perception image.

    An instance that several phrases of an image name is decoded once.

    Raises:
        DataError: a mask cannot be decoded, or a record has no truth.
    """
    masks: list[np.ndarray] = []
    phrase_index: list[int] = []
    phrase = 0
    for group in groups:
        decoded: dict[tuple[str, int], np.ndarray] = {}
        for record in group.records:
            check_has_truth(record, needed_for="training")
            for instance in record.instances:
                # The REFER datasets share COCO's annotation ids, but their polygons may differ.
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
