"""Reads anybody's predictions for a split: lines of JSON, or a folder of PNG masks.

A line names its phrase and gives a mask:

    {"phrase_id": "refcoco/val/123", "mask": {"size": [h, w], "counts": "..."}}       COCO RLE, or polygons, or null: no answer
    {"sent_id": 123, ...}    {"ref_id": 5, "phrase": "left cat", ...}    {"image": "COCO_train2014_000000000009.jpg", "phrase": ...}

Full names are tried first: the whole phrase id, the id of the source, the image whose path ends like the given one. Then shorter
names: the last part of an id, a file name alone (or without extension), COCO's number, ``image_id``. A name that means several
phrases or images is refused with the candidates, and so is an id beside the image and phrase of another one. A line by image and
phrase answers every phrase of that text in the image; as many lines as there are such phrases are assigned in order. Optional:
``says_target`` (default: whether the mask is empty), ``score``, ``presence``, ``boxes`` [[x0, y0, x1, y1], ...] of the instances
(for F1), and what `deris-llm eval` adds so that its numbers can be computed again: ``top_scores``, ``oracle_px``, ``answers``.
Other keys are ignored.

A PNG is named by its phrase: ``refcoco/val/123.png``, ``123.png`` or ``refcoco_val_123.png``; it has the image's size, 0 and one
other value. Of folders that `deris-llm predict` and `deris-llm eval` write, the JSONL is read. A file may hold one JSON array
instead of lines.
"""

from __future__ import annotations

import contextlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from deris_llm.common.strict_files import unique_keys
from deris_llm.common.words import shortened
from deris_llm.data.errors import DataError, listed_by_cause
from deris_llm.data.formats.base import read_json_file
from deris_llm.data.images import BROKEN, opened_image
from deris_llm.data.masks import coco_mask, mask_of_image, segmentation_rle
from deris_llm.evaluation.answers import Answer, Rle
from deris_llm.structures import ReferringRecord

PREDICTIONS_FILE = "predictions.jsonl"
"""What `deris-llm predict` writes."""

_PROBLEMS_SHOWN = 10


@dataclass(frozen=True, eq=False)
class Submission:
    """Answers by phrase id, and the phrases without one."""

    path: Path
    answers: dict[str, Answer]
    missing: tuple[str, ...]  # phrase ids, in the order of the records
    other_folder: tuple[str, ...] = ()  # images that were found by file name, in another folder than the given one

    def protocols_with_own_masks(self) -> frozenset[str]:
        """Returns the ids of protocols for which every answer has its own mask."""
        if not self.answers:
            return frozenset()
        return frozenset.intersection(*(frozenset(answer.answers or ()) for answer in self.answers.values()))


class SubmissionError(DataError):
    """Everything that is wrong with a file of predictions."""

    def __init__(self, path: Path, problems: Sequence[str], num_answers: int) -> None:
        self.problems = list(problems)
        listed = listed_by_cause(problems, num_shown=_PROBLEMS_SHOWN)
        super().__init__(
            f"{path}: {len(problems):,} problem{'s' if len(problems) > 1 else ''} in {num_answers:,} predictions\n{listed}\n"
            "Correct them: a phrase without a prediction counts as a miss, but existing predictions must be valid"
        )


def read_submission(path: str | Path, records: Sequence[ReferringRecord]) -> Submission:
    """Reads predictions and finds the phrase of each; `rle_of` checks the masks later.

    Args:
        path: of a JSONL file, a folder of PNGs, or a folder that `deris-llm predict` or `eval` wrote.
        records: the split.

    Raises:
        DataError: no such file, or all lines that are malformed, name no phrase of the split, or repeat one.
    """
    phrases = _Phrases(records)
    path = _lines_of_folder(Path(path), phrases.split)
    if path.is_dir():
        return _read_folder(path, phrases)
    if not path.is_file():
        raise DataError(f"{path}: expected a JSONL file or a folder of PNG masks, got nothing there: check the path")
    problems: list[str] = []
    found: dict[str, Answer] = {}
    by_text: dict[tuple[str, ...], list[Answer]] = defaultdict(list)  # phrase ids -> lines
    number_of_lines = 0
    for where, line in _lines(path):
        number_of_lines += 1
        try:
            tree = _parsed(line) if isinstance(line, bytes) else line
            if not isinstance(tree, dict):
                raise ValueError(f"expected one JSON object, got {shortened(tree)}")
            ids = phrases.of_line(tree)
            answer = Answer.from_json(tree, where)
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: {error}")
            continue
        if len(ids) == 1:
            _put(found, ids[0], answer, problems)
        else:
            by_text[ids].append(answer)
    if not number_of_lines:
        raise DataError(f"{path}: expected predictions, a line of JSON each, got an empty file: make them again")
    for ids, lines in by_text.items():
        if len(lines) not in (1, len(ids)):
            problems.append(
                f"{lines[-1].where}: image and phrase mean {len(ids)} phrases ({ids[0]}, ...), for which {len(lines)} lines are "
                "given: give one for all, one for each, or phrase ids"
            )
        for phrase_id, answer in zip(ids, lines * len(ids) if len(lines) == 1 else lines, strict=False):
            _put(found, phrase_id, answer, problems)
    return _whole(path, found, problems, number_of_lines, phrases)


