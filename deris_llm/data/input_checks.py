"""What a run is going to read, looked at before it starts: pictures that do not decode, phrases and sizes that the model refuses."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deris_llm.data.errors import DataError
from deris_llm.data.images import PictureError, read_picture
from deris_llm.data.store.record_views import image_numbers, phrases
from deris_llm.structures import ReferringRecord

if TYPE_CHECKING:
    from deris_llm.models.cognition.base import InputChecker

logger = logging.getLogger(__name__)

_LISTED = 10


def first_of_each_picture(records: Sequence[ReferringRecord]) -> tuple[list[ReferringRecord], np.ndarray]:
    """A record of each picture, and for each of the records the number of its picture among them, int64."""
    numbers, _ = image_numbers(records)
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return [records[int(i)] for i in first], inverse


def undecodable_pictures(
    records: Sequence[ReferringRecord],
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Decodes the pictures of records as training does.

    Args:
        records: of any splits; a picture that several name is decoded once.
        workers: threads (Pillow decodes beside Python); None: one per core.
        on_progress: called with the number of pictures done and their number.

    Returns:
        for each picture that cannot be used: the id of a phrase that needs it, its file, and why.
    """
    pictures = list({record.image_path: record for record in records}.values())
    problems: list[str] = []
    with ThreadPoolExecutor(workers or available_cores()) as pool:
        for done, problem in enumerate(pool.map(_picture_problem, pictures), start=1):
            problems += [problem] if problem else []
            if on_progress is not None:
                on_progress(done, len(pictures))
    return problems


def refused_inputs(checker: InputChecker, records: Sequence[ReferringRecord], rows: np.ndarray) -> list[str]:
    """Asks a model's processor about phrases and about the sizes of their pictures.

    Args:
        checker: the processor.
        records: of any splits.
        rows: int64 (n,): the records that are asked about.

    Returns:
        for each phrase that is refused: its id, the file of its picture, and why.
    """
    pictures, number = first_of_each_picture(records)
    sizes = [(picture.height, picture.width) for picture in pictures]
    refused = checker.refused(phrases(records, rows), [sizes[i] for i in number[rows]])
    found = [(records[int(rows[i])], message) for i, message in sorted(refused.items())]
    return [f"{record.phrase_id} ({record.image_path}): {message}" for record, message in found]


def unusable_inputs_error(what: str, problems: Sequence[str], *, number: int) -> DataError:
    """One error for all problems, the first ten listed.

    Args:
        what: phrases or pictures, and of which splits.
        problems: from the functions above.
        number: of phrases or pictures that were looked at.
    """
    listed = "\n".join(f"  - {problem}" for problem in problems[:_LISTED])
    more = f"\n  - and {len(problems) - _LISTED:,} more" if len(problems) > _LISTED else ""
    return DataError(
        f"{what}: {len(problems):,} of {number:,} cannot be used\n{listed}{more}\n"
        "Repair or remove them before training (nothing is dropped silently)"
    )


def log_progress(what: str, seconds: float = 15.0) -> Callable[[int, int], None]:
    """An `on_progress` that writes a log line now and then."""
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _picture_problem(record: ReferringRecord) -> str:
    size = (record.height, record.width)
    try:
        image = read_picture(Path(record.image_path), size_hw=size)
    except PictureError as error:
        return f"{record.phrase_id} ({record.image_path}): {error}"
    if (image.height, image.width) != size:
        return (
            f"{record.phrase_id} ({record.image_path}): expected {record.width} x {record.height} px, for which the masks were "
            f"annotated, got {image.width} x {image.height} px"
        )
    return ""
