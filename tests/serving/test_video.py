"""Videos: answers frame by frame, the files of `deris-llm predict --video`, going on after an interruption, bad input."""

import json

import numpy as np
import pytest
from PIL import Image

from deris_llm.cli.main import main
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.video import VideoError, open_video, write_video
from deris_llm.models.postprocess import answer_masks
from deris_llm.models.video_slots import chosen_over_video, frame_queries
from deris_llm.serving import video as video_module
from deris_llm.serving.pipeline import DerisPipeline
from deris_llm.serving.video import VideoAnswers
from deris_llm.testing import synthetic_images
from tests.serving.test_pipeline import config, run, same  # noqa: F401  fixtures

PHRASES = ["red circle", "the star, [bold]left", "ring"]
NUM_FRAMES = 8


@pytest.fixture(scope="module")
def pipeline(run):  # noqa: F811
    return DerisPipeline.from_pretrained(run)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """A video with frames at uneven times."""
    images = synthetic_images(NUM_FRAMES)
    times = np.cumsum(np.arange(NUM_FRAMES) / 20).tolist()
    return write_video(
        tmp_path_factory.mktemp("video") / "street", list(zip(images, times, strict=True)), frames_per_second=10
    )


@pytest.fixture(scope="module")
def straight(pipeline, street, tmp_path_factory):
    """The folder of one call that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "out"
    pipeline.video(street, PHRASES).save(out)
    return out


def files_of(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def cut(video, path):
    content = video.read_bytes()
    path.write_bytes(content.replace(content[len(content) // 2 : len(content) // 2 + 4000], bytes(4000)))
    return path


def test_each_frame_is_answered_as_an_image_of_its_own(pipeline, street):
    answers = pipeline.video(street, PHRASES)
    assert answers.num_frames == NUM_FRAMES
    frames = list(answers)
    assert [frame.name for frame in frames] == [f"{n:05d}" for n in range(NUM_FRAMES)]
    np.testing.assert_allclose([frame.seconds for frame in frames], np.cumsum(np.arange(NUM_FRAMES) / 20), atol=1e-3)
    for frame in frames:
        assert [answer.phrase for answer in frame.answers] == PHRASES
        for answer, phrase in zip(frame.answers, PHRASES, strict=True):
            same(answer, pipeline(frame.image, phrase))
    (first, *_) = pipeline.video([frame.image for frame in frames[:2]], "ring")  # a list of frames, one phrase
    same(first.answers[0], frames[0].answers[2])


def test_frames_are_decoded_when_their_turn_comes(pipeline, street):
    answers = pipeline.video(street, PHRASES)
    decoded = []
    frames_of_file = answers.video.frames

    def counted(start=0):
        for frame in frames_of_file(start):
            decoded.append(frame.index)
            yield frame

    answers.video.frames = counted
    frames = iter(answers)
    assert not decoded
    next(frames)
    assert len(decoded) == answers.frames_at_once((80, 60)) == 3  # evaluation.images_per_device
    assert answers.frames_at_once((3840, 2160)) == 2
    assert answers.frames_at_once((7680, 4320)) == 1
    many = pipeline.video(street, [f"star {n}" for n in range(100)])
    assert many.frames_at_once((80, 60)) == pipeline.config.evaluation.max_phrases_per_batch // 100 == 1


def test_what_is_written(straight, pipeline, street):
    frames = list(pipeline.video(street, PHRASES))
    lines = [json.loads(line) for line in (straight / "predictions" / "street.jsonl").read_text().splitlines()]
    assert [(line["frame"], line["number"]) for line in lines] == [(f, p) for f in range(NUM_FRAMES) for p in range(3)]
    for line in lines:
        frame = frames[line["frame"]]
        answer = frame.answers[line["number"]]
        assert (line["phrase"], line["name"]) == (answer.phrase, frame.name)
        assert line["seconds"] == pytest.approx(frame.seconds)
        assert line["score"] == pytest.approx(answer.score, abs=1e-3)
        mask = decode_segmentation(line["mask"], 60, 80)
        assert np.array_equal(mask, answer.mask)
        drawn = Image.open(straight / "masks" / "street" / str(line["number"]) / f"{frame.name}.png")
        assert np.array_equal(np.asarray(drawn), 255 * mask.astype(np.uint8))
        assert line["file"] == f"masks/street/{line['number']}/{frame.name}.png"
    overlay = list(open_video(straight / "overlays" / "street.mp4").frames())
    assert len(overlay) == NUM_FRAMES
    np.testing.assert_allclose([f.seconds for f in overlay], [f.seconds for f in frames], atol=1e-3)
    assert overlay[0].image.size == (240, 180 + 4 * 30)  # enlarged three times, a row per phrase and one of the frame
    assert sorted(files_of(straight)) == sorted(
        ["settings.json", "overlays/street.mp4", "predictions/street.jsonl"]
        + [f"masks/street/{p}/{f:05d}.png" for p in range(3) for f in range(NUM_FRAMES)]
    )


@pytest.mark.parametrize("num_before", [1, 3, 5])
def test_a_resumed_call_equals_a_straight_one(pipeline, street, straight, tmp_path, monkeypatch, num_before):
    answered = VideoAnswers.from_frame
    starts = []

    def interrupted(self, start, **options):
        starts.append(start)
        for frame in answered(self, start, **options):
            if frame.index == num_before and len(starts) == 1:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(VideoAnswers, "from_frame", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pipeline.video(street, PHRASES).save(out)
    predictions = out / "predictions" / "street.jsonl"
    assert len(predictions.read_text().splitlines()) == 3 * num_before
    with predictions.open("a") as file:  # killed while it wrote
        file.write('{"video": "street", "frame"')
    saved = pipeline.video(street, PHRASES).save(out)
    assert starts == [0, num_before // 3 * 3]  # frames that are computed together stay together: equal to the last bit
    assert (saved.num_there, saved.num_frames) == (num_before // 3 * 3, NUM_FRAMES)
    ours, theirs = files_of(out), files_of(straight)
    assert ours == theirs
    assert pipeline.video(street, PHRASES).save(out).num_there == NUM_FRAMES
    assert len(starts) == 2  # nothing was left to answer
    (out / "masks" / "street" / "1" / "00004.png").unlink()
    pipeline.video(street, PHRASES).save(out)
    assert files_of(out) == theirs


def test_a_video_that_is_damaged_half_way(run, pipeline, street, straight, tmp_path, capsys):  # noqa: F811
    broken = cut(street, tmp_path / "broken.mp4")
    with pytest.raises(VideoError) as caught:
        list(open_video(broken).frames())
    num = int(str(caught.value).split("at frame ")[1].split(",")[0])
    assert 0 < num < NUM_FRAMES
    frames = iter(pipeline.video(broken, PHRASES))
    assert [next(frames).index for _ in range(num)] == list(range(num))
    with pytest.raises(VideoError, match=rf"cannot be decoded at frame {num}, after \d\.\d{{3}} s"):
        next(frames)
    out = tmp_path / "out"
    command = ["predict", "--checkpoint", str(run), "--out", str(out), "--phrase", "ring"]
    assert main([*command, "--video", str(broken), str(street)]) == 2
    said = capsys.readouterr().err
    assert f"cannot be decoded at frame {num}" in said
    assert f"The masks of {num} frames are in {out}/masks/broken, drawn in {out}/overlays/broken.mp4" in said
    assert len(list((out / "masks" / "broken" / "0").iterdir())) == num
    assert len(list(open_video(out / "overlays" / "broken.mp4").frames())) == num
    assert main([*command, "--video", str(broken), str(street), "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert f"1 video, {NUM_FRAMES} frames; 1 left out or cut short" in said
    assert f"left out: {broken}: cannot be decoded at frame {num}" in said


def test_the_command(run, street, straight, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    command = ["predict", "--checkpoint", str(run), "--video", str(street), "--out", str(out)]
    phrases = [word for phrase in PHRASES for word in ("--phrase", phrase)]
    assert main([*command, *phrases]) == 0
    assert files_of(out) == files_of(straight)
    said = capsys.readouterr().out
    assert "1: the star, [bold]left" in said
    assert f"1 video, {NUM_FRAMES} frames" in said
    assert f"written to {out}" in said
    assert main([*command, *phrases, "--json"]) == 0
    (video,) = json.loads(capsys.readouterr().out)["videos"]
    assert (video["num_frames"], video["num_answered_before"]) == (NUM_FRAMES, NUM_FRAMES)
    assert [each["phrase"] for each in video["phrases"]] == PHRASES
    assert main([*command, *phrases, "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--phrase", "star"], "answers of another kind: phrases"),
        (
            ["--phrase", "star", "--set", "evaluation.score_threshold=0.9"],
            "score_threshold 0.4 there, 0.9 now",
        ),
        ([], "expected at least one --phrase with --video"),
        (["--phrase", " "], "phrases[0]: expected some words"),
        (["--phrase", "star", "--image", "a.png"], "--video: expected it without --image"),
        (["--phrase", "star", "--instances"], "--video: expected it without --instances"),
    ],
)
def test_what_is_refused(run, street, straight, capsys, options, expected):  # noqa: F811
    before = files_of(straight)
    command = ["predict", "--checkpoint", str(run), "--video", str(street), "--out", str(straight)]
    assert main([*command, *options]) == 2
    assert expected in capsys.readouterr().err
    assert files_of(straight) == before


def test_videos_that_cannot_share_a_folder(run, pipeline, street, straight, tmp_path, capsys):  # noqa: F811
    other = write_video(
        tmp_path / "street", [(image, None) for image in synthetic_images(4, seed=5)], frames_per_second=5
    )
    with pytest.raises(ValueError, match="another video named street there"):
        pipeline.video(other, PHRASES).save(straight)
    command = ["predict", "--checkpoint", str(run), "--phrase", "star", "--out", str(tmp_path / "out")]
    assert main([*command, "--video", str(street), str(other)]) == 2
    assert "expected videos of different names, got 'street' more than once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="got one with other files"):
        pipeline.video(street, PHRASES).save(tmp_path / "mine")


def test_a_folder_of_frames_and_a_second_video_in_the_same_folder(run, pipeline, straight, tmp_path):  # noqa: F811
    folder = tmp_path / "walk"
    folder.mkdir()
    for number, image in enumerate(synthetic_images(3, seed=2)):
        image.save(folder / f"{5 * number:05d}.png")
    out = tmp_path / "out"
    options = ["--phrase", "ring", "--out", str(out), "--fps", "4"]
    assert main(["predict", "--checkpoint", str(run), "--video", str(folder), *options]) == 0
    assert [path.name for path in sorted((out / "masks" / "walk" / "0").iterdir())] == [
        "00000.png",
        "00005.png",
        "00010.png",
    ]
    frames = list(open_video(out / "overlays" / "walk.mp4").frames())
    np.testing.assert_allclose([frame.seconds for frame in frames], [0, 0.25, 0.5], atol=1e-3)
    saved = pipeline.video([folder / "00000.png"], "ring").save(out, overlay=False)
    assert (saved.name, saved.overlay) == ("video", None)
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["video", "walk"]


# -- queries chosen for the whole video ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(run):  # noqa: F811
    return DerisPipeline.from_pretrained(run, overrides=["evaluation.video_selection=video"])


def test_queries_chosen_for_the_whole_video(whole, pipeline, street):
    frames = list(whole.video(street, PHRASES))
    by_frame = list(pipeline.video(street, PHRASES))
    assert [frame.index for frame in frames] == list(range(NUM_FRAMES))
    rule = pipeline.answer_rule
    for p, phrase in enumerate(PHRASES):
        outputs = [next(pipeline.outputs([(frame.image, [phrase])])) for frame in by_frame]
        expected = chosen_over_video((frame_queries(output)[0] for output in outputs), **rule)
        for frame, output, choice in zip(frames, outputs, expected, strict=True):
            answer = frame.answers[p]
            (alone,) = answer_masks(output, [(60, 80)], **rule, chosen=[choice])
            assert answer.query_index == alone.query_index
            assert (answer.mask != alone.mask).mean() < 1e-3
            assert set(answer.query_index) <= set(choice.queries)
            assert answer.is_guess == (choice.is_guess and bool(answer.query_index))
            if answer.query_index == by_frame[frame.index].answers[p].query_index:
                assert np.array_equal(answer.mask, by_frame[frame.index].answers[p].mask)
    first = list(whole.video([frame.image for frame in by_frame[:1]], PHRASES))[0]
    for answer, expected in zip(first.answers, by_frame[0].answers, strict=True):
        same(answer, expected)  # of one frame the choice is that of an image


def test_a_resumed_choice_equals_a_straight_one(whole, street, tmp_path, monkeypatch):
    whole.video(street, PHRASES).save(tmp_path / "straight")
    written = video_module._write_output
    numbers = []

    def interrupted(file, output):
        numbers.append(file.name)
        if len(numbers) == 5:
            raise KeyboardInterrupt
        written(file, output)

    monkeypatch.setattr(video_module, "_write_output", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        whole.video(street, PHRASES).save(out)
    assert len(list((out / ".network-street").iterdir())) == 4
    saved = whole.video(street, PHRASES).save(out)
    assert numbers[5:] == [f"{n:05d}.safetensors" for n in range(3, NUM_FRAMES)]  # the first three were kept
    assert saved.num_frames == NUM_FRAMES
    assert files_of(out) == files_of(tmp_path / "straight")


def test_the_choice_in_a_video_that_is_damaged(whole, street, tmp_path):
    broken = cut(street, tmp_path / "broken.mp4")
    frames = iter(whole.video(broken, "ring"))
    assert next(frames).index == 0
    with pytest.raises(VideoError, match="cannot be decoded at frame"):
        list(frames)
    with pytest.raises(VideoError, match=r"The masks of \d+ frames are in"):
        whole.video(broken, "ring").save(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".network*"))
