"""Scores anybody's predictions for videos against the truth as it is published (`deris-llm score --format ...`).

Every expression of the truth counts. One without any prediction counts as J = F = 0, whether its folder is missing or empty, and is
listed; one with predictions of some frames only is an error. With ``missing_as_empty`` whatever is missing is an empty mask, which
is right where the truth is empty.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np

from deris_llm.common.terminal import progress_bar
from deris_llm.common.words import count_of
from deris_llm.data.errors import DataError, listed_by_cause
from deris_llm.evaluation.tables import Column, StackedTable
from deris_llm.evaluation.video.metrics import frame_statistics
from deris_llm.evaluation.video.protocols import (
    ANNOTATORS,
    DavisNumbers,
    Score,
    SequenceScore,
    davis_numbers,
    frame_score,
    mean_score,
    semi_supervised,
    unsupervised,
)
from deris_llm.evaluation.video.trees import FrameError, PngTree, RleFile, open_predictions, read_labels
from deris_llm.evaluation.video.truth import DavisSequence, TruthVideo, read_davis, read_truth

FORMATS = {
    "mevis": "MeViS: every expression, all frames",
    "ref-ytvos": "Ref-YouTube-VOS: every expression, all frames",
    "ref-davis-a": "Ref-DAVIS17, protocol A: label maps of four annotators (anno_0 to anno_3), best assignment",
    "ref-davis-b": "Ref-DAVIS17, protocol B: every expression, all frames",
    "davis-semi": "DAVIS 2017, semi-supervised: objects by label, without the first and the last frame",
    "davis-unsup": "DAVIS 2017, unsupervised: at most 20 proposals, best assignment",
}
"""Formats of `deris-llm score`, with what they compare."""
DEFAULT_SPLITS = {"mevis": "valid_u", "ref-ytvos": "valid"} | dict.fromkeys(
    ("ref-davis-a", "ref-davis-b", "davis-semi", "davis-unsup"), "val"
)
SCORES_FILE = "scores.json"
_EACH_FILES = ("expressions.jsonl", "objects.jsonl")
_LISTED = 5
_ITEM = TypeVar("_ITEM")
_RESULT = TypeVar("_RESULT")


@dataclass(frozen=True)
class ExpressionResult:
    """One expression of a video."""

    video: str
    expression: str
    phrase: str
    frames: tuple[Score, ...]
    num_missing: int = 0  # frames without a prediction
    own_frames: tuple[int, ...] | None = None  # positions of the frames that the source lists for the object

    @property
    def is_missing(self) -> bool:
        """There is no prediction of any frame."""
        return self.num_missing == len(self.frames)

    @property
    def score(self) -> Score:
        """Mean over all frames."""
        return mean_score(self.frames)

    @property
    def name(self) -> str:
        return f"{self.video}/{self.expression}"


def score_expressions(
    videos: Sequence[TruthVideo],
    predictions: PngTree | RleFile,
    *,
    missing_as_empty: bool = False,
    workers: int | None = None,
) -> list[ExpressionResult]:
    """Compares the masks of every expression with the truth, frame by frame.

    Args:
        videos: the truth.
        predictions: anybody's.
        missing_as_empty: what is missing is an empty mask; default: see above.
        workers: processes; None = one per core, at most 8.

    Returns:
        A result per expression, in the order of the truth.

    Raises:
        DataError: everything that cannot be compared, in one error, or no prediction at all.
    """
    score = partial(_score_video, missing_as_empty=missing_as_empty)
    parts = _mapped(score, [(video, predictions.of_video(video.name)) for video in videos], workers)
    results = [result for found, _ in parts for result in found]
    _check(predictions.path, [problem for _, problems in parts for problem in problems])
    if all(result.is_missing for result in results):
        raise DataError(
            f"{predictions.path}: expected predictions of {videos[0].name}/{next(iter(videos[0].phrases), '0')} and others, got "
            "none of any expression: check the path and the names of the folders"
        )
    return results


def score_davis(
    sequences: Sequence[DavisSequence],
    predictions: Path,
    *,
    is_unsupervised: bool,
    missing_as_empty: bool = False,
    workers: int | None = None,
) -> dict[str, SequenceScore]:
    """Compares label maps with the truth of DAVIS.

    Args:
        sequences: the truth.
        predictions: folder ``SEQUENCE/FRAME.png``.
        is_unsupervised: which protocol.
        missing_as_empty: a missing frame is an empty label map; default: an error.
        workers: processes; None = one per core, at most 8.

    Raises:
        DataError: everything that cannot be compared, in one error.
    """
    score = partial(_score_sequence, is_unsupervised=is_unsupervised, missing_as_empty=missing_as_empty)
    parts = _mapped(score, [(sequence, predictions / sequence.name) for sequence in sequences], workers)
    _check(predictions, [found for found in parts if isinstance(found, str)])
    return {
        sequence.name: found for sequence, found in zip(sequences, parts, strict=True) if not isinstance(found, str)
    }


def run_video_score(
    predictions: Path,
    *,
    form: str,
    source: Path,
    out: Path,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
    missing_as_empty: bool = False,
    workers: int | None = None,
) -> dict[str, Any]:
    """Scores predictions and writes ``scores.json`` and ``expressions.jsonl`` or ``objects.jsonl``.

    Args:
        predictions: a tree of PNGs or a JSON file of RLEs.
        form: one of `FORMATS`.
        source: folder of the dataset as published, as of ``data prepare --source``; of DAVIS that with ``ImageSets``.
        out: folder of the results.
        split: as the dataset calls it; default: the one whose masks are published for evaluation.
        mapping: as of ``data prepare --mapping``.
        missing_as_empty: what is missing is an empty mask.
        workers: processes; None = one per core, at most 8.

    Returns:
        What ``scores.json`` holds: numbers in [0, 1] by row and column, and notes.

    Raises:
        DataError: unusable truth or predictions.
    """
    split = split or DEFAULT_SPLITS[form]
    if form in ("mevis", "ref-ytvos", "ref-davis-b"):
        opened = open_predictions(predictions)
        videos = read_truth(form.removesuffix("-b"), source, split, mapping=mapping)
        results = score_expressions(videos, opened, missing_as_empty=missing_as_empty, workers=workers)
        numbers = expression_numbers(results)
        notes = _missing_notes(results, missing_as_empty=missing_as_empty)
        unsorted = [video.name for video in videos if list(video.frames) != sorted(video.frames)]
        notes += [
            f"frames of {count_of(len(unsorted), 'video')} are listed in another order than that of their names; RLEs follow the "
            f"list, PNGs the names: {_some(unsorted)}"
        ] * bool(unsorted)
        unknown = opened.unknown({(video.name, e): video.frames for video in videos for e in video.phrases})
        notes += [f"{count_of(len(unknown), 'prediction')} of nothing in the truth, not read: {_some(unknown)}"] * bool(
            unknown
        )
        lines, file = [_line(result) for result in results], _EACH_FILES[0]
        counts = {"videos": len(videos), "expressions": len(results)}
    else:
        numbers, lines, notes, counts = _davis(
            predictions, form=form, source=source, split=split, missing_as_empty=missing_as_empty, workers=workers
        )
        file = _EACH_FILES[1]
    report = {
        "format": form,
        "compares": FORMATS[form],
        "predictions": str(predictions),
        "source": str(source),
        "split": split,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "missing_as_empty": missing_as_empty,
        "counts": counts,
        "numbers": numbers,
        "notes": notes,
        "each": file,
    }
    out.mkdir(parents=True, exist_ok=True)
    for other in _EACH_FILES:
        (out / other).unlink(missing_ok=True)  # of an earlier call
    with (out / file).open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (out / SCORES_FILE).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def expression_numbers(results: Sequence[ExpressionResult]) -> dict[str, dict[str, float]]:
    """Returns J&F, J and F in [0, 1] by the frames that are counted.

    ``all frames`` is the number of the benchmark. For Ref-YouTube-VOS, where the server's code was not published, two others are
    added: only the frames that the source lists for the object, and all frames from the first of these on.
    """
    rows = {"all frames": mean_score(result.score for result in results)}
    listed = [(result, result.own_frames) for result in results if result.own_frames]
    if len(listed) == len(results):
        rows["only frames of the object"] = mean_score(_mean_at(result, own) for result, own in listed)
        rows["from the object's first frame"] = mean_score(
            _mean_at(result, range(min(own), len(result.frames))) for result, own in listed
        )
    return {row: _columns(score) for row, score in rows.items()}


def video_table(report: dict[str, Any]) -> StackedTable:
    """Returns the numbers in percent, with notes below."""
    rows = report["numbers"]
    columns = [
        Column(f" {name}", [f"{100 * row[name]:.2f}" for row in rows.values()]) for name in next(iter(rows.values()))
    ]
    counts = ", ".join(count_of(number, name.removesuffix("s")) for name, number in report["counts"].items())
    caption = "\n".join([f"{report['compares']}. {counts}. Percent.", *report["notes"]])
    return StackedTable(f"{report['format']}, {report['split']}", Column("", list(rows)), columns, caption=caption)


def _score_video(
    video_and_predictions: tuple[TruthVideo, PngTree | RleFile], *, missing_as_empty: bool
) -> tuple[list[ExpressionResult], list[str]]:
    """Returns results and problems of a video; runs in a worker process."""
    video, predictions = video_and_predictions
    problems: list[str] = []
    found: dict[str, list[bool]] = {}
    for expression in video.phrases:
        try:
            found[expression] = predictions.found(video.name, expression, video.frames)
        except FrameError as error:
            problems.append(str(error))
            continue
        absent = [frame for frame, is_there in zip(video.frames, found[expression], strict=True) if not is_there]
        if 0 < len(absent) < len(video.frames) and not missing_as_empty:
            problems.append(
                f"{video.name}/{expression}: expected a mask of each of the {len(video.frames)} frames, got none of "
                f"{_some(absent)}: write them; --missing-as-empty takes empty masks for them"
            )
            del found[expression]
    frames: dict[str, list[Score]] = {expression: [] for expression in found}
    for position, frame in enumerate(video.frames):
        truths = video.masks(position)
        for expression in list(frames):
            is_there = found[expression]
            try:
                if is_there[position]:
                    answer = predictions.mask(video.name, expression, position, frame, video.size)
                    score = frame_score(truths[expression], answer)
                elif missing_as_empty:
                    score = frame_score(truths[expression], np.zeros(video.size, dtype=bool))
                else:
                    score = Score(0.0, 0.0)
            except FrameError as error:
                problems.append(str(error))
                del frames[expression]
            else:
                frames[expression].append(score)
    results = [
        ExpressionResult(
            video.name,
            expression,
            video.phrases[expression],
            tuple(scores),
            num_missing=found[expression].count(False),
            own_frames=None if video.own_frames is None else video.own_frames[expression],
        )
        for expression, scores in frames.items()
    ]
    return results, problems


def _score_sequence(
    sequence_and_folder: tuple[DavisSequence, Path], *, is_unsupervised: bool, missing_as_empty: bool
) -> SequenceScore | str:
    """Returns the score of a sequence or what is wrong with it; runs in a worker process."""
    sequence, folder = sequence_and_folder
    truth = sequence.labels()
    frames = sequence.frames if is_unsupervised else sequence.frames[1:-1]
    answer: list[np.ndarray] = []
    try:
        for frame in frames:
            path = folder / f"{frame}.png"
            if missing_as_empty and not path.is_file():
                answer.append(np.zeros_like(truth[0]))
            else:
                answer.append(read_labels(path, truth[0].shape))
        return unsupervised(truth, answer) if is_unsupervised else semi_supervised(truth, answer)
    except FrameError as error:
        return str(error)
    except ValueError as error:
        return f"{folder}: {error}"


def _davis(
    predictions: Path, *, form: str, source: Path, split: str, missing_as_empty: bool, workers: int | None
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]], list[str], dict[str, int]]:
    """Numbers, lines per object, notes and counts of the formats that compare label maps."""
    is_a = form == "ref-davis-a"
    is_unsupervised = form != "davis-semi"
    sequences = read_davis(source / "DAVIS" if is_a else source, unsupervised=is_unsupervised, split=split)
    parts = {f"annotator {k}": predictions / f"anno_{k}" for k in range(ANNOTATORS)} if is_a else {"all": predictions}
    if absent := [path for path in parts.values() if not path.is_dir()]:
        raise DataError(
            f"{absent[0]}: expected a folder of label maps, SEQUENCE/FRAME.png, got none there: check the path"
            + ("; protocol A has one for each annotator, anno_0 to anno_3" if is_a else "")
        )
    found = {
        name: score_davis(
            sequences, path, is_unsupervised=is_unsupervised, missing_as_empty=missing_as_empty, workers=workers
        )
        for name, path in parts.items()
    }
    numbers = {name: davis_numbers(scored.values()) for name, scored in found.items()}
    rows = {name: _columns(each.score) if is_a else davis_columns(each) for name, each in numbers.items()}
    if is_a:
        rows = {"mean of the annotators": _columns(mean_score(each.score for each in numbers.values()))} | rows
    lines = [
        ({"annotator": name} if is_a else {}) | _object_line(sequence, each, scored)
        for name, of_part in found.items()
        for sequence, scored in of_part.items()
        for each in scored.objects
    ]
    first = next(iter(found.values()))
    never = [f"{name} {label}" for name, scored in first.items() for label in scored.never_seen]
    notes = [
        f"{count_of(len(never), 'label')} below the largest of the first frame in no scored frame; an empty answer gets 1 there: "
        f"{_some(never)}"
    ] * bool(never)
    return rows, lines, notes, {"sequences": len(first), "objects": sum(len(s.objects) for s in first.values())}


def _missing_notes(results: Sequence[ExpressionResult], *, missing_as_empty: bool) -> list[str]:
    absent = [result.name for result in results if result.is_missing]
    notes = []
    if absent:
        counted = "count as empty masks" if missing_as_empty else "count as J = F = 0"
        notes.append(
            f"{len(absent)} of {count_of(len(results), 'expression')} have no prediction and {counted}: {_some(absent)}"
        )
    if partly := [result for result in results if 0 < result.num_missing < len(result.frames)]:
        number = sum(result.num_missing for result in partly)
        notes.append(
            f"{count_of(number, 'frame')} of {count_of(len(partly), 'expression')} without a prediction count as empty masks: "
            f"{_some([result.name for result in partly])}"
        )
    return notes


def _mean_at(result: ExpressionResult, positions: Iterable[int]) -> Score:
    return mean_score(result.frames[position] for position in positions)


def _columns(score: Score) -> dict[str, float]:
    return {"J&F": score.jf, "J": score.j, "F": score.f}


def davis_columns(numbers: DavisNumbers) -> dict[str, float]:
    """The seven numbers of the DAVIS table, in its order."""
    by_metric = {
        f"{metric}-{name.capitalize()}": value
        for metric, statistics in (("J", numbers.j), ("F", numbers.f))
        for name, value in statistics._asdict().items()
    }
    return {"J&F-Mean": numbers.score.jf} | by_metric


def _line(result: ExpressionResult) -> dict[str, Any]:
    return {
        "video": result.video,
        "expression": result.expression,
        "phrase": result.phrase,
        **_columns(result.score),
        "missing_frames": result.num_missing,
        "J_per_frame": [score.j for score in result.frames],
        "F_per_frame": [score.f for score in result.frames],
    }


def _object_line(sequence: str, each: Any, scored: SequenceScore) -> dict[str, Any]:
    return {
        "sequence": sequence,
        "object": each.label,
        "proposal": each.answer_label if each.answer_label <= scored.num_answers else None,
        "J": frame_statistics(each.j)._asdict(),
        "F": frame_statistics(each.f)._asdict(),
        "J_per_frame": each.j.tolist(),
        "F_per_frame": each.f.tolist(),
    }


def _mapped(function: Callable[[_ITEM], _RESULT], items: Sequence[_ITEM], workers: int | None) -> list[_RESULT]:
    number = min(os.cpu_count() or 1, 8, len(items)) if workers is None else workers
    with contextlib.ExitStack() as stack:
        results: Iterable[_RESULT] = map(function, items)
        if number > 1:
            method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
            context = multiprocessing.get_context(method)
            # OpenCV's threads of this process do not exist in a fork
            pool = stack.enter_context(
                ProcessPoolExecutor(number, context, initializer=cv2.setNumThreads, initargs=(0,))
            )
            results = pool.map(function, items)
        bar = stack.enter_context(progress_bar())
        return list(bar.track(results, total=len(items), description="videos"))


def _check(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise DataError(
            f"{path}: {count_of(len(problems), 'problem')}\n{listed_by_cause(problems)}\nCorrect them: predictions that are there "
            "must be valid"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_LISTED], *["..."] * (len(names) > _LISTED)])
