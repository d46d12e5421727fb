"""Videos in an evaluation: J and F by expression, controls, the report and its page."""

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deris_llm.config import RunConfig
from deris_llm.config.protocols import PROTOCOLS, protocols_of
from deris_llm.data.masks import encode_mask
from deris_llm.data.store.prepared import Manifest
from deris_llm.evaluation import run as evaluation_run
from deris_llm.evaluation.evaluator import check_records, control_phrases, evaluate
from deris_llm.evaluation.page.stored import open_evaluation
from deris_llm.evaluation.report import report_line, report_table
from deris_llm.evaluation.run import run_evaluation
from deris_llm.evaluation.truth import merged_truth
from deris_llm.evaluation.video import submission
from deris_llm.evaluation.video.frames import FrameProtocol, expressions_of, first_frame_held, video_numbers
from deris_llm.evaluation.video.protocols import frame_score
from deris_llm.models.cognition import build_processor
from deris_llm.structures import InstanceAnnotation, ReferringRecord
from deris_llm.testing import tiny_config, tiny_weights
from tests.evaluation.known_answers import Answers

HEIGHT, WIDTH = 48, 64
NUM_FRAMES = {"crossing": 4, "still": 3}


def truth_of(video: str, expression: str, frame: int) -> np.ndarray:
    """A square that moves by 12 px a frame, another that stays; the moving one is outside from frame 3 on."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    left = 40 if expression == "1" else 4 + (12 if video == "crossing" else 0) * frame
    if expression == "1" or frame < 3:
        mask[10:30, left : left + 16] = True
    return mask


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[ReferringRecord]:
    folder = tmp_path_factory.mktemp("frames")
    generator = np.random.default_rng(1)
    found = []
    for video, num_frames in NUM_FRAMES.items():
        for frame in range(num_frames):
            path = folder / f"{video}-{frame:05d}.png"
            Image.fromarray(generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)
            for expression in ("0", "1"):
                mask = truth_of(video, expression, frame)
                instance = InstanceAnnotation(int(expression), encode_mask(mask))
                found.append(
                    ReferringRecord(
                        phrase_id=f"toy/val/{video}/{expression}/{frame:05d}",
                        dataset="toy",
                        split="val",
                        image_id=f"toy/{video}/{frame:05d}",
                        image_path=str(path),
                        width=WIDTH,
                        height=HEIGHT,
                        phrase="the square that moves" if expression == "0" else "the square that stays",
                        instances=(instance,) if mask.any() else (),
                        video=video,
                        frame=frame,
                        expression=expression,
                    )
                )
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    weights = tiny_weights(tmp_path_factory.mktemp("weights"))
    found = tiny_config(*weights, "evaluation.selection=threshold", "evaluation.presence=none")
    return dataclasses.replace(found, name="toy")


@pytest.fixture(autouse=True)
def generalised(monkeypatch: pytest.MonkeyPatch, records: list[ReferringRecord]) -> None:
    """The records are in memory, so nothing is looked up below a data root."""
    monkeypatch.setattr("deris_llm.evaluation.evaluator.is_generalised", lambda *_: True)
    monkeypatch.setattr("deris_llm.evaluation.evaluator.benchmark_of", lambda *_: None)
    monkeypatch.setattr(evaluation_run, "has_truth", lambda *_: records[0].has_truth)
    monkeypatch.setattr(evaluation_run, "read_split", lambda *_, **__: records)
    monkeypatch.setattr(evaluation_run, "split_notes", lambda *_: ())
    monkeypatch.setattr(
        "deris_llm.evaluation.page.page.records_of",
        lambda _, wanted, **__: {r.phrase_id: r for r in records if any(r.phrase_id in ids for ids in wanted.values())},
    )


def test_every_expression_is_scored_over_all_its_frames(config: RunConfig, records: list[ReferringRecord]) -> None:
    missed = ("toy/val/still/0/00001",)
    model = Answers(records, missed=missed)
    result = evaluate(model, config, records, build_processor(config), device="cpu", progress=False)
    by_key = {(each.video, each.id): each for each in result.expressions}
    assert list(by_key) == [("crossing", "0"), ("crossing", "1"), ("still", "0"), ("still", "1")]
    assert [len(each.frames) for each in result.expressions] == [4, 4, 3, 3]
    assert by_key["crossing", "0"].scores[3] == (1, 1)  # neither answer nor truth has a pixel
    assert by_key["still", "0"].scores[1] == (0, 0)
    assert by_key["still", "0"].best_query[1].j > 0.9  # the query was there and did not pass the threshold
    assert by_key["still", "0"].score.j == pytest.approx(2 / 3, abs=0.05)
    numbers = video_numbers(result.expressions)
    assert (numbers["n_videos"], numbers["n_expressions"], numbers["n_frames"]) == (2, 4, 14)
    assert numbers["J&F"] == pytest.approx((numbers["J"] + numbers["F"]) / 2)
    assert numbers["J"] == pytest.approx(100 * np.mean([each.score.j for each in result.expressions]))
    assert numbers["J_recall"] == pytest.approx(100 * (1 + 1 + 2 / 3 + 1) / 4)
    assert numbers["best_query_J&F"] > numbers["J&F"]
    low, high = numbers["intervals"]["J&F"]
    assert low <= numbers["J&F"] <= high


def test_queries_chosen_for_the_whole_video(config: RunConfig, records: list[ReferringRecord], tmp_path: Path) -> None:
    """A frame whose score flickers is answered all the same; comparing in worker processes changes nothing."""
    missed = ("toy/val/still/0/00001",)
    model, processor = Answers(records, missed=missed), build_processor(config)
    whole = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(
            config.evaluation, video_selection="video", score_threshold=0.5, compare_workers=1
        ),
    )
    result = evaluate(model, whole, records, processor, device="cpu", progress=False)
    by_key = {(each.video, each.id): each for each in result.expressions}
    assert by_key["still", "0"].scores[1].j > 0.9
    assert by_key["crossing", "0"].scores[3] == (1, 1)
    assert result.video_protocol is not None
    assert result.video_protocol.id == "whole-video"
    report = run_evaluation(
        whole, model, processor, ["toy/val"], out=tmp_path, control=True, pictures=False, progress=False
    )
    protocol = next(iter(report["splits"]["toy/val"].values()))
    assert protocol["fingerprint"] not in {each.fingerprint() for each in protocols_of(whole)}
    assert report["videos"]["toy/val"]["whole-video"]["J&F"] == pytest.approx(
        video_numbers(result.expressions)["J&F"], abs=1e-4
    )


def test_fingerprints_change_with_what_changes_the_numbers() -> None:
    rule = (0.5, "threshold", "none")
    frame, video = FrameProtocol(rule), FrameProtocol(rule, "video")
    drawn = FrameProtocol(rule, resampling="x4_align_corners_bilinear")
    other = FrameProtocol((0.6, "threshold", "none"))
    assert len({each.fingerprint() for each in (frame, video, drawn, other)}) == 4
    assert "x4_align_corners" in drawn.describe()
    protocol = PROTOCOLS["original"]
    assert frame.fingerprint_of_images(protocol) == protocol.fingerprint() != video.fingerprint_of_images(protocol)


def test_rules_of_which_only_one_would_be_used_are_refused(
    config: RunConfig, records: list[ReferringRecord], tmp_path: Path
) -> None:
    """Queries are chosen for a video once, by the rule of the first protocol."""
    path = tmp_path / "high.yaml"
    path.write_text("id: high\nsize: original\nscore_threshold: 0.99\n")
    changed = {"video_selection": "video", "protocols": ("original", str(path))}
    both = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **changed))
    with pytest.raises(
        ValueError, match="video_selection=video: expected protocols with one threshold.*got others in high"
    ):
        evaluate(Answers(records), both, records, build_processor(config), device="cpu", progress=False)


def test_frames_of_different_sizes_are_refused_before_the_work(records: list[ReferringRecord]) -> None:
    """A mask that is held still could not be compared, after the work and on one rank only."""
    other = [*records[:-1], dataclasses.replace(records[-1], width=WIDTH + 2)]
    with pytest.raises(ValueError, match=r"toy/val/still/1/00002: expected a frame of 64 x 48 px, .* got 66 x 48 px"):
        check_records(other, "data")


def test_the_order_of_the_answers_does_not_matter(config: RunConfig, records: list[ReferringRecord]) -> None:
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    model, processor = Answers(records), build_processor(config)
    one, other = (evaluate(model, config, rs, processor, device="cpu", progress=False) for rs in (records, shuffled))
    assert {(e.video, e.id): (e.frames, e.scores) for e in one.expressions} == {
        (e.video, e.id): (e.frames, e.scores) for e in other.expressions
    }


def test_the_control_swaps_an_expression_in_all_of_its_frames(records: list[ReferringRecord]) -> None:
    swapped = control_phrases(records)
    assert len(swapped) == len(records)
    for record in records:
        moves = record.expression == "0"
        assert swapped[record.phrase_id] == ("the square that stays" if moves else "the square that moves")


def test_the_first_frame_held_still(config: RunConfig, records: list[ReferringRecord]) -> None:
    model, processor = Answers(records), build_processor(config)
    result = evaluate(model, config, records, processor, device="cpu", progress=False)
    held = first_frame_held(result.answers, records)
    assert held["still", "0"].j > 0.9
    first, other = truth_of("crossing", "0", 0), truth_of("crossing", "0", 1)
    expected = [1.0, frame_score(other, first).j, 0, 0]
    assert held["crossing", "0"].j == pytest.approx(np.mean(expected), abs=0.05)


def test_report_and_page(config: RunConfig, records: list[ReferringRecord], tmp_path: Path) -> None:
    model, processor = Answers(records, missed=("toy/val/still/0/00001",)), build_processor(config)
    report = run_evaluation(config, model, processor, ["toy/val"], out=tmp_path, control=True, progress=False)
    numbers = report["videos"]["toy/val"]["per-frame"]
    assert numbers["control_J&F"] == pytest.approx(numbers["J&F"], abs=15)  # it knows the answers, whatever it is asked
    assert numbers["first_frame_J&F"] < numbers["J&F"]
    assert (numbers["control_own_J&F"], numbers["control_n_expressions"]) == (numbers["J&F"], 4)
    assert report["versions"]["protocols"]["per-frame"].startswith("per-frame: every frame is answered as an image")
    assert report_line(report["videos"]).startswith("toy/val J&F ")
    assert report_table(report) is not None
    kept = json.loads((tmp_path / "videos" / "toy_val.json").read_text())
    assert [len(each["J"]) for each in kept] == [4, 4, 3, 3]
    stored = open_evaluation(tmp_path)
    again = video_numbers(stored.videos["toy/val"])
    assert {name: again[name] for name in ("J&F", "J", "F")} == pytest.approx(
        {name: numbers[name] for name in ("J&F", "J", "F")}, abs=1e-2
    )
    page = (tmp_path / "report.html").read_text()
    assert page.index("<h2>Videos</h2>") < page.index("<h2>Frames as images</h2>")
    assert page.count("the square that moves") >= 2
    assert page.count("frame 3</") + page.count("frame 3\n") >= 1


def test_the_zip_for_the_server_holds_the_answers(
    config: RunConfig, records: list[ReferringRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_run, "source_format", lambda *_: "ref-ytvos")
    model, processor, out = Answers(records), build_processor(config), tmp_path / "out.zip"
    run_evaluation(config, model, processor, ["toy/val"], out=tmp_path, pictures=False, progress=False, submission=out)
    with zipfile.ZipFile(out) as archive:
        assert len(archive.namelist()) == len(records)
        for record in records:
            name = f"Annotations/{record.video}/{record.expression}/{record.image_id.rpartition('/')[2]}.png"
            mask = np.asarray(Image.open(archive.open(name)))
            assert set(np.unique(mask).tolist()) <= {0, 255}
            assert frame_score(merged_truth(record), mask > 0).j > 0.9


@pytest.mark.parametrize(
    ("splits", "out", "max_images", "form", "said"),
    [
        (["a/valid", "b/valid"], "x.zip", 0, "mevis", "expected one whole split, got a/valid, b/valid"),
        (["a/valid"], "x.zip", 3, "mevis", "expected one whole split, got a/valid and --max-images"),
        (["a/valid"], "x.zip", 0, "refer", "expected a split of videos in the format of mevis or ref-ytvos"),
        (["a/valid"], "x.tar", 0, "mevis", "expected a name that ends in .zip, got x.tar"),
    ],
)
def test_what_no_server_takes_is_refused_before_the_work(
    splits: list[str], out: str, max_images: int, form: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "source_format", lambda *_: form)
    monkeypatch.setattr(submission, "manifest_of", lambda *_: Manifest(Path(), {}, Path()))
    with pytest.raises(ValueError, match=said):
        submission.check_submission("data", splits, Path(out), max_images=max_images)


def test_a_split_without_truth_is_answered_and_not_scored(
    config: RunConfig, records: list[ReferringRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = [dataclasses.replace(record, instances=(), has_truth=False) for record in records]
    monkeypatch.setattr(evaluation_run, "read_split", lambda *_, **__: hidden)
    monkeypatch.setattr(evaluation_run, "has_truth", lambda *_: False)
    model, processor = Answers(records), build_processor(config)
    report = run_evaluation(config, model, processor, ["toy/val"], out=tmp_path, control=True, progress=False)
    assert report["splits"] == {}
    assert report["notes"]["toy/val"] == ["14 phrases answered, not scored: the truth is not published"]
    lines = [json.loads(line) for line in (tmp_path / "predictions" / "toy_val.jsonl").read_text().splitlines()]
    assert [line["phrase_id"] for line in lines] == [record.phrase_id for record in hidden]
    assert torch.tensor([line["mask"]["size"] == [HEIGHT, WIDTH] for line in lines]).all()
    assert expressions_of([], []) == []
