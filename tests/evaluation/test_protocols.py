"""Protocols: sizes, OpenCV's nearest neighbour, fingerprints."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from deris_llm.config import RunConfig, load_config
from deris_llm.evaluation.protocols import PROTOCOLS, protocols_of

GOLDEN = Path(__file__).parents[1] / "golden" / "parity" / "preproc.npz"


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("mask", ["mask", "part"])
def test_truth_is_resized_as_upstream_does(name: str, mask: str) -> None:
    with np.load(GOLDEN) as fixture:
        width = fixture[f"{name}_bgr"].shape[1]
        before = np.unpackbits(fixture[f"{name}_{mask}"], axis=-1, count=width).astype(bool)
        after = np.unpackbits(fixture[f"{name}_{mask}384"], axis=-1, count=384).astype(bool)
    np.testing.assert_array_equal(PROTOCOLS["deris"].resampled_truth(before), after)


def test_original_compares_at_the_pictures_own_size() -> None:
    truth = np.eye(7, 9, dtype=bool)
    assert PROTOCOLS["original"].size_hw(7, 9) == (7, 9)
    assert PROTOCOLS["original"].resampled_truth(truth) is truth
    assert PROTOCOLS["deris"].size_hw(7, 9) == (384, 384)


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
    assert "scores are multiplied by the presence first" in deris.describe()
    assert "96x96" in deris.describe()
    assert "else an empty mask" in deris.describe()


def test_every_field_changes_the_fingerprint() -> None:
    base = PROTOCOLS["deris"]
    other = {
        "id": "x", "size": "original", "fixed_px": 480, "truth_resampling": "none", "prediction_resampling": "nearest",
        "text_field": "raw", "score_threshold": 0.9, "selection": "best", "miss": "dropped",
        "presence": "gate",
    }  # fmt: skip
    assert other.keys() == {f.name for f in dataclasses.fields(base)}
    prints = {dataclasses.replace(base, **{name: value}).fingerprint() for name, value in other.items()}
    assert len(prints | {base.fingerprint()}) == len(other) + 1


def test_fingerprints_are_stable() -> None:
    """A change here makes all published numbers incomparable: say so in the CHANGELOG."""
    assert {name: protocol.fingerprint() for name, protocol in PROTOCOLS.items()} == {
        "original": "132ca0f7",
        "deris": "a5769d97",
    }
    assert protocols_of(RunConfig()) == tuple(PROTOCOLS.values())


def test_unknown_protocol_is_an_error() -> None:
    config = load_config("tiny-refcoco", ["evaluation.protocols=[original, rela480]"])
    with pytest.raises(ValueError, match=r"expected some of original, deris, got \['original', 'rela480'\]"):
        protocols_of(config)
