"""The folder of an evaluation: the same files whether a model answered or somebody's file of predictions."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deris_llm.common.folders import replace_text
from deris_llm.common.words import count_of
from deris_llm.config import EvaluationConfig
from deris_llm.config.protocols import Protocol
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.breakdown import breakdown
from deris_llm.evaluation.intervals import intervals
from deris_llm.evaluation.overlays import Case, choose_cases, write_contact_sheet
from deris_llm.evaluation.overlays import write_page as write_overlays
from deris_llm.evaluation.page.page import PAGE_FILE, write_page
from deris_llm.evaluation.page.stored import Evaluation, open_evaluation
from deris_llm.evaluation.report import Section, read_report, update_report
from deris_llm.evaluation.results import EvaluationResult
from deris_llm.evaluation.video.frames import Expression, FrameProtocol, video_numbers
from deris_llm.evaluation.views import VIEWS_FILE, write_views
from deris_llm.structures import ReferringRecord

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"


class EvaluationFolder:
    """Takes the results of splits and writes what belongs to them; a report that is already there is added to.

        report.json             numbers with intervals, breakdown and selection error, where they come from, times, versions
        predictions/SPLIT.jsonl one line per phrase, masks as COCO RLE
        videos/SPLIT.json       of frames of videos: J and F of every expression and frame
        overlays.html           worst, best and random cases; overlays/SPLIT.png the same as sheets
        report.html             the page of it all (`page`); views.json what the model's queries said of some phrases

    Args:
        folder: made when something is written.
        protocols: those of all results.
        title: of the images.
        about: where the numbers come from: name, checkpoint, data_root, date, threshold_source, ...; stored as it is.

    Raises:
        ValueError: the folder's ``report.json`` is something else, or of another checkpoint; found before the work, not after.
    """

    def __init__(
        self, folder: str | Path, protocols: Sequence[Protocol], *, title: str, about: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.protocols = protocols
        self.title = title
        self.about = about
        self._cases: dict[str, list[Case]] = {}
        self._check_same_checkpoint(read_report(self.folder / REPORT_FILE))

    def _check_same_checkpoint(self, report: Mapping[str, Any]) -> None:
        there, ours = ((found or {}).get("fingerprint") for found in (report.get("about"), self.about))
        if there and ours and there != ours:
            raise ValueError(
                f"{self.folder}: expected a new folder or results of checkpoint {ours}, got results of checkpoint {there} "
                f"({report['about'].get('checkpoint', 'not noted where')}); nothing was changed. Choose another output folder"
            )

    def add(
        self,
        split: str,
        result: EvaluationResult,
        records: Sequence[ReferringRecord],
        *,
        seconds: float,
        section: Section = "splits",
        notes: Sequence[str] = (),
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Adds a split's numbers to the report; those of section ``splits`` with predictions and images.

        Args:
            split: ``dataset/split``.
            result: of the whole split.
            records: the same phrases.
            seconds: that it took.
            section: of the report.
            notes: what must be read with the split's numbers, besides the result's own.
            more: further entries of each protocol's numbers.

        Returns:
            The numbers as they stand in the report.
        """
        by_id = {record.phrase_id: record for record in records}
        num_crowds = sum(bool(record.crowds) for record in by_id.values())
        video = result.video_protocol
        fingerprints = {
            protocol.id: protocol.fingerprint() if video is None else video.fingerprint_of_images(protocol)
            for protocol in self.protocols
        }
        numbers = {
            protocol.id: result.numbers[protocol.id]
            | ({"n_crowds_left_out": num_crowds} if num_crowds and protocol.crowds == "left_out" else {})
            | {"fingerprint": fingerprints[protocol.id]}
            | extras(result, by_id, protocol, with_breakdown=section != "control")
            | dict(more or {})
            for protocol in self.protocols
        }
        update_report(
            self.folder / REPORT_FILE,
            section=section,
            numbers={split: numbers},
            timing={f"evaluate {section} {split}": seconds},
            protocols=self.protocols,
            notes={split: (*notes, *result.notes)} if section == "splits" else {},
            about=None if section == "step0" else self.about,
        )
        if section == "splits" and result.video_protocol is not None:
            self._add_videos(split, result.expressions, result.video_protocol)
        if section == "splits":
            path = self.folder / "predictions" / f"{file_name(split)}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            result.write_jsonl(path)
            self._cases[split] = choose_cases(result.answers, by_id, protocol=self.protocols[0].id)
        return numbers

    def add_unscored(self, split: str, answers: Sequence[Answer]) -> None:
        """Writes the predictions of a split whose truth is not published; a note in the report says so."""
        path = self.folder / "predictions" / f"{file_name(split)}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        EvaluationResult({}, list(answers)).write_jsonl(path)
        said = f"{count_of(len(answers), 'phrase')} answered, not scored: the truth is not published"
        update_report(self.folder / REPORT_FILE, notes={split: [said]}, about=self.about)

    def _add_videos(self, split: str, expressions: Sequence[Expression], protocol: FrameProtocol) -> None:
        """Adds J and F of a split, and the scores of every frame: `videos/SPLIT.json`."""
        numbers = video_numbers(expressions) | {"fingerprint": protocol.fingerprint()}
        self._add_video_numbers(split, protocol, numbers)
        path = self.folder / "videos" / f"{file_name(split)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps([each.to_json() for each in expressions], ensure_ascii=False) + "\n")

    def add_video_controls(self, split: str, controls: Mapping[str, float | None], protocol: FrameProtocol) -> None:
        """Adds numbers beside the J&F of a split that was added under a protocol."""
        known = read_report(self.folder / REPORT_FILE)["videos"][split][protocol.id]
        self._add_video_numbers(split, protocol, {**known, **controls})

    def _add_video_numbers(self, split: str, protocol: FrameProtocol, numbers: Mapping[str, Any]) -> None:
        found = {split: {protocol.id: numbers}}
        update_report(self.folder / REPORT_FILE, section="videos", numbers=found, protocols=[protocol])

    def write_pictures(self, look_inside: Callable[[Evaluation], Evaluation] | None = None) -> None:
        """Draws the cases of the splits that were added, and the page of the folder.

        Args:
            look_inside: adds to the page what only the model that answered can show.
        """
        if not self._cases:
            return
        for what, write in (
            ("overlays", self._write_overlays),
            (PAGE_FILE, functools.partial(self._write_page, look_inside)),
        ):
            try:
                write()
            except (ValueError, OSError) as error:  # the numbers are written, and `deris-llm report` makes a page again
                logger.warning("%s was not written: %s", self.folder / what, error)

    def _write_overlays(self) -> None:
        first = self.protocols[0].id
        for split, cases in self._cases.items():
            path = self.folder / "overlays" / f"{file_name(split)}.png"
            write_contact_sheet(cases, path, title=f"{self.title}: {split} ({first})", protocol=first)
        write_overlays(self._cases, self.folder / "overlays.html", title=self.title, protocol=first)

    def _write_page(self, look_inside: Callable[[Evaluation], Evaluation] | None) -> None:
        (self.folder / VIEWS_FILE).unlink(missing_ok=True)  # of answers that are no more
        evaluation = open_evaluation(self.folder)
        if look_inside is not None:  # at the splits of this model: others in the folder may be of another
            added = {split: evaluation.answers[split] for split in self._cases}
            views = look_inside(dataclasses.replace(evaluation, answers=added)).views
            write_views(views, self.folder / VIEWS_FILE)
            evaluation = dataclasses.replace(evaluation, views=views)
        write_page(evaluation, self.folder / PAGE_FILE)


