"""Which phrase a prediction answers: full names first, an ambiguous short one refused with its candidates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deris_llm.data.errors import DataError
from deris_llm.evaluation.submissions import SubmissionError, read_submission
from deris_llm.structures import InstanceAnnotation, ReferringRecord


def _record(own_id: str, image: str, phrase: str, *, image_id: str | None = None) -> ReferringRecord:
    return ReferringRecord(
        phrase_id=f"mine/val/{own_id}",
        dataset="mine",
        split="val",
        image_id=image_id or f"sha256-{image}",
        image_path=f"/data/set/pictures/{image}",
        width=100,
        height=80,
        phrase=phrase,
        instances=(InstanceAnnotation(annotation_id=1, segmentation=[[10, 10, 40, 10, 40, 40, 10, 40]]),),
    )


STEMS = (
    _record("c1", "cat/001.png", "the box"),
    _record("d1", "dog/001.png", "the box"),
    _record("c2", "cat/001.png", "the red box"),
    _record("d2", "dog/002.png", "the box"),
    _record("d3", "dog/002.jpg", "the box"),
)
IDS = tuple(_record(own, "a.png", f"phrase {own}") for own in ("a/b", "a_b", "x/ids/a_b", "u[/1]", "1", "1.0", "y/z"))


def _answered(tmp_path: Path, records: Sequence[ReferringRecord], *named: dict[str, Any]) -> list[str]:
    """Phrase ids, in the order of the lines."""
    path = tmp_path / "pred.jsonl"
    path.write_text("".join(json.dumps(name | {"mask": None}) + "\n" for name in named))
    found = read_submission(path, records).answers
    return [phrase_id.removeprefix("mine/val/") for phrase_id in found]


@pytest.mark.parametrize(
    "prefix", ["", "pictures/", "/data/set/pictures/", "/elsewhere/pictures/", "./", "..\\pictures\\"]
)
def test_a_picture_is_matched_by_as_much_of_its_path_as_is_given(tmp_path: Path, prefix: str) -> None:
    images = ("cat/001.png", "dog/001.png", "cat/001.png", "dog/002.png", "dog/002.jpg")
    lines = [{"image": prefix + i, "phrase": r.phrase} for i, r in zip(images, STEMS, strict=True)]
    assert _answered(tmp_path, STEMS, *lines) == ["c1", "d1", "c2", "d2", "d3"]
    assert _answered(tmp_path, STEMS, lines[1]) == ["d1"]  # alone, too


@pytest.mark.parametrize(
    ("image", "candidates"),
    [
        ("001.png", ("cat/001.png", "dog/001.png")),
        ("001", ("cat/001.png", "dog/001.png")),
        ("bird/001.png", ("cat/001.png", "dog/001.png")),
        ("002", ("dog/002.png", "dog/002.jpg")),
        ("dog/002", ("dog/002.png", "dog/002.jpg")),
    ],
)
def test_a_name_of_two_pictures_is_refused(tmp_path: Path, image: str, candidates: tuple[str, str]) -> None:
    with pytest.raises(SubmissionError, match="means 2 images") as error:
        _answered(tmp_path, STEMS, {"image": image, "phrase": "the box"})
    assert all(name in str(error.value) for name in candidates)


def test_another_extension_is_another_picture(tmp_path: Path) -> None:
    only_jpg = STEMS[4:]
    assert _answered(tmp_path, only_jpg, {"image": "002.jpg", "phrase": "the box"}) == ["d3"]
    assert _answered(tmp_path, only_jpg, {"image": "002", "phrase": "the box"}) == ["d3"]
    with pytest.raises(SubmissionError, match=r"'002\.png' is none of mine/val; did you mean 002\.jpg\?"):
        _answered(tmp_path, only_jpg, {"image": "002.png", "phrase": "the box"})


def test_a_picture_in_another_folder_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "pred.jsonl"
    lines = [{"image": image, "phrase": "the box", "mask": None} for image in ("else/002.jpg", "dog/002.png")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_submission(path, STEMS).other_folder == ("else/002.jpg",)


def test_a_number_of_two_pictures_is_refused(tmp_path: Path) -> None:
    records = (
        _record("1", "a_7.jpg", "box", image_id="a_7"),
        _record("2", "b_7.jpg", "box", image_id="b_7"),
        _record("3", "c_8.jpg", "box", image_id="c_8"),
    )
    assert _answered(tmp_path, records, {"image_id": 8, "phrase": "box"}) == ["3"]
    assert _answered(tmp_path, records, {"image_id": "b_7", "phrase": "box"}) == ["2"]
    with pytest.raises(SubmissionError, match=r"image 7 means 2 images, .*a_7\.jpg and .*b_7\.jpg"):
        _answered(tmp_path, records, {"image_id": 7, "phrase": "box"})


def test_the_exact_text_goes_before_one_that_differs_in_case(tmp_path: Path) -> None:
    records = (_record("1", "a.png", "Polish man"), _record("2", "a.png", "polish man"))
    lines = [{"image": "a.png", "phrase": phrase} for phrase in ("polish man", "Polish man")]
    assert _answered(tmp_path, records, *lines) == ["2", "1"]
    assert _answered(tmp_path, records, {"image": "a.png", "phrase": " POLISH  man"}) == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "own_id"),
    [("mine/val/a_b", "a_b"), ("a/b", "a/b"), ("a_b", "a_b"), ("x/ids/a_b", "x/ids/a_b"), (1, "1"), ("1", "1"),
     ("1.0", "1.0"), ("u[/1]", "u[/1]"), ("z", "y/z"), ("1]", "u[/1]")],
)  # fmt: skip
@pytest.mark.parametrize("key", ["phrase_id", "sent_id"])
def test_an_id_is_matched_whole_first(tmp_path: Path, key: str, name: str | int, own_id: str) -> None:
    assert _answered(tmp_path, IDS, {key: name}) == [own_id]


@pytest.mark.parametrize("name", [{"phrase_id": "1"}, {"sent_id": 1}])
def test_the_last_part_of_two_ids_is_refused(tmp_path: Path, name: dict[str, Any]) -> None:
    records = (_record("cat/1", "a.png", "p"), _record("dog/1", "a.png", "q"))
    with pytest.raises(SubmissionError, match="means 2 phrases, mine/val/cat/1 and mine/val/dog/1: give the whole"):
        _answered(tmp_path, records, name)


def _pngs(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((80, 100), dtype=np.uint8)).save(folder / name, format="PNG")
    return folder


def test_a_file_is_matched_whole_first(tmp_path: Path) -> None:
    names = ("mine/val/a/b.png", "a_b.png", "mine_val_1.0.png", "1.png", "._1.png")  # the last: macOS' own
    found = read_submission(_pngs(tmp_path / "masks", *names), IDS).answers
    assert {answer.where: phrase_id.removeprefix("mine/val/") for phrase_id, answer in found.items()} == {
        "mine/val/a/b.png": "a/b",
        "a_b.png": "a_b",
        "mine_val_1.0.png": "1.0",
        "1.png": "1",
    }
    with pytest.raises(
        SubmissionError, match=r"'mine_val_a_b' means 2 phrases, mine/val/a/b and mine/val/a_b: give folders"
    ):
        read_submission(_pngs(tmp_path / "joined", "mine_val_a_b.png"), IDS)


def test_folders_of_predict_and_eval_are_read_by_their_lines(tmp_path: Path) -> None:
    line = json.dumps({"phrase_id": "c1", "mask": None}) + "\n"
    for file, given in (
        ("predict/predictions.jsonl", "predict"),
        ("predict/predictions.jsonl", "predict/masks"),
        ("eval/predictions/mine_val.jsonl", "eval"),
        ("eval/predictions/mine_val.jsonl", "eval/predictions"),
        ("run/eval/predictions/mine_val.jsonl", "run"),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(line)
        _pngs(tmp_path / "predict" / "masks", "001-the-box-1a2b3c4d.png")
        found = read_submission(tmp_path / given, STEMS)
        assert (found.path, list(found.answers)) == (tmp_path / file, ["mine/val/c1"])
    (tmp_path / "bare" / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(DataError, match="expected predictions of mine/val, got a checkpoint or run without any"):
        read_submission(tmp_path / "bare", STEMS)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            {"phrase_id": "mine/val/c1", "image": "dog/001.png", "phrase": "the box"},
            "mine/val/c1 is 'the box' in 001.png, but",
        ),
        (
            {"phrase_id": "mine/val/c1", "image": "cat/001.png", "phrase": "the red box"},
            "but the line names 'the red box'",
        ),
        ({"sent_id": "d3", "image": "002.png"}, "do its ids belong to another version of the data"),
        ({"phrase_id": "mine/val/c1", "image": "cat/001.png", "phrase": "The  Box"}, ""),
        ({"phrase_id": "mine/val/c1", "image": "cat/001.png", "phrase": "as typed"}, ""),  # --phrase-field
        ({"phrase_id": "mine/val/c1", "image": "renamed/002.jpg"}, ""),  # what it was called is not known here
        ({"phrase_id": "mine/val/c1", "image": "001.png"}, ""),
    ],
)
def test_an_id_of_another_phrase_than_the_line_names_is_refused(
    tmp_path: Path, line: dict[str, Any], says: str
) -> None:
    if says:
        with pytest.raises(SubmissionError, match=says):
            _answered(tmp_path, STEMS, line)
    else:
        assert _answered(tmp_path, STEMS, line) == ["c1"]
        assert read_submission(tmp_path / "pred.jsonl", STEMS).other_folder == ()


def test_an_array_is_read_as_lines_are_and_nothing_is_no_predictions(tmp_path: Path) -> None:
    path = tmp_path / "pred.json"
    for indent in (None, 1):
        path.write_text(json.dumps([{"sent_id": record.phrase_id, "mask": None} for record in STEMS], indent=indent))
        assert len(read_submission(path, STEMS).answers) == len(STEMS)
    path.write_text('[{"sent_id": "c1", "mask": null}, 5]')
    with pytest.raises(SubmissionError, match="entry 2: expected one JSON object, got 5"):
        read_submission(path, STEMS)
    path.write_text('[{"sent_id": "c1", "mask": null},')
    with pytest.raises(DataError, match="expected JSON in UTF-8, got JSONDecodeError"):
        read_submission(path, STEMS)
    for nothing in ("", "\n\n", "[]"):
        path.write_text(nothing)
        with pytest.raises(
            DataError, match="expected predictions, a line of JSON each, got an empty file: make them again"
        ):
            read_submission(path, STEMS)


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pred.jsonl"
    path.write_text('{"sent_id": "c1", "sent_id": "d1", "mask": null}\n')
    with pytest.raises(SubmissionError, match="line 1: the key 'sent_id' occurs twice; keep one of them"):
        read_submission(path, STEMS)


def test_accents_may_be_written_apart(tmp_path: Path) -> None:
    records = (_record("1", "\u00fc.png", "box"), _record("2", "e\u0301.png", "box"))
    lines = [{"image": name, "phrase": "box"} for name in ("u\u0308.png", "\u00e9.png")]
    assert _answered(tmp_path, records, *lines) == ["1", "2"]


def test_masks_of_a_folder_that_are_no_png(tmp_path: Path) -> None:
    for name in ("c1.png", "d1.PNG", "about.jpg"):
        Image.new("L", (100, 80)).save(tmp_path / name)
    assert set(read_submission(tmp_path, STEMS).answers) == {"mine/val/c1", "mine/val/d1"}
    Image.new("L", (100, 80)).save(tmp_path / "c2.jpg")
    with pytest.raises(
        SubmissionError, match=r"c2\.jpg: expected a PNG mask, got another image format: save it as PNG"
    ):
        read_submission(tmp_path, STEMS)
