"""The demo without a server: what it draws and gives away, how requests share a batch, what is refused, what is freed."""

import io
import json
import shlex
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deris_llm import DerisPipeline
from deris_llm.cli.main import build_parser
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.video import write_video
from deris_llm.models.postprocess import PhraseAnswer
from deris_llm.serving.answers import ImageAnswer
from deris_llm.serving.demo import files, views
from deris_llm.serving.demo.examples import drawn_examples, examples_in
from deris_llm.serving.demo.requests import lines_of, rule_of, upload
from deris_llm.serving.demo.service import DemoService, Limits, Request, RequestError
from deris_llm.serving.demo.sessions import Asked, Session, Sessions
from deris_llm.serving.demo.video import answer_video
from deris_llm.serving.demo.views import Rule
from deris_llm.serving.inspection import Inspection
from deris_llm.serving.video_files import SavedVideo
from deris_llm.testing import synthetic_images

PHRASES = ["red circle", "the small blue square on the left", "star & <b>moon</b>"]


@pytest.fixture(scope="module")
def inspection(pipeline: DerisPipeline) -> Inspection:
    return pipeline.inspect(synthetic_images(1)[0], PHRASES)


@pytest.fixture(scope="module")
def service(pipeline: DerisPipeline) -> DemoService:
    return DemoService([pipeline], Limits(max_phrases=4, max_letters=50, max_megapixels=0.1))


def answer(mask: np.ndarray, phrase: str = "a star") -> ImageAnswer:
    scores = np.array([0.9, 0.1], dtype=np.float32)
    found = PhraseAnswer(mask, mask[None][: int(mask.any())], (0,) * int(mask.any()), scores, 0.8, 0.5)
    return ImageAnswer(**vars(found), phrase=phrase, source=Image.new("RGB", mask.shape[::-1]))


