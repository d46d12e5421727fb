"""Pure functions equal to the public code: on the fixtures beside the checkout, and on the copies in tests/golden."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scripts.parity.functions import (
    ParityRow,
    check_metrics,
    check_preprocess,
    check_similarity,
    detection_accuracy,
    top_box_iou,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "parity"
SHARED = Path(__file__).parents[2].parent / "shared" / "parity"
CHECKS: dict[str, tuple[Callable[[Path], list[ParityRow]], int]] = {
    "metrics": (check_metrics, 116),
    "similarity": (check_similarity, 64),
    "preprocess": (check_preprocess, 18),
}


@pytest.mark.parametrize("folder", [GOLDEN, SHARED], ids=["golden", "shared"])
@pytest.mark.parametrize("name", CHECKS)
def test_equal_to_the_public_code(name: str, folder: Path) -> None:
    if not folder.is_dir():
        pytest.skip(f"no fixtures in {folder}")
    check, count = CHECKS[name]
    rows = check(folder)
    assert [row for row in rows if not row.is_equal] == []
    assert len(rows) == len({row.name for row in rows}) == count


@pytest.fixture
def fixtures(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "parity"))


def _edited(path: Path, *keys: str | int, value: object) -> None:
    content = json.loads(path.read_text())
    node = content
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "keys", "value", "row"),
    [
        ("metrics.json", ("gres_cases", "all_07", "gres", "cIoU"), 50.7587, "gres.all_07.cIoU"),
        ("metrics.json", ("gres_cases", "all_05", "grec", "F1score"), 26.7, "grec.all_05.F1score"),
        ("metrics.json", ("ris_per_sample", 3, "DetACC"), 0.0, "ris.sample3.DetACC"),
        ("nsc_similarity.json", ("pairs", 4, "similarity"), 0.5834, "pairs.similarity"),
        ("nsc_similarity.json", ("traces", 1, "rng_after"), 0.25, "trace.high_rate.rng_after"),
        ("nsc_similarity.json", ("traces", 0, "samples", 2, "expression"), "two surfers", "trace.default.expression"),
        ("clean_string.json", (0, "cleaned"), "the man's left hand side", "clean_string"),
    ],
)
def test_a_difference_is_seen(fixtures: Path, file: str, keys: tuple[str | int, ...], value: object, row: str) -> None:
    _edited(fixtures / file, *keys, value=value)
    check = check_metrics if file == "metrics.json" else check_similarity
    assert [each.name for each in check(fixtures) if not each.is_equal] == [row]


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("metrics.json", ("gres_cases", "first5", "gres", "oIoU")),
        ("metrics.json", ("ris_samples", 0, "depth")),
        ("metrics.json", ("more",)),
        ("nsc_similarity.json", ("traces", 0, "samples", 0, "more")),
        ("clean_string.json", (0, "more")),
    ],
)
def test_what_is_not_compared_is_an_error(fixtures: Path, file: str, keys: tuple[str | int, ...]) -> None:
    _edited(fixtures / file, *keys, value=1)
    check = check_metrics if file == "metrics.json" else check_similarity
    with pytest.raises(ValueError, match=f"{file}.* expected .* add a comparison for what is new"):
        check(fixtures)


def test_a_wrong_or_new_array_is_seen(fixtures: Path) -> None:
    path = fixtures / "preproc.npz"
    with np.load(path) as file:
        arrays = {name: file[name].copy() for name in file.files}
    arrays["b_resized224_u8_bgr"][5, 5, 1] ^= 1
    np.savez(path, **arrays)
    assert [(r.name, r.deviation) for r in check_preprocess(fixtures) if not r.is_equal] == [("b_resized224_u8_bgr", 1)]
    np.savez(path, **arrays, b_depth=np.zeros(3))
    with pytest.raises(ValueError, match="b_depth"):
        check_preprocess(fixtures)


def test_detection_takes_the_best_scoring_box_alone() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [0, 0, 10, 6]])
    truth = np.array([0.0, 0, 10, 10])
    assert top_box_iou(boxes, np.array([0.2, 0.9]), truth) == 0.6
    assert detection_accuracy([0.6, 1.0, 0.0, 0.6]) == {0.5: 75, 0.6: 75, 0.7: 25, 0.8: 25, 0.9: 25}
    assert all(math.isnan(value) for value in detection_accuracy([]).values())
