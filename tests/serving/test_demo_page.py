"""The demo served: over HTTP, through gradio's client, and in the system's Chromium."""

import io
import json
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deris_llm import DerisPipeline
from deris_llm.common.builtin import builtin_folder
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.video import open_video, write_video
from deris_llm.serving.demo import server
from deris_llm.serving.demo.examples import drawn_examples
from deris_llm.serving.demo.service import DemoService, Limits

gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed: pip install -e '.[demo]'")
pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")

from deris_llm.serving.demo.page import DemoPage  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHRASES = "car with stripes\nbig black cat"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoPage]:
    """A page that serves a copy of the shipped checkpoint, compared with itself; the copy is gone before the first request."""
    folder = tmp_path_factory.mktemp("demo")
    shipped = builtin_folder("tiny", holding="trainable.safetensors")
    assert shipped is not None
    checkpoint = folder / "checkpoint"
    shutil.copytree(shipped, checkpoint)
    pipeline = DerisPipeline.from_pretrained(checkpoint, device="cpu")
    page = DemoPage(
        DemoService([pipeline, pipeline], Limits(max_phrases=5)),
        names=["first", "second"],
        checkpoint=str(checkpoint),
        examples=drawn_examples(folder / "drawings"),
        note="A note.",
        folder=folder / "served",
    )
    page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    shutil.rmtree(checkpoint)
    yield page
    page.close()
    assert not (folder / "served").exists()


