"""A whole evaluation: splits, control run, predictions, report and pictures in one folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deris_llm.cognition import CognitionProcessor
from deris_llm.config import RunConfig
from deris_llm.data.dataset import group_by_image
from deris_llm.data.sources import read_split
from deris_llm.evaluation.evaluator import EvaluationResult, control_phrases, evaluate
from deris_llm.evaluation.overlays import Case, choose_cases, write_contact_sheet, write_page
from deris_llm.evaluation.protocols import protocols_of
from deris_llm.evaluation.report import read_report, update_report
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
) -> dict[str, Any]:
    """Evaluates splits and writes, on rank 0, what came out; a report that is already there is added to.

    ``out`` gets ``report.json``, ``predictions/<split>.jsonl`` (one line per phrase, COCO RLE), ``overlays.html`` and
    ``overlays/<split>.png``. All ranks call this together.

    Args:
        config: the run.
        model: a `Deris` or a wrapper of one.
        processor: the cognition backend's.
        splits: e.g. ``refcoco/val``.
        out: folder.
        control: also asks every picture the wrong phrases (`control_phrases`), into section ``control``.
        step0: the model is not fine-tuned yet: numbers go to section ``step0``, without predictions and pictures.
        device: where the model is; None = where its parameters are.
        rank: this process.
        world_size: number of ranks.
        max_images: evenly spaced pictures of each split; 0 = all. The report's n_images says it.
        pictures: writes the overlays.
        progress: shows a bar on rank 0.

    Returns:
        The report (on every rank; on ranks above 0 with this call's numbers only).
    """
    out = Path(out)
    device = next(model.parameters()).device if device is None else torch.device(device)
    protocols = protocols_of(config)
    report_path = out / "report.json"
    report = read_report(report_path)  # a file of something else is an error before the work, not after
    cases: dict[str, list[Case]] = {}
    section = "step0" if step0 else "splits"

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
        timing = {f"evaluate {section} {split}": time.monotonic() - started}
        report[section][split] = result.numbers
        if rank == 0:
            update_report(
                report_path,
                section=section,
                numbers={split: result.numbers},
                timing=timing,
                protocols=protocols,
                notes={} if step0 else {split: result.notes},
            )
            if not step0:
                _write_predictions(result, out, split)
                by_id = {record.phrase_id: record for record in records}
                cases[split] = choose_cases(result.predictions, by_id, protocol=protocols[0].id)
        if control:
            report["control"][split] = _run_control(records, split, evaluated, report_path if rank == 0 else None)
    if rank == 0 and pictures and cases:
        for split, chosen in cases.items():
            title = f"{config.name}: {split} ({protocols[0].id})"
            write_contact_sheet(
                chosen, out / "overlays" / f"{_file_name(split)}.png", title=title, protocol=protocols[0].id
            )
        write_page(cases, out / "overlays.html", title=config.name, protocol=protocols[0].id)
    return read_report(report_path) if rank == 0 else report


def some_images(records: Sequence[ReferringRecord], max_images: int) -> list[ReferringRecord]:
    """All phrases of ``max_images`` evenly spaced pictures, in the records' order; 0 = all."""
    groups = group_by_image(records)
    if max_images <= 0 or max_images >= len(groups):
        return list(records)
    kept = {groups[i * len(groups) // max_images].records[0].image_id for i in range(max_images)}
    return [record for record in records if record.image_id in kept]


def _run_control(
    records: Sequence[ReferringRecord], split: str, evaluated: Any, report_path: Path | None
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
    numbers = {
        name: values | {"n_left_out": left_out}
        for name, values in evaluated(records, f"{split} (control)", swapped).numbers.items()
    }
    if report_path is not None:
        timing = {f"evaluate control {split}": time.monotonic() - started}
        update_report(report_path, section="control", numbers={split: numbers}, timing=timing)
    return numbers


def _write_predictions(result: EvaluationResult, out: Path, split: str) -> None:
    path = out / "predictions" / f"{_file_name(split)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    result.write_jsonl(path)


def _file_name(split: str) -> str:
    return split.replace("/", "_")
