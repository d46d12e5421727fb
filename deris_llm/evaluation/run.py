"""A whole evaluation: splits, control run, predictions, report and pictures in one folder."""

from __future__ import annotations

import datetime
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deris_llm.config import RunConfig
from deris_llm.config.protocols import protocols_of
from deris_llm.data.dataset import some_images
from deris_llm.data.mix import leakage_notice
from deris_llm.data.sources import read_split, split_notes
from deris_llm.evaluation.evaluator import control_phrases, evaluate
from deris_llm.evaluation.output import REPORT_FILE, EvaluationFolder
from deris_llm.evaluation.page.page import look_inside_model
from deris_llm.evaluation.report import Section, read_report
from deris_llm.evaluation.results import EvaluationResult
from deris_llm.models.cognition import CognitionProcessor
from deris_llm.structures import ReferringRecord

logger = logging.getLogger(__name__)


def run_evaluation(
    config: RunConfig,
    model: nn.Module,
    processor: CognitionProcessor,
    splits: Sequence[str],
    *,
    out: str | Path,
    control: bool = False,
    step0: bool = False,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
    max_images: int = 0,
    pictures: bool = True,
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Evaluates splits and writes, on rank 0, what came out (`EvaluationFolder`). All ranks call this together.

    Args:
        config: the run.
        model: a `Deris` or a wrapper of one.
        processor: the cognition backend's.
        splits: e.g. ``refcoco/val``.
        out: folder; a report that is already there is added to.
        control: also asks every picture the wrong phrases (`control_phrases`), into section ``control``.
        step0: the model is not fine-tuned yet: numbers go to section ``step0``, without predictions and pictures.
        device: where the model is; None = where its parameters are.
        rank: this process.
        world_size: number of ranks.
        max_images: evenly spaced pictures of each split; 0 = all. The report's n_images says it.
        pictures: writes the overlays.
        progress: shows a bar on rank 0.
        about: what the caller knows of the numbers' origin: checkpoint, threshold_source; stored in the report.
        notes: split -> what must be read with its numbers, e.g. that the threshold was chosen on it.

    Returns:
        The report (on every rank; on ranks above 0 with this call's numbers only).
    """
    device = next(model.parameters()).device if device is None else torch.device(device)
    protocols = protocols_of(config)
    leakage = leakage_notice(config, splits)
    folder = EvaluationFolder(
        out, protocols, title=config.name, about=_about(config, leakage, max_images) | dict(about or {})
    )
    section: Section = "step0" if step0 else "splits"
    report: dict[str, Any] = {"splits": {}, "control": {}, "step0": {}}

    def evaluated(
        records: Sequence[ReferringRecord], title: str, override: dict[str, str] | None = None
    ) -> EvaluationResult:
        return evaluate(
            model,
            config,
            records,
            processor,
            device=device,
            rank=rank,
            world_size=world_size,
            phrase_override=override,
            progress=progress,
            title=title,
        )

    for split in splits:
        records = some_images(read_split(config.data.root, split, phrase_field=config.data.phrase_field), max_images)
        started = time.monotonic()
        result = evaluated(records, f"{split}{' (step 0)' if step0 else ''}")
        report[section][split] = result.numbers
        if rank == 0:
            seconds = time.monotonic() - started
            said = [
                *(notes or {}).get(split, ()),
                *split_notes(config.data.root, split, phrase_field=config.data.phrase_field),
            ]
            folder.add(split, result, records, seconds=seconds, section=section, notes=said)
        if control:
            report["control"][split] = _run_control(records, split, evaluated, folder if rank == 0 else None)
    if rank == 0 and pictures:
        is_whole = not any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # not spread by ZeRO-3
        inside = functools.partial(look_inside_model, model=model, config=config, processor=processor)
        folder.write_pictures(inside if is_whole else None)
    return read_report(folder.folder / REPORT_FILE) if rank == 0 else report


def _about(config: RunConfig, leakage: str | None, max_images: int) -> dict[str, Any]:
    """Where the numbers of a run come from."""
    found = {
        "name": config.name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "data_root": config.data.root,
        "phrase_field": config.data.phrase_field,
        "seed": config.training.seed,
        "score_threshold": config.evaluation.score_threshold,
        "selection": config.evaluation.selection,
        "presence": config.evaluation.presence,
        "max_images": max_images,
    }
    return found | ({"leakage": leakage} if leakage else {})


def _run_control(
    records: Sequence[ReferringRecord], split: str, evaluated: Any, folder: EvaluationFolder | None
) -> dict[str, Any]:
    swapped = control_phrases(records)
    left_out = len(records) - len(swapped)
    if left_out:
        logger.info(
            "control of %s: %d of %d phrases have no target, or no other referent in their picture, and are left out",
            split,
            left_out,
            len(records),
        )
    if not swapped:
        return {}
    started = time.monotonic()
    result = evaluated(records, f"{split} (control)", swapped)
    if folder is not None:
        seconds = time.monotonic() - started
        folder.add(split, result, records, seconds=seconds, section="control", more={"n_left_out": left_out})
    return {name: values | {"n_left_out": left_out} for name, values in result.numbers.items()}
