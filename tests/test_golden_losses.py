"""Golden losses: what is trained and answered stays equal to tests/golden/losses, or a commit says why it does not.

Where machine and libraries equal those of the recording, every number must be equal to the last digit, elsewhere within
1e-5. Measured with ONEDNN_MAX_CPU_ISA=SSE41, alone and with ATEN_CPU_CAPABILITY=default, in place of AVX2: losses of all
tiny runs within 1.6e-6.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle

from scripts import golden_losses, loss_compare

NUM_PARITY_STEPS = 2  # of the 8 that are stored: a step of DeRIS-B takes 13 CPU seconds


def check(name: str, **content: Any) -> None:
    """Asserts that what was computed equals the stored recording, as strictly as the place allows."""
    stored = loss_compare.read_recordings(golden_losses.LOSSES / f"{name}.json")[name]
    for ranks, losses in content.get("losses", {}).items():
        stored["losses"][ranks] = stored["losses"][ranks][: len(losses)]
    stored["losses"] = {ranks: stored["losses"][ranks] for ranks in content.get("losses", {})}
    rows = loss_compare.compare_recordings(stored, golden_losses.recording(name, "this test", **content))
    assert rows
    assert all(row.is_within for row in rows), (
        f"the numbers differ from tests/golden/losses/{name}.json:\n{loss_compare.table(rows)}\n"
        f"If this is intended, record again and say why in the commit: python scripts/golden_losses.py --runs {name}"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def world(folder: Path) -> Path:
    return golden_losses.write_golden_world(folder)


@pytest.fixture(scope="module")
def two_ranks(folder: Path, world: Path) -> dict[str, list[float]]:
    return golden_losses.two_rank_losses(folder, list(golden_losses.RUNS), world)


@pytest.mark.parametrize("name", golden_losses.RUNS)
def test_one_rank(name: str, folder: Path, world: Path):
    check(name, losses={"1 rank": golden_losses.trained_losses(folder, name, world)})


@pytest.mark.slow
@pytest.mark.parametrize("name", golden_losses.RUNS)
def test_two_ranks(name: str, two_ranks: dict[str, list[float]]):
    check(name, losses={"2 ranks": two_ranks[name]})


@pytest.mark.slow
def test_released_preset_on_the_parity_extract():
    check(golden_losses.PARITY, losses={"1 rank": golden_losses.parity_losses(NUM_PARITY_STEPS)})


def test_predictions_of_the_quickstart_checkpoint(world: Path):
    check(golden_losses.PREDICTIONS, predictions=golden_losses.predictions(world))


def test_every_recording_is_complete():
    stored = loss_compare.read_recordings(golden_losses.LOSSES)
    assert stored.keys() == {*golden_losses.RUNS, golden_losses.PARITY, golden_losses.PREDICTIONS}
    for name in golden_losses.RUNS:
        assert {ranks: len(losses) for ranks, losses in stored[name]["losses"].items()} == {"1 rank": 8, "2 ranks": 8}
    assert len(stored[golden_losses.PARITY]["losses"]["1 rank"]) == 8
    assert len(stored[golden_losses.PREDICTIONS]["predictions"]) == 20
    assert all("golden_losses.py" in content["command"] and len(content["commit"]) == 40 for content in stored.values())


def test_runs_cover_every_form_and_structure():
    """Each value of the two options is in some run; the defaults are in `tiny-refcoco`."""
    options = " ".join(option for run in golden_losses.RUNS.values() for option in run.overrides)
    for name in ("p2c", "c2p", "hierarchical"):
        assert f"loopback.form={name}" in options
    for name in ("perception_centric", "cognition_centric"):
        assert f"loopback.structure={name}" in options


LOSSES = [4.0, 3.0, 2.0, 1.0]


def write(path: Path, run: str = "a", **changes: Any) -> Path:
    content = {"run": run, "machine": {"cpu": "x"}, "libraries": {"torch": "1"}, "losses": {"1 rank": LOSSES}} | changes
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_equal_recordings_are_bit_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json")
    assert loss_compare.main([str(a), str(b)]) == 0
    assert "bit-equal" in capsys.readouterr().out


def test_the_first_differing_step_is_named(tmp_path: Path):
    a = write(tmp_path / "a.json")
    b = write(tmp_path / "b.json", losses={"1 rank": [4.0, 3.0, 2.0 + 2e-6, 1.5]})
    (row,) = loss_compare.compare(a, b)
    assert (row.first_step, row.is_within) == (3, False)
    assert row.absolute == 0.5
    assert row.relative == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("changes", "options", "status"),
    [
        ({}, [], 1),
        ({"machine": {"cpu": "y"}}, [], 0),
        ({"libraries": {"torch": "2"}}, [], 0),
        ({}, ["--tolerance", "1e-5"], 0),
        ({"machine": {"cpu": "y"}}, ["--tolerance", "0"], 1),
    ],
)
def test_tolerance_is_zero_in_the_same_place(tmp_path: Path, changes: dict, options: list[str], status: int):
    a = write(tmp_path / "a.json")
    b = write(tmp_path / "b.json", losses={"1 rank": [4.0, 3.0, 2.0, 1.0 + 5e-6]}, **changes)
    assert loss_compare.main([str(a), str(b), *options]) == status


def test_nan_is_never_equal(tmp_path: Path):
    a = write(tmp_path / "a.json", losses={"1 rank": [4.0, float("nan")]})
    assert loss_compare.main([str(a), str(a), "--tolerance", "1"]) == 1


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"run": "b"}, ["a only in", "b only in"]),
        ({"losses": {"1 rank": LOSSES, "2 ranks": LOSSES}}, ["1 rank", "2 ranks"]),
        ({"losses": {"1 rank": LOSSES[:3]}}, ["expected 4", "got 3"]),
        ({"losses": None}, []),
    ],
)
def test_what_one_side_lacks_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes, facts):
    a, b = write(tmp_path / "a" / "run.json"), write(tmp_path / "b" / "run.json", **changes)
    if changes.get("losses", ()) is None:
        b.write_text("{}")
    assert loss_compare.main([str(a.parent), str(b.parent)]) == 2
    said = capsys.readouterr().err
    assert all(fact in said for fact in facts)
    assert str(b) in said or facts


def test_no_recording_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert loss_compare.main([str(tmp_path / "none"), str(tmp_path)]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def answer(**changes: Any) -> dict[str, Any]:
    """An answer whose mask is the first of two columns of 2 pixels."""
    whole = {"image": "i.jpg", "phrase": "p", "score": 0.5, "presence": 0.5, "best_query": 1, "area": 2}
    return whole | {"size_hw": [2, 2], "mask": "022"} | changes


def test_a_changed_pixel_of_a_mask_differs(tmp_path: Path):
    masks = [np.asfortranarray([[1, 0], [1, k]], dtype=np.uint8) for k in (0, 1)]
    a, b = (
        write(tmp_path / f"{k}.json", predictions=[answer(mask=rle.encode(mask)["counts"].decode())], losses={})
        for k, mask in enumerate(masks)
    )
    assert all(row.is_within for row in loss_compare.compare(a, a))
    row = loss_compare.compare(a, b)[-1]
    assert (row.absolute, row.relative, row.first_step, row.is_within) == (1.0, 0.25, 1, False)