@pytest.fixture(scope="module")
def image(demo: DemoPage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first drawing under another name: two cars, two cats, a fish."""
    path = tmp_path_factory.mktemp("images") / "my street.png"
    shutil.copyfile(demo.example_files[0], path)
    return path


@pytest.fixture(scope="module")
def clip(demo: DemoPage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six frames of a camera that moves over the first drawing."""
    drawing = Image.open(demo.example_files[0]).convert("RGB")
    width, height = drawing.width * 3 // 4 // 2 * 2, drawing.height // 2 * 2
    frames = [(drawing.crop((3 * n, 0, 3 * n + width, height)), n / 5) for n in range(6)]
    path = write_video(tmp_path_factory.mktemp("videos") / "my clip", frames, frames_per_second=5)
    assert path is not None
    return path


def user_files(demo: DemoPage) -> list[Path]:
    return [
        Path(folder, name)  # os.walk, since folders vanish meanwhile
        for folder, _, names in os.walk(demo.folder)
        for name in names
        if "examples" not in Path(folder).parts
    ]


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


# -- HTTP ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(demo: DemoPage) -> Iterator[Any]:
    client = gradio_client.Client(demo.blocks.local_url, verbose=False)
    yield client
    client.close()


def test_the_named_endpoints(client: Any):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/ask", "/answers", "/rounds", "/queries", "/compare", "/export", "/segment", "/video"}


def test_a_session_over_http(demo: DemoPage, client: Any, image: Path, caplog: pytest.LogCaptureFixture):
    """One run of the network, then every view, by several thresholds."""
    runs = demo.service.num_runs
    client.predict(gradio_client.handle_file(image), PHRASES, api_name="/ask")
    rule = (0.9, "threshold_or_best", "none")
    drawn, legend = client.predict(*rule, 0, api_name="/answers")
    assert Image.open(drawn).size == (640, 594) or max(Image.open(drawn).size) == 640
    assert "big black cat" in legend
    assert client.predict(1.0, "threshold", "none", 0, api_name="/answers")[1].count("not in the image") == 2
    pair, chart = client.predict(1, 2, api_name="/rounds")
    assert len(pair) == 2
    assert chart.count("<polyline") == 2
    assert len(client.predict(*rule, 1, api_name="/queries")) == 10
    *_, table = client.predict(*rule, 0, api_name="/compare")
    assert table.count("100 %") == 2
    (masks, answers), command, gone = client.predict(*rule, api_name="/export")
    assert len(zipfile.ZipFile(masks).namelist()) == 3
    lines = json.loads(Path(answers).read_text())
    assert [line["image"] for line in lines] == ["my_street.png"] * 2 or lines[0]["image"].startswith("my")
    assert "--phrase='big black cat'" in command
    assert "is not there any more" in gone  # the checkpoint
    assert demo.service.num_runs == runs + 1
    for arguments, endpoint, said in (
        ((2, "best", "none", 0), "/answers", "score_threshold: expected 0 to 1, got 2"),
        (("high", "best", "none", 0), "/answers", "expected a number from 0 to 1, got 'high'"),
        (
            (0.5, "most", "none", 0),
            "/queries",
            "selection: expected threshold, threshold_or_best, best or null, got 'most'",
        ),
        ((0.5, "best", "none", 2), "/answers", "The selected phrase: expected a whole number from 0 to 1, got 2"),
        ((0, 3), "/rounds", "The round: expected a whole number from 0 to 2, got 3"),
        ((None, "a"), "/ask", "There is no image"),
        (
            (gradio_client.handle_file(image), "a\nb\nc\nd\ne\nf"),
            "/ask",
            "There are 6 phrases; this demo takes at most 5",
        ),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=said):
            client.predict(*arguments, api_name=endpoint)
    assert demo.service.num_runs == runs + 1
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def post(demo: DemoPage, data: list[Any]) -> str:
    """One call of /segment as curl makes it; returns the stream of events."""
    url = f"{demo.blocks.local_url}gradio_api/call/segment"
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/{event}", timeout=60) as answer:
        return answer.read().decode()


def test_one_call_without_a_session(demo: DemoPage, client: Any, image: Path, capsys: pytest.CaptureFixture[str]):
    found = client.predict(gradio_client.handle_file(image), PHRASES.split("\n"), None, None, None, api_name="/segment")
    pipeline = demo.service.pipelines[0]
    for line, answer in zip(found, pipeline(image, PHRASES.split("\n")), strict=True):
        assert (line["phrase"], line["verdict"]) == (answer.phrase, answer.verdict)
        np.testing.assert_array_equal(decode_segmentation(line["mask"], *answer.mask.shape), answer.mask)
    assert "This image was not uploaded" in post(demo, [{"path": str(image)}, ["a"], None, None, None])
    assert "There is no image" in post(demo, [None, ["a"], None, None, None])
    for broken in ([], [5, ["a"], None, None, None], [{"path": "x", "meta": {"_type": "gradio.FileData"}}, 1, 1, 1, 1]):
        assert "event: error" in post(demo, broken)
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out


def test_broken_files(demo: DemoPage, client: Any, tmp_path: Path, image: Path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "half.png").write_bytes(image.read_bytes()[:2000])
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    for name, said in (
        ("text.png", r"^This file cannot be read as an image: .*'text.png'\. Try a JPEG or PNG file\.$"),
        ("empty.jpg", "got a file of 0 bytes"),
        ("half.png", "expected a complete image"),
        ("large.png", "has 9,000 x 9,000 px; this demo takes at most 40 megapixels"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=said):
            client.predict(gradio_client.handle_file(tmp_path / name), "a cat", api_name="/ask")


def test_a_video_over_http(demo: DemoPage, client: Any, clip: Path, tmp_path: Path):
    rule = (None, None, None)
    legend, drawn, masks = client.predict(gradio_client.handle_file(clip), PHRASES, *rule, api_name="/video")
    assert legend.count("of 6 frames") == 2
    drawn = drawn["video"] if isinstance(drawn, dict) else drawn
    assert len(list(open_video(drawn).frames())) == 6
    answers = list(demo.service.pipelines[0].video(clip, PHRASES.split("\n")))
    with zipfile.ZipFile(masks) as archive:
        assert len(archive.namelist()) == 2 * 6 + 2
        for frame in answers:
            for number, answer in enumerate(frame.answers):
                found = np.asarray(Image.open(io.BytesIO(archive.read(f"{number}/{frame.name}.png")))) > 0
                assert (found != answer.mask).mean() < 1e-3
        assert len(archive.read("answers.jsonl").splitlines()) == 12
    broken = tmp_path / "broken.mp4"
    content = clip.read_bytes()
    end = content.rindex(b"moov") - 4  # the frames lie before the index
    broken.write_bytes(content[: end - 300] + bytes(300) + content[end:])
    legend, drawn, _ = client.predict(gradio_client.handle_file(broken), PHRASES, *rule, api_name="/video")
    assert "broken.mp4: cannot be decoded at frame" in legend
    assert str(demo.folder) not in legend
    assert legend.count(" of 6 frames") == 0
    (tmp_path / "text.mp4").write_text("no video")
    large = write_video(tmp_path / "large", [(Image.new("RGB", (1920, 1200)), 0.0)], frames_per_second=5)
    long = write_video(
        tmp_path / "long", [(Image.new("RGB", (32, 32)), 7.0 * n) for n in range(5)], frames_per_second=1
    )
    for path, said in (
        (tmp_path / "text.mp4", r"This file cannot be read as a video: text\.mp4.*Try an MP4 file\.$"),
        (large, "has 1,920 x 1,200 px; this demo takes at most 2.1 megapixels"),
        (long, r"has \d+\.\d seconds; this demo takes at most 20"),
        (None, "There is no video; upload one"),
    ):
        given = None if path is None else gradio_client.handle_file(path)
        with pytest.raises(gradio_client.exceptions.AppError, match=said):
            client.predict(given, "a cat", *rule, api_name="/video")
    with pytest.raises(gradio_client.exceptions.AppError, match="There is no phrase"):
        client.predict(gradio_client.handle_file(clip), "", *rule, api_name="/video")


# -- browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(demo: DemoPage, browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page as a new user; afterwards no request may have left this machine and no error be in the console."""
    contexts, seen = [], []

    def opened(width: int = 1280, height: int = 900) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: seen.append(request.url))
        page.goto(demo.blocks.local_url)
        page.wait_for_selector("#find")
        return page

    yield opened
    for context in contexts:
        context.close()
    local = demo.blocks.local_url
    assert [url for url in seen if not url.startswith((local, "data:", "blob:"))] == []


def upload(page: Any, path: Path) -> None:
    page.set_input_files("#picture input[type=file]", path)
    page.wait_for_selector("#picture img")


def ask(page: Any, phrases: str) -> None:
    page.fill("#phrases textarea", phrases)
    page.click("#find")
    page.wait_for_function(
        "text => document.querySelector('#legend')?.innerText.includes(text)", arg=phrases.splitlines()[-1]
    )


def shown_image(page: Any, selector: str = "#answers img") -> str:
    return page.get_attribute(selector, "src")


def changes(page: Any, act: Callable[[], Any], selector: str = "#answers img") -> None:
    """Acts and waits until another image is shown."""
    before = shown_image(page, selector)
    act()
    page.wait_for_function("([s, b]) => document.querySelector(s).src != b", arg=[selector, before])


def test_a_visit(demo: DemoPage, open_page: Callable[..., Any], image: Path):
    """Upload, two phrases, threshold, a click on a mask, rounds, queries, comparison, download, and leaving."""
    page, runs = open_page(), demo.service.num_runs
    upload(page, image)
    ask(page, PHRASES)
    assert page.inner_text("#legend").count("found") == 2
    threshold = page.locator("#threshold input[type=number]")

    def raise_threshold() -> None:
        threshold.fill("1")
        threshold.press("Tab")

    changes(page, raise_threshold)
    page.wait_for_function("document.querySelector('#legend').innerText.includes('best guess')")

    assert page.input_value("#chosen input").startswith("1.")
    box = page.locator("#answers img").bounding_box()
    cat = {"x": 0.53 * box["width"], "y": 0.58 * box["height"]}
    changes(page, lambda: page.locator("#answers img").click(position=cat))
    page.wait_for_function("document.querySelector('#chosen input').value.startsWith('2.')")

    slider = page.locator("#rounds input[type=number]")

    def next_round() -> None:
        slider.fill("2")
        slider.press("Tab")

    page.wait_for_selector("#pair img")
    changes(page, next_round, "#pair img")
    assert page.locator("#chart polyline").count() == 2

    page.get_by_role("tab", name="Queries").click()
    page.wait_for_function("document.querySelectorAll('#queries img').length == 10")
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_function("document.querySelector('#comparison').innerText.includes('100 %')")

    page.get_by_role("tab", name="Export").click()
    page.click("#make")
    page.wait_for_selector("#made a")
    with page.expect_download() as download:
        page.locator("#made a").first.click()
    with zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes())) as archive:
        assert len(archive.namelist()) == 3
    assert "evaluation.score_threshold=1" in page.inner_text("#command")

    assert demo.service.num_runs == runs + 1  # the network ran once
    assert user_files(demo)
    page.context.close()
    wait_until(lambda: not [path for path in user_files(demo) if "my" in path.name or "answers" in path.name])


