"""The calibrated threshold of a checkpoint: used by default, never against the user's word, always named."""

from pathlib import Path

import pytest

from deris_llm.config import RunConfig, load_config, save_config
from deris_llm.evaluation.calibration import Calibration, calibrated, choose

FOUND = Calibration(
    threshold=0.35, selection="threshold", presence="gate", split="refcoco/val", metric="mIoU", protocol="original",
    fingerprint="0123abcd", n_phrases=1234, date="2026-11-25", curve=({"threshold": 0.35, "mIoU": 70.5},),
)  # fmt: skip


def _config(folder: Path, *overrides: str) -> RunConfig:
    """The checkpoint's config as a command has it: the saved file, then the user's `--set`."""
    save_config(load_config("tiny-refcoco"), folder / "config.yaml")
    return load_config(folder / "config.yaml", overrides)


def test_without_a_sweep_nothing_changes(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert calibrated(tmp_path, config).config is config
    assert calibrated(tmp_path, config).source == "threshold 0.9, of the run config, not calibrated"


def test_a_sweep_is_used_and_named(tmp_path: Path) -> None:
    config = _config(tmp_path)
    FOUND.write(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["calibration.json", "config.yaml"]
    assert Calibration.read(tmp_path) == FOUND
    used = calibrated(tmp_path, config).config
    assert (used.evaluation.score_threshold, used.evaluation.selection, used.evaluation.presence) == (
        0.35,
        "threshold",
        "gate",
    )
    assert calibrated(tmp_path, used).config == used
    for asked in (config, used):
        said = calibrated(tmp_path, asked).source
        for part in ("0.35", "refcoco/val", "1,234 phrases", "original", "0123abcd", "2026-11-25"):
            assert part in said


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evaluation.score_threshold=0.8", "threshold 0.8: set by the user, so not the calibrated 0.35"),
        (
            "evaluation.score_threshold=0.9",
            "threshold 0.9: set by the user, so not the calibrated 0.35",
        ),  # as it was saved
        ("evaluation.presence=multiply", "the user set evaluation.presence=multiply, the sweep had gate"),
        ("evaluation.selection=best", "the user set evaluation.selection=best, the sweep had threshold"),
    ],
)
def test_the_users_word_wins(tmp_path: Path, override: str, says: str) -> None:
    config = _config(tmp_path, override)
    FOUND.write(tmp_path)
    assert calibrated(tmp_path, config, [override]).config is config
    assert says in calibrated(tmp_path, config, [override]).source
    if override != "evaluation.score_threshold=0.9":  # seen without being told, because it differs from what was saved
        assert calibrated(tmp_path, config).config is config


def test_the_users_word_on_something_else_leaves_it(tmp_path: Path) -> None:
    config = _config(tmp_path, "data.num_workers=0")
    FOUND.write(tmp_path)
    assert calibrated(tmp_path, config, ["data.num_workers=0"]).config.evaluation.score_threshold == 0.35


@pytest.mark.parametrize("content", ["", "[]", '{"threshold": 0.5}', '{"curve": 3}'])
def test_a_file_of_something_else_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(ValueError, match=r"calibration\.json: expected what `deris-llm eval --sweep` writes"):
        calibrated(tmp_path, _config(tmp_path))


def test_of_equal_values_the_middle_one_is_chosen() -> None:
    curve = [{"threshold": t, "mIoU": v} for t, v in ((0.1, 50.0), (0.2, 60.0), (0.3, 60.0), (0.4, 60.0), (0.5, 10.0))]
    assert choose(curve, "mIoU") == 0.3
    assert choose(curve[:3], "mIoU") == 0.2
    assert choose(curve, "mIoU", 0.9) == 0.3  # the present one is not among the best


def test_the_present_threshold_stays_where_no_other_is_better() -> None:
    curve = [{"threshold": t, "mIoU": 50.0 if t > 0.3 else 40.0} for t in (0.1, 0.35, 0.5, 0.72, 0.9)]
    for present in (0.35, 0.5, 0.72, 0.9):
        assert choose(curve, "mIoU", present) == present
    assert choose(curve, "mIoU", 0.1) == 0.5
