"""scripts/parity/video.py: every number of every part counts, and nothing that is there goes uncompared.

The parts are small trees in the layout of the fixtures. What is expected of davis/ and of the pairs of masks is computed here, from
the slow re-write; that of the other parts, whose expected numbers came from the public code, is recorded from the script itself.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deris_llm.evaluation.video.metrics import frame_statistics
from deris_llm.evaluation.video.protocols import fuse_expressions
from scripts.parity import video_parts
from scripts.parity.video import compare_fixtures, main
from tests.evaluation.video.by_definition import drawn_cases, slow_counts
from tests.evaluation.video.video_world import (
    labels_at,
    mevis_truth,
    moving,
    save_json,
    save_labels,
    save_mask,
    write_davis,
    write_labels,
    write_mevis,
    write_predictions,
    write_ref_davis,
    write_ytvos,
)

# ---- pairs of masks ----


def _write_pairs(root: Path) -> None:
    """Half of the drawn cases as jf_cases.npz, half as jf_cases_real.npz, two with maps; three vectors."""
    arrays: dict[str, dict[str, np.ndarray]] = {"jf_cases.npz": {}, "jf_cases_real.npz": {}}
    cases = []
    for i, (name, truth, answer, void) in enumerate(drawn_cases()):
        key, file = f"c{i:03d}", sorted(arrays)[i % 2]
        slow = slow_counts(truth, answer, void)
        masks = {"gt": truth, "pred": answer} | ({} if void is None else {"void": void})
        if i in (4, 9):
            kept = {n: m if void is None else m & ~void for n, m in (("gt", truth), ("pred", answer))}
            for part, mask in kept.items():
                masks |= {
                    f"{part}_boundary": (found := _boundary(mask)),
                    f"{part}_dilated": _near(found, slow["radius"]),
                }
        arrays[file] |= {f"{key}_{part}": np.packbits(mask) for part, mask in masks.items()}
        seen = [m if void is None else m & ~void for m in (truth, answer)]
        cases.append(
            {
                "key": key, "name": name, "npz": file, "shape": list(truth.shape), "bound_th": 0.008, "void": void is not None,
                "bound_pix": slow["radius"], "J": slow["J"], "F": slow["F"], "boundary_maps": i in (4, 9), "note": "",
                "counts": {
                    "inter": int((seen[0] & seen[1]).sum()), "union": int((seen[0] | seen[1]).sum()),
                    "n_gt_boundary": slow["boundary"][0], "n_pred_boundary": slow["boundary"][1],
                    "n_gt_match": slow["matched"][0], "n_pred_match": slow["matched"][1],
                },
            }
        )  # fmt: skip
    vectors = {"s00": np.array([1.0, 0.5, 0.25]), "s01": np.linspace(1, 0, 300), "s02": np.linspace(0, 1, 400)}
    arrays["jf_cases.npz"] |= {f"{key}_values": values for key, values in vectors.items()}
    statistics = [
        {"key": "s00", "n": 3, "mean": 1.75 / 3, "recall": 1 / 3, "decay": 0.5, "decay_without_overflow": 0.5},
        {"key": "s01", "n": 300, "mean": 0.5, "recall": 0.5, "decay": None, "bin_edges": [0, 75, 150, 224, 299]},
        {"key": "s02", "n": 400, "recall": 0.5, "public_edges_uint8": [0, 100, 200, 43, 143]},
    ]
    for file, of_file in arrays.items():
        np.savez(root / file, **of_file)
    save_json(
        root / "jf_cases.json",
        {"format": "bits", "bound_pix_by_size": {"480x854": 8}, "cases": cases, "statistics": statistics},
    )


def _boundary(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != diagonal)


def _near(boundary: np.ndarray, radius: int) -> np.ndarray:
    rows, columns = np.indices(boundary.shape)
    near = np.zeros_like(boundary)
    for y, x in np.argwhere(boundary):
        near |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return near


# ---- davis ----


def _davis_expected(truth: list[np.ndarray], answer: list[np.ndarray], *, is_unsupervised: bool) -> dict[str, Any]:
    """One sequence, written out: every pair, and the best of all assignments."""
    num_objects = int(np.where(truth[0] == 255, 0, truth[0]).max())
    if not is_unsupervised:
        truth, answer = truth[1:-1], answer[1:-1]
    num_answers = max(int(labels.max()) for labels in answer)
    rows = max(num_answers, num_objects)
    pairs = np.zeros((rows, num_objects, len(answer), 2))
    for row, column in itertools.product(range(rows), range(num_objects)):
        for t, (true, labels) in enumerate(zip(truth, answer, strict=True)):
            slow = slow_counts(true == column + 1, labels == row + 1, (true == 255) if is_unsupervised else None)
            pairs[row, column, t] = slow["J"], slow["F"]
    matrix = pairs.mean(axis=2).mean(axis=2)
    chosen: tuple[int, ...] = tuple(range(num_objects))
    if is_unsupervised:
        chosen = max(
            itertools.permutations(range(rows), num_objects),
            key=lambda of: sum(matrix[row, i] for i, row in enumerate(of)),
        )
    objects = []
    for i, row in enumerate(chosen):
        j, f = pairs[row, i, :, 0], pairs[row, i, :, 1]
        objects.append(
            {
                "gt_object": i + 1, "public_name": f"balls_{sorted(chosen).index(row) + 1}", "proposal": row + 1,
                "proposal_unique": True, "J": frame_statistics(j)._asdict(), "F": frame_statistics(f)._asdict(),
                "J_per_frame": j.tolist(), "F_per_frame": f.tolist(),
            }
        )  # fmt: skip
    return {
        "frames_scored": len(answer),
        "n_gt_objects": num_objects,
        "n_pred_objects": num_answers,
        "objects": objects,
        "matching_matrix_JF_proposal_by_object": matrix.tolist() if is_unsupervised else None,
    }


def _global(sequence: dict[str, Any]) -> dict[str, float]:
    found = {
        f"{metric}-{name.capitalize()}": float(np.mean([each[metric][name] for each in sequence["objects"]]))
        for metric in "JF"
        for name in ("mean", "recall", "decay")
    }
    return {"J&F-Mean": (found["J-Mean"] + found["F-Mean"]) / 2} | found


def _write_davis(root: Path) -> None:
    truth = [labels_at(t, 3) for t in range(5)]
    truth[2][2:6, 2:8] = 255
    exchanged = np.array([0, 2, 3, 1], dtype=np.uint8)
    semi = [np.roll(labels_at(t, 3), 1, axis=1) for t in range(5)]
    unsup = [exchanged[np.roll(labels_at(t, 3), 2, axis=1)] for t in range(5)]
    unsup[1][20:22, 2:6] = 4
    write_davis(root, {"balls": truth})
    write_labels(root / "pred_semi" / "balls", semi)
    write_labels(root / "pred_unsup" / "balls", unsup)
    tasks = {
        "semi-supervised": _davis_expected(truth, semi, is_unsupervised=False),
        "unsupervised": _davis_expected(truth, unsup, is_unsupervised=True),
    }
    assert [each["proposal"] for each in tasks["unsupervised"]["objects"]] == [2, 3, 1]
    save_json(
        root / "expected.json",
        {task: {"global": _global(found), "sequences": {"balls": found}} for task, found in tasks.items()},
    )


# ---- parts whose expected numbers are recorded ----


def _write_mevis(root: Path) -> None:
    write_mevis(root / "valid_u")
    write_predictions(root / "pred", {k: m for k, m in mevis_truth().items() if k != ("one", "1")})
    variants = [{"name": "empty_folder", "good_implementation": "must equal the base result"}]
    save_json(root / "expected.json", {"variants": variants})


def _write_ytvos(root: Path) -> None:
    write_ytvos(root)
    write_predictions(
        root / "pred_train" / "Annotations", {("aa", "0"): [moving(0, 1)] * 4, ("aa", "1"): [moving(1, 0)] * 4}
    )
    entry = {"frames": ["00000"], "expressions": {"0": {"exp": "x"}}}
    for folder in ("meta_expressions", "counts/meta_expressions"):
        for split, names in (("valid", ["b", "c", "a"]), ("test", ["c"])):
            save_json(root / folder / split / "meta_expressions.json", {"videos": dict.fromkeys(names, entry)})
    save_json(root / "expected.json", {"sets": {"train": {}}})


def _write_ref_davis(root: Path) -> None:
    write_ref_davis(root)
    truth = np.array([[labels_at(t) == label for t in range(3)] for label in (1, 2)])
    scores = {f"balls__anno_{k}": (np.roll(truth, k, axis=-1) * 0.6 + 0.1).astype(np.float32) for k in range(4)}
    np.savez(root / "scores.npz", **scores)
    masks = [encoded for expression in sorted(map(str, range(8))) for encoded in [_rles(truth[int(expression) // 4])]]
    save_json(root / "valid" / "mask_dict.json", {str(i): rles for i, rles in enumerate(masks)})
    for k, t in itertools.product(range(4), range(3)):
        of_frame = scores[f"balls__anno_{k}"][:, t]
        save_labels(root / "pred_A" / "normal" / f"anno_{k}" / "balls" / f"{t:05d}.png", fuse_expressions(of_frame))
        for i in range(2):
            save_mask(root / "pred_B" / "normal" / "balls" / str(4 * i + k) / f"{t:05d}.png", of_frame[i] > 0.5)
    save_json(root / "expected.json", {"protocol_A": {"normal": {}}, "protocol_B": {"normal": {}}})


def _rles(masks: np.ndarray) -> list[Any]:
    from deris_llm.data.masks import encode_mask

    return [encode_mask(mask) for mask in masks]


_RECORDED: dict[str, Callable[[Path], None]] = {
    "mevis": _write_mevis,
    "ref_ytvos": _write_ytvos,
    "ref_davis": _write_ref_davis,
}


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fixtures")
    (root / "README.md").write_text("not a part")
    _write_pairs(root)
    _write_davis(root / "davis")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(video_parts._EDITS, "empty_folder", _empty_folder)
        for part, write in _RECORDED.items():
            write(root / part)
            _record(root, part, patch)
    return root


def _empty_folder(root: Path) -> None:
    (root / "pred" / "one" / "1").mkdir()


@pytest.fixture(autouse=True)
def _known_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(video_parts._EDITS, "empty_folder", _empty_folder)


def _record(root: Path, part: str, patch: pytest.MonkeyPatch) -> None:
    """Writes what the script computes of a part as what is expected."""
    path = root / part / "expected.json"
    expected, seen = json.loads(path.read_text()), {}
    whole = video_parts.Comparison.trees

    def trees(self: Any, name: str, ours: Any, wanted: Any, said: Any = ()) -> None:
        seen.setdefault(name, ours)
        whole(self, name, ours, wanted, said)

    with patch.context() as inner:
        inner.setattr(video_parts.Comparison, "trees", trees)
        getattr(video_parts, part)(root, video_parts.Comparison(part, 0))
    recorded = seen[part]
    for ours, variant in zip(recorded.get("variants", []), expected.get("variants", []), strict=True):
        ours |= variant
    save_json(path, json.loads(json.dumps(recorded)))


# ---- the tests ----


def test_every_part_is_compared_and_equal(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main(["--fixtures", str(fixtures), "--json", str(report)]) == 0
    said = capsys.readouterr().out
    parts = {part["part"]: part for part in json.loads(report.read_text())["parts"]}
    assert list(parts) == ["jf_cases", "mevis", "ref_ytvos", "ref_davis", "davis"]
    for part, found in parts.items():
        assert f"{part} " in said
        assert found["numbers"] > 30
        assert found["differences"] == []
        assert found["worst_deviation"] < 1e-15


def _numbers(tree: Any, skipped: frozenset[str]) -> list[tuple[Any, Any]]:
    """Every place of a number or null in a tree: the container and the key."""
    places: list[tuple[Any, Any]] = []
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        if key in skipped:
            continue
        if isinstance(value, (dict, list)):
            places += _numbers(value, skipped)
        elif not isinstance(value, (str, bool)):
            places.append((tree, key))
    return places


@pytest.mark.parametrize("part", ["jf_cases", "mevis", "ref_ytvos", "ref_davis", "davis"])
def test_every_number_counts(part: str, fixtures: Path, tmp_path: Path) -> None:
    """Changes every number of a part by little, all at once: each must be reported."""
    path = fixtures / "jf_cases.json" if part == "jf_cases" else fixtures / part / "expected.json"
    tree = json.loads(path.read_text())
    skipped = frozenset({*video_parts._CASE_INPUTS, *video_parts._MEVIS_SAID, "gt_object"})
    places = _numbers(tree, skipped)
    for container, key in places:
        value = container[key]
        container[key] = 0.123 if value is None else value + 1 if isinstance(value, int) else value + 1e-9
    root = tmp_path / "fixtures"
    root.mkdir()
    for other in fixtures.iterdir():
        if other.name.startswith(part):
            _linked(other, root / other.name)
    changed = root / path.relative_to(fixtures)
    changed.unlink()
    save_json(changed, tree)
    (found,) = compare_fixtures(root)
    assert found.number >= len(places)
    extra = ("from_png", ".strict[", ".ours.")  # what is derived from other numbers is not changed
    assert len([name for name, _ in found.differences if not any(word in name for word in extra)]) == len(places)
    assert main(["--fixtures", str(root)]) == 1
    assert main(["--fixtures", str(root), "--tolerance", "1e-6"]) == 1  # counts must be equal


def _linked(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
        for entry in source.iterdir():
            _linked(entry, target / entry.name)
    else:
        target.symlink_to(source)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("new_part/expected.json", "{}", "new_part: not compared: it belongs to no part that this script knows"),
        ("davis/more.json", "{}", "more.json: not compared: this script does not know the file"),
        ("jf_cases_other.npz", None, "jf_cases_other.npz.c999_gt: not compared: no case names this array"),
    ],
)
def test_what_is_there_and_not_compared_is_an_error(
    name: str, content: str | None, says: str, fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "fixtures"
    root.mkdir()
    for part in ("davis", "jf_cases.json", "jf_cases.npz", "jf_cases_real.npz"):
        _linked(fixtures / part, root / part)
    path = root / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        np.savez(path, c999_gt=np.zeros(3, dtype=np.uint8))
    else:
        path.write_text(content)
    assert main(["--fixtures", str(root)]) == 1
    assert says in " ".join(capsys.readouterr().out.split())


def test_an_expected_number_that_we_do_not_have_is_an_error(fixtures: Path, tmp_path: Path) -> None:
    root = tmp_path / "fixtures"
    root.mkdir()
    _linked(fixtures / "davis", root / "davis")
    path = root / "davis" / "expected.json"
    tree = json.loads(path.read_text())
    tree["unsupervised"]["sequences"]["balls"]["objects"][0]["G"] = {"mean": 0.5}
    tree["unsupervised"]["sequences"]["other"] = tree["unsupervised"]["sequences"]["balls"]
    path.unlink()
    save_json(path, tree)
    (found,) = compare_fixtures(root)
    said = [f"{name}: {why}" for name, why in found.differences]
    assert any(".objects[0].G: not compared" in line for line in said)
    assert any("sequences.other: not compared: not in ImageSets" in line for line in said)


def test_predictions_of_which_nothing_is_expected_are_an_error(fixtures: Path, tmp_path: Path) -> None:
    for part in ("mevis", "ref_davis", "ref_ytvos"):
        _linked(fixtures / part, tmp_path / part)
    paths = {part: tmp_path / part / "expected.json" for part in ("mevis", "ref_davis", "ref_ytvos")}
    trees = {part: json.loads(path.read_text()) for part, path in paths.items()}
    trees["mevis"]["expressions"].popitem()
    trees["ref_davis"]["protocol_B"].pop("normal")
    trees["ref_ytvos"]["sets"]["train"]["expressions"].popitem()
    for part, path in paths.items():
        path.unlink()
        save_json(path, trees[part])
    for found in compare_fixtures(tmp_path):
        assert any("not compared: nothing is expected of it" in why for _, why in found.differences), found.part


@pytest.mark.parametrize("content", [b"", b"PK damaged"])
def test_a_damaged_npz_is_a_difference(content: bytes, fixtures: Path, tmp_path: Path) -> None:
    for name in ("jf_cases.json", "jf_cases.npz"):
        _linked(fixtures / name, tmp_path / name)
    (tmp_path / "jf_cases_real.npz").write_bytes(content)
    (found,) = compare_fixtures(tmp_path)
    assert any(why.startswith("stopped: ") for _, why in found.differences)


def test_pairs_without_their_masks_are_an_error(fixtures: Path, tmp_path: Path) -> None:
    for name in ("jf_cases.json", "jf_cases.npz"):
        _linked(fixtures / name, tmp_path / name)
    (found,) = compare_fixtures(tmp_path)
    assert any("not compared: there is no jf_cases_real.npz" in why for _, why in found.differences)


def test_other_forms_of_the_davis_numbers(fixtures: Path, tmp_path: Path) -> None:
    """Lists in the order of the public table, objects by label, names of frames, a matrix without padding."""
    root = tmp_path / "fixtures"
    root.mkdir()
    _linked(fixtures / "davis", root / "davis")
    path = root / "davis" / "expected.json"
    tree = json.loads(path.read_text())
    for task, found in tree.items():
        found["global"] = list(found["global"].values())
        sequence = found["sequences"]["balls"]
        names = [f"{t:05d}" for t in range(5)]
        sequence["frames_scored"] = names if task == "unsupervised" else names[1:-1]
        sequence["objects"] = {str(each.pop("gt_object")): each for each in sequence["objects"]}
    path.unlink()
    save_json(path, tree)
    (found,) = compare_fixtures(root)
    assert found.differences == []


def test_folders_without_a_part_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--fixtures", str(tmp_path / "absent")]) == 2
    assert main(["--fixtures", str(tmp_path)]) == 2
    assert "expected at least one of jf_cases, mevis" in capsys.readouterr().err
