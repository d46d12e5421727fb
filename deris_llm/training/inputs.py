"""Checks phrases and images before the first step, each rank its share, so that no run fails hours later."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deris_llm.common.ranks import gathered, on_first_rank, rank, world_size
from deris_llm.config import RunConfig
from deris_llm.data import input_checks
from deris_llm.data.sources import manifest_of
from deris_llm.data.store.prepared import MANIFEST_FILE, file_sha256
from deris_llm.models.cognition import CognitionProcessor
from deris_llm.models.cognition.base import InputChecker
from deris_llm.structures import ReferringRecord

logger = logging.getLogger(__name__)


def check_phrases(
    config: RunConfig,
    processor: CognitionProcessor,
    inputs: Mapping[str, Sequence[ReferringRecord]],
    data: Mapping[str, Any],
) -> None:
    """Passes all phrases, with the sizes of their images, to the processor's check.

    A processor that is not an `InputChecker` accepts everything. The folder of the data remembers which one has accepted them.

    Args:
        config: of the run.
        processor: the cognition backend's.
        inputs: records by the name that a message gives them.
        data: their manifest.

    Raises:
        DataError: lists all rejected phrases, on every rank.
    """
    if not isinstance(processor, InputChecker):
        return
    mark = on_first_rank(lambda: _mark_of_checked_phrases(config, processor, data))
    if mark.is_file():
        return
    for name, records in inputs.items():
        problems = gathered(
            input_checks.refused_inputs(processor, records, np.arange(rank(), len(records), world_size()))
        )
        if any(problems):
            raise input_checks.unusable_inputs_error(f"phrases of {name}", sum(problems, []), number=len(records))
    if rank() == 0:
        with contextlib.suppress(OSError):  # read-only data is checked again
            mark.parent.mkdir(exist_ok=True)
            mark.touch()


def _mark_of_checked_phrases(config: RunConfig, processor: CognitionProcessor, data: Mapping[str, Any]) -> Path:
    """Returns the file that marks a run's phrases as accepted by a processor."""
    names = (*config.data.train, config.training.eval_split.partition("/")[0])
    folders = [manifest_of(config.data.root, name).folder for name in names]
    sets = [file_sha256(folder / MANIFEST_FILE) for folder in folders]
    read = [data["datasets"], data["evaluation_splits"], config.training.eval_split, config.training.eval_max_images]
    asked = json.dumps([sets, read, config.data.phrase_field]).encode()
    key = hashlib.sha256(pickle.dumps(processor) + asked).hexdigest()[:16]
    return folders[0] / "checked_phrases" / key


def check_images(config: RunConfig, inputs: Mapping[str, Sequence[ReferringRecord]], *, is_new: bool) -> None:
    """Decodes all images if `data.check_images` asks for it; ``is_new`` is False on resume.

    Raises:
        DataError: lists all unusable images, on every rank.
    """
    wanted = config.data.check_images
    if wanted == "never" or (wanted == "first-run" and not is_new):
        return
    cores = max(1, input_checks.available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    for name, records in inputs.items():
        images = input_checks.first_of_each_image(records)[0]
        logger.info("decoding %s images of %s (data.check_images=%s)", f"{len(images):,}", name, wanted)
        problems = gathered(
            input_checks.undecodable_images(
                images[rank() :: world_size()], workers=cores, on_progress=input_checks.log_progress("images")
            )
        )
        if any(problems):
            what = f"images of {name} (data.check_images={wanted})"
            raise input_checks.unusable_inputs_error(what, sum(problems, []), number=len(images))