def box_mask(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((60, 80), dtype=bool)
    mask[rows, columns] = True
    return mask


# -- views -----------------------------------------------------------------------------------------------------------


def test_all_answers_in_one_image_each_in_its_colour(inspection: Inspection):
    masks = [box_mask(slice(0, 20), slice(0, 20)), box_mask(slice(30, 60), slice(40, 80)), box_mask(slice(0), slice(0))]
    grey = Inspection(
        Image.new("RGB", (80, 60), (128, 128, 128)), tuple(PHRASES), inspection.output, inspection.evaluation
    )
    drawn = views.annotated_image(grey, [answer(mask) for mask in masks], chosen=1)
    assert drawn.size == views.display_size(grey) == (640, 480)  # small images are enlarged
    pixels = np.asarray(drawn).astype(int)
    for phrase, (row, column) in enumerate(((20, 20), (250, 350))):
        expected = 0.58 * 128 + 0.42 * np.array(views.colour_of(phrase))
        assert np.abs(pixels[row, column] - expected).max() <= 1
    assert (pixels[470, 10] == 128).all()
    assert views.colour_of(0) == views.colour_of(10) != views.colour_of(1)


def test_large_images_are_reduced_for_display(inspection: Inspection):
    large = Inspection(Image.new("RGB", (4000, 1000)), inspection.phrases, inspection.output, inspection.evaluation)
    assert views.display_size(large) == (1024, 256)
    assert views.annotated_image(large, Rule().answers(large)).size == (1024, 256)
    assert Rule().answers(large, max_side=None)[0].mask.shape == (1000, 4000)


def test_a_click_selects_the_smallest_mask_under_it():
    answers = [answer(box_mask(slice(0, 60), slice(0, 80))), answer(box_mask(slice(10, 20), slice(10, 20)))]
    assert views.phrase_at(answers, 15 / 80, 15 / 60) == 1
    assert views.phrase_at(answers, 0.9, 0.9) == 0
    assert views.phrase_at(answers[1:], 0.9, 0.9) is None
    assert views.phrase_at(answers, 1.0, 1.0) is None  # beyond the last pixel


def test_the_legend_has_verdicts_and_is_safe(inspection: Inspection):
    shown = views.legend(Rule(0.5, "threshold").answers(inspection), chosen=2)
    assert shown.count("<tr") == 4
    assert "star &amp; &lt;b&gt;moon" in shown
    assert "<b>" not in shown
    assert shown.count('class="chosen"') == 1
    assert "not in the image" in views.legend([answer(box_mask(slice(0), slice(0)))])


def test_rounds_and_their_scores(inspection: Inspection):
    before, after = views.round_pair(inspection, 1, 0)
    assert before.size == after.size == (640, 480)
    assert (np.asarray(before) != np.asarray(after)).any()
    with pytest.raises(ValueError, match="round_index: expected 0 to"):
        views.round_pair(inspection, 1, inspection.num_rounds - 1)
    chart = views.score_chart(inspection, chosen=0)
    assert chart.count("<polyline") == 3
    assert chart.count(">round ") == inspection.num_rounds
    assert "<b>" not in chart


def test_queries_best_first_and_those_of_the_answer_framed(inspection: Inspection):
    found = Rule(0, "best").answers(inspection)[1]
    drawn = views.query_images(inspection, found, 1)
    scores = inspection.referring_scores()[1]
    assert [caption for _, caption in drawn] == [f"query {q}: {scores[q]:.2f}" for q in np.argsort(-scores)]
    framed = [bool((np.asarray(image)[0] == 255).all()) for image, _ in drawn]
    assert framed == [True, False, False, False, False]


def test_two_checkpoints_and_where_they_differ(inspection: Inspection):
    ours = [answer(box_mask(slice(0, 60), slice(0, 40)), phrase) for phrase in PHRASES[:2]]
    theirs = [answer(box_mask(slice(0, 60), slice(20, 60)), PHRASES[0]), ours[1]]
    assert views.mask_iou(ours[0].mask, theirs[0].mask) == pytest.approx(1 / 3)
    assert views.mask_iou(*(box_mask(slice(0), slice(0)),) * 2) == 1
    table = views.comparison_table(ours, theirs, ["a<b", "c"])
    assert table.index("33 %") < table.index("100 %")  # what differs most is first
    assert "a&lt;b" in table
    pixels = np.asarray(views.difference_image(inspection, ours, theirs, 0)).astype(int)
    orange, white, blue = pixels[240, 80], pixels[240, 240], pixels[240, 400]
    assert orange[0] > orange[2]
    assert blue[2] > blue[0]
    assert white.min() > max(orange[2], blue[0])


# -- files -----------------------------------------------------------------------------------------------------------


def test_the_files_hold_the_masks_of_the_answer(tmp_path: Path, inspection: Inspection):
    answers = Rule(0.01, "threshold").answers(inspection, max_side=None)
    files.write_masks("street.jpg", answers, tmp_path / "masks.zip")
    files.write_answers("street.jpg", answers, tmp_path / "answers.json")
    lines = json.loads((tmp_path / "answers.json").read_text())
    assert [line["phrase"] for line in lines] == PHRASES
    with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
        names = archive.namelist()
        assert "02-the-small-blue-square-on-the-left.png" in names
        assert sum("instance" in name for name in names) == sum(
            len(a.query_index) for a in answers if len(a.query_index) > 1
        )
        for number, (line, found) in enumerate(zip(lines, answers, strict=True), start=1):
            (name,) = [name for name in names if name.startswith(f"{number:02d}-") and "instance" not in name]
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(archive.read(name)))), found.mask * 255)
            np.testing.assert_array_equal(decode_segmentation(line["mask"], *found.mask.shape), found.mask)


def test_the_command_that_makes_them_again_is_one_of_ours(inspection: Inspection):
    command = files.predict_command("runs/my run", "a b.jpg", inspection, Rule(0.25, "best", "gate"))
    program, *arguments = shlex.split(command.replace("\\\n", ""))  # as a shell joins the lines
    parsed = build_parser().parse_args(arguments)
    assert program == "deris-llm"
    assert (str(parsed.checkpoint), [str(path) for path in parsed.image]) == ("runs/my run", ["a b.jpg"])
    assert parsed.phrase == PHRASES
    assert parsed.set == ["evaluation.score_threshold=0.25", "evaluation.selection=best", "evaluation.presence=gate"]
    assert "score_threshold=0.5 " in files.predict_command("x", "a.jpg", inspection, Rule())


# -- examples --------------------------------------------------------------------------------------------------------