def extras(
    result: EvaluationResult,
    records: Mapping[str, ReferringRecord],
    protocol: Protocol,
    *,
    with_breakdown: bool = True,
) -> dict[str, Any]:
    """What stands beside the numbers of a protocol.

    Args:
        result: of the whole split.
        records: by phrase id.
        protocol: one of the result's.
        with_breakdown: by kind of phrase and object too.

    Returns:
        ``intervals`` {metric: [low, high]}, 95 %, see `intervals.intervals`; ``selection`` {"metric", "oracle",
        "answer", "error"}: what the choice of queries loses against the best ones, in points, where the best are known;
        ``breakdown``, see `breakdown.breakdown`.
    """
    counted, ratios = result.counted[protocol.id], result.ratios[protocol.id]
    sure = intervals(ratios, [records[p.phrase_id].video or p.image_id for p in counted])
    found: dict[str, Any] = {"intervals": {name: interval for name, interval in sure.items() if interval is not None}}
    metric = "gIoU" if result.is_generalised else "mIoU"
    if counted and f"oracle_{metric}" in ratios:
        answer, oracle = ratios[metric].percent or 0.0, ratios[f"oracle_{metric}"].percent or 0.0
        found["selection"] = {"metric": metric, "oracle": oracle, "answer": answer, "error": oracle - answer}
    if with_breakdown and counted:
        found["breakdown"] = breakdown(counted, records, ratios)
    return found


def default_folder(kind: str, name: str, fingerprint: str, evaluation: EvaluationConfig) -> Path:
    """Where results of a checkpoint go if nobody says: a folder that no other checkpoint or threshold has.

    Args:
        kind: ``eval`` or ``predict``.
        name: of the run config.
        fingerprint: of the checkpoint.
        evaluation: with the threshold that is used.
    """
    return Path("runs", kind, f"{name}-{fingerprint}-threshold-{evaluation.score_threshold:g}")


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be made or written to, before the work; leaves nothing behind.

    Raises:
        ValueError: it cannot be.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder or a new name, got a file; choose another name")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{folder}: expected a folder that can be written to, got {type(error).__name__}: {error}; choose another place, or "
            "make room there"
        ) from error


def write_names(path: Path, names: Sequence[str]) -> None:
    """Writes what a call left out, a line each, and removes what an earlier call wrote if nothing was left out."""
    if names:
        lines = (" ".join(name.splitlines()) for name in names)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace")
    else:
        path.unlink(missing_ok=True)


def file_name(split: str) -> str:
    """``refcoco/val`` as part of a file's name."""
    return split.replace("/", "_")