def rle_of(mask: object, height: int, width: int) -> Rle:
    """Checks the mask of an answer and returns it as compressed RLE.

    Args:
        mask: `Answer.mask`.
        height: that it must have, px.
        width: that it must have, px.

    Returns:
        ``{"size": [h, w], "counts": bytes}``.

    Raises:
        ValueError: malformed, or of another size.
    """
    if mask is None:
        return coco_mask.encode(np.zeros((height, width), dtype=np.uint8, order="F"))
    if isinstance(mask, Path):
        return _rle_of_png(mask, height, width)
    if isinstance(mask, list) and not mask:
        raise ValueError("expected polygons, got an empty list: write null for no answer")
    try:
        return segmentation_rle(mask, height, width)
    except ValueError as error:
        raise ValueError(str(error).rpartition(": ")[0]) from error


class _Phrases:
    """Finds the phrases of a split by any of their names."""

    def __init__(self, records: Sequence[ReferringRecord]) -> None:
        self._records = {record.phrase_id: record for record in records}
        self._of_image = {record.image_path: record.phrase_id for record in records}  # one of its phrases
        self.ids = [record.phrase_id for record in records]
        self.split = f"{records[0].dataset}/{records[0].split}" if records else "the split"
        self.other_folder: dict[str, None] = {}
        self._by_id: tuple[dict[str, list[str]], ...] = ({}, {}, {})  # whole id, id of the source, its last part
        self._by_file: dict[str, list[str]] = defaultdict(list)  # whole id with "_" for "/"
        self._by_ref: dict[int, list[ReferringRecord]] = defaultdict(list)
        self._by_text: dict[tuple[str, str], list[ReferringRecord]] = defaultdict(list)  # image path, plain text
        self._images: dict[str | int, dict[str, None]] = defaultdict(dict)  # image id or COCO's number -> paths
        self._files: dict[str, dict[str, None]] = defaultdict(dict)  # file name, with and without extension -> paths
        for record in records:
            own_id = record.phrase_id.removeprefix(f"{self.split}/")
            for names, name in zip(self._by_id, (record.phrase_id, own_id, own_id.rpartition("/")[2]), strict=True):
                names.setdefault(name, []).append(record.phrase_id)
            self._by_file[record.phrase_id.replace("/", "_")].append(record.phrase_id)
            if record.ref_id is not None:
                self._by_ref[record.ref_id].append(record)
            self._by_text[record.image_path, _plain(record.phrase)].append(record)
            self._images[record.image_id][record.image_path] = None
            digits = record.image_id.rpartition("_")[2]
            if digits.isdigit():
                self._images[int(digits)][record.image_path] = None
            file = PurePosixPath(record.image_path)
            for name in {file.name, file.stem}:
                self._files[name][record.image_path] = None

    def of_line(self, tree: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the phrases that a line answers: one, or several of the same text in one image.

        Raises:
            ValueError: none, or it is ambiguous.
        """
        for key in ("phrase_id", "sent_id"):
            if tree.get(key) is not None:
                found = self._of_name(tree[key], key)
                self._check_agrees(found, tree)
                return (found,)
        phrase = tree.get("phrase")
        if phrase is not None and not isinstance(phrase, str):
            raise ValueError(f"phrase: expected text, got {shortened(phrase)}")
        if tree.get("ref_id") is not None:
            return self._of_ref(tree["ref_id"], phrase)
        image = tree.get("image_id") if tree.get("image_id") is not None else tree.get("image")
        if image is None or phrase is None:
            raise ValueError(
                "expected phrase_id, sent_id, ref_id with phrase, or image (or image_id) with phrase, got the keys "
                f"{', '.join(map(str, list(tree)[:8])) or 'none'}"
            )
        path, is_in_other_folder = self._find_image(image)
        if is_in_other_folder:
            self.other_folder[image] = None
        found = _same_text(self._by_text.get((path, _plain(phrase)), ()), phrase)
        if not found:
            raise ValueError(
                f"image {shortened(image)} has no phrase {shortened(phrase)} in {self.split} (--phrase-field raw?)"
            )
        return found

    def of_file(self, name: str) -> str:
        """Returns the phrase of a mask file, given without extension; parts are separated by "/", or by "_" in its name.

        Raises:
            ValueError: none, or several.
        """
        if name in self._by_file and not any(name in names for names in self._by_id):
            return self._one(self._by_file[name], f"file {shortened(name)}", "folders, DATASET/SPLIT/ID.png")
        return self._of_name(name, "file")

    def _check_agrees(self, phrase_id: str, tree: Mapping[str, Any]) -> None:
        """Checks that the image and phrase of a line, if the split has them, are not those of another phrase than its id's.

        Raises:
            ValueError: they are; usually the ids belong to another version of the data.
        """
        image, phrase = tree.get("image"), tree.get("phrase")
        try:
            path, is_in_other_folder = self._find_image(image)
        except ValueError:
            return  # no image of the split, or several: the id alone counts
        if is_in_other_folder:
            return  # perhaps another image of that name
        record = self._records[phrase_id]
        is_same_image = self._records[self._of_image[path]].image_id == record.image_id
        others = self._by_text.get((path, _plain(phrase)), []) if isinstance(phrase, str) else []
        if not is_same_image or (others and phrase_id not in {other.phrase_id for other in others}):
            raise ValueError(
                f"{phrase_id} is {record.phrase!r} in {PurePosixPath(record.image_path).name}, but the line names "
                f"{shortened(phrase)} in {shortened(image)}: do its ids belong to another version of the data?"
            )

    def _of_name(self, name: object, key: str) -> str:
        """Returns the phrase of a phrase id, of the source's own id (a sentence id), or of the last part of either."""
        text = str(name) if isinstance(name, (str, int)) and not isinstance(name, bool) else ""
        found = next((names[text] for names in self._by_id if text in names), [])
        return self._one(found, f"{key} {shortened(name)}", "the whole phrase id")

    def _one(self, found: Sequence[str], said: str, cure: str) -> str:
        if not found:
            raise ValueError(
                f"{said} is no phrase of {self.split}, which has e.g. {self.ids[0] if self.ids else 'none'}"
            )
        if len(found) > 1:
            raise ValueError(f"{said} means {len(found)} phrases, {found[0]} and {found[1]}: give {cure}")
        return found[0]

    def _of_ref(self, ref_id: object, phrase: str | None) -> tuple[str, ...]:
        refs = self._by_ref.get(ref_id, []) if isinstance(ref_id, int) else []
        if not refs:
            raise ValueError(f"ref_id {shortened(ref_id)} is none of {self.split}")
        chosen = tuple(r.phrase_id for r in refs) if phrase is None else _same_text(refs, phrase)
        if not chosen:
            texts = [r.phrase for r in refs]
            raise ValueError(f"ref_id {ref_id} has no phrase {shortened(phrase)}, but {shortened(texts)}")
        if phrase is None and len(chosen) > 1:
            raise ValueError(f"ref_id {ref_id} has {len(chosen)} phrases: name one with `phrase` or `sent_id`")
        return chosen

    def _find_image(self, image: object) -> tuple[str, bool]:
        """Returns the path of the image that a path, a file name, an image id or COCO's number names.

        Returns:
            The path, and whether only the file name agrees, not the folder.

        Raises:
            ValueError: none, or several.
        """
        if isinstance(image, bool) or not isinstance(image, (str, int)):
            raise ValueError(f"image {shortened(image)} is none of {self.split}")
        found, is_in_other_folder = list(self._images.get(image, ())), False
        if not found and isinstance(image, str):
            found, is_in_other_folder = self._find_path(image)
        if not found and isinstance(image, str) and image.isdecimal():
            found = list(self._images.get(int(image), ()))
        if not found:
            other = list(self._files.get(PurePosixPath(str(image)).stem, ()))
            hint = f"; did you mean {PurePosixPath(other[0]).name}?" if other else ""
            raise ValueError(f"image {shortened(image)} is none of {self.split}{hint}")
        if len(found) > 1:
            raise ValueError(
                f"image {shortened(image)} means {len(found)} images, {found[0]} and {found[1]}: give more of the path"
            )
        return found[0], is_in_other_folder

    def _find_path(self, name: str) -> tuple[list[str], bool]:
        """Returns the image paths that share the file name and most folders with a path, and whether they share no folder."""
        parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..")]
        if not parts:
            return [], False
        forms = (parts[-1], *(unicodedata.normalize(form, parts[-1]) for form in ("NFC", "NFD")))
        paths = next((list(self._files[form]) for form in forms if form in self._files), [])
        folders = parts[-2::-1]
        shared = {path: _num_shared(folders, PurePosixPath(path).parts[-2::-1]) for path in paths}
        most = max(shared.values(), default=0)
        return [path for path in paths if shared[path] == most], bool(paths and folders and not most)


def _num_shared(parts: Sequence[str], others: Sequence[str]) -> int:
    """Returns how many parts are equal before the first difference."""
    pairs = zip(parts, others, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(parts), len(others)))


