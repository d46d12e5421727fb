"""The parity runner, and our model against the public code's numbers: the whole fixtures where they lie beside the
repository, else the extract in tests/golden/parity (made by `scripts/parity/extract.py`)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.parity.model import compare_arrays, main, parse_slice, run_checks
from scripts.parity.recipe import MODELS, recipe_inputs, recipe_weight, relative_position_index

REPOSITORY = Path(__file__).parents[2]
EXTRACT = REPOSITORY / "tests" / "golden" / "parity"
WHOLE = REPOSITORY.parent / "shared" / "parity"
FIXTURES = WHOLE if WHOLE.is_dir() else EXTRACT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deris_b_equals_the_public_code():
    """Arrays of the forward at batch 2 and 1, losses, matching and gradient norms.

    Measured: worst array 3.3e-5 (an area), worst float array 1.1e-5 of its std; losses 3e-6, gradients 1.6e-4 relative.
    """
    rows = run_checks(FIXTURES, model="B_refcoco", losses=True, functions=())
    assert [row for row in rows if not row.is_equal] == []
    assert sum(row.group == "arrays" for row in rows) == 128
    assert sum(".grad." in row.name for row in rows) == 1784


@pytest.mark.skipif(not WHOLE.is_dir(), reason="needs the whole fixtures, which lie beside the project")
def test_extract_is_of_the_whole_fixtures():
    for name in ("losses.json", "metrics.json", "keys_B_refcoco.json"):
        assert json.loads((EXTRACT / name).read_text()) == json.loads((WHOLE / name).read_text())
    whole, extract = (np.load(folder / "parity_B_refcoco.npz") for folder in (WHOLE, EXTRACT))
    assert whole.files == extract.files
    for name in whole.files:
        np.testing.assert_array_equal(whole[name].ravel()[::4], extract[name])
    assert sum(path.stat().st_size for path in EXTRACT.iterdir()) <= 2_000_000


ENTRY = {"full_shape": [2, 6], "slice": "[:, ::2]", "std": 2.0, "abs_sum": 66.0}
REFERENCE = np.arange(12, dtype=np.float32).reshape(2, 6)


def deviation(ours: np.ndarray | None, entry: dict = ENTRY, stored: np.ndarray = REFERENCE[:, ::2]) -> float:
    arrays = {} if ours is None else {"x": ours}
    (row,) = compare_arrays(arrays, {"x": entry}, {"x": stored}, 1e-4)
    return row.deviation


def test_comparison_measures_against_the_std():
    assert deviation(REFERENCE) == 0
    changed = REFERENCE.copy()
    changed[1, 2] += 0.5
    assert deviation(changed) == pytest.approx(0.25)


def test_comparison_sees_what_is_not_stored_through_the_sum():
    changed = REFERENCE.copy()
    changed[0, 1] += 6.6
    assert deviation(changed) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "ours", [None, REFERENCE[:, :4], np.full((2, 6), np.nan, np.float32)], ids=["missing", "shape", "nan"]
)
def test_what_cannot_be_compared_is_not_equal(ours):
    assert math.isinf(deviation(ours))


def test_an_array_without_entry_is_not_equal():
    rows = compare_arrays({"x": REFERENCE}, {"x": ENTRY}, {"x": REFERENCE[:, ::2], "y": REFERENCE}, 1e-4)
    assert [(row.name, row.is_equal) for row in rows] == [("x", True), ("y", False)]


def test_masks_are_compared_cell_by_cell():
    mask = np.zeros((1, 16, 16), bool)
    entry = {"full_shape": [1, 16, 16], "slice": "packbits(axis=-1)", "area": [0]}
    assert deviation(mask, entry, np.packbits(mask, axis=-1)) == 0
    other = mask.copy()
    other[0, 3, 4] = True
    assert deviation(other, entry, np.packbits(mask, axis=-1)) == 1 / 256


@pytest.mark.parametrize("text", ["[:]", "[:, ::3, ::16]", "[..., ::2]", "[:, :, 5::16, 3::16]", "[:1]"])
def test_slices_are_read_as_numpy_reads_them(text):
    array = np.arange(3 * 4 * 40 * 40).reshape(3, 4, 40, 40)
    np.testing.assert_array_equal(array[parse_slice(text)], eval(f"array{text}"))


def test_a_slice_runs_nothing():
    with pytest.raises(ValueError, match="expected parts like"):
        parse_slice("[__import__('os').system('true')]")


def test_recipe_has_its_spot_checks():
    """RECIPE.md section 1: first two values and sum of abs."""
    keys = json.loads((EXTRACT / "keys_B_refcoco.json").read_text())
    for name, first, total in (
        ("perception_branch.predictor.query_embed.weight", (0.3979410, 1.2119364), 2079.4597),
        ("perception_branch.predictor.SEG_cls.weight", (0.0381849, 0.0493623), 38.4966),
        ("perception_branch.predictor.query_SA.2.self_attn.in_proj_bias", (0.0249028, -0.1672716), 62.0854),
        ("perception_branch.hier_vision_encoder.patch_embed.norm.weight", (0.7688984, 0.9736065), 96.4710),
    ):
        values = recipe_weight(name, tuple(keys[name][0]))
        assert values.ravel()[:2] == pytest.approx(first, abs=1e-6)
        assert np.abs(values.astype(np.float64)).sum() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("window", [3, 7])
def test_relative_position_index_is_that_of_swin(window):
    from transformers.models.swin.modeling_swin import SwinRelativePositionBias

    theirs = SwinRelativePositionBias(1, (window, window)).relative_position_index.view(window**2, window**2)
    np.testing.assert_array_equal(relative_position_index(window), theirs.numpy())


def test_inputs_of_every_model():
    for model in MODELS.values():
        inputs = recipe_inputs(model.seeds)
        assert inputs.token_ids.shape == (2, model.seeds.max_token)
        assert (inputs.token_padding == 0).sum(axis=1).tolist() == [n + 2 for n in model.seeds.lengths]
        assert torch.from_numpy(inputs.image).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "B_refcok"], "expected one of B_refcoco, B_grefcoco, L_refcoco, got 'B_refcok'"),
        (["--model", "L_refcoco"], "expected the fixtures of L_refcoco, got no keys_L_refcoco.json"),
        (["--losses"], "losses.json: expected a parity fixture, got no such file"),
    ],
)
def test_unusable_fixtures_are_said_before_anything_is_built(tmp_path, capsys, arguments, message):
    assert main(["--fixtures", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_says_what_there_is_to_compare(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--fixtures", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--model NAME, --losses" in capsys.readouterr().err


def test_exit_status_and_json(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["--fixtures", str(EXTRACT), "--metrics", "--json", str(out)]) == 0
    assert all(row["is_equal"] for row in json.loads(out.read_text())["rows"])
    wrong = json.loads((EXTRACT / "metrics.json").read_text())
    wrong["gres_cases"]["all_07"]["gres"]["gIoU"] += 0.5
    (tmp_path / "metrics.json").write_text(json.dumps(wrong))
    assert main(["--fixtures", str(tmp_path), "--metrics"]) == 1
    assert "DIFFERS" in capsys.readouterr().out
