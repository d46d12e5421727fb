"""A few noise pictures with rectangles as referents, for the evaluation tests (imported by path, not collected)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from deris_llm.structures import InstanceAnnotation, ReferringRecord

PHRASES_PER_IMAGE = (3, 1, 4, 2, 5)  # 15 phrases of 5 pictures: neither divides by 2 ranks
SIZES_HW = ((60, 80), (48, 64), (64, 64), (70, 52), (60, 80))


def write_records(folder: Path) -> list[ReferringRecord]:
    """Pictures are written to `folder`; phrase k of a picture names its object k % 2."""
    generator = np.random.default_rng(5)
    records = []
    for number, (num_phrases, (height, width)) in enumerate(zip(PHRASES_PER_IMAGE, SIZES_HW, strict=True)):
        path = folder / f"picture_{number}.png"
        if not path.exists():
            Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        for k in range(num_phrases):
            left = (width // 2) * (k % 2)
            polygon = [left + 2, 4, left + 2, height - 8, left + width // 2 - 3, height - 8, left + width // 2 - 3, 4]
            records.append(
                ReferringRecord(
                    phrase_id=f"refcoco/val/{100 * number + k}",
                    dataset="refcoco",
                    split="val",
                    image_id=path.stem,
                    image_path=str(path),
                    width=width,
                    height=height,
                    phrase=f"the {'left' if k % 2 == 0 else 'right'} one, wording {k}",
                    instances=(InstanceAnnotation(annotation_id=10 * number + k % 2, segmentation=[polygon]),),
                )
            )
    return records