def _same_text(records: Sequence[ReferringRecord], phrase: str) -> tuple[str, ...]:
    """Returns the ids of the phrases with exactly this text, or else of those that differ only in case and blanks."""
    exact = tuple(record.phrase_id for record in records if record.phrase == phrase)
    return exact or tuple(record.phrase_id for record in records if _plain(record.phrase) == _plain(phrase))


def _plain(phrase: str) -> str:
    return " ".join(phrase.lower().split())


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields where each prediction is, and its line in bytes or, if the file is one array, its parsed entry.

    Raises:
        DataError: an array that is not valid JSON in UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if number == 1 and line.lstrip().startswith(b"["):
                yield from ((f"entry {i}", value) for i, value in enumerate(read_json_file(path), start=1))
                return
            if line.strip():
                yield f"line {number}", line


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
    except UnicodeDecodeError:
        raise ValueError("expected UTF-8, got other bytes") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"expected one JSON object, got {shortened(line.decode('utf-8').strip())} ({error.msg})"
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {name}")


def _put(found: dict[str, Answer], phrase_id: str, answer: Answer, problems: list[str]) -> None:
    if phrase_id in found:
        problems.append(f"{answer.where}: {phrase_id} has a prediction already, {found[phrase_id].where}")
    else:
        found[phrase_id] = answer