def test_a_visit_with_a_video(demo: DemoPage, open_page: Callable[..., Any], clip: Path):
    page = open_page()
    page.fill("#phrases textarea", PHRASES)
    page.get_by_role("tab", name="Video").click()
    page.set_input_files("#video input[type=file]", clip)
    page.wait_for_selector("#video video")
    page.click("#find-video")
    page.wait_for_function("document.querySelector('#video-legend').innerText.includes('of 6 frames')")
    page.wait_for_selector("#video-answers video")
    page.wait_for_function("document.querySelector('#video-answers video').readyState >= 1")
    assert page.evaluate("document.querySelector('#video-answers video').duration") == pytest.approx(1.2, abs=0.2)
    with page.expect_download() as download:
        page.locator("#video-masks a").first.click()
    assert download.value.suggested_filename.endswith("-masks.zip")
    page.context.close()
    wait_until(lambda: not [path for path in user_files(demo) if "clip" in path.name])


def test_two_users_at_once_do_not_mix(demo: DemoPage, open_page: Callable[..., Any], image: Path):
    pages = [open_page(), open_page()]
    upload(pages[0], image)
    pages[1].locator(".gallery-item").nth(1).click()
    pages[1].wait_for_selector("#picture img")
    for page, phrases in zip(pages, ("fish\nred car", "blue fish"), strict=True):
        page.fill("#phrases textarea", phrases)
    for page in pages:
        page.click("#find", no_wait_after=True)
    for page, phrases in zip(pages, (["fish", "red car"], ["blue fish"]), strict=True):
        page.wait_for_selector("#legend tr:nth-child(2)")
        assert [text.split("\n")[0] for text in page.locator("#legend td.phrase").all_inner_texts()] == phrases
    sizes = [
        page.evaluate("(i => [i.naturalWidth, i.naturalHeight])(document.querySelector('#answers img'))")
        for page in pages
    ]
    assert sizes[0] != sizes[1]
    first = shown_image(pages[0])
    changes(pages[1], lambda: pages[1].locator("#threshold input[type=number]").fill("0.1"))
    assert shown_image(pages[0]) == first


