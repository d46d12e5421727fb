"""Draws what the model sees: the first phrases of a run with images and masks as they enter the model, in ``inputs.png``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from deris_llm.common.words import count_of
from deris_llm.data.loaders import TrainingLoader
from deris_llm.data.show import Tile, sheet_of
from deris_llm.models.preprocess import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB
from deris_llm.structures import ReferringBatch

logger = logging.getLogger(__name__)

INPUTS_FILE = "inputs.png"
_NUM_IMAGES = 8
_PHRASES_PER_IMAGE = 2


def write_inputs_sheet(loader: TrainingLoader, path: Path) -> None:
    """Draws the first images of this rank, with up to two phrases each, after conversion and preprocessing.

    The loader's order and its random states stay as they are.

    Args:
        loader: of the run.
        path: of the PNG.

    Raises:
        DataError: an image cannot be read, or a mask cannot be decoded.
    """
    selections = chain.from_iterable(cast(Any, loader.batch_sampler))
    chosen = [replace(each, phrases=each.phrases[:_PHRASES_PER_IMAGE]) for each in islice(selections, _NUM_IMAGES)]
    chosen = list({(each.group, each.phrases): each for each in chosen}.values())  # a short epoch repeats images
    batch = cast(Any, loader.collate_fn)([loader.dataset[each] for each in chosen])
    size = batch.perception_image.shape[-1]
    title = f"the first phrases of the run as the model sees them: images and masks at {size} x {size} px"
    sheet_of(_tiles(batch), batch.num_phrases, title=title).save(path)
    logger.info(
        "%s shows %s as the model sees them; look at it before the run is long",
        path,
        count_of(batch.num_phrases, "phrase"),
    )


def _tiles(batch: ReferringBatch) -> Iterator[Tile]:
    assert batch.targets is not None, "the training loader's collator adds targets"
    images = [_picture(image) for image in batch.perception_image]
    owner, masks = batch.targets.phrase_index.numpy(), batch.targets.masks.numpy()
    for phrase, (text, image) in enumerate(zip(batch.phrases, batch.image_index.tolist(), strict=True)):
        yield Tile(images[image], text, list(masks[owner == phrase]))


def _picture(normalised: Tensor) -> Image.Image:
    """Undoes `preprocess.normalised`."""
    mean, std = np.array(IMAGENET_MEAN_RGB), np.array(IMAGENET_STD_RGB)
    pixels = normalised.permute(1, 2, 0).numpy() * std + mean
    return Image.fromarray((pixels * 255).clip(0, 255).round().astype(np.uint8))
