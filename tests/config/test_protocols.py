"""Protocols: sizes, fingerprints, files of a user's own."""

import dataclasses
import re
from pathlib import Path

import pytest

from deris_llm.config import RunConfig, load_config
from deris_llm.config.protocols import PROTOCOLS, Protocol, protocols_of, protocols_of_file


def test_original_compares_at_the_pictures_own_size() -> None:
    assert PROTOCOLS["original"].size_hw(7, 9) == (7, 9)
    assert PROTOCOLS["deris"].size_hw(7, 9) == (384, 384)
    assert protocols_of(load_config("tiny-refcoco", ["evaluation.protocols=[rela480]"]))[0].fixed_px == 480


def test_run_config_completes_the_protocols() -> None:
    config = load_config(
        "tiny-refcoco",
        [
            "perception.image_size=96",
            "evaluation.score_threshold=0.9",
            "evaluation.selection=threshold",
            "evaluation.presence=multiply",
            "data.phrase_field=raw",
        ],
    )
    original, deris = protocols_of(config)
    assert (original.fixed_px, deris.fixed_px) == (None, 96)
    assert {p.score_threshold for p in (original, deris)} == {0.9}
    assert {p.selection for p in (original, deris)} == {"threshold"}
    assert {p.text_field for p in (original, deris)} == {"raw"}
    assert {p.presence for p in (original, deris)} == {"multiply"}
    assert "scores are multiplied by the presence probability first" in deris.describe()
    assert "96x96" in deris.describe()
    assert "else an empty mask" in deris.describe()


def test_every_field_changes_the_fingerprint() -> None:
    base = PROTOCOLS["deris"]
    other = {
        "id": "x", "size": "original", "fixed_px": 481, "truth_resampling": "none", "prediction_resampling": "nearest",
        "text_field": "raw", "score_threshold": 0.9, "selection": "best", "miss": "dropped",
        "presence": "gate", "crowds": "taken",
    }  # fmt: skip
    assert other.keys() == {f.name for f in dataclasses.fields(base)}
    prints = {dataclasses.replace(base, **{name: value}).fingerprint() for name, value in other.items()}
    assert len(prints | {base.fingerprint()}) == len(other) + 1


def test_fingerprints_are_stable() -> None:
    """A change here makes all published numbers incomparable: say so in the CHANGELOG."""
    assert {name: protocol.fingerprint() for name, protocol in PROTOCOLS.items()} == {
        "original": "132ca0f7",
        "deris": "a5769d97",
        "rela480": "a22857de",
    }
    assert protocols_of(RunConfig()) == (PROTOCOLS["original"], PROTOCOLS["deris"])


def test_unknown_protocol_is_an_error() -> None:
    config = load_config("tiny-refcoco", ["evaluation.protocols=[original, rela48]"])
    with pytest.raises(ValueError, match=r"rela48: expected one of original, deris, rela480 .* did you mean rela480\?"):
        protocols_of(config)


def _written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_protocol_of_ones_own_fixes_what_it_says_and_leaves_the_rest_to_the_run(tmp_path: Path) -> None:
    path = _written(
        tmp_path, "id: mine\nsize: fixed\nfixed_px: 320\ntruth_resampling: nearest_centre\nscore_threshold: 0.35\n"
    )
    config = load_config("tiny-refcoco", [f"evaluation.protocols=[original, {path}]", "evaluation.selection=threshold"])
    original, mine = protocols_of(config)
    assert original.score_threshold == config.evaluation.score_threshold != 0.35
    expected = Protocol(
        "mine", "fixed", 320, "nearest_centre", score_threshold=0.35, selection="threshold", miss="empty_mask"
    )
    assert mine == expected
    assert "at 320x320 px" in mine.describe()
    assert mine.fingerprint() in mine.describe()
    (scored,) = protocols_of_file([str(path)])
    assert (scored.selection, scored.prediction_resampling, scored.fixed_px) == ("given", "finished_mask", 320)
    assert scored.fingerprint() not in (mine.fingerprint(), original.fingerprint())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id: m\nsize: original\nscore_treshold: 0.3\n", "score_treshold: unknown field; did you mean score_threshold?"),
        ("id: m\nsize: large\n", "size: expected one of original, fixed, got 'large'"),
        ("id: m\nsize: fixed\n", "fixed_px: missing with size=fixed"),
        ("id: m\nsize: fixed\nfixed_px: 9\n", "truth_resampling: expected nearest or nearest_centre"),
        ("id: m\nsize: fixed\nfixed_px: 0\ntruth_resampling: nearest\n", "fixed_px: expected a whole number of px"),
        ("id: m\nsize: fixed\nfixed_px: true\ntruth_resampling: nearest\n", "fixed_px: expected a whole number of px"),
        ("id: m\nsize: original\nfixed_px: 480\n", "fixed_px=480 contradicts size=original"),
        ("id: m\nsize: original\ntruth_resampling: nearest\n", "truth_resampling=nearest cannot take effect"),
        ("id: m\nsize: original\nprediction_resampling: finished_mask\n", "finished_mask cannot take effect"),
        ("id: m\nsize: original\nprediction_resampling: given\n", "prediction_resampling: expected one of bilinear"),
        ("id: m\nsize: original\nscore_threshold: 1.5\n", "score_threshold: expected a probability in (0, 1), got 1.5"),
        ("id: m\nsize: original\nscore_threshold: high\n", "score_threshold: expected a probability in (0, 1), got 'high'"),
        ("id: m\nsize: original\nselection: best\nscore_threshold: 0.5\n", "score_threshold cannot take effect"),
        ("id: m\nsize: original\nselection: given\n", "selection: expected one of threshold, threshold_or_best, best"),
        ("id: m\nsize: original\nmiss: dropped\n", "miss=dropped cannot take effect with selection=threshold_or_best"),
        ("id: m\nsize: original\ntext_field: raw\n", "text_field=raw contradicts data.phrase_field=sent"),
        ("id: m\nsize: original\nprediction_resampling: x4_align_corners_bilinear\n", "contradicts compat=none"),
        ("id: deris\nsize: original\n", "id: 'deris' is the id of a built-in protocol"),
        ("id: a/b\nsize: original\n", "id: expected a name"),
        ("size: original\n", "id: missing"),
        ("id: m\nsize: original\nid: n\n", "mine.yaml: line 3, column 1: the key 'id' occurs twice"),
        ("id: m\nsize: original\nscore_threshold: .nan\n", "score_threshold: expected a probability in (0, 1), got nan"),
        ("", "expected a mapping of fields, got NoneType"),
        ("- original\n", "expected a mapping of fields, got list"),
        ("id: [\n", "mine.yaml: line 2, column 1: expected the node content, but found '<stream end>'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_protocol_is_said(tmp_path: Path, text: str, says: str) -> None:
    config = load_config("tiny-refcoco", [f"evaluation.protocols=[original, {_written(tmp_path, text)}]"])
    with pytest.raises(ValueError, match=re.escape(says)):
        protocols_of(config)


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    mine = _written(tmp_path, "id: m\nsize: original\nmis: dropped\npresence: maybe\n")
    names = ["orignal", str(mine), str(tmp_path / "absent.yaml"), "deris", "deris"]
    with pytest.raises(ValueError, match="5 problems") as error:
        protocols_of_file(names)
    for said in (
        "did you mean original?",
        "did you mean miss?",
        "got 'maybe'",
        "absent.yaml: no such file",
        "occurs 2 times",
    ):
        assert said in str(error.value)