def test_a_broken_upload_is_a_sentence(
    open_page: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    page = open_page()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image at all")
    page.set_input_files("#picture input[type=file]", broken)
    page.fill("#phrases textarea", "a cat")
    page.wait_for_timeout(1000)
    page.click("#find")
    page.wait_for_selector("text=This file cannot be read as an image")
    assert "Traceback" not in page.content()
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out


def test_on_a_phone(open_page: Callable[..., Any]):
    page = open_page(390, 844)
    page.locator(".gallery-item").first.click()
    page.wait_for_selector("#picture img")
    page.wait_for_function("document.querySelector('#phrases textarea').value != ''")
    page.click("#find")
    page.wait_for_selector("#legend tr:nth-child(2)")
    for name in ("Queries", "Compare", "Export", "Rounds", "Video"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name


# -- the command -----------------------------------------------------------------------------------------------------


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"expected the package gradio.*pip install 'deris-llm\[demo\]'"):
        server.check_gradio()


def test_names_of_checkpoints(demo: DemoPage):
    pipelines = demo.service.pipelines
    assert server.names_of(["/a/runs/x/best", "builtin:tiny"], pipelines) == ["x/best", "builtin:tiny"]
    assert server.names_of(["/a/x/best", "/b/x/best"], pipelines) == [f"x/best ({pipelines[0].fingerprint})"] * 2