def _lines_of_folder(path: Path, split: str) -> Path:
    """Returns the JSONL in a folder that `predict` or `eval` wrote, or in an evaluated run; any other path as it is.

    Raises:
        DataError: the folder is a checkpoint or run without predictions of the split.
    """
    if not path.is_dir():
        return path
    of_split = f"{split.replace('/', '_')}.jsonl"
    homes = [path, *([path.parent] if path.name == "masks" else [])]
    named = [home / PREDICTIONS_FILE for home in homes]
    named += [path / inside / of_split for inside in ("", "predictions", "eval/predictions")]
    found = next((file for file in named if file.is_file()), None)
    if found is None and (
        any(path.glob("checkpoint-*")) or any(path.glob("*.safetensors")) or (path / "best").is_dir()
    ):
        raise DataError(
            f"{path}: expected predictions of {split}, got a checkpoint or run without any: make them with `deris-llm eval "
            f"--checkpoint {path} --splits {split}`, which prints the numbers too"
        )
    return found or path


def _read_folder(path: Path, phrases: _Phrases) -> Submission:
    problems: list[str] = []
    found: dict[str, Answer] = {}
    there = sorted(file for file in path.rglob("*") if not file.name.startswith("."))  # macOS writes ._NAME files
    files = [file for file in there if file.suffix.lower() == ".png"]
    if not files:
        raise DataError(f"{path}: expected PNG masks named by phrase, got a folder without any: check the path")
    for file in files:
        name = file.relative_to(path).with_suffix("").as_posix()
        try:
            phrase_id = phrases.of_file(name)
        except ValueError as error:
            problems.append(f"{name}.png: {error}")
            continue
        _put(found, phrase_id, Answer(mask=file, says_target=None, where=f"{name}.png"), problems)
    for file in there:
        if file.suffix.lower() not in Image.registered_extensions() or file in files:
            continue
        name = file.relative_to(path).with_suffix("").as_posix()
        with contextlib.suppress(ValueError):  # another image
            if phrases.of_file(name) not in found:
                problems.append(f"{name}{file.suffix}: expected a PNG mask, got another image format: save it as PNG")
    return _whole(path, found, problems, len(files), phrases)


def _whole(path: Path, found: dict[str, Answer], problems: Sequence[str], number: int, phrases: _Phrases) -> Submission:
    if problems:
        raise SubmissionError(path, problems, number)
    missing = tuple(phrase_id for phrase_id in phrases.ids if phrase_id not in found)
    return Submission(path, found, missing, tuple(phrases.other_folder))


def _rle_of_png(path: Path, height: int, width: int) -> Rle:
    try:
        with opened_image(path) as file:
            if file.size == (width, height):  # another one may explode when it is decoded
                file.load()
    except BROKEN as error:
        raise ValueError(f"expected a whole PNG, got {type(error).__name__}: {error}") from error
    if file.size != (width, height):
        raise ValueError(f"expected the image's {width} x {height} px, got {file.width} x {file.height}")
    mask, _ = mask_of_image(file)
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
