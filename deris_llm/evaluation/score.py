"""Scores anybody's predictions for a split with the metrics, intervals and files of an evaluation (`deris-llm score`).

Masks stay run-length encoded where a protocol compares them at the image's own size. Where it compares at another size, they
are drawn and resized as the truth is, unless the file holds masks of that size.

A phrase without a prediction is a miss: with a target, no answer; without one, a wrong answer, so that silence gains nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deris_llm.config.protocols import Protocol, protocols_of_file
from deris_llm.data.dataset import group_by_image
from deris_llm.data.errors import check_has_truth
from deris_llm.data.masks import coco_mask, segmentation_rle
from deris_llm.data.sources import benchmark_of, is_generalised, is_synthetic, read_split, split_notes
from deris_llm.evaluation.answers import Answer, Rle, outcome_fields
from deris_llm.evaluation.boxes import boxes_f1, boxes_of_masks
from deris_llm.evaluation.comparison import compare, write_comparison
from deris_llm.evaluation.metrics import Outcome, Overlap, overlap
from deris_llm.evaluation.output import REPORT_FILE, EvaluationFolder, file_name, write_names
from deris_llm.evaluation.report import read_report
from deris_llm.evaluation.results import EvaluationResult, check_misses
from deris_llm.evaluation.submissions import (
    PREDICTIONS_FILE,
    Submission,
    SubmissionError,
    read_submission,
    rle_of,
)
from deris_llm.evaluation.truth import resampled_truth, without_ignored
from deris_llm.structures import InstanceAnnotation, ReferringRecord

logger = logging.getLogger(__name__)

MISSING_SHOWN = 10
_CHUNK = 500  # phrases that a process gets at a time; whole images
_WORTH_PROCESSES = 2000  # fewer phrases are scored in this process


@dataclass(frozen=True)
class Scored:
    """The result of one file of predictions for a split."""

    result: EvaluationResult
    protocols: tuple[Protocol, ...]
    missing: tuple[str, ...]  # phrase ids without a prediction
    other_folder: tuple[str, ...] = ()  # see `Submission`

    @property
    def notes(self) -> list[str]:
        """What must be read with the numbers."""
        notes = []
        if self.missing:
            shown = ", ".join(self.missing[:MISSING_SHOWN])
            split = self.result.answers[0].phrase_id.split("/")[:2]
            more = f", ... (all in {missing_file('/'.join(split))})" if len(self.missing) > MISSING_SHOWN else ""
            notes.append(
                f"{len(self.missing):,} of {len(self.result.answers):,} phrases have no prediction and count as misses: "
                f"{shown}{more}"
            )
        if self.other_folder:
            notes.append(
                f"{len(self.other_folder):,} images were found by the file name alone, in another folder than the predictions "
                f"name, e.g. {self.other_folder[0]}"
            )
        if self.result.is_generalised and any("F1" not in found for found in self.result.numbers.values()):
            notes.append("no boxes of instances in the file: no F1")
        return notes


def score_submission(
    submission: Submission,
    records: Sequence[ReferringRecord],
    protocols: Sequence[Protocol],
    *,
    is_generalised: bool,
    benchmark: str | None = None,
    workers: int | None = None,
) -> Scored:
    """Compares predictions with the truth of a split.

    Args:
        submission: of these records.
        records: the split.
        protocols: of files (`protocols_of_file`).
        is_generalised: phrases may name nothing, or several objects.
        benchmark: whose own metrics are computed too (`metrics.benchmark_ratios`).
        workers: processes; None = one per core, at most 8.

    Raises:
        SubmissionError: every mask that is malformed or of the wrong size, in one error.
        ValueError: a protocol that does not fit the dataset, or a record without truth.
    """
    for record in records:
        check_has_truth(record, needed_for="metrics")
    check_misses(protocols, records[0].dataset, is_generalised=is_generalised)
    used = tuple(_with_own_masks(protocol, submission) for protocol in protocols)
    own = frozenset(p.id for p in used if p.prediction_resampling != "finished_mask")
    own &= submission.protocols_with_own_masks()
    score = partial(_score_chunk, protocols=used, own=own, is_generalised=is_generalised)
    chunks = _chunks(records, submission)
    workers = min(os.cpu_count() or 1, 8) if workers is None else workers
    if workers > 1 and len(records) >= _WORTH_PROCESSES:
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as pool:
            parts = list(pool.map(score, chunks))
    else:
        parts = [score(chunk) for chunk in chunks]
    problems = [problem for _, found in parts for problem in found]
    if problems:
        raise SubmissionError(submission.path, problems, len(submission.answers))
    by_id = {prediction.phrase_id: prediction for found, _ in parts for prediction in found}
    predictions = [by_id[record.phrase_id] for record in records]
    result = EvaluationResult.of(predictions, used, is_generalised=is_generalised, benchmark=benchmark)
    return Scored(result, used, submission.missing, submission.other_folder)


def run_score(
    predictions: str | Path,
    *,
    data_root: str | Path,
    split: str,
    out: str | Path,
    protocols: Sequence[str] = ("original",),
    phrase_field: Literal["sent", "raw"] = "sent",
    against: str | Path | None = None,
    workers: int | None = None,
    pictures: bool = True,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Scores a file of predictions and writes the folder of an evaluation; or two files, and how they differ.

    Args:
        predictions: JSONL file or folder of PNGs (`submissions`).
        data_root: where the data is.
        split: ``dataset/split``.
        out: folder; that of ``against`` is ``out/against``, the comparison ``out/comparison.json``.
        protocols: ids or YAML files; the first decides what is shown.
        phrase_field: which text was asked.
        against: another file of predictions for the same split.
        workers: processes; None = one per core, at most 8.
        pictures: draws worst, best and random cases.

    Returns:
        The report, and the comparison or None.

    Raises:
        ValueError: unusable predictions, data, protocols or folder.
    """
    asked = protocols_of_file(protocols, text_field=phrase_field)
    dropping = [protocol.id for protocol in asked if protocol.miss == "dropped"]
    if against is not None and dropping:
        raise ValueError(
            f"--against: expected protocols that count the same phrases of both files, got {', '.join(dropping)}, which drops "
            "phrases without an answer: choose another --protocol"
        )
    read_report(Path(out) / REPORT_FILE)  # an unusable folder is an error before the work
    records = read_split(data_root, split, phrase_field=phrase_field)
    generalised = is_generalised(data_root, records[0].dataset)
    benchmark = benchmark_of(data_root, records[0].dataset)
    found: list[Scored] = []
    for path, folder in ((predictions, Path(out)), *([(against, Path(out) / "against")] if against else [])):
        started = time.monotonic()
        submission = read_submission(path, records)
        scored = score_submission(
            submission, records, asked, is_generalised=generalised, benchmark=benchmark, workers=workers
        )
        about = {
            "name": _name_of(Path(path)),
            "predictions": str(path),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "data_root": str(data_root),
            "phrase_field": phrase_field,
        }
        about |= {"synthetic": True} if is_synthetic(data_root) else {}
        written = EvaluationFolder(folder, scored.protocols, title=_name_of(Path(path)), about=about)
        written.add(
            split,
            scored.result,
            records,
            seconds=time.monotonic() - started,
            notes=[*scored.notes, *split_notes(data_root, split)],
        )
        write_names(folder / missing_file(split), scored.missing)
        if pictures:
            written.write_pictures()
        found.append(scored)
    report = read_report(Path(out) / REPORT_FILE)
    if against is None:
        return report, None
    names = (str(predictions), str(against))
    comparison = compare(
        found[0].result,
        found[1].result,
        [p.id for p in found[0].protocols],
        names=names,
        split=split,
        videos={record.phrase_id: record.video for record in records if record.video is not None},
    )
    comparison["notes"] = [scored.notes for scored in found]
    write_comparison(comparison, Path(out))
    return report, comparison


