"""Answers phrases about image files: masks as PNG, overlays, and one line of JSON per phrase (`deris-llm predict`).

A folder of predictions holds

    predictions.jsonl   one line per image and phrase, written after its files; `deris-llm score` reads it
    masks/              NAME.png, 0 or 255, at the image's size; with --instances also NAME.instance-1.png, ...
    overlays/           NAME.jpg, the mask over the image, with phrase, score and presence
    left_out.txt        what the last call left out, with the reason; absent if nothing was

NAME is derived from image and phrase. A line also records the checkpoint and the selection rule, so that a second call
skips what is done and refuses to mix answers of different kinds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deris_llm.common.strict_files import json_of
from deris_llm.common.terminal import progress_bar
from deris_llm.common.words import shortened
from deris_llm.data.images import images_in
from deris_llm.data.masks import encode_mask
from deris_llm.evaluation.output import check_writable, default_folder, write_names
from deris_llm.evaluation.submissions import PREDICTIONS_FILE
from deris_llm.models.out_of_memory import DoesNotFitError
from deris_llm.serving.answers import ImageAnswer, save_mask
from deris_llm.serving.pipeline import DerisPipeline, as_picture
from deris_llm.serving.video import FrameModel
from deris_llm.structures import Exif

logger = logging.getLogger(__name__)

LEFT_OUT_FILE = "left_out.txt"
_ROWS_SHOWN = 40
_BAD_SHOWN = 10
_NAME_SHOWN = 40  # characters of an image name or a phrase in the table
_COLOURS = {"found": "green", "best guess": "yellow", "nothing": "red"}


@dataclass(frozen=True)
class Question:
    """A phrase about an image."""

    image: str  # as it was given; the name of the image in the predictions
    path: Path  # of the file
    phrase: str
    phrase_id: str = ""  # copied to the predictions; empty = none

    @property
    def file_stem(self) -> str:
        """A readable file name that is unique to the question."""
        named = "\0".join((self.image, self.phrase, self.phrase_id)).encode(errors="surrogatepass")
        digest = hashlib.sha256(named).hexdigest()[:8]
        readable = (_words(self.path.stem[-32:]), _words(self.phrase.lower()[:32]))
        return "-".join((*filter(None, readable), digest))


def _words(text: str) -> str:
    """Returns a text as part of a file name; cut so that names stay below 255 bytes."""
    return re.sub(r"[^\w]+", "-", text).encode()[:96].decode(errors="ignore").strip("-")


@dataclass
class Predictions:
    """The result of a call."""

    out: Path
    threshold_source: str = ""  # in words
    lines: list[dict[str, Any]] = field(
        default_factory=list
    )  # of this call, without masks, with area and number of queries
    num_there: int = 0  # questions answered by an earlier call
    bad: list[str] = field(default_factory=list)  # what was left out as bad, with the reason
    others: list[str] = field(default_factory=list)  # files in image folders that are not images
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage of a command

    def to_json(self) -> dict[str, Any]:
        """Returns where the answers are, and those of this call without their masks."""
        return {
            "out": str(self.out),
            "predictions": str(self.out / PREDICTIONS_FILE),
            "threshold_source": self.threshold_source,
            "answers": [line | {"file": str(self.out / line["file"])} for line in self.lines],
            "num_answered_before": self.num_there,
            "left_out": [*self.bad, *self.others],
            "seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
        }


# -- questions -------------------------------------------------------------------------------------------------------


def questions_about(images: Sequence[Path], phrases: Sequence[str], others: list[str] | None = None) -> list[Question]:
    """Returns every phrase about every image.

    Args:
        images: files and folders; a folder's images are taken in the order of their names, subfolders are not entered.
        phrases: texts.
        others: receives the names of files in the folders that are not images, with the reason.

    Raises:
        ValueError: a path that does not exist, or a folder without images.
    """
    files: dict[Path, None] = {}
    for path in images:
        if path.is_dir():
            found, left_out = images_in(path)
            if not found:
                there = f", but e.g. {left_out[0]}" if left_out else ""
                raise ValueError(
                    f"--image {path}: expected an image or a folder with images in it, got a folder without any "
                    f"(subfolders are not entered){there}; give that folder, or the files."
                )
            files |= dict.fromkeys(found)
            if others is not None:
                others += left_out
        elif path.is_file():
            files[path] = None
        else:
            raise ValueError(f"--image {path}: expected an image or a folder of images, got no such file; correct it.")
    return [Question(str(path), path, phrase) for path in files for phrase in phrases]


def read_pairs(path: Path) -> tuple[list[Question], list[str]]:
    """Reads a JSONL of `{"image": ..., "phrase": ...}` or `{"image": ..., "phrases": [...]}`, other keys are not read.

    Image names are relative to the folder of the file. A `phrase_id` is copied to the predictions.

    Args:
        path: of the file.

    Returns:
        the questions, and what is wrong with the lines that cannot be used.

    Raises:
        ValueError: no such file, or an empty one.
    """
    if not path.is_file():
        raise ValueError(
            f"--jsonl {path}: expected a file with one line of JSON per image and phrase, got no such file."
        )
    questions: list[Question] = []
    problems: list[str] = []
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"--jsonl {path}: expected lines such as {_EXAMPLE_LINE}, got an empty file; write some.")
    for number, line in lines:
        try:
            questions += _questions_of_line(line, path.parent)
        except ValueError as error:
            problems.append(f"{path.name}, line {number}: {error}")
    return questions, problems


_EXAMPLE_LINE = '{"image": "street.jpg", "phrase": "the red car"}'


def _questions_of_line(line: bytes, folder: Path) -> list[Question]:
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in UTF-8 such as {_EXAMPLE_LINE}, got {line[:80]!r} ({error})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or not entry["image"]:
        raise ValueError(f"expected an object such as {_EXAMPLE_LINE}, got {shortened(entry, 120)}")
    phrases = entry.get("phrases", [entry.get("phrase")])
    if ("phrase" in entry) == ("phrases" in entry) or not isinstance(phrases, list) or not phrases:
        raise ValueError(
            f"expected either `phrase`, a text, or `phrases`, a list of texts, got {shortened(entry, 120)}"
        )
    for phrase in phrases:
        if not isinstance(phrase, str) or not phrase.strip():
            raise ValueError(f"expected phrases with words, got {phrase!r}")
    phrase_id = entry.get("phrase_id", "")
    if not isinstance(phrase_id, str) or (phrase_id and len(phrases) > 1):
        raise ValueError(f"expected a `phrase_id` that is a text, for one phrase, got {shortened(entry, 120)}")
    path = folder / entry["image"]
    if not path.is_file():
        raise ValueError(f"expected an image at {path}, got {'a folder' if path.is_dir() else 'no such file'}")
    return [Question(entry["image"], path, phrase, phrase_id) for phrase in phrases]


# -- answers ---------------------------------------------------------------------------------------------------------


def predict(
    pipeline: DerisPipeline,
    questions: Iterable[Question],
    out: Path,
    *,
    overlays: bool = True,
    instances: bool = False,
    skip_bad: bool = False,
    progress: bool = True,
    exif: Exif = "displayed",
    bad: Sequence[str] = (),
    others: Sequence[str] = (),
) -> Predictions:
    """Answers the questions that a folder has no answer for yet, image by image.

    Args:
        pipeline: the checkpoint.
        questions: any number; those about one image are asked together.
        out: folder of predictions; an unfinished one of the same checkpoint and settings is resumed.
        overlays: writes the images with their masks.
        instances: also writes the mask of each selected query.
        skip_bad: leaves out images and phrases that cannot be answered; otherwise they are errors.
        progress: shows a progress bar.
        exif: orientation of images and masks: as EXIF displays them, or as their pixels are stored.
        bad: input lines already left out, for `left_out.txt`.
        others: files already left out because they are not images, for `left_out.txt`.

    Raises:
        ValueError: the folder holds something else or cannot be written to, or (without `skip_bad`) an image or phrase is bad.
    """
    done = _prepared(out, rule_of(pipeline, instances=instances) | {"exif": exif})
    result = Predictions(out, pipeline.threshold_source, bad=list(bad), others=list(others))
    by_picture: dict[Path, list[Question]] = {}
    for question in dict.fromkeys(questions):
        if _key(question) in done:
            result.num_there += 1
        else:
            by_picture.setdefault(question.path, []).append(question)
    limits = pipeline.config.evaluation
    groups = [
        asked[start : start + limits.max_phrases_per_batch]
        for asked in by_picture.values()
        for start in range(0, len(asked), limits.max_phrases_per_batch)
    ]
    batches = [groups[i : i + limits.images_per_device] for i in range(0, len(groups), limits.images_per_device)]
    try:
        # File names that are not UTF-8 contain lone surrogates, which are escaped.
        with (
            progress_bar("phrases", enabled=progress) as bar,
            (out / PREDICTIONS_FILE).open("a", encoding="utf-8", errors="backslashreplace") as file,
        ):
            task = bar.add_task("predict", total=sum(map(len, groups)))
            for batch in batches:
                for question, answer in _answered(pipeline, batch, result.bad, exif, skip_bad=skip_bad):
                    _write_files(question, answer, out, overlays=overlays, instances=instances)
                    line = _line(question, answer, instances=instances) | rule_of(pipeline)
                    line |= {"exif": exif} if exif == "stored" else {}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    small = {name: value for name, value in line.items() if name not in ("mask", "instances")}
                    result.lines.append(small | {"area": float(answer.mask.mean()), "number": len(answer.query_index)})
                file.flush()
                bar.update(task, advance=sum(map(len, batch)))
        write_names(out / LEFT_OUT_FILE, [*result.bad, *result.others])
    except OSError as error:
        raise ValueError(
            f"{out}: expected to write answers there, got {error}. Earlier answers are kept; make room and repeat the "
            "command, which continues from there, or choose another --out"
        ) from error
    return result


def _answered(
    pipeline: DerisPipeline, batch: Sequence[Sequence[Question]], bad: list[str], exif: Exif, *, skip_bad: bool
) -> Iterable[tuple[Question, ImageAnswer]]:
    """Answers a batch; if something in it is bad, asks one question at a time, so that the bad one is named."""
    try:
        pictures = [as_picture(asked[0].path, exif=exif) for asked in batch]
        pairs = [(picture, [q.phrase for q in asked]) for picture, asked in zip(pictures, batch, strict=True)]
        answers = list(pipeline.answer_all(pairs))
    except DoesNotFitError:
        raise
    except ValueError:
        yield from _one_by_one(pipeline, batch, bad, exif, skip_bad=skip_bad)
        return
    for asked, found in zip(batch, answers, strict=True):
        yield from zip(asked, found, strict=True)


def _one_by_one(
    pipeline: DerisPipeline, batch: Sequence[Sequence[Question]], bad: list[str], exif: Exif, *, skip_bad: bool
) -> Iterable[tuple[Question, ImageAnswer]]:
    for asked in batch:
        for question in asked:
            try:
                picture = as_picture(question.path, exif=exif)
                answer = pipeline(picture, question.phrase)
            except DoesNotFitError:
                raise
            except ValueError as error:
                problem = f"{question.image}, {question.phrase[:120]!r}: {error}"
                if not skip_bad:
                    raise ValueError(
                        f"{problem}\nEarlier answers are kept; repeat the command to continue from there, with --skip-bad to "
                        "leave out what is bad"
                    ) from error
                bad.append(problem)
            else:
                yield question, answer


def rule_of(pipeline: FrameModel, *, instances: bool | None = None) -> dict[str, Any]:
    """Returns the checkpoint and the selection rule that made the answers."""
    options = pipeline.config.evaluation
    settings: dict[str, Any] = {
        "checkpoint": pipeline.fingerprint,
        "score_threshold": options.score_threshold,
        "selection": options.selection,
        "presence_use": options.presence,
    }
    return settings if instances is None else settings | {"instances": instances}


def _line(question: Question, answer: ImageAnswer, *, instances: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"phrase_id": question.phrase_id} if question.phrase_id else {}
    line |= {
        "image": question.image,
        **answer.to_json(),
        "file": f"masks/{question.file_stem}.png",
    }
    if instances:
        masks = zip(answer.instance_masks, answer.instance_scores, strict=True)
        line["instances"] = [{"mask": encode_mask(mask), "score": round(score, 4)} for mask, score in masks]
    return line


def _key(question: Question) -> tuple[str, str, str]:
    return question.image, question.phrase, question.phrase_id


def _prepared(out: Path, settings: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Makes the folder, or reads the answers of an earlier call; an incomplete last line of a killed call is removed.

    Raises:
        ValueError: it holds something else, or answers of another checkpoint or selection rule.
    """
    path = out / PREDICTIONS_FILE
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: expected a folder or a new name, got a file; choose another name.")
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(
                f"--out {out}: expected a new folder, or one with {PREDICTIONS_FILE} of an earlier call, got one with "
                f"other files in it; choose another name."
            )
        out.mkdir(parents=True, exist_ok=True)
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        logger.warning("%s: its last line is incomplete and is answered again", path)
        path.write_bytes(whole)
    done = set()
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json_of(text)
            there = {name: line[name] for name in settings if name not in ("instances", "exif")}
            there |= {"instances": "instances" in line, "exif": line.get("exif", "displayed")}
            done.add((line["image"], line["phrase"], line.get("phrase_id", "")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected an answer of `deris-llm predict`, got {shortened(text.decode(errors='replace'), 120)} "
                f"({type(error).__name__}: {error}); choose another --out."
            ) from error
        differ = [
            f"{name} {there[name]} there, {settings[name]} now" for name in settings if there[name] != settings[name]
        ]
        if differ:
            raise ValueError(
                f"--out {out}: expected a new folder, or answers of the same kind, got answers of another kind: {'; '.join(differ)}. "
                "Nothing was changed; choose another --out, or remove that folder."
            )
    return done


# -- files and terminal ----------------------------------------------------------------------------------------------


def _write_files(question: Question, answer: ImageAnswer, out: Path, *, overlays: bool, instances: bool) -> None:
    stem = question.file_stem
    answer.save(out / "masks" / f"{stem}.png")
    if instances:
        for number, mask in enumerate(answer.instance_masks, start=1):
            save_mask(mask, out / "masks" / f"{stem}.instance-{number}.png")
    if overlays:
        path = out / "overlays" / f"{stem}.jpg"
        path.parent.mkdir(exist_ok=True)
        answer.overlay().save(path, quality=92)


def show_predictions(result: Predictions, console: Console) -> None:
    """Prints a table of the first answers, and counts."""
    shown = result.lines[:_ROWS_SHOWN]
    images = [line["image"] for line in shown]
    folder = os.path.commonprefix(images).rpartition("/")[0]  # common to all
    table = Table(box=None, pad_edge=False)
    one_picture = len(set(images)) == 1
    for name in ("phrase",) if one_picture else ("image", "phrase"):
        table.add_column(name, overflow="fold")
    table.add_column("answer", no_wrap=True)
    for name in ("area %", "score", "presence"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in shown:
        verdict = line["verdict"] + f" {line['number']}" * (line["number"] > 1)
        answer = Text(verdict, style=_COLOURS[line["verdict"]])
        numbers = (f"{100 * line['area']:.1f}", f"{line['score']:.2f}", f"{line['presence']:.2f}")
        picture = () if one_picture else (_end_of(line["image"].removeprefix(f"{folder}/")),)
        table.add_row(*picture, _start_of(line["phrase"]), answer, *numbers)
    if shown:
        console.print(table)
    if len(result.lines) > _ROWS_SHOWN:
        console.print(
            f"... and {len(result.lines) - _ROWS_SHOWN:,} more in {result.out / PREDICTIONS_FILE}", soft_wrap=True
        )
    console.print(_counts(result))
    left_out = [*result.bad, *result.others]
    for problem in left_out[:_BAD_SHOWN]:
        console.print(f"  left out: {problem}", soft_wrap=True)
    if len(left_out) > _BAD_SHOWN:
        console.print(
            f"  ... and {len(left_out) - _BAD_SHOWN:,} more, all in {result.out / LEFT_OUT_FILE}", soft_wrap=True
        )
    console.print(result.threshold_source)
    if result.seconds:
        console.print(f"seconds: {', '.join(f'{stage} {seconds:.1f}' for stage, seconds in result.seconds.items())}")
    console.print(f"written to {result.out}", soft_wrap=True)


def show_result_line(result: Predictions, console: Console) -> None:
    """Prints the counts and the folder in one line."""
    console.print(f"{_counts(result)}: written to {result.out}", soft_wrap=True)


def _counts(result: Predictions) -> str:
    verdicts = Counter(line["verdict"] for line in result.lines)
    said = [f"{len(result.lines):,} answered: {verdicts['found']:,} found"]
    if number := verdicts["best guess"]:
        guesses = "1 best guess" if number == 1 else f"{number:,} best guesses"
        said[0] += f", {guesses} below the threshold {result.lines[0]['score_threshold']:g}"
    said[0] += f", {verdicts['nothing']:,} nothing"
    said += [f"{result.num_there:,} were answered before"] if result.num_there else []
    said += [f"{len(result.bad):,} bad ones left out"] if result.bad else []
    said += [f"{len(result.others):,} that are not images left out"] if result.others else []
    return "; ".join(said)


def _start_of(phrase: str) -> str:
    text = " ".join(phrase.split())
    return text if len(text) <= _NAME_SHOWN else f"{text[: _NAME_SHOWN - 3]}..."


def _end_of(name: str) -> str:
    return name if len(name) <= _NAME_SHOWN else f"...{name[3 - _NAME_SHOWN :]}"


# -- command ---------------------------------------------------------------------------------------------------------


def questions_of_command(
    images: Sequence[Path], phrases: Sequence[str], jsonl: Path | None, *, skip_bad: bool
) -> tuple[list[Question], list[str], list[str]]:
    """Returns the questions of a `deris-llm predict` command.

    Args:
        images: of `--image`.
        phrases: of `--phrase`.
        jsonl: of `--jsonl`, instead of both.
        skip_bad: bad lines are returned instead of raised.

    Returns:
        the questions, the bad lines, and the files in folders of `--image` that are not images.

    Raises:
        ValueError: neither or both are given, an empty phrase, or bad lines.
    """
    if jsonl is not None:
        if images or phrases:
            raise ValueError(
                "--jsonl: expected --jsonl alone, got --image or --phrase too; the file has images and phrases."
            )
        questions, problems = read_pairs(jsonl)
        if problems and not skip_bad:
            listed = "\n".join(f"  - {problem}" for problem in problems[:_BAD_SHOWN])
            more = f"\n  - and {len(problems) - _BAD_SHOWN:,} more" if len(problems) > _BAD_SHOWN else ""
            raise ValueError(
                f"--jsonl {jsonl}: {len(problems):,} lines cannot be used\n{listed}{more}\nNothing was answered; correct them, or "
                "leave them out with --skip-bad, which counts them"
            )
        return questions, problems, []
    if not images or not phrases:
        raise ValueError(
            "predict: expected --image and at least one --phrase, or --jsonl, got "
            f"{'no --image' if not images else 'no --phrase'}; e.g. --image street.jpg --phrase 'the red car'."
        )
    empty = [phrase for phrase in phrases if not phrase.strip()]
    if empty:
        raise ValueError(f"--phrase {empty[0]!r}: expected some words, got an empty text; correct or drop it.")
    others: list[str] = []
    return questions_about(images, phrases, others), [], others


def run(
    checkpoint: Path,
    images: Sequence[Path],
    phrases: Sequence[str],
    *,
    jsonl: Path | None,
    out: Path | None,
    overrides: Sequence[str],
    overlays: bool,
    instances: bool,
    skip_bad: bool,
    exif: Exif,
    progress: bool = True,
) -> Predictions:
    """Runs `deris-llm predict` without printing the result."""
    started = time.monotonic()
    questions, bad, others = questions_of_command(images, phrases, jsonl, skip_bad=skip_bad)
    check_writable(out or Path("runs", "predict"))
    pipeline = DerisPipeline.from_pretrained(checkpoint, overrides=overrides)
    named = default_folder("predict", pipeline.config.name, pipeline.fingerprint, pipeline.config.evaluation)
    loaded = time.monotonic()
    result = predict(
        pipeline,
        questions,
        out or named,
        overlays=overlays,
        instances=instances,
        skip_bad=skip_bad,
        progress=progress,
        exif=exif,
        bad=bad,
        others=others,
    )
    result.seconds = {"loading the checkpoint": loaded - started, "answering": time.monotonic() - loaded}
    return result
