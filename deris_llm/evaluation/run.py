"""A whole evaluation: splits, control run, predictions, report and images in one folder."""

from __future__ import annotations

import datetime
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from deris_llm.common import ranks
from deris_llm.common.words import count_of
from deris_llm.config import RunConfig
from deris_llm.config.protocols import protocols_of
from deris_llm.data.dataset import some_images
from deris_llm.data.mix import leakage_notice
from deris_llm.data.sources import has_truth, is_synthetic, read_split, source_format, split_notes
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.evaluator import answers_without_truth, control_phrases, evaluate
from deris_llm.evaluation.output import REPORT_FILE, EvaluationFolder
from deris_llm.evaluation.page.page import look_inside_model
from deris_llm.evaluation.report import Section, read_report
from deris_llm.evaluation.results import EvaluationResult
from deris_llm.evaluation.video.frames import first_frame_held, video_numbers
from deris_llm.evaluation.video.protocols import mean_score
from deris_llm.evaluation.video.submission import SERVER_FORMATS, Layout, asked_frames, submitted, write_submission
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
    max_images: int = 0,
    pictures: bool = True,
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    submission: Path | None = None,
) -> dict[str, Any]:
    """Evaluates splits; rank 0 writes the results (`EvaluationFolder`). All ranks call this together.

    A split whose truth is not published is answered and not scored: its predictions are all that is written.

    Args:
        config: the run.
        model: a `Deris` or a wrapper of one.
        processor: the cognition backend's.
        splits: e.g. ``refcoco/val``.
        out: folder; an existing report is extended.
        control: also asks the wrong phrases about every image (`control_phrases`); section ``control`` of the report.
        step0: the model is not fine-tuned yet: numbers go to section ``step0``, without predictions and overlays.
        max_images: evenly spaced images of each split; 0 = all. The report's n_images says it.
        pictures: writes the overlays.
        progress: shows a bar on rank 0.
        about: where the numbers come from, as the caller knows it: checkpoint, threshold_source; stored in the report.
        notes: split -> what must be read with its numbers, e.g. that the threshold was chosen on it.
        submission: zip for the evaluation server of a set of videos; for one split (`video.submission.check_submission`).

    Returns:
        The report (on ranks above 0 with this call's numbers only).
    """
    is_first_rank = ranks.rank() == 0
    leakage = leakage_notice(config, splits)
    origin = {
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
    origin |= {"synthetic": True} if is_synthetic(config.data.root) else {}
    origin |= ({"leakage": leakage} if leakage else {}) | dict(about or {})
    folder = EvaluationFolder(out, protocols_of(config), title=config.name, about=origin)
    report: dict[str, Any] = {"splits": {}, "control": {}, "step0": {}}

    def run_split(
        section: Section,
        split: str,
        records: Sequence[ReferringRecord],
        notes: Sequence[str] = (),
        override: dict[str, str] | None = None,
    ) -> EvaluationResult:
        started = time.monotonic()
        result = evaluate(
            model,
            config,
            records,
            processor,
            device=next(model.parameters()).device,
            phrase_override=override,
            progress=progress,
            title=split if section == "splits" else f"{split} ({section})",
        )
        more = {} if override is None else {"n_left_out": len(records) - len(override)}
        report[section][split] = {name: values | more for name, values in result.numbers.items()}
        if is_first_rank:
            seconds = time.monotonic() - started
            folder.add(split, result, records, seconds=seconds, section=section, notes=notes, more=more)
        return result

    for split in splits:
        records = some_images(read_split(config.data.root, split, phrase_field=config.data.phrase_field), max_images)
        known = split_notes(config.data.root, split)
        if max_images and records[0].video is not None:
            number = len({record.image_id for record in records})
            known += (
                f"J&F: over {count_of(number, 'frame')}, evenly spaced over all videos (--max-images {max_images})",
            )
        if not has_truth(config.data.root, split):
            answers = answers_without_truth(model, config, records, processor, progress=progress, title=split)
            if is_first_rank:
                folder.add_unscored(split, answers)
                _submit(submission, config, answers, records)
            continue
        result = run_split("step0" if step0 else "splits", split, records, [*(notes or {}).get(split, ()), *known])
        if is_first_rank:
            _submit(submission, config, result.answers, records)
        swapped = control_phrases(records) if control else {}
        if control and len(swapped) < len(records):
            logger.info(
                "control of %s: leaves out %d of %d phrases, which have no target or no other referent in their image",
                split,
                len(records) - len(swapped),
                len(records),
            )
        controls: dict[str, float | None] = {}
        if swapped:
            other = run_split("control", split, records, override=swapped)
            if other.expressions:
                swappable = {(each.video, each.id) for each in other.expressions}
                own = [each.score for each in result.expressions if (each.video, each.id) in swappable]
                controls["control_J&F"] = video_numbers(other.expressions)["J&F"]
                controls["control_own_J&F"] = 100 * mean_score(own).jf
                controls["control_n_expressions"] = len(own)
        elif control:
            report["control"][split] = {}
        if control and result.video_protocol is not None:
            held = first_frame_held(result.answers, records)
            controls["first_frame_J&F"] = 100 * mean_score(held.values()).jf
            if is_first_rank:
                folder.add_video_controls(split, controls, result.video_protocol)
    if is_first_rank and pictures:
        is_whole = not any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # not spread by ZeRO-3
        inside = functools.partial(look_inside_model, model=model, config=config, processor=processor)
        folder.write_pictures(inside if is_whole else None)
    return read_report(folder.folder / REPORT_FILE) if is_first_rank else report


def _submit(out: Path | None, config: RunConfig, answers: Sequence[Answer], records: Sequence[ReferringRecord]) -> None:
    if out is None:
        return
    form = source_format(config.data.root, records[0].dataset)
    layout = SERVER_FORMATS[SERVER_FORMATS.index(cast(Layout, form))]
    by_id = {record.phrase_id: record for record in records}
    write_submission(
        out, layout, (submitted(answer, by_id[answer.phrase_id]) for answer in answers), asked_frames(records)
    )
    logger.info("%s is the zip for the evaluation server", out)