def default_folder(predictions: Path, split: str, against: Path | None = None) -> Path:
    """Returns the default output folder, which other predictions do not share."""
    names = [f"{_name_of(path)}-{_digest(path)}" for path in (predictions, against) if path is not None]
    return Path("runs", "score", f"{'-against-'.join(names)}-{file_name(split)}")


def _name_of(path: Path) -> str:
    """Returns a name for predictions: of their file, or of the folder where every file has the same name."""
    if path.parent.name == "predictions":  # of `eval`: NAME/predictions/SPLIT.jsonl
        return path.parent.parent.name or path.stem
    return (path.parent.name if path.name == PREDICTIONS_FILE else path.stem) or path.stem


def _digest(path: Path) -> str:
    """Returns eight hex digits of a file's content, or of a folder's listing."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:8]
    listed = sorted(
        (str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()
    )
    return hashlib.sha256(repr((str(path.resolve()), listed)).encode(errors="surrogatepass")).hexdigest()[:8]


def missing_file(split: str) -> str:
    """Returns the name of the file that lists the phrases without a prediction; it exists only if there are some."""
    return f"missing_{file_name(split)}.txt"


def _with_own_masks(protocol: Protocol, submission: Submission) -> Protocol:
    """Returns the protocol with the masks that the file holds for it, if it holds one for every phrase that it answers."""
    if protocol.fixed_px is None or protocol.id not in submission.protocols_with_own_masks():
        return protocol
    masks = [answer.answers[protocol.id].mask for answer in submission.answers.values()]
    sizes = {
        tuple(mask["size"]) if isinstance(mask, dict) and isinstance(mask.get("size"), list) else None for mask in masks
    }
    size = sizes.pop() if len(sizes) == 1 else None
    if size is None or len(size) != 2 or size[0] != size[1] or not isinstance(size[0], int):
        return protocol
    # the side of `deris` is that of the model's perception image; that of the other protocols is fixed
    return (
        protocol.of_file(brings_own_masks_px=size[0])
        if protocol.id == "deris" or size[0] == protocol.fixed_px
        else protocol
    )


_Image = list[tuple[ReferringRecord, Answer | None]]  # the phrases of one image and their answers


def _chunks(records: Sequence[ReferringRecord], submission: Submission) -> list[list[_Image]]:
    """Splits records into whole images, so that each truth is drawn once."""
    chunks: list[list[_Image]] = []
    size = _CHUNK
    for group in group_by_image(records):
        if size >= _CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append([(record, submission.answers.get(record.phrase_id)) for record in group.records])
        size += len(group.records)
    return chunks


def _score_chunk(
    images: Sequence[_Image], *, protocols: Sequence[Protocol], own: frozenset[str], is_generalised: bool
) -> tuple[list[Answer], list[str]]:
    """Returns scored answers, and what is wrong with masks; runs in a worker process."""
    answers: list[Answer] = []
    problems: list[str] = []
    for image in images:
        truths = _Truths()
        for record, given in image:
            try:
                answers.append(_scored(record, given, truths, protocols, own, is_generalised=is_generalised))
            except _BadMaskError as error:
                problems.append(str(error))
    return answers, problems


class _BadMaskError(ValueError):
    """A mask that cannot be compared."""


class _Truths:
    """The truth of one image's phrases; each referent is encoded once for all phrases that name it."""

    def __init__(self) -> None:
        self.instances: dict[int, Rle] = {}
        self.merged: dict[tuple[int, ...], Rle] = {}
        self.resized: dict[tuple[tuple[int, ...], str], np.ndarray] = {}

    def instance(self, instance: InstanceAnnotation, record: ReferringRecord) -> Rle:
        """One referent at the original size."""
        if instance.annotation_id not in self.instances:
            rle = segmentation_rle(instance.segmentation, record.height, record.width)
            self.instances[instance.annotation_id] = rle
        return self.instances[instance.annotation_id]

    def of(self, record: ReferringRecord, protocol: Protocol) -> Rle:
        """The union of a phrase's referents at the original size."""
        referents = _referents(record, protocol)
        key = tuple(instance.annotation_id for instance in referents)
        if key not in self.merged:
            rles = [self.instance(instance, record) for instance in referents]
            self.merged[key] = coco_mask.merge(rles) if rles else rle_of(None, record.height, record.width)
        return self.merged[key]

    def resized_truth(self, record: ReferringRecord, protocol: Protocol) -> np.ndarray:
        """The same as a protocol resizes it, bool (W, H)."""
        key = (tuple(instance.annotation_id for instance in _referents(record, protocol)), protocol.id)
        if key not in self.resized:
            self.resized[key] = resampled_truth(protocol, _transposed(self.of(record, protocol)))
        return self.resized[key]


