"""Zips for evaluation servers: exact layouts, complete or not there at all."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deris_llm.evaluation.video.score import run_video_score
from deris_llm.evaluation.video.submission import (
    Layout,
    SubmissionZipError,
    SubmittedMask,
    asked_frames,
    davis_palette,
    write_submission,
)
from deris_llm.structures import ReferringRecord
from tests.evaluation.video.video_world import FRAMES, SIZE, labels_at, mevis_truth, write_mevis

ASKED = {key: list(FRAMES[: len(masks)]) for key, masks in mevis_truth().items()}


def _masks() -> list[SubmittedMask]:
    return [
        (video, expression, frame, mask)
        for (video, expression), masks in mevis_truth().items()
        for frame, mask in zip(FRAMES, masks, strict=False)
    ]


def _names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return archive.namelist()


def test_layout_of_mevis_scores_as_it_was_written(tmp_path: Path) -> None:
    path = write_submission(tmp_path / "out.zip", "mevis", _masks(), ASKED)
    names = _names(path)
    assert names[0] == "one/0/00000.png"
    assert len(names) == 14
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "pred")
        with Image.open(io.BytesIO(archive.read("one/0/00000.png"))) as image:
            assert image.mode == "L"
            assert np.unique(np.asarray(image)).tolist() == [0, 255]
    write_mevis(tmp_path / "valid_u")
    report = run_video_score(tmp_path / "pred", form="mevis", source=tmp_path, out=tmp_path / "score", workers=1)
    assert report["numbers"]["all frames"]["J&F"] == 1


def test_layout_of_ref_youtube_vos(tmp_path: Path) -> None:
    names = _names(write_submission(tmp_path / "out.zip", "ref-ytvos", _masks(), ASKED))
    assert names[0] == "Annotations/one/0/00000.png"
    assert all(name.startswith("Annotations/") for name in names)


def test_layout_of_davis(tmp_path: Path) -> None:
    path = write_submission(
        tmp_path / "out.zip", "davis", [("balls", "", "00000", labels_at(0))], {("balls", ""): ["00000"]}
    )
    assert _names(path) == ["balls/00000.png"]
    with zipfile.ZipFile(path) as archive, Image.open(io.BytesIO(archive.read("balls/00000.png"))) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels_at(0))
        assert image.convert("RGB").getpixel((1, 2)) == (128, 0, 0)


def test_palette_of_davis() -> None:
    colours = np.frombuffer(davis_palette(), dtype=np.uint8).reshape(256, 3).tolist()
    assert colours[:5] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert colours[8] == [64, 0, 0]
    assert colours[255] == [224, 224, 192]
    assert len({tuple(colour) for colour in colours}) == 256


@pytest.mark.parametrize("layout", ["mevis", "ref-ytvos"])
def test_bytes_are_those_of_the_masks_alone(layout: Layout, tmp_path: Path) -> None:
    first = write_submission(tmp_path / "a.zip", layout, _masks(), ASKED).read_bytes()
    assert write_submission(tmp_path / "b.zip", layout, _masks(), ASKED).read_bytes() == first


def test_masks_are_taken_one_by_one(tmp_path: Path) -> None:
    alive: list[int] = []

    def masks() -> Iterator[SubmittedMask]:
        for video, expression, frame, mask in _masks():
            alive.append(len(list(tmp_path.iterdir())))  # the zip is open while masks are made
            yield video, expression, frame, mask.copy()

    write_submission(tmp_path / "out.zip", "mevis", masks(), ASKED)
    assert set(alive) == {1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda masks: masks[:-1], "expected 14 masks, got 13; missing: two/0/00005.png: nothing was written"),
        (lambda masks: [m for m in masks if m[1] != "2"], "missing: one/2/00000.png, one/2/00005.png"),
        (lambda masks: [*masks, masks[0]], "one/0/00000.png: expected each asked frame once, got one more: it is there twice"),
        (lambda masks: [("one", "9", "00000", masks[0][3])], "the split does not ask for it"),
        (lambda masks: [(*masks[0][:3], masks[0][3] * 0.5)], r"expected bool \(H, W\), got float64 \(24, 32\): no prob"),
        (lambda masks: [masks[0], (*masks[1][:3], masks[1][3][:5])], "size of the video's other masks, 24 x 32, got 5 x 32"),
        (lambda masks: [("..", "0", "00000", masks[0][3])], "got one that is a path"),
    ],
)  # fmt: skip
def test_incomplete_submissions_are_refused(change: object, says: str, tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    out.write_bytes(b"the last one")
    with pytest.raises(SubmissionZipError, match=says):
        write_submission(out, "mevis", change(_masks()), ASKED)  # type: ignore[operator]
    assert out.read_bytes() == b"the last one"
    assert [path.name for path in tmp_path.iterdir()] == ["out.zip"]


def test_wrong_calls(tmp_path: Path) -> None:
    with pytest.raises(SubmissionZipError, match="expected a name that ends in .zip"):
        write_submission(tmp_path / "out", "mevis", [], ASKED)
    with pytest.raises(SubmissionZipError, match="got none asked for"):
        write_submission(tmp_path / "out.zip", "mevis", [], {})
    with pytest.raises(SubmissionZipError, match="layout 'coco': expected one of mevis, ref-ytvos, davis"):
        write_submission(tmp_path / "out.zip", "coco", [], ASKED)  # type: ignore[arg-type]
    with pytest.raises(SubmissionZipError, match="got 255: that is void in DAVIS"):
        write_submission(
            tmp_path / "out.zip", "davis", [("a", "", "0", np.full(SIZE, 255, np.uint8))], {("a", ""): ["0"]}
        )


def test_what_a_split_asks_for() -> None:
    record = ReferringRecord(
        "mevis/valid/one/0/00005", "mevis", "valid", "mevis/one/00005", "one/00005.jpg", 32, 24, "a box", (),
        video="one", frame=1, expression="0", has_truth=False,
    )  # fmt: skip
    other = replace(record, image_id="mevis/one/00010", frame=2)
    assert asked_frames([record, other]) == {("one", "0"): ["00005", "00010"]}
    with pytest.raises(ValueError, match="expected a frame of a video, got an image"):
        asked_frames([replace(record, video=None)])
