"""Predictions of anybody against published trees: what is missing, wrong or ambiguous is an error or a counted miss."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deris_llm.cli.main import main
from deris_llm.cli.score import VIDEO_FORMATS
from deris_llm.data.errors import DataError
from deris_llm.data.masks import encode_mask
from deris_llm.evaluation.video.protocols import Score, mean_score
from deris_llm.evaluation.video.score import DEFAULT_SPLITS, FORMATS, run_video_score, score_expressions
from deris_llm.evaluation.video.trees import FrameError, PngTree, RleFile, open_predictions, read_labels, read_mask
from deris_llm.evaluation.video.truth import read_truth
from tests.evaluation.video.video_world import (
    FRAMES,
    SIZE,
    labels_at,
    mevis_truth,
    moving,
    save_json,
    save_labels,
    save_mask,
    write_davis,
    write_labels,
    write_mevis,
    write_predictions,
    write_ref_davis,
    write_ytvos,
)


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    return write_mevis(tmp_path / "valid_u")


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    return write_predictions(tmp_path / "pred", mevis_truth())


def _score(truth: Path, predictions: Path, *, missing_as_empty: bool = False) -> dict[str, Any]:
    results = score_expressions(
        read_truth("mevis", truth.parent, truth.name),
        open_predictions(predictions),
        missing_as_empty=missing_as_empty,
        workers=1,
    )
    return {result.name: result for result in results}


def _edit(path: Path, edit: Any) -> None:
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def _rle(masks: list[np.ndarray]) -> list[Any]:
    return [encode_mask(mask) if mask.any() else None for mask in masks]


def test_a_perfect_answer(truth: Path, predictions: Path) -> None:
    found = _score(truth, predictions)
    assert list(found) == ["one/0", "one/1", "one/2", "two/0"]
    assert all(result.score == Score(1, 1) and not result.is_missing for result in found.values())
    assert [len(result.frames) for result in found.values()] == [4, 4, 4, 2]
    assert found["one/1"].phrase == "both boxes"


def test_rle_lists_score_as_pngs_do(truth: Path, predictions: Path, tmp_path: Path) -> None:
    shifted = {key: [np.roll(mask, 1, axis=1) for mask in masks] for key, masks in mevis_truth().items()}
    write_predictions(predictions, shifted)
    tree: dict[str, Any] = {}
    for (video, expression), masks in shifted.items():
        rles = _rle(masks)
        tree.setdefault(video, {})[expression] = rles if video == "one" else {"prediction_masks": rles, "text": "Sa2VA"}
    save_json(tmp_path / "pred.json", tree)
    by_png, by_rle = _score(truth, predictions), _score(truth, tmp_path / "pred.json")
    assert [result.frames for result in by_png.values()] == [result.frames for result in by_rle.values()]
    assert 0 < by_png["one/0"].score.j < 1


# ---- what is missing ----


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a folder of its video alone"])
def test_an_expression_without_predictions_counts_as_zero(left: str, truth: Path, predictions: Path) -> None:
    shutil.rmtree(predictions / "two")
    if left == "an empty folder":
        (predictions / "two" / "0").mkdir(parents=True)
    elif left == "a folder of its video alone":
        (predictions / "two").mkdir()
    found = _score(truth, predictions)
    assert len(found) == 4
    assert found["two/0"].is_missing
    assert found["two/0"].score == Score(0, 0)
    assert mean_score(result.score for result in found.values()) == Score(0.75, 0.75)


def test_a_missing_answer_to_a_no_target_phrase_counts_as_zero_unless_asked_otherwise(
    truth: Path, predictions: Path
) -> None:
    shutil.rmtree(predictions / "one" / "2")
    assert _score(truth, predictions)["one/2"].score == Score(0, 0)
    assert _score(truth, predictions, missing_as_empty=True)["one/2"].score == Score(1, 1)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_missing_frame_is_an_error_unless_asked_otherwise(frame: str, truth: Path, predictions: Path) -> None:
    (predictions / "one" / "0" / f"{frame}.png").unlink()
    with pytest.raises(DataError, match=rf"one/0: expected a mask of each of the 4 frames, got none of {frame}"):
        _score(truth, predictions)
    found = _score(truth, predictions, missing_as_empty=True)
    assert found["one/0"].score == Score(0.75, 0.75)
    assert found["one/0"].num_missing == 1


def test_predictions_of_something_else_are_an_error(truth: Path, tmp_path: Path) -> None:
    write_predictions(tmp_path / "pred", {("three", "0"): [moving(0, 0)]})
    with pytest.raises(DataError, match="expected predictions of one/0 and others, got none of any expression"):
        _score(truth, tmp_path / "pred")


def test_an_rle_list_of_another_length_is_an_error(truth: Path, tmp_path: Path) -> None:
    for number in (3, 5):
        save_json(tmp_path / "pred.json", {"one": {"0": _rle([moving(0, 0)] * number)}})
        with pytest.raises(DataError, match=rf"one/0: expected 4 RLEs, one per frame.*, got {number}"):
            _score(truth, tmp_path / "pred.json", missing_as_empty=True)


# ---- what is wrong ----


def test_masks_of_another_size_are_an_error_also_without_a_target(
    truth: Path, predictions: Path, tmp_path: Path
) -> None:
    small = np.zeros((12, 16), dtype=bool)
    save_mask(predictions / "one" / "2" / f"{FRAMES[-1]}.png", small)
    expected = r"expected the truth's size, 24 x 32 px \(height x width\), got 12 x 16 px"
    with pytest.raises(DataError, match=expected):
        _score(truth, predictions)
    save_json(tmp_path / "pred.json", {"one": {"2": [encode_mask(small)] * 4}})
    with pytest.raises(DataError, match=r"one/2/00000: expected an RLE of the image's size \[h, w\] = \[24, 32\]"):
        _score(truth, tmp_path / "pred.json")


def test_all_problems_are_named_at_once(truth: Path, predictions: Path) -> None:
    save_mask(predictions / "one" / "0" / f"{FRAMES[1]}.png", np.zeros((3, 3), dtype=bool))
    (predictions / "one" / "1" / f"{FRAMES[0]}.png").unlink()
    (predictions / "two" / "0" / f"{FRAMES[0]}.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(DataError, match="3 problems") as raised:
        _score(truth, predictions)
    for word in ("one/0/00005.png", "one/1: expected a mask", "two/0/00000.png: expected a PNG, got a file that does"):
        assert word in str(raised.value)


def test_kinds_of_png(tmp_path: Path) -> None:
    mask = moving(0, 0)
    path = tmp_path / "mask.png"
    grey = Image.fromarray(np.where(mask, 3, 0).astype(np.uint8))
    for image in (grey, grey.convert("RGB"), Image.fromarray(mask)):
        image.save(path)
        np.testing.assert_array_equal(read_mask(path, SIZE), mask)
    save_labels(path, mask * 2)
    np.testing.assert_array_equal(read_mask(path, SIZE), mask)
    np.testing.assert_array_equal(read_labels(path, SIZE), mask * 2)
    Image.fromarray(np.where(mask, 255, 0).astype(np.uint16)).save(path)
    for read in (read_mask, read_labels):
        with pytest.raises(FrameError, match="expected 8 bits per channel, got mode I;16"):
            read(path, SIZE)
    grey.convert("RGB").save(path)
    with pytest.raises(FrameError, match="expected a label map, a PNG with a palette"):
        read_labels(path, SIZE)
    inverse = Image.fromarray((~mask).astype(np.uint8))
    inverse.putpalette([255, 255, 255, 0, 0, 0])
    inverse.save(path)
    with pytest.raises(FrameError, match="whose first colour alone is black"):
        read_mask(path, SIZE)
    with pytest.raises(FrameError, match="got no file"):
        read_mask(tmp_path / "absent.png")


def test_files_that_are_no_predictions(tmp_path: Path) -> None:
    archive = tmp_path / "pred.zip"
    archive.write_bytes(b"PK")
    with pytest.raises(DataError, match="unpack a zip first"):
        open_predictions(archive)
    save_json(tmp_path / "list.json", [1])
    with pytest.raises(DataError, match=r"expected \{video: \{expression: \[RLE, ...\]\}\}, got a list"):
        open_predictions(tmp_path / "list.json")
    save_json(tmp_path / "text.json", {"one": {"0": "mask"}})
    with pytest.raises(DataError, match="one/0: expected a list of RLEs"):
        open_predictions(tmp_path / "text.json")


# ---- the truth ----


def test_names_of_frames_need_not_start_at_zero(truth: Path, predictions: Path) -> None:
    def rename(tree: Any) -> None:
        tree["videos"]["one"]["frames"][0] = "00001"

    _edit(truth / "meta_expressions.json", rename)
    for path in (predictions / "one").glob("*/00000.png"):
        path.rename(path.with_name("00001.png"))
    assert all(result.score == Score(1, 1) for result in _score(truth, predictions).values())


def test_rles_follow_the_list_of_frames_and_pngs_their_names(truth: Path, predictions: Path, tmp_path: Path) -> None:
    _edit(truth / "meta_expressions.json", lambda tree: tree["videos"]["one"]["frames"].reverse())
    by_name = _score(truth, predictions)["one/0"].score
    assert by_name.j < 1  # the PNG of frame 00000 is compared with the last mask of the list
    save_json(tmp_path / "pred.json", {"one": {"0": _rle(mevis_truth()["one", "0"])}})
    assert _score(truth, tmp_path / "pred.json")["one/0"].score == Score(1, 1)


def test_masks_that_overlap_256_times_are_one_mask(truth: Path, predictions: Path) -> None:
    _edit(truth / "meta_expressions.json", lambda t: t["videos"]["one"]["expressions"]["0"].update(anno_id=[7] * 256))
    assert _score(truth, predictions)["one/0"].score == Score(1, 1)


def test_a_hidden_split_is_refused(truth: Path, predictions: Path) -> None:
    def hide(tree: Any) -> None:
        for video in tree["videos"].values():
            for entry in video["expressions"].values():
                del entry["anno_id"], entry["obj_id"]

    _edit(truth / "meta_expressions.json", hide)
    with pytest.raises(DataError, match="expected anno_id, a list of numbers"):
        _score(truth, predictions)
    (truth / "mask_dict.json").unlink()
    with pytest.raises(DataError, match="expected the masks of valid_u, got none: they are not published"):
        _score(truth, predictions)


def test_a_list_of_true_masks_has_the_length_of_the_video(truth: Path, predictions: Path) -> None:
    _edit(truth / "mask_dict.json", lambda masks: masks.update({"7": masks["7"][:3]}))
    with pytest.raises(DataError, match="valid_u/one expression 0: expected 4 masks of anno_id 7, one for each frame"):
        _score(truth, predictions)


def test_the_size_comes_from_the_image_where_no_object_is_annotated(truth: Path, predictions: Path) -> None:
    _edit(
        truth / "meta_expressions.json",
        lambda tree: tree["videos"]["two"]["expressions"]["0"].update(anno_id=[], obj_id=[]),
    )
    with pytest.raises(DataError, match="valid_u/two: expected a mask or an image in valid_u/JPEGImages/two/"):
        _score(truth, predictions)
    (truth / "JPEGImages" / "two").mkdir(parents=True)
    Image.new("RGB", SIZE[::-1]).save(truth / "JPEGImages" / "two" / "00000.jpg")
    assert _score(truth, predictions)["two/0"].score == Score(0, 0)


def test_a_true_mask_of_another_size_is_refused(truth: Path, predictions: Path) -> None:
    _edit(truth / "mask_dict.json", lambda masks: masks["8"].__setitem__(1, encode_mask(np.ones((3, 4), dtype=bool))))
    with pytest.raises(DataError, match=r"truth of one, frame 00005: expected an RLE of the image's size"):
        _score(truth, predictions)


def test_ref_youtube_vos_counts_frames_in_three_ways(tmp_path: Path) -> None:
    root = write_ytvos(tmp_path / "set")
    masks = {("aa", "0"): [moving(0, t) for t in range(4)], ("aa", "1"): [moving(1, t) for t in range(4)]}
    write_predictions(tmp_path / "pred" / "Annotations", masks)
    report = run_video_score(
        tmp_path / "pred", form="ref-ytvos", source=root, split="train", out=tmp_path / "out", workers=1
    )
    rows = {row: numbers["J"] for row, numbers in report["numbers"].items()}
    # the object is not there in the first frame, where the answer has a mask
    assert rows == {"all frames": 0.875, "only frames of the object": 1, "from the object's first frame": 1}


def test_a_missing_label_map_is_named(tmp_path: Path) -> None:
    root = write_ytvos(tmp_path)
    (video,) = read_truth("ref-ytvos", root, "train")
    np.testing.assert_array_equal(video.masks(1)["1"], moving(1, 1))
    (root / "train" / "Annotations" / "aa" / "00005.png").unlink()
    with pytest.raises(DataError, match=r"train/aa: expected 4 label maps, one per frame, got no train/.*/00005.png"):
        read_truth("ref-ytvos", root, "train")


def test_valid_of_ref_youtube_vos_is_202_videos_or_as_many_as_declared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_ytvos(tmp_path / "set")
    (root / "train").rename(root / "valid_gt")
    (root / "meta_expressions" / "train").rename(root / "meta_expressions" / "valid")
    save_json(root / "valid_gt" / "obj_id.json", {"aa": {"0": "1", "1": "2"}})
    write_predictions(tmp_path / "pred", {("aa", e): [moving(int(e), t) for t in range(4)] for e in "01"})
    command = ["score", str(tmp_path / "pred"), "--format", "ref-ytvos", "--source", str(root)]
    command += ["--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 2
    assert "expected 202 videos" in capsys.readouterr().err
    assert main([*command, "--mapping", "valid_videos=1"]) == 0
    assert "ref-ytvos, valid" in capsys.readouterr().out


# ---- label maps ----


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train/Annotations/aa/00000.png", b"x", "00000.png: expected a PNG, got a file that does not decode"),
        (
            "train/meta.json",
            b'{"videos": {"aa": {"objects": {"1": {}, "2": {}}}}}',
            "expected `frames`, a list of names, of object 1",
        ),
        (
            "meta_expressions/train/meta_expressions.json",
            b'"obj_id": "' + b"9" * 6000,
            "expected obj_id, the number of one object",
        ),
    ],
)
def test_truth_of_ref_youtube_vos_that_cannot_be_read_is_named(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    path = write_ytvos(tmp_path) / name
    if path.name == "meta_expressions.json":
        content = path.read_bytes().replace(b'"obj_id": "1', content, 1)
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"(?s)train/aa.*{re.escape(says)}"):
        read_truth("ref-ytvos", tmp_path, "train")


@pytest.mark.parametrize("size", [[-1, 5], [10**6, 10**6], ["a", "b"]])
def test_a_true_mask_without_a_size_is_named(size: list[object], truth: Path) -> None:
    path = truth / "mask_dict.json"
    masks = json.loads(path.read_text())
    masks["7"] = [{"size": size, "counts": "abc"}] * len(masks["7"])
    path.write_text(json.dumps(masks))
    with pytest.raises(DataError, match=r"(?s)valid_u/one.*expected an RLE of size \[height, width\] in px, got"):
        read_truth("mevis", truth.parent, truth.name)


@pytest.mark.parametrize("name", ["davis_text_annotations/Davis17_annot1.txt", "DAVIS/ImageSets/2017/val.txt"])
def test_texts_of_ref_davis_in_another_encoding_are_named(name: str, tmp_path: Path) -> None:
    (write_ref_davis(tmp_path) / name).write_bytes(b"balls 1 \xe9")
    with pytest.raises(DataError, match=f"{name}: expected text in utf-8, got byte 0xe9 at 8"):
        read_truth("ref-davis", tmp_path, "val")


def test_davis_reads_what_the_protocol_reads(tmp_path: Path) -> None:
    labels = [labels_at(t) for t in range(5)]
    root = write_davis(tmp_path / "davis", {"balls": labels})
    pred = tmp_path / "pred"
    write_labels(pred / "balls", labels)
    for name in ("00000.png", "00004.png"):
        (pred / "balls" / name).unlink()  # never opened by the semi-supervised protocol
    report = run_video_score(pred, form="davis-semi", source=root, out=tmp_path / "out", workers=1)
    assert report["numbers"]["all"] == {
        "J&F-Mean": 1, "J-Mean": 1, "J-Recall": 1, "J-Decay": 0, "F-Mean": 1, "F-Recall": 1, "F-Decay": 0,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"balls/00000.png: expected a PNG for this frame, got no file"):
        run_video_score(pred, form="davis-unsup", source=root, out=tmp_path / "out", workers=1)
    empty = run_video_score(
        pred, form="davis-unsup", source=root, out=tmp_path / "out", workers=1, missing_as_empty=True
    )
    assert empty["numbers"]["all"]["J-Mean"] == pytest.approx(0.6)
    lines = [json.loads(line) for line in (tmp_path / "out" / "objects.jsonl").read_text().splitlines()]
    assert [line["object"] for line in lines] == [1, 2]
    assert lines[0]["J_per_frame"] == [0, 1, 1, 1, 0]


def test_davis_notes_labels_that_no_frame_has(tmp_path: Path) -> None:
    labels = [np.where(labels_at(t) == 1, 0, labels_at(t)) for t in range(4)]
    root = write_davis(tmp_path / "davis", {"balls": labels})
    write_labels(tmp_path / "pred" / "balls", labels)
    report = run_video_score(tmp_path / "pred", form="davis-unsup", source=root, out=tmp_path / "out", workers=1)
    assert report["notes"] == [
        "1 label below the largest of the first frame in no scored frame; an empty answer gets 1 there: balls 1"
    ]


def test_ref_davis_a_forgives_exchanged_objects_and_b_does_not(tmp_path: Path) -> None:
    root = write_ref_davis(tmp_path / "ref_davis")
    other = np.array([0, 2, 1], dtype=np.uint8)
    for k in range(4):
        write_labels(tmp_path / "a" / f"anno_{k}" / "balls", [other[labels_at(t)] for t in range(3)])
    for expression in range(8):
        for t in range(3):
            save_mask(tmp_path / "b" / "balls" / str(expression) / f"{t:05d}.png", moving(1 - expression // 4, t))
    a = run_video_score(tmp_path / "a", form="ref-davis-a", source=root, out=tmp_path / "out", workers=1)
    b = run_video_score(tmp_path / "b", form="ref-davis-b", source=root, out=tmp_path / "out", workers=1)
    assert a["numbers"]["mean of the annotators"]["J&F"] == 1
    assert b["numbers"]["all frames"]["J"] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["expressions.jsonl", "scores.json"]
    with pytest.raises(DataError, match="protocol A has one for each annotator"):
        run_video_score(tmp_path / "b", form="ref-davis-a", source=root, out=tmp_path / "out", workers=1)


# ---- the command ----


def test_the_command(
    truth: Path, predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shutil.rmtree(predictions / "two")
    save_mask(predictions / "three" / "0" / "00000.png", moving(0, 0))
    save_mask(predictions / "one" / "0" / "00099.png", moving(0, 0))
    out = tmp_path / "out"
    command = ["score", str(predictions), "--format", "mevis", "--source", str(truth.parent), "--output", str(out)]
    assert main([*command, "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "75.00 75.00 75.00" in said
    assert "1 of 4 expressions have no prediction and count as J = F = 0: two/0" in said
    assert "2 predictions of nothing in the truth, not read: one/0/00099, three/0" in said
    report = json.loads((out / "scores.json").read_text())
    assert report["numbers"] == {"all frames": {"J&F": 0.75, "J": 0.75, "F": 0.75}}
    assert report["counts"] == {"videos": 2, "expressions": 4}
    lines = [json.loads(line) for line in (out / "expressions.jsonl").read_text().splitlines()]
    assert [(line["video"], line["expression"], line["J&F"]) for line in lines][-1] == ("two", "0", 0)
    assert main([*command, "--missing-as-empty"]) == 0
    assert "1 of 4 expressions have no prediction and count as empty masks" in capsys.readouterr().out


def test_the_command_refuses_options_that_do_not_belong_together(
    truth: Path, predictions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, says in (
        ([], "expected --data ROOT and --split DATASET/SPLIT, or for videos --format and --source, got none of them"),
        (["--data", "x"], "got --data alone: give both"),
        (["--data", "x", "--split", "a/b", "--missing-as-empty"], "--missing-as-empty: expected --format with it"),
        (["--format", "mevis"], "--format mevis: expected --source DIR"),
        (["--format", "mevis", "--source", str(truth.parent), "--data", "x"], "--data: expected no such option with"),
        (["--format", "mevis", "--source", str(truth.parent), "--mapping", "x"], "--mapping x: expected KEY=VALUE"),
        (
            ["--format", "mevis", "--source", str(truth.parent), "--split", "valid_v"],
            "expected one of train, valid_u, valid, test for",
        ),
        (["--format", "mevis", "--source", str(truth / "nothing")], "nothing"),
    ):
        assert main(["score", str(predictions), *options]) == 2
        assert says in " ".join(capsys.readouterr().err.split())


def test_the_command_offers_every_format() -> None:
    assert list(VIDEO_FORMATS) == list(FORMATS) == list(DEFAULT_SPLITS)


def test_readers_of_one_kind_agree(truth: Path, predictions: Path) -> None:
    assert PngTree.of(predictions).found("one", "0", FRAMES) == [True] * 4
    assert PngTree.of(predictions).found("one", "9", FRAMES) == [False] * 4
    assert RleFile(predictions, {"one": {"0": []}}).found("one", "0", FRAMES) == [False] * 4