def _referents(record: ReferringRecord, protocol: Protocol) -> tuple[InstanceAnnotation, ...]:
    return record.instances if protocol.crowds == "left_out" else record.instances + record.crowds


def _scored(
    record: ReferringRecord,
    submitted: Answer | None,
    truths: _Truths,
    protocols: Sequence[Protocol],
    own: frozenset[str],
    *,
    is_generalised: bool,
) -> Answer:
    given = submitted or Answer(says_target=record.is_no_target, where="missing")
    mask, says_target = _checked(given, record.height, record.width)
    true_boxes = None
    if is_generalised and given.boxes is not None:
        instances = [coco_mask.decode(truths.instance(i, record)).astype(bool) for i in record.instances]
        true_boxes = boxes_of_masks(np.array(instances).reshape(-1, record.height, record.width))
    outcomes: dict[str, Outcome] = {}
    others: dict[str, Answer] = {}
    drawn_WH = None
    for protocol in protocols:
        size = protocol.size_hw(record.height, record.width)
        other = given.answers.get(protocol.id) if protocol.id in own else None
        compared, says, boxes, truth = mask, says_target, given.boxes, truths.of(record, protocol)
        if other is not None:
            (compared, says), boxes = _checked(other, *size), other.boxes
            others[protocol.id] = Answer(mask=_plain(compared), says_target=says, boxes=boxes)
        if protocol.fixed_px is None and record.ignored is not None:
            answer, true = (without_ignored(protocol, record, _transposed(each).T) for each in (compared, truth))
            pixels, truth_px = overlap(answer, true), int(np.count_nonzero(true))
        elif protocol.fixed_px is None:
            pixels, truth_px = _overlap(compared, truth), int(coco_mask.area(truth))
        else:
            if other is not None:
                answer_WH = _transposed(compared)
            else:
                drawn_WH = _transposed(mask) if drawn_WH is None else drawn_WH
                answer_WH = resampled_truth(protocol, drawn_WH)
            truth_WH = truths.resized_truth(record, protocol)
            answer_WH, truth_WH = (without_ignored(protocol, record, each.T).T for each in (answer_WH, truth_WH))
            pixels, truth_px = overlap(answer_WH, truth_WH), int(np.count_nonzero(truth_WH))
        boxes_match = None if true_boxes is None or boxes is None else boxes_f1(boxes, true_boxes) == 1
        outcomes[protocol.id] = Outcome(
            pixels,
            has_target=not record.is_no_target,
            says_target=says,
            oracle=given.oracle_px.get(protocol.id) if _compares_as_evaluated(protocol) else None,
            boxes_match=boxes_match,
            truth_px=truth_px,
            image_px=size[0] * size[1],
            ref_id=record.ref_id,
        )
    return Answer(
        phrase_id=record.phrase_id,
        image=Path(record.image_path).name,
        image_id=record.image_id,
        phrase=record.phrase,
        mask=_plain(mask),
        top_scores=given.top_scores,
        presence=given.presence,
        has_target=not record.is_no_target,
        says_target=says_target,
        boxes=given.boxes,
        answers=others,
        truth_px=int(coco_mask.area(truths.of(record, protocols[0]))),
        **outcome_fields(outcomes),
    )


