"""`deris-llm predict`: the files it writes, going on, and bad input."""

import dataclasses
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from deris_llm.checkpoints.fingerprints import checkpoint_fingerprint
from deris_llm.checkpoints.save import save_weights
from deris_llm.cli.main import main
from deris_llm.data.masks import decode_segmentation
from deris_llm.evaluation.boxes import boxes_of_masks
from deris_llm.evaluation.overlays import fitted
from deris_llm.evaluation.submissions import read_submission
from deris_llm.models.deris import build_model
from deris_llm.serving.pipeline import DerisPipeline
from deris_llm.serving.predict import Question, predict, questions_about, read_pairs
from deris_llm.structures import ReferringRecord
from deris_llm.testing import synthetic_images, tiny_config, tiny_weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config(*tiny_weights(folder), "evaluation.score_threshold=0.4", "evaluation.images_per_device=2")
    torch.manual_seed(0)
    save_weights(folder / "run" / "best", build_model(config), config, {})
    return folder / "run"


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return DerisPipeline.from_pretrained(checkpoint)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "inside").mkdir(parents=True)
    for number, image in enumerate(synthetic_images(3)):
        image.save(folder / f"picture {number}.png")
    synthetic_images(1)[0].save(folder / "inside" / "hidden.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def lines_of(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def asked_of(pictures, *phrases):
    return questions_about([pictures], phrases)


def test_what_is_written(checkpoint, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    image = pictures / "picture 0.png"
    options = ["--phrase", "The red circle!", "--phrase", "[bold]star", "--out", str(out), "--instances"]
    assert main(["predict", "--checkpoint", str(checkpoint), "--image", str(image), *options]) == 0
    lines = lines_of(out)
    assert [line["phrase"] for line in lines] == ["The red circle!", "[bold]star"]
    for line in lines:
        mask = decode_segmentation(line["mask"], 60, 80)
        drawn = np.asarray(Image.open(out / line["file"]))
        np.testing.assert_array_equal(drawn, 255 * mask.astype(np.uint8))
        assert line["image"] == str(image)
        assert line["says_target"] is True
        assert line["checkpoint"] == checkpoint_fingerprint(checkpoint / "best")
        assert (line["score_threshold"], line["selection"], line["presence_use"]) == (0.4, "threshold_or_best", "none")
        parts = [decode_segmentation(each["mask"], 60, 80) for each in line["instances"]]
        np.testing.assert_array_equal(np.logical_or.reduce(parts), mask)
        assert line["boxes"] == [box.astype(int).tolist() for part in parts for box in boxes_of_masks(part[None])]
        assert len(list((out / "masks").glob(f"{out.joinpath(line['file']).stem}.instance-*.png"))) == len(parts)
        assert Image.open(out / line["file"].replace("masks", "overlays").replace("png", "jpg")).width == 480
    assert lines[0]["file"].startswith("masks/picture-0-the-red-circle-")
    said = capsys.readouterr().out
    assert "[bold]star" in said
    assert "2 answered: 0 found, 2 best guesses below the threshold 0.4, 0 nothing" in said
    assert f"written to {out}" in said
    assert re.search(
        r"^seconds: importing libraries \d+\.\d, loading the checkpoint \d+\.\d, answering \d+\.\d$", said, re.M
    )


def test_quiet_and_json(checkpoint, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    command = [
        "predict",
        "--checkpoint",
        str(checkpoint),
        "--image",
        str(pictures),
        "--phrase",
        "star",
        "--out",
        str(out),
    ]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["out"], said["predictions"]) == (str(out), str(out / "predictions.jsonl"))
    assert [Image.open(answer["file"]).size for answer in said["answers"]] == [(80, 60)] * 3
    assert [answer["phrase"] for answer in said["answers"]] == ["star"] * 3
    assert len(said["left_out"]) == 2  # notes.txt and a folder
    assert set(said["seconds"]) == {"importing libraries", "loading the checkpoint", "answering"}

    assert main([*command, "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "3 were answered before" in lines[0]
    assert lines[0].endswith(f": written to {out}")


def test_nothing_is_there(checkpoint, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["predict", "--checkpoint", str(checkpoint), "--image", str(pictures), "--phrase", "star", "--no-overlay"]
    settings = ["--set", "evaluation.score_threshold=0.999", "evaluation.selection=threshold"]
    assert main([*command, "--out", str(out), *settings]) == 0
    lines = lines_of(out)
    assert len(lines) == 3
    assert not any(line["says_target"] for line in lines)
    assert not np.asarray(Image.open(out / lines[0]["file"])).any()
    assert sorted(path.name for path in out.iterdir()) == ["left_out.txt", "masks", "predictions.jsonl"]
    assert "3 answered: 0 found, 3 nothing" in capsys.readouterr().out


def test_a_folder_gives_its_own_pictures(pictures):
    questions = asked_of(pictures, "ring", "star")
    assert [question.path.name for question in questions[::2]] == ["picture 0.png", "picture 1.png", "picture 2.png"]
    assert len({question.file_stem for question in questions}) == 6
    with pytest.raises(ValueError, match=r"got a folder without any"):
        questions_about([pictures.parent], ["ring"])
    with pytest.raises(ValueError, match=r"got no such file"):
        questions_about([pictures / "nowhere.png"], ["ring"])


def test_names_of_files_stay_short_and_inside():
    question = Question("x/../../secret", Path("x" * 300 + "/../" + "漢" * 90), "../" + "字" * 400)
    assert "/" not in question.file_stem
    assert len(f"{question.file_stem}.instance-100.png".encode()) < 255


def test_pairs_of_a_jsonl(pictures, pipeline, tmp_path):
    path = pictures / "pairs.jsonl"
    path.write_text(
        '{"image": "picture 0.png", "phrases": ["ring", "star"], "note": 7}\n\n'
        '{"image": "inside/hidden.png", "phrase": "ring", "phrase_id": "mine/val/7"}\n'
        '{"image": "picture 0.png", "phrase": "circle"}\n{"image": "picture 0.png", "phrase": "ring"}\n'
    )
    questions, problems = read_pairs(path)
    assert (len(questions), problems) == (5, [])
    result = predict(pipeline, questions, tmp_path / "out", overlays=False, progress=False)
    # the phrases of a picture are asked together, a question that is there twice once
    assert [(line["image"], line["phrase"]) for line in lines_of(tmp_path / "out")] == [
        ("picture 0.png", "ring"),
        ("picture 0.png", "star"),
        ("picture 0.png", "circle"),
        ("inside/hidden.png", "ring"),
    ]
    assert lines_of(tmp_path / "out")[3]["phrase_id"] == "mine/val/7"
    assert len(result.lines) == 4


def test_a_second_call_goes_on(pictures, pipeline, tmp_path):
    out = tmp_path / "out"
    first = predict(pipeline, asked_of(pictures, "ring"), out, progress=False)
    path = out / "predictions.jsonl"
    written = path.read_bytes()
    path.write_bytes(written[: written.index(b"\n") + 40])  # killed in the second line
    second = predict(pipeline, asked_of(pictures, "ring"), out, progress=False)
    assert (len(first.lines), len(second.lines), second.num_there) == (3, 2, 1)
    assert path.read_bytes() == written
    third = predict(pipeline, asked_of(pictures, "ring", "star"), out, progress=False)
    assert (len(third.lines), third.num_there) == (3, 3)
    assert path.read_bytes().startswith(written)


def test_pictures_are_taken_as_displayed_or_as_stored(checkpoint, pipeline, tmp_path):
    """What is answered about a mirrored file is what is answered about its displayed, or its stored, pixels."""
    stored = synthetic_images(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 2
    stored.save(tmp_path / "mirrored.png", exif=exif)
    seen = {"displayed": ImageOps.mirror(stored), "stored": stored}
    for name, picture in seen.items():
        out = tmp_path / name
        options = ["--phrase", "ring", "--out", str(out), *(("--exif", name) if name == "stored" else ())]
        assert (
            main(["predict", "--checkpoint", str(checkpoint), "--image", str(tmp_path / "mirrored.png"), *options]) == 0
        )
        (answer,) = pipeline(picture, ["ring"])
        (line,) = lines_of(out)
        np.testing.assert_array_equal(decode_segmentation(line["mask"], 60, 80), answer.mask)
    assert "exif" not in lines_of(tmp_path / "displayed")[0]
    with pytest.raises(ValueError, match=r"exif stored there, displayed now"):
        predict(pipeline, asked_of(tmp_path / "mirrored.png", "star"), tmp_path / "stored", progress=False)


def test_answers_of_another_kind_are_not_mixed(checkpoint, pictures, pipeline, tmp_path):
    out = tmp_path / "out"
    predict(pipeline, asked_of(pictures, "ring"), out, progress=False)
    before = (out / "predictions.jsonl").read_bytes()
    other = DerisPipeline.from_pretrained(checkpoint, score_threshold=0.9)
    with pytest.raises(ValueError, match=r"score_threshold 0\.4 there, 0\.9 now\. Nothing was changed; choose another"):
        predict(other, asked_of(pictures, "star"), out, progress=False)
    with pytest.raises(ValueError, match=r"instances False there, True now"):
        predict(pipeline, asked_of(pictures, "star"), out, instances=True, progress=False)
    other.fingerprint = "0" * 12
    with pytest.raises(ValueError, match=rf"checkpoint {pipeline.fingerprint} there, 000000000000 now"):
        predict(other, asked_of(pictures, "star"), out, progress=False)
    assert (out / "predictions.jsonl").read_bytes() == before


def test_a_folder_of_something_else_is_refused(pictures, pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"got one with other files in it; choose another name"):
        predict(pipeline, [], pictures, progress=False)
    with pytest.raises(ValueError, match="got a file; choose another name"):
        predict(pipeline, [], pictures / "notes.txt", progress=False)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "predictions.jsonl").write_text('{"image": "a.png", "phrase": "ring"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected an answer of `deris-llm predict`"):
        predict(pipeline, [], tmp_path / "theirs", progress=False)


def test_bad_pictures_and_phrases_are_named(pictures, pipeline, tmp_path):
    synthetic_images(1)[0].save(pictures / "picture 1.png", format="JPEG")
    whole = (pictures / "picture 1.png").read_bytes()
    (pictures / "picture 1.png").write_bytes(whole[: len(whole) // 2])
    questions = [*asked_of(pictures, "ring"), Question("a", pictures / "picture 2.png", "ring <image>")]
    with pytest.raises(ValueError, match=r"picture 1\.png.*\nEarlier answers are kept.*--skip-bad"):
        predict(pipeline, questions, tmp_path / "out", progress=False)
    assert [line["image"] for line in lines_of(tmp_path / "out")] == [str(pictures / "picture 0.png")]
    result = predict(pipeline, questions, tmp_path / "out", skip_bad=True, progress=False)
    assert (len(result.lines), result.num_there, len(result.bad)) == (1, 1, 2)
    assert "expected a complete image" in result.bad[0]
    assert "special token '<image>'" in result.bad[1]


def test_a_phrase_beyond_the_limit_of_tokens_is_named(checkpoint, pictures, pipeline, tmp_path, capsys):
    long = "the red circle on the left behind the yellow star"
    limit = sum(pipeline.processor.count_tokens([long], [(60, 80)])[0]) - 1
    command = ["predict", "--checkpoint", str(checkpoint), "--image", str(pictures / "picture 0.png"), "--no-overlay"]
    command += ["--phrase", "ring", "--phrase", long, "--phrase", "star"]
    command += ["--out", str(tmp_path / "out"), "--set", f"data.max_tokens_per_image={limit}"]
    assert main(command) == 2
    said = f"picture 0.png, {long!r}: data.max_tokens_per_image={limit}: expected every phrase to fit with its image"
    assert said in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    assert "1 bad ones left out" in capsys.readouterr().out
    assert [line["phrase"] for line in lines_of(tmp_path / "out")] == ["ring", "star"]


def test_too_little_memory_is_no_bad_picture(pictures, checkpoint, tmp_path, monkeypatch):
    pipeline = DerisPipeline.from_pretrained(checkpoint)

    def fails(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline.model, "forward", fails)
    with pytest.raises(ValueError, match="evaluation ran out of memory"):
        predict(pipeline, asked_of(pictures, "ring"), tmp_path / "out", skip_bad=True, progress=False)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "expected JSON in UTF-8 such as"),
        ("[" * 100_000, "expected JSON in UTF-8 such as"),
        ("[1]", "expected an object such as"),
        ('{"phrase": "ring"}', "expected an object such as"),
        ('{"image": 7, "phrase": "ring"}', "expected an object such as"),
        ('{"image": "picture 0.png"}', "expected either `phrase`, a text, or `phrases`"),
        ('{"image": "picture 0.png", "phrase": "a", "phrases": ["b"]}', "expected either `phrase`"),
        ('{"image": "picture 0.png", "phrases": []}', "expected either `phrase`"),
        ('{"image": "picture 0.png", "phrase": " "}', "expected phrases with words, got ' '"),
        ('{"image": "picture 0.png", "phrases": ["a", null]}', "expected phrases with words, got None"),
        ('{"image": "picture 0.png", "phrase": "a", "phrase_id": 3}', "expected a `phrase_id` that is a text"),
        ('{"image": "nowhere.png", "phrase": "a"}', "expected an image at "),
        ('{"image": "inside", "phrase": "a"}', "expected an image at "),
        (b'{"image": "picture 0.png", "phrase": "\xff"}', "expected JSON in UTF-8 such as"),
    ],
)
def test_a_broken_line_stops_before_anything_runs(checkpoint, pictures, tmp_path, capsys, line, said):
    path = pictures / "pairs.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"image": "picture 0.png", "phrase": "ring"}\n' + line + b"\n")
    command = ["predict", "--checkpoint", str(checkpoint), "--jsonl", str(path), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "1 lines cannot be used" in error
    assert f"pairs.jsonl, line 2: {said}" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_broken_lines_are_left_out_and_counted(checkpoint, pictures, tmp_path, capsys):
    (pictures / "pairs.jsonl").write_text('{"image": "picture 0.png", "phrase": "ring"}\n{}\n')
    options = ["--jsonl", str(pictures / "pairs.jsonl"), "--out", str(tmp_path / "out"), "--skip-bad"]
    assert main(["predict", "--checkpoint", str(checkpoint), *options]) == 0
    said = capsys.readouterr().out
    assert "1 bad ones left out" in " ".join(said.split())
    assert "pairs.jsonl, line 2: expected an object" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image", "x.png"], "got no --phrase"),
        (["--phrase", "ring"], "got no --image"),
        (["--image", "x.png", "--phrase", " "], "--phrase ' ': expected some words"),
        (["--image", "x.png", "--phrase", "ring"], "--image x.png: expected an image or a folder of images"),
        (["--jsonl", "nowhere.jsonl"], "--jsonl nowhere.jsonl: expected a file"),
        (["--jsonl", "nowhere.jsonl", "--phrase", "ring"], "--jsonl: expected --jsonl alone"),
    ],
)
def test_wrong_commands(checkpoint, capsys, options, said):
    assert main(["predict", "--checkpoint", str(checkpoint), *options]) == 2
    assert said in capsys.readouterr().err


def test_no_checkpoint(pictures, capsys):
    command = ["predict", "--checkpoint", str(pictures), "--image", str(pictures), "--phrase", "ring"]
    assert main(command) == 2
    assert "expected a checkpoint folder with config.yaml" in capsys.readouterr().err


def test_an_overlay_says_what_was_found(pipeline):
    narrow = synthetic_images(1, size=(90, 30))[0]
    page = pipeline(narrow, "ring " * 60).overlay()
    assert page.size == (480, 270 + 62)
    wide = synthetic_images(1, size=(100, 2000))[0]
    assert pipeline(wide, "ring").overlay().size == (1280, 64 + 62)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_what_is_no_picture_is_left_out_of_a_folder_and_listed(checkpoint, pictures, tmp_path, capsys):
    left_out = {"._picture 0.png": b"AppleDouble", ".DS_Store": b"x", "fake.jpg": b"<html>no</html>", "a.heic": HEIC,
                "empty.png": b"", "Thumbs.db": b"x", "table.h5": b"\x89HDF\r\n\x1a\n"}  # fmt: skip
    for name, content in left_out.items():
        (pictures / name).write_bytes(content)
    command = ["predict", "--checkpoint", str(checkpoint), "--image", str(pictures), "--phrase", "ring", "--no-overlay"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "3 answered" in said
    assert "9 that are not images left out" in " ".join(said.split())  # these, notes.txt and the folder
    assert "pip install pillow-heif" in said
    listed = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
    named = {line.partition(": ")[0] for line in listed}
    assert named == {str(pictures / name) for name in (*left_out, "notes.txt", "inside")}
    assert main([*command[:4], str(pictures / "picture 0.png"), *command[5:], "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "left_out.txt").exists()  # of a call that left nothing out


def test_all_that_is_left_out_is_in_the_file(checkpoint, pictures, tmp_path, capsys):
    (pictures / "pairs.jsonl").write_text('{"image": "picture 0.png", "phrase": "ring"}\n' + "{}\n" * 25)
    options = ["--jsonl", str(pictures / "pairs.jsonl"), "--out", str(tmp_path / "out"), "--skip-bad", "--no-overlay"]
    assert main(["predict", "--checkpoint", str(checkpoint), *options]) == 0
    assert f"and 15 more, all in {tmp_path / 'out' / 'left_out.txt'}" in capsys.readouterr().out
    assert len((tmp_path / "out" / "left_out.txt").read_text().splitlines()) == 25


def test_any_name_on_any_terminal(checkpoint, pictures, tmp_path, monkeypatch):
    """Markup of rich, letters that the encoding lacks, and a name that is not UTF-8."""
    folder = tmp_path / "pic[" / "bold] \u7ea2"
    folder.parent.mkdir()
    pictures.rename(folder)
    strange = Path(os.fsdecode(os.fsencode(folder) + b"/no-\xff[red].png"))
    (folder / "picture 1.png").rename(strange)
    out = tmp_path / "o[" / "u]t \u2192"
    phrases = ["the [/red] one \u2026", "\u7ea2\u8272"]
    stream = io.BytesIO()
    command = ["predict", "--checkpoint", str(checkpoint), "--image", str(folder), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="latin-1"))
        assert main([*command, "--phrase", phrases[0], "--phrase", phrases[1]]) == 0
        said = stream.getvalue().decode("latin-1")
    assert "the [/red] one \\u2026" in said
    assert "\\u7ea2\\u8272" in said
    assert "no-\\udcff[red].png" in said
    assert "o[/u]t \\u2192" in said
    assert {line["image"] for line in lines_of(out)} >= {str(strange)}
    records = [
        ReferringRecord(f"own/val/{i}", "own", "val", f"id{i}", str(strange), 80, 60, phrase, ())
        for i, phrase in enumerate(phrases)
    ]
    (out / "predictions.jsonl").write_text(
        "".join(line + "\n" for line in (out / "predictions.jsonl").read_text().splitlines() if "udcff" in line)
    )
    assert set(read_submission(out, records).answers) == {"own/val/0", "own/val/1"}


def test_a_reader_that_goes_ends_nothing(checkpoint, pictures, tmp_path, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as stream:
        patch.setattr(sys, "stdout", stream)
        command = ["predict", "--checkpoint", str(checkpoint), "--image", str(pictures), "--phrase", "ring"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
        assert main(["config", "list"]) == 0
    assert len(lines_of(tmp_path / "out")) == 3
    assert "BrokenPipe" not in capfd.readouterr().err


def test_an_unwritable_folder_is_found_before_loading(checkpoint, pictures, monkeypatch, capsys):
    monkeypatch.setattr(DerisPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    command = ["predict", "--checkpoint", str(checkpoint), "--image", str(pictures), "--phrase", "ring"]
    assert main([*command, "--out", str(pictures / "notes.txt" / "out")]) == 2
    assert "expected a folder that can be written to, got NotADirectoryError" in capsys.readouterr().err
    assert main([*command, "--out", str(pictures / "notes.txt")]) == 2
    assert "got a file; choose another name" in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_answered(pictures, pipeline, tmp_path, monkeypatch):
    written = []

    def fails(mask, path):
        written.append(path)
        if len(written) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("deris_llm.serving.answers.save_mask", fails)
    with pytest.raises(ValueError, match=r"No space left on device\. Earlier answers are kept"):
        predict(pipeline, asked_of(pictures, "ring"), tmp_path / "out", overlays=False, progress=False)
    assert len(lines_of(tmp_path / "out")) == 1


def test_a_phrase_that_is_no_text_is_named(pictures, pipeline, tmp_path):
    question = Question("a", pictures / "picture 0.png", "half \ud83d")
    with pytest.raises(ValueError, match=r"expected text that UTF-8 can hold, got 'half \\ud83d'"):
        predict(pipeline, [question], tmp_path / "out", progress=False)


def amber_px(page):
    return int((np.asarray(page)[-62:] == (176, 116, 0)).all(axis=-1).sum())


def test_a_best_guess_is_said_to_be_one(checkpoint, pictures, tmp_path, capsys):
    command = [
        "predict",
        "--checkpoint",
        str(checkpoint),
        "--image",
        str(pictures / "picture 0.png"),
        "--phrase",
        "ring",
    ]
    for threshold, verdict in (("0.999", "best guess"), ("0.001", "found")):
        out = tmp_path / threshold
        assert main([*command, "--out", str(out), "--set", f"evaluation.score_threshold={threshold}"]) == 0
        (line,) = lines_of(out)
        assert (line["verdict"], line["says_target"]) == (verdict, True)
        said = capsys.readouterr().out
        assert (f"1 best guess below the threshold {threshold}" in said) == (verdict == "best guess")
        page = Image.open(next((out / "overlays").iterdir()))
        assert page.height > 62
    answer = DerisPipeline.from_pretrained(checkpoint, score_threshold=0.999)(synthetic_images(1)[0], "ring")
    found = dataclasses.replace(answer, is_guess=False)
    assert amber_px(answer.overlay()) > 20
    assert amber_px(found.overlay()) == 0


def test_an_empty_mask_is_nothing_everywhere(checkpoint, pictures, tmp_path, monkeypatch, capsys):
    """Also where a query is selected: its logits are below 0 everywhere."""
    pipeline = DerisPipeline.from_pretrained(checkpoint, score_threshold=0.001)
    forward = pipeline.model.forward

    def without_masks(batch):
        output = forward(batch)
        rounds = tuple(dataclasses.replace(one, mask_logits=-one.mask_logits.abs() - 1) for one in output.rounds)
        return dataclasses.replace(output, rounds=rounds)

    monkeypatch.setattr(pipeline.model, "forward", without_masks)
    result = predict(pipeline, asked_of(pictures, "ring"), tmp_path / "out", instances=True, progress=False)
    for line in lines_of(tmp_path / "out"):
        assert (line["verdict"], line["says_target"], line["boxes"], line["instances"]) == ("nothing", False, [], [])
        assert line["score"] > 0.001
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 3
    assert all(line["verdict"] == "nothing" for line in result.lines)


def test_a_caption_of_15000_letters_is_measured_a_few_times():
    class Pen:
        measured = 0

        def textlength(self, text, font):
            self.measured += len(text)
            return 7.0 * len(text)

    pen = Pen()
    assert fitted("x" * 15_000, None, 456, pen) == "x" * 62 + "..."
    assert pen.measured < 5_000
    assert fitted("the  red\ncup", None, 456, pen) == "the red cup"