def test_examples_of_a_folder(tmp_path: Path):
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a cat\na dog\n")
    assert [(Path(p).name, phrases) for p, phrases in examples_in(tmp_path)] == [
        ("a.jpg", "a cat\na dog"),
        ("b.png", ""),
    ]
    with pytest.raises(ValueError, match="expected a folder of images, got no such folder"):
        examples_in(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected images in this folder, got none"):
        examples_in(tmp_path / "empty")


def test_drawn_examples_are_the_same_every_time(tmp_path: Path):
    first, second = drawn_examples(tmp_path / "a"), drawn_examples(tmp_path / "b")
    assert [phrases for _, phrases in first] == [phrases for _, phrases in second]
    assert [Path(p).read_bytes() for p, _ in first] == [Path(p).read_bytes() for p, _ in second]
    assert all(1 < len(phrases.splitlines()) <= 4 for _, phrases in first)


# -- service ---------------------------------------------------------------------------------------------------------


def test_an_answer_of_the_service_is_the_pipelines(service: DemoService, pipeline: DerisPipeline):
    image = synthetic_images(1)[0]
    (found,) = service.inspect(image, [" red circle ", "", PHRASES[1]])
    assert found.phrases == ("red circle", PHRASES[1])
    for ours, theirs in zip(found.answers(), pipeline(image, list(found.phrases)), strict=True):
        np.testing.assert_array_equal(ours.mask, theirs.mask)


def test_requests_that_come_together_share_a_batch(pipeline: DerisPipeline, monkeypatch: pytest.MonkeyPatch):
    """While the network runs on the first one, the others come; each gets what belongs to its image."""
    service, started, may_go, batches = DemoService([pipeline]), threading.Event(), threading.Event(), []
    inspect_all = pipeline.inspect_all

    def slow(pairs):
        batches.append(len(pairs))
        started.set()
        assert may_go.wait(60)
        return inspect_all(pairs)

    monkeypatch.setattr(pipeline, "inspect_all", slow)
    images = synthetic_images(5, seed=3)
    requests = [service.submit(images[0], PHRASES)]
    assert started.wait(60)
    requests += [service.submit(image, [phrase]) for image, phrase in zip(images[1:4], PHRASES, strict=True)]
    left = service.submit(images[4], PHRASES)
    left.found.cancel()  # its client is gone
    may_go.set()
    found = [service.wait(request)[0] for request in requests]
    service.close()
    assert batches == [1, 3]
    assert service.num_runs == 2
    for inspection, image, phrases in zip(found, images, [PHRASES, *([phrase] for phrase in PHRASES)], strict=False):
        alone = next(iter(inspect_all([(image, phrases)])))
        np.testing.assert_allclose(inspection.referring_scores(), alone.referring_scores(), atol=1e-5)


def test_only_the_request_at_fault_fails(pipeline: DerisPipeline, monkeypatch: pytest.MonkeyPatch, caplog):
    service = DemoService([pipeline])
    inspect_all = pipeline.inspect_all

    def refusing(pairs):
        for _, phrases in pairs:
            if "defect" in phrases:
                raise KeyError("a defect")
            if "refused" in phrases:
                raise ValueError("the phrase 'refused': expected fewer tokens")
        return inspect_all(pairs)

    monkeypatch.setattr(pipeline, "inspect_all", refusing)
    image = synthetic_images(1)[0]
    requests = [service.submit(image, [phrase]) for phrase in ("red circle", "refused", "star")]
    assert service.wait(requests[0])[0].phrases == ("red circle",)
    assert service.wait(requests[2])[0].phrases == ("star",)
    with pytest.raises(RequestError, match="expected fewer tokens"):
        service.wait(requests[1])
    assert not caplog.records
    with pytest.raises(RequestError, match="its log says why"):
        service.wait(service.submit(image, ["defect"]))
    assert "a defect" in caplog.text  # with its traceback: somebody must mend it
    service.close()


def test_what_is_wrong_with_a_request_is_said(service: DemoService, tmp_path: Path):
    image, runs = synthetic_images(1)[0], service.num_runs
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for picture, phrases, said in (
        (image, [], "There is no phrase"),
        (image, ["  ", "\t"], "There is no phrase"),
        (image, list("abcde"), "There are 5 phrases; this demo takes at most 4"),
        (image, ["x" * 51], "has 51 letters; this demo takes at most 50"),
        (image, ["\ud800"], "expected text that UTF-8 can hold"),
        (broken, ["star"], r"^This file cannot be read as an image: .*'broken.png'\. Try a JPEG or PNG file\.$"),
        (tmp_path / "nowhere.png", ["star"], "got no file"),
        (Image.new("RGB", (400, 300)), ["star"], "has 400 x 300 px; this demo takes at most 0.1 megapixels"),
    ):
        with pytest.raises(RequestError, match=said):
            service.inspect(picture, phrases)
    assert service.num_runs == runs


def test_too_many_and_too_slow(pipeline: DerisPipeline, monkeypatch: pytest.MonkeyPatch):
    service, may_go = DemoService([pipeline], Limits(max_seconds=0.2, max_waiting=2)), threading.Event()
    monkeypatch.setattr(pipeline, "inspect_all", lambda _: may_go.wait(60))
    image = synthetic_images(1)[0]
    running = service.submit(image, ["star"])
    time.sleep(0.1)
    with pytest.raises(RequestError, match="no answer within 0.2 seconds"):
        service.inspect(image, ["star"])  # waits, is given up, and frees its place
    waiting = service.submit(image, ["star"])
    with pytest.raises(RequestError, match="2 requests are waiting"):
        service.submit(image, ["star"])
    assert waiting.found.cancel()
    assert service.submit(image, ["star"]).found.cancel()
    may_go.set()
    assert isinstance(running, Request)


# -- sessions --------------------------------------------------------------------------------------------------------


def test_closing_a_session_frees_memory_files_and_its_place(
    tmp_path: Path, inspection: Inspection, service: DemoService
):
    sessions = Sessions(tmp_path, max_open=2)
    mine, other = sessions.get("mine"), sessions.get("other")
    assert sessions.get("mine") is mine
    own, shared = tmp_path / "own.png", tmp_path / "shared.png"
    for path in (own, shared):
        path.write_bytes(b"x")
    mine.uploads, other.uploads = {own, shared}, {shared}
    mine.asked = Asked((inspection,), own, 0.1)
    shown = Path(mine.write_image("answers", Image.new("RGB", (4, 4))))
    assert shown != Path(mine.write_image("answers", Image.new("RGB", (4, 4))))
    assert shown.is_file()
    mine.waiting = Request(inspection.image, inspection.phrases, service.submit(inspection.image, ["star"]).found)
    sessions.close("mine")
    sessions.close("mine")
    assert mine.asked is None
    assert [path.exists() for path in (own, shared, shown, mine.folder)] == [False, True, False, False]
    assert len(sessions) == 1
    sessions.get("third")
    sessions.get("fourth")  # the one that was used least recently makes room
    assert len(sessions) == 2
    assert not shared.exists()


# -- videos ----------------------------------------------------------------------------------------------------------


def asked_video(service: DemoService, session: Session, path: Path, **options: Any) -> SavedVideo:
    return answer_video(service, session, path, PHRASES[:2], Rule(), **{"on_frame": lambda *_: None} | options)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = write_video(tmp_path / "clip", [(image, None) for image in synthetic_images(6)], frames_per_second=5)
    assert path is not None
    return path


def test_a_video_is_answered_as_by_the_pipeline(
    pipeline: DerisPipeline, service: DemoService, clip: Path, tmp_path: Path
):
    told = []
    session = Sessions(tmp_path / "sessions").get("a")
    saved = asked_video(service, session, clip, on_frame=lambda *numbers: told.append(numbers))
    assert told == [(number, 6) for number in range(1, 7)]
    assert (saved.num_frames, saved.error, session.waiting) == (6, None, None)
    for frame in pipeline.video(clip, PHRASES[:2]):
        for number, expected in enumerate(frame.answers):
            mask = np.asarray(Image.open(saved.masks / str(number) / f"{frame.name}.png")) > 0
            assert (mask != expected.mask).mean() < 1e-3
    session.close()
    assert not session.folder.exists()


def test_a_video_of_a_page_that_is_closed_leaves_nothing(service: DemoService, clip: Path, tmp_path: Path):
    session = Sessions(tmp_path / "sessions").get("a")
    with pytest.raises(RequestError):
        asked_video(service, session, clip, on_frame=lambda number, _: session.close() if number == 2 else None)
    assert not session.folder.exists()
    assert service._num_open == 0


def test_videos_that_are_refused(pipeline: DerisPipeline, clip: Path, tmp_path: Path):
    session = Sessions(tmp_path / "sessions").get("a")
    for limits, said in (
        (Limits(max_video_seconds=1), r"This video has 1\.2 seconds; this demo takes at most 1\."),
        (Limits(max_video_megapixels=0.004), r"This video has 80 x 60 px; this demo takes at most 0\.004 megapixels"),
        (Limits(max_phrases=1), "There are 2 phrases"),
    ):
        asked = DemoService([pipeline], limits)
        with pytest.raises(RequestError, match=said):
            asked_video(asked, session, clip)
        asked.close()


@pytest.mark.parametrize(
    "given", ["", None, "/etc/passwd", "../secret.png", "nul\0byte", "~/a.png", ["a.png"], 5, "link.png"]
)
def test_only_uploads_are_read(given: Any, tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "link.png").symlink_to("/etc/passwd")
    with pytest.raises(RequestError, match="no image|was not uploaded"):
        upload(str(folder / given) if given in ("../secret.png", "link.png") else given, folder)


def test_values_of_another_kind_are_named() -> None:
    for phrases in (5, {}, [5], [["a"]], True):
        with pytest.raises(RequestError, match="expected text with one phrase a line"):
            lines_of(phrases)
    for rule in (("x", None, None), (True, None, None), (None, "all", None), (None, None, ["none"])):
        with pytest.raises(RequestError, match="expected"):
            rule_of(*rule)