def _compares_as_evaluated(protocol: Protocol) -> bool:
    """Returns whether an evaluation's overlaps of the best queries belong to the masks that are compared here."""
    return protocol.fixed_px is None or protocol.prediction_resampling == "given"


def _checked(answer: Answer, height: int, width: int) -> tuple[Rle, bool]:
    """Returns the mask of an answer as compressed RLE and whether there is one, which the mask decides if the file does not."""
    try:
        mask = rle_of(answer.mask, height, width)
    except ValueError as error:
        raise _BadMaskError(f"{answer.where}: {error}") from error
    return mask, bool(coco_mask.area(mask)) if answer.says_target is None else answer.says_target


def _transposed(mask: Rle) -> np.ndarray:
    """Draws a mask as bool (W, H), contiguous: RLE runs down the columns."""
    return coco_mask.decode(mask).T.view(bool)


def _overlap(mask: Rle, truth: Rle) -> Overlap:
    both = int(coco_mask.area(coco_mask.merge([mask, truth], intersect=True)))
    return Overlap(both, int(coco_mask.area(mask)) + int(coco_mask.area(truth)) - both)


def _plain(mask: Rle) -> Rle:
    """Returns RLE that JSON can hold."""
    return {"size": [int(side) for side in mask["size"]], "counts": mask["counts"].decode("ascii")}
