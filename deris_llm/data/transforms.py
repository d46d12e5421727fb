"""Pictures and masks on their way to the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from deris_llm.data.errors import DataError

IMAGENET_MEAN_RGB = (0.485, 0.456, 0.406)
IMAGENET_STD_RGB = (0.229, 0.224, 0.225)

_SCALE = (1 / (255 * np.array(IMAGENET_STD_RGB))).astype(np.float32)
_OFFSET = (np.array(IMAGENET_MEAN_RGB) / np.array(IMAGENET_STD_RGB)).astype(np.float32)


def load_image(
    path: str | Path, *, size_hw: tuple[int, int] | None = None, asked_by: Sequence[str] = ()
) -> Image.Image:
    """Decodes a picture to RGB, as stored (an EXIF rotation is not applied: COCO's annotations ignore it).

    Args:
        path: a file that PIL reads.
        size_hw: height and width in px that the annotations were made for; anything else is an error.
        asked_by: ids of the phrases that need the picture, for the message.

    Raises:
        DataError: the file is missing, truncated, no picture, or of another size.
    """
    needed = f" (needed by {', '.join(asked_by[:5])}{' …' if len(asked_by) > 5 else ''})" if asked_by else ""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}{needed}: expected a whole picture, got {type(error).__name__}: {error}. "
            f"Restore this file ({Path(path).stem}) from COCO's train2014.zip, or remove its refs"
        ) from error
    if size_hw is not None and (image.height, image.width) != size_hw:
        raise DataError(
            f"{path}{needed}: expected {size_hw[1]} x {size_hw[0]} px, for which the masks were annotated, got "
            f"{image.width} x {image.height} px. Use COCO's original file, not a resized one"
        )
    return image


def perception_pixels(image: Image.Image, image_size: int) -> Tensor:
    """Warps a picture to a square, aspect not kept (as upstream), and normalises it with ImageNet's mean and deviation.

    PIL's bilinear filter widens its support when it shrinks, so the result is antialiased.

    Returns:
        float (3, image_size, image_size), RGB, about -2.1..2.6.
    """
    warped = np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR), dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray((warped * _SCALE - _OFFSET).transpose(2, 0, 1)))


def warp_mask(mask: np.ndarray, image_size: int) -> np.ndarray:
    """Warps a bool (h, w) mask to bool (image_size, image_size): the pixel under each new pixel's centre.

    Centres keep the mask where the bilinearly warped picture has its object; `masks.resize_mask`, which the ``deris``
    protocol scores with, takes the upper left corner as OpenCV does and shifts by up to half a pixel.
    """
    height, width = mask.shape
    centres = (np.arange(image_size) + 0.5) / image_size
    return mask[np.ix_((centres * height).astype(np.intp), (centres * width).astype(np.intp))]
