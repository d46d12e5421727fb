"""Checks before a run starts: images that do not decode, phrases and image sizes that the model refuses."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from deris_llm.data.errors import DataError
from deris_llm.data.images import load_image
from deris_llm.data.store.records import as_records
from deris_llm.structures import ReferringRecord

if TYPE_CHECKING:
    from deris_llm.models.cognition.base import InputChecker

logger = logging.getLogger(__name__)

_LISTED = 10


def first_of_each_image(records: Sequence[ReferringRecord]) -> tuple[list[ReferringRecord], np.ndarray]:
    """The first record of each image; and for each record the index of its image in that list, int64."""
    numbers, _ = as_records(records).image_numbers()
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return [records[int(i)] for i in first], inverse


def undecodable_images(
    records: Sequence[ReferringRecord],
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Decodes the images of records as training does, each image once.

    Args:
        records: of any splits.
        workers: threads (Pillow releases the GIL while it decodes); None for one per core.
        on_progress: called with the number of decoded images and the total.

    Returns:
        A message for each image that cannot be used: the id of a phrase that needs it, the file and the reason.
    """
    images = list({record.image_path: record for record in records}.values())
    problems: list[str] = []
    with ThreadPoolExecutor(workers or available_cores()) as pool:
        for done, problem in enumerate(pool.map(_image_problem, images), start=1):
            problems += [problem] if problem else []
            if on_progress is not None:
                on_progress(done, len(images))
    return problems


def refused_inputs(checker: InputChecker, records: Sequence[ReferringRecord], rows: np.ndarray) -> list[str]:
    """Asks a model's processor which phrases and image sizes it refuses.

    Args:
        checker: the processor.
        records: of any splits.
        rows: int64 (n,), the records to ask about.

    Returns:
        A message for each refused phrase: its id, its image file and the reason.
    """
    images, number = first_of_each_image(records)
    sizes = [(image.height, image.width) for image in images]
    refused = checker.refused(as_records(records).phrases(rows), [sizes[i] for i in number[rows]])
    found = [(records[int(rows[i])], message) for i, message in sorted(refused.items())]
    return [f"{record.phrase_id} ({record.image_path}): {message}" for record, message in found]


def unusable_inputs_error(what: str, problems: Sequence[str], *, number: int) -> DataError:
    """One error for all problems, which lists the first ten.

    Args:
        what: phrases or images, and of which splits.
        problems: from the functions above.
        number: of phrases or images that were checked.
    """
    listed = "\n".join(f"  - {problem}" for problem in problems[:_LISTED])
    more = f"\n  - and {len(problems) - _LISTED:,} more" if len(problems) > _LISTED else ""
    return DataError(
        f"{what}: {len(problems):,} of {number:,} cannot be used\n{listed}{more}\n"
        "Repair or remove them before training (nothing is dropped silently)"
    )


def log_progress(what: str, seconds: float = 15.0) -> Callable[[int, int], None]:
    """An `on_progress` that logs a line every ``seconds``."""
    started = said = time.monotonic()

    def log(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= seconds:
            said = now
            left = (now - started) * (total - done) / done
            logger.info("%s: %s of %s, about %.0f s left", what, f"{done:,}", f"{total:,}", left)

    return log


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _image_problem(record: ReferringRecord) -> str:
    try:
        load_image(record.image_path, size_hw=(record.height, record.width), asked_by=(record.phrase_id,))
    except DataError as error:
        return str(error)
    return ""
