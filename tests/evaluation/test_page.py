"""The page of an evaluation: valid, self-contained, true to report.json, safe with hostile text, bounded."""

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deris_llm.cli.main import main
from deris_llm.common.html import bounded_jpeg, environment
from deris_llm.evaluation.page import cases as page_cases
from deris_llm.evaluation.page.cases import QUADRANTS, choose_groups, many_phrases
from deris_llm.evaluation.page.charts import Line, Marker, line_chart
from deris_llm.evaluation.page.compare import NUM_PAIRS, choose_pairs, pairs_of
from deris_llm.evaluation.page.numbers import precision_curve
from deris_llm.evaluation.page.page import NUM_VIEWS, look_inside, write_page
from deris_llm.evaluation.page.stored import open_evaluation
from deris_llm.evaluation.views import NUM_QUERIES

_spec = importlib.util.spec_from_file_location("page_world", Path(__file__).with_name("page_world.py"))
assert _spec is not None
assert _spec.loader is not None
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)

VOID = {"meta", "img", "br", "hr", "link", "input", "wbr"}


class Page(HTMLParser):
    """Reads a page: every tag must be closed in order; keeps tags, attributes, texts, numbers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.values: list[tuple[float, str]] = []  # of <data>: value and what is shown
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID, f"void element closed: {tag}"
        assert self.open.pop() == tag, f"{tag} closed out of order"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "data":
            self.values.append((float(str(self.tags[-1][1]["value"])), data))
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.write_evaluation(tmp_path_factory.mktemp("eval") / "tiny")


@pytest.fixture(scope="module")
def page(folder: Path, data: Path) -> Page:
    return Page(write_page(open_evaluation(folder), folder / "page.html", data_root=data).read_text(encoding="utf-8"))


def test_page_needs_nothing_else(page: Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert names >= {"html", "head", "body", "table", "svg", "img", "nav"}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/jpeg;base64,")), (tag, name)
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {str(a["href"])[1:] for tag, a in page.tags if tag == "a"} == anchors


def test_style_loads_nothing(folder: Path, data: Path) -> None:
    text = write_page(open_evaluation(folder), folder / "page.html", data_root=data).read_text(encoding="utf-8")
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    assert not re.search(r"url\(|@import|https?:", style)


def test_numbers_are_those_of_the_report(page: Page, folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    shown = {value for value, _ in page.values}
    for split, numbers in report["splits"].items():
        for metric, value in numbers["original"].items():
            if not metric.startswith("n_"):
                assert value in shown, (split, metric)
        for metric in ("mIoU", "oIoU", "gIoU", "cIoU"):
            assert numbers["deris"].get(metric) in {None, *shown}, (split, metric)
        assert split in page.text
    assert 4.3211 in shown  # the control
    assert {84.05, 77.67} & shown == {77.67}  # published ones of gRefCOCO are numbers in its columns
    assert "84.05" in page.text
    for value, text in page.values:
        assert abs(value - float(text)) <= 0.05 + 1e-9, "rounded only"


def test_pictures_are_embedded_and_captioned(page: Page, folder: Path) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) > 30
    assert all(attributes["alt"] for attributes in pictures)
    for name, *_ in QUADRANTS:
        assert name in page.text
    assert "box 3 of picture 4" in page.text
    assert (folder / "page.html").stat().st_size < 8_000_000


def test_hostile_text_is_text(tmp_path: Path) -> None:
    phrases = {f"refcoco/val/{n}": world.HOSTILE for n in range(1, 17)}
    data = world.write_data(tmp_path / "data", {k: "plain" for k in phrases})
    folder = world.write_evaluation(tmp_path / "<b>eval & co", phrases=phrases)
    report = json.loads((folder / "report.json").read_text())
    report["about"] = {"name": world.HOSTILE, "leakage": world.HOSTILE, "date": world.HOSTILE}
    report["notes"] = {"refcoco/val": [world.HOSTILE]}
    report["versions"]["protocols"]["original"] = world.HOSTILE
    report["splits"]["refcoco/val"]["original"]["breakdown"] = {
        world.HOSTILE: [{"label": world.HOSTILE, "n_phrases": 3, "mIoU": 50.0}]
    }
    (folder / "report.json").write_text(json.dumps(report))
    text = write_page(open_evaluation(folder), folder / "page.html", data_root=data).read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "b"}
    assert '<script>alert("1")</script> &' in " ".join(page.texts)
    assert all(
        (a["src"] or "").startswith("data:image/jpeg;base64,") and "onerror" not in a
        for tag, a in page.tags
        if tag == "img"
    )
    assert "\x00" not in text
    assert text.count("</style>") == 1


def test_without_predictions_data_or_anything_optional(folder: Path, data: Path, tmp_path: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    bare = tmp_path / "bare"
    bare.mkdir()
    for split in report["splits"]:  # as an older evaluation, or one of predictions without scores
        for name, numbers in report["splits"][split].items():
            kept = ("mIoU", "gIoU", "N-acc", "T-acc", "n_phrases", "n_images", "n_no_target")
            report["splits"][split][name] = {k: v for k, v in numbers.items() if k in kept}
    report["control"], report["timing"], report["versions"] = {}, {}, {}
    (bare / "report.json").write_text(json.dumps(report))
    page = Page(write_page(open_evaluation(bare), bare / "page.html").read_text(encoding="utf-8"))
    assert "no predictions beside the report" in page.text
    assert "Where the rest is lost" not in page.text
    assert "From the inside" not in page.text
    assert "always empty" not in page.text
    somewhere = write_page(open_evaluation(folder), tmp_path / "no_data.html").read_text(encoding="utf-8")
    assert "No images: neither the evaluation nor a checkpoint says where the data is" in somewhere
    assert "<img" not in somewhere
    with pytest.raises(ValueError, match=r"absent(.|\n)*`deris-llm report --data ROOT` names the folder"):
        write_page(open_evaluation(folder), tmp_path / "other.html", data_root=tmp_path / "absent")
    other = world.write_data(tmp_path / "other")
    refs = json.loads((other / "grefcoco" / "grefs(unc).json").read_text())
    for ref in refs:
        ref["sentences"][0]["sent_id"] += 1000
    (other / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refs))
    with pytest.raises(ValueError, match=r"expected the phrases of the predictions in .* --data ROOT"):
        write_page(open_evaluation(folder), tmp_path / "other.html", data_root=other)
    assert not (tmp_path / "other.html").exists()


def test_intervals_and_breakdowns_are_shown(folder: Path, data: Path, tmp_path: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    numbers = report["splits"]["refcoco/val"]["original"]
    numbers["intervals"] = {"mIoU": [41.25, 59.75]}
    numbers["breakdown"] = {
        "object_size": [
            {"label": "small", "n_phrases": 7, "mIoU": 31.4159, "oracle": 61.5, "interval": [25.0, 40.0]},
            {"label": "large", "n_phrases": 9, "mIoU": None, "oracle": None, "interval": None},
        ]
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    page = Page(write_page(open_evaluation(tmp_path), tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "41.2–59.8" in page.text
    assert "object size" in page.text
    assert 31.4159 in {value for value, _ in page.values}
    assert "95 %: 25.0 to 40.0" in page.text


def test_a_run_has_curves_with_or_without_an_evaluation(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    history = [
        {
            "step": 10 * i,
            "loss": 9.0 / i,
            "loss/dice/round0": 1.0,
            "loss/dice/round3": 0.5 / i,
            "learning_rate/lora": 1e-4 * i,
        }
        for i in range(1, 9)
    ]
    history += [
        {"step": 40, "eval_mIoU": 20.0, "eval_n_phrases": 9},
        {"step": 80, "eval_mIoU": 35.0, "eval_n_phrases": 9},
    ]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    page = Page(write_page(open_evaluation(run), run / "page.html").read_text(encoding="utf-8"))
    for title in ("Training loss", "Its parts in the last round", "Learning rate", "Evaluation during training"):
        assert title in page.text
    assert (
        "evaluation 35.0 mIoU while training 9 phrases, step 80" in page.text
    )  # of no known split: no config.yaml here
    assert {20.0, 35.0} <= {value for value, _ in page.values}
    state = {"log_history": [entry for entry in history if "loss" in entry]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    page = Page(write_page(open_evaluation(run), run / "page.html").read_text(encoding="utf-8"))
    assert "not evaluated yet" in page.text
    assert "While training" not in page.text
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (run / "eval").symlink_to(folder, target_is_directory=True)
    assert list(open_evaluation(run).report["splits"]) == ["refcoco/val", "refcoco/testA", "grefcoco/val"]
    best = run / "best"
    best.mkdir()
    assert len(open_evaluation(folder, best).training) == len(history)  # `best` has no log of its own


def test_what_a_reader_must_know_stands_where_the_numbers_are(folder: Path, data: Path, tmp_path: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    path = tmp_path / "report.json"

    def shown() -> Page:
        path.write_text(json.dumps(report))
        return Page(write_page(open_evaluation(tmp_path), tmp_path / "page.html").read_text(encoding="utf-8"))

    page = shown()
    assert "Control: each phrase is swapped for one that names another object" in page.text
    assert "How the protocols original count" in page.text
    assert "racle" not in page.text
    assert "synthetic" not in page.text
    heads = {str(a["data-label"]) for tag, a in page.tags if tag == "td" and "data-label" in a}
    assert heads >= {"phrases", "mIoU", "best query", "deris mIoU", "control", "GLaMM-7B\N{DAGGER}"}

    report["about"] = {"synthetic": True}
    page = shown()
    assert "evaluation on synthetic images" in page.text
    assert "published, photographs" in page.text
    assert "are no comparison" in page.text

    report["splits"] = {"refcoco/val": report["splits"]["refcoco/val"], "mine/val": report["splits"]["refcoco/val"]}
    page = shown()
    assert page.text.count("One target per phrase") == 2  # own data without columns of published numbers
    assert page.text.count("GLaMM-7B") == 1
    report["splits"].pop("refcoco/val")
    assert "GLaMM" not in shown().text


def test_side_by_side_says_who_is_better_where(folder: Path, data: Path, tmp_path: Path) -> None:
    other = world.write_evaluation(tmp_path / "weaker", shift=-30.0)
    out = write_page(open_evaluation(folder), tmp_path / "page.html", data_root=data, against=open_evaluation(other))
    page = Page(out.read_text(encoding="utf-8"))
    assert "This evaluation, tiny , against weaker ." in page.text
    means = [
        np.mean([a.iou["original"] for a in open_evaluation(one).answers["refcoco/val"]]) for one in (other, folder)
    ]
    for mean in means:
        assert min(abs(value - mean) for value, _ in page.values) < 1e-9
    assert f"{means[1] - means[0]:+.2f}" in page.text
    assert "refcoco/val: tiny is better" in page.text
    assert "weaker is better" not in page.text
    assert "points apart" in page.text


def test_side_by_side_of_the_same_has_no_pictures(folder: Path, data: Path, tmp_path: Path) -> None:
    same = open_evaluation(folder)
    text = write_page(same, tmp_path / "page.html", data_root=data, against=same).read_text(encoding="utf-8")
    assert "points apart" not in text
    assert "1.000" in text  # p


def test_pairs_are_the_largest_differences_both_ways(folder: Path, tmp_path: Path) -> None:
    other = open_evaluation(world.write_evaluation(tmp_path / "other", seed=1))
    pairs = pairs_of(open_evaluation(folder), other)["refcoco/val"]
    better, worse = choose_pairs(pairs, 2)
    assert all(pair.gain > 0 for pair in better)
    assert all(pair.gain < 0 for pair in worse)
    assert better[0].gain == max(pair.gain for pair in pairs)
    assert worse[0].gain == min(pair.gain for pair in pairs)


def test_side_by_side_warns_of_other_protocols_and_phrases(data: Path, tmp_path: Path) -> None:
    ours = world.write_evaluation(tmp_path / "ours")
    other = world.write_evaluation(tmp_path / "other", phrases={"refcoco/val/1": "other words"})
    for where, fingerprint in ((ours, "aaaaaaaa"), (other, "bbbbbbbb")):
        report = json.loads((where / "report.json").read_text())
        report["splits"]["refcoco/val"]["original"]["fingerprint"] = fingerprint
        (where / "report.json").write_text(json.dumps(report))
    lines = (other / "predictions" / "refcoco_testA.jsonl").read_text().splitlines()
    (other / "predictions" / "refcoco_testA.jsonl").write_text("\n".join(lines[:5]))
    out = write_page(open_evaluation(ours), tmp_path / "page.html", data_root=data, against=open_evaluation(other))
    text = Page(out.read_text(encoding="utf-8")).text
    assert "protocol original was aaaaaaaa here and bbbbbbbb there" in text
    assert "refcoco/val: 1 phrases were asked in other words" in text
    assert "refcoco/testA: 7 phrases were answered only here, 0 only there" in text


def test_side_by_side_of_other_splits_or_other_data_is_refused(folder: Path, tmp_path: Path) -> None:
    other = world.write_evaluation(tmp_path / "other")
    report = json.loads((other / "report.json").read_text())
    report["splits"] = {"refcoco/testB": report["splits"]["refcoco/testA"]}
    (other / "report.json").write_text(json.dumps(report))
    (other / "predictions" / "refcoco_testA.jsonl").rename(other / "predictions" / "refcoco_testB.jsonl")
    with pytest.raises(
        ValueError, match=r"got refcoco/testB, beside refcoco/val, .*: evaluate both on the same splits"
    ):
        pairs_of(open_evaluation(folder), open_evaluation(other))
    moved = world.write_evaluation(tmp_path / "moved")
    path = moved / "predictions" / "refcoco_val.jsonl"
    path.write_text(path.read_text().replace("COCO_train2014_000000000001.jpg", "elsewhere.jpg"))
    with pytest.raises(ValueError, match=r"got 4 phrases of refcoco/val with another image"):
        pairs_of(open_evaluation(folder), open_evaluation(moved))


def test_a_folder_of_neither_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"expected the folder of an evaluation.*got \['notes.txt'\].*deris-llm eval"):
        open_evaluation(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        open_evaluation(tmp_path / "absent")


@pytest.mark.parametrize(
    "line",
    ["not json", "[]", '{"phrase_id": "a"}', '{"phrase_id": "a", "image": "b", "phrase": "c", "mask": 1, "iou": 2}'],
)
def test_a_broken_line_of_predictions_is_named(tmp_path: Path, line: str) -> None:
    folder = world.write_evaluation(tmp_path / "eval")
    path = folder / "predictions" / "refcoco_val.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"refcoco_val.jsonl:17: expected a prediction with .* evaluate again"):
        open_evaluation(folder)


def test_groups_are_what_they_say(folder: Path) -> None:
    evaluation = open_evaluation(folder)
    groups = choose_groups(evaluation.answers["grefcoco/val"], "original", is_generalised=True, num_each=2, seed=0)
    chosen = [a.phrase_id for group in groups for a in group.answers]
    assert len(chosen) == len(set(chosen))
    by_title = {group.title.partition(":")[0]: group.answers for group in groups}
    assert all(a.has_target and not a.says_target for a in by_title["Missed"])
    assert all(not a.has_target and a.says_target for a in by_title["Imagined"])
    assert max(a.iou["original"] for a in by_title["Worst"]) <= min(a.iou["original"] for a in by_title["Best"])
    again = choose_groups(evaluation.answers["grefcoco/val"], "original", is_generalised=True, num_each=2, seed=0)
    assert again == groups


def test_many_phrases_are_of_one_picture(folder: Path) -> None:
    found = many_phrases(open_evaluation(folder).answers["grefcoco/val"], seed=1)
    assert len({a.image for a in found}) == 1
    assert {a.has_target for a in found} == {True, False}
    assert not many_phrases(open_evaluation(folder).answers["grefcoco/val"][:2], seed=1)


def test_precision_curve_is_pr_at_x(folder: Path) -> None:
    answers = open_evaluation(folder).answers["refcoco/val"]
    curve = dict(precision_curve(answers, "original"))
    assert curve[0.0] == 100
    for level in (0.5, 0.7, 0.9):
        assert curve[level] == 100 * np.mean([a.iou["original"] >= 100 * level for a in answers])


def test_all_pictures_together_are_bounded() -> None:
    cases = (page_cases.NUM_CASES + 12) * page_cases._CASE_BYTES
    views = NUM_VIEWS * (1 + NUM_QUERIES + 4) * page_cases._TILE_BYTES
    pairs = 3 * NUM_PAIRS * page_cases._TILE_BYTES
    assert (cases + views + pairs) * 4 / 3 < 8_000_000  # base64


def test_command_line(folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    other = world.write_evaluation(tmp_path / "other", seed=2)
    options = ["--data", str(data), "--against", str(other), "--out", str(out), "--seed", "3"]
    assert main(["report", str(folder), *options]) == 0
    assert f"written to {out} (" in capsys.readouterr().out
    assert "points apart" in out.read_text(encoding="utf-8")
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "expected the folder of an evaluation" in capsys.readouterr().err
    report = json.loads((folder / "report.json").read_text())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "report.json").write_text(json.dumps(report))
    for name in ("config.yaml", "model.safetensors"):  # what makes a folder a checkpoint; nothing reads them here
        (tmp_path / name).touch()
    assert main(["report", str(tmp_path / "bare"), "--checkpoint", str(tmp_path)]) == 2
    assert "expected the predictions of" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "bare"), "--checkpoint", str(tmp_path / "bare")]) == 2
    assert "expected a checkpoint folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected the predictions of"):
        look_inside(open_evaluation(tmp_path / "bare"), tmp_path)


def test_a_picture_is_of_bounded_size() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8))
    uri, encoded = bounded_jpeg(noise, 20_000)
    assert len(uri) < 27_000
    assert encoded.width < 800


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1.0, 2.0)],
        [(0.0, 5.0), (1.0, 5.0)],
        [(0.0, float("nan")), (1.0, 1.0)],
        [(float(i), i**2) for i in range(5000)],
    ],
)
def test_charts_of_any_points(points: list[tuple[float, float]]) -> None:
    chart = line_chart("t", [Line("a", points)], x_label="x", y_label="y", marker=Marker(0.5, "here"))
    drawn = str(environment("deris_llm.evaluation.page").get_template("charts.html.j2").module.line_chart(chart))
    paths = re.findall(r'<path d="([^"]*)"', drawn)
    assert drawn.startswith("\n<figure") or drawn.startswith("<figure")
    assert "nan" not in "".join(paths)
    assert max(path.count("L") for path in paths) <= 240


def test_templates_escape_and_clean_text() -> None:
    made = environment("deris_llm.evaluation.page").from_string("<p>{{ text }}</p>").render(text="a < b & \x00\ud800")
    assert made == "<p>a &lt; b &amp; \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}</p>"
