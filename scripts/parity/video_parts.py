"""The parts of the video fixtures, each computed again from its masks and compared with ``expected.json``.

Each part builds a tree of our numbers in the form of the expected one; `Comparison.trees` walks the expected tree, so a number
that we do not have is a difference. What the public code got by a mistake is computed with that mistake, here and nowhere else:
`_public_mevis`, `_public_decay`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deris_llm.data.errors import DataError
from deris_llm.data.formats.base import PrepareOptions
from deris_llm.data.formats.ref_ytvos import RefYtvosReader
from deris_llm.data.formats.video import META_FILE, Video, read_videos
from deris_llm.data.masks import coco_mask
from deris_llm.evaluation.video.metrics import (
    boundary_radius,
    frame_statistics,
    outline,
    quarter_edges,
    region_similarity,
    without_void,
)
from deris_llm.evaluation.video.protocols import (
    ANNOTATORS,
    Score,
    SequenceScore,
    davis_numbers,
    expression_scores,
    frame_score,
    fuse_expressions,
    mean_score,
    object_and_annotator,
    unsupervised,
)
from deris_llm.evaluation.video.score import (
    ExpressionResult,
    davis_columns,
    expression_numbers,
    score_davis,
    score_expressions,
)
from deris_llm.evaluation.video.trees import PngTree, read_labels, read_mask
from deris_llm.evaluation.video.truth import DavisSequence, TruthVideo, read_davis, read_truth


@dataclass
class Comparison:
    """What was compared of a part."""

    part: str
    tolerance: float
    number: int = 0  # numbers compared
    others: int = 0  # texts and maps
    worst: float = 0.0
    differences: list[tuple[str, str]] = field(default_factory=list)  # name, why
    notes: list[str] = field(default_factory=list)

    def differs(self, name: str, why: str) -> None:
        """Notes a difference."""
        self.differences.append((name, why))

    def value(self, name: str, ours: Any, expected: Any) -> None:
        """Compares two values: numbers by tolerance, counts and texts exactly; None is NaN."""
        if isinstance(expected, str):
            self.others += 1
            if str(ours) != expected:
                self.differs(name, f"{ours!r}, expected {expected!r}")
            return
        self.number += 1
        theirs = math.nan if expected is None else expected
        if ours is None or isinstance(ours, (dict, list, str)):
            ours = math.nan if ours is None else math.inf
        if math.isnan(theirs) or math.isnan(ours):
            deviation = 0.0 if math.isnan(theirs) and math.isnan(ours) else math.inf
        else:
            deviation = abs(ours - theirs)
        self.worst = max(self.worst, deviation)
        if deviation > (0 if isinstance(expected, int) and isinstance(ours, int) else self.tolerance):
            self.differs(name, f"{ours}, expected {expected}")

    def trees(self, name: str, ours: Any, expected: Any, said: Iterable[str] = ()) -> None:
        """Compares every value of the expected tree with ours.

        Args:
            name: where the trees are, for messages.
            ours: may hold more than expected.
            expected: of the fixture.
            said: keys of the expected tree that hold no result: inputs, explanations, what the public program printed.
        """
        said = frozenset(said)
        if isinstance(expected, dict):
            for key, value in expected.items():
                if key in said:
                    continue
                own = _same_key(ours, key) if isinstance(ours, dict) else None
                if own is None:
                    if _holds_numbers(value):
                        self.differs(f"{name}.{key}", "not compared: we compute nothing of that name")
                    continue
                self.trees(f"{name}.{key}", ours[own], value, said)
        elif isinstance(expected, list):
            if not isinstance(ours, (list, tuple)) or len(ours) != len(expected):
                found = len(ours) if isinstance(ours, (list, tuple)) else ours
                self.differs(name, f"not compared: {found} values, expected {len(expected)}")
                return
            for i, (one, other) in enumerate(zip(ours, expected, strict=True)):
                self.trees(f"{name}[{i}]", one, other, said)
        else:
            self.value(name, ours, expected)

    def maps(self, name: str, ours: np.ndarray, expected: np.ndarray) -> None:
        """Compares two maps, which must be equal."""
        self.others += 1
        if ours.shape != expected.shape or (ours != expected).any():
            self.differs(
                name, f"{int((ours != expected).sum()) if ours.shape == expected.shape else 'all'} pixels differ"
            )

    def holds(self, name: str, *, is_so: bool, otherwise: str) -> None:
        """Checks something that the fixture says in words."""
        self.others += 1
        if not is_so:
            self.differs(name, otherwise)

    def raises(self, name: str, function: Callable[[], Any]) -> None:
        """Checks that something is refused."""
        try:
            function()
        except DataError:
            self.others += 1
        else:
            self.differs(name, "expected an error, got none")

    def none_left(self, name: str, ours: Iterable[str], expected: Iterable[str]) -> None:
        """Reports what a part holds and nothing is expected of."""
        for each in sorted(set(ours) - set(expected)):
            self.differs(f"{name}.{each}", "not compared: nothing is expected of it")

    def known(self, folder: Path, names: set[str]) -> None:
        """Reports what a part holds beside the known files: data is a difference, the rest a note."""
        for path in sorted(folder.iterdir()):
            if path.name in names or path.name.startswith("."):
                continue
            if path.suffix in (".json", ".npz"):
                self.differs(path.name, "not compared: this script does not know the file")
            elif path.suffix not in (".md", ".txt"):
                self.notes.append(f"{path.name} is not known to this script and was not read")

    def report(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {
            "part": self.part,
            "numbers": self.number,
            "texts_and_maps": self.others,
            "worst_deviation": self.worst if math.isfinite(self.worst) else None,
            "differences": [f"{name}: {why}" if name else why for name, why in self.differences],
            "notes": self.notes,
        }


# ---- J and F on pairs of masks ----

_CASE_INPUTS = ("key", "name", "npz", "shape", "bound_th", "void", "boundary_maps", "note", "n", "format")


def jf_cases(folder: Path, found: Comparison) -> None:
    """Pairs of masks, statistics of vectors, radii; every array of every ``jf_cases*.npz`` must be used."""
    arrays = {path.name: dict(np.load(path)) for path in sorted(folder.glob("jf_cases*.npz"))}
    used: set[tuple[str, str]] = set()
    for path in sorted(folder.glob("jf_cases*.json")):
        fixture = _read(path)
        own_file = path.with_suffix(".npz").name
        ours = {
            "bound_pix_by_size": {
                size: boundary_radius(*map(int, size.split("x"))) for size in fixture.get("bound_pix_by_size", {})
            },
            "cases": [],
            "statistics": [],
        }
        for case in fixture.get("cases", []):
            file = case.get("npz", own_file)
            if file not in arrays:
                found.differs(f"{path.name}.{case['key']}", f"not compared: there is no {file}")
                ours["cases"].append({})
                continue
            ours["cases"].append(_case(case, arrays[file], found))
            used |= {(file, name) for name in arrays[file] if name.startswith(f"{case['key']}_")}
        for entry in fixture.get("statistics", []):
            file, name = entry.get("npz", own_file), f"{entry['key']}_values"
            ours["statistics"].append(_statistics(arrays[file][name]))
            used.add((file, name))
        found.trees(path.stem, ours, fixture, _CASE_INPUTS)
    for file, names in arrays.items():
        for name in sorted(set(names) - {name for in_file, name in used if in_file == file}):
            found.differs(f"{file}.{name}", "not compared: no case names this array")


def _case(case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], found: Comparison) -> dict[str, Any]:
    height, width = case["shape"]

    def mask(name: str) -> np.ndarray:
        bits = np.unpackbits(arrays[f"{case['key']}_{name}"])
        return bits[: height * width].reshape(height, width).astype(bool)

    threshold = case["bound_th"]
    radius = int(threshold) if threshold >= 1 else boundary_radius(height, width, threshold)
    void = mask("void") if case["void"] else None
    truth, answer = without_void(mask("gt"), mask("pred"), void)
    outlines = {"gt": outline(truth, radius), "pred": outline(answer, radius)}
    if case["boundary_maps"]:
        for name, one in outlines.items():
            found.maps(f"{case['key']}.{name}_boundary", one.boundary, mask(f"{name}_boundary"))
            found.maps(f"{case['key']}.{name}_dilated", one.near, mask(f"{name}_dilated"))
    counts = outlines["gt"].counts(outlines["pred"])
    return {
        "bound_pix": radius,
        "J": region_similarity(truth, answer),
        "F": counts.accuracy,
        "counts": {
            "inter": int((truth & answer).sum()),
            "union": int((truth | answer).sum()),
            "n_gt_boundary": counts.truth,
            "n_pred_boundary": counts.answer,
            "n_gt_match": counts.truth_matched,
            "n_pred_match": counts.answer_matched,
        },
    }


def _statistics(values: np.ndarray) -> dict[str, Any]:
    found = frame_statistics(values)
    edges = quarter_edges(len(values))
    return {
        "mean": found.mean,
        "recall": found.recall,
        "decay_without_overflow": found.decay,
        "decay": _public_decay(values, edges),
        "bin_edges": edges,
        "public_edges_uint8": [edge % 256 for edge in edges],
    }


def _public_decay(values: np.ndarray, edges: Sequence[int]) -> float:
    """Decay with the public code's edges of 8 bits, which overflow from 256 frames on."""
    small = [edge % 256 for edge in edges]
    parts = [values[small[k] : (small[k + 1] + 1) % 256] for k in (0, 3)]
    return float(parts[0].mean() - parts[1].mean()) if all(part.size for part in parts) else math.nan


# ---- MeViS ----

_MEVIS_SAID = (
    "exit_status", "stdout_lines", "worker_errors", "hung", "rule", "why", "edit", "good_implementation", "name",
)  # fmt: skip


def mevis(folder: Path, found: Comparison) -> None:
    """The base tree, read strictly, with missing masks as empty ones, and as the public code does; every variant."""
    root = folder / "mevis"
    found.known(root, {"valid_u", "valid", "pred", "expected.json"})
    expected = _read(root / "expected.json")
    strict = _score_mevis(root)
    lenient = _score_mevis(root, missing_as_empty=True)
    public = _public_mevis(root)
    of_strict, of_lenient = ({_flat(one): one for one in results} for results in (strict, lenient))
    expressions = {
        name: {
            "public": None if score is None else list(score),
            "J_per_frame": [frame.j for frame in of_strict[name].frames],
            "F_per_frame": [frame.f for frame in of_strict[name].frames],
            "if_missing_is_empty_mask": list(of_lenient[name].score),
        }
        for name, score in public.items()
    }
    found.none_left("expressions", expressions, expected.get("expressions", {}))
    for name, score in public.items():
        if score is not None:
            found.trees(f"expressions.{name}.strict", list(of_strict[name].score), list(score))
    found.trees(
        "mevis",
        {
            "public_run": _means(score for score in public.values() if score is not None),
            "recommended_strict": _means(one.score for one in strict),
            "missing_as_empty_masks": _means(one.score for one in lenient),
            "expressions": expressions,
            "variants": [_variant(root, variant, public, strict, found) for variant in expected["variants"]],
        },
        expected,
        _MEVIS_SAID,
    )
    if (root / "valid").is_dir():
        found.raises("valid", lambda: read_truth("mevis", root, "valid"))


def _score_mevis(root: Path, *, missing_as_empty: bool = False) -> list[ExpressionResult]:
    return score_expressions(
        read_truth("mevis", root, "valid_u"), PngTree.of(root / "pred"), missing_as_empty=missing_as_empty, workers=1
    )


def _public_mevis(root: Path) -> dict[str, Score | None]:
    """What the public program gives every expression, with its mistakes; None: its worker dies and the expression is left out.

    It takes the size from the prediction of frame 00000, adds up masks of 8 bits, gives 0 to expressions of a video without a
    folder, and dies of anything else that is missing.
    """
    meta = json.loads((root / "valid_u" / META_FILE).read_text(encoding="utf-8"))["videos"]
    masks = json.loads((root / "valid_u" / "mask_dict.json").read_text(encoding="utf-8"))
    scores: dict[str, Score | None] = {}
    for video, entry in meta.items():
        for expression, about in entry["expressions"].items():
            name = f"{video}_{expression}"
            if not (root / "pred" / video).is_dir():
                scores[name] = Score(0.0, 0.0)
                continue
            try:
                scores[name] = _public_expression(root / "pred" / video / expression, entry["frames"], about, masks)
            except (DataError, KeyError, IndexError, ValueError):
                scores[name] = None
    return scores


def _public_expression(
    folder: Path, frames: Sequence[str], about: Mapping[str, Any], masks: Mapping[str, Any]
) -> Score:
    size = read_mask(folder / "00000.png").shape
    scores: list[Score] = []
    for position, frame in enumerate(frames):
        truth = np.zeros(size, dtype=np.uint8)
        for annotation in about["anno_id"]:
            rle = masks[str(annotation)][position]
            if rle:
                truth += coco_mask.decode(rle)
        scores.append(frame_score(truth > 0, read_mask(folder / f"{frame}.png")))
    return mean_score(scores)


def _variant(
    base: Path,
    variant: Mapping[str, Any],
    public: Mapping[str, Score | None],
    strict: Sequence[ExpressionResult],
    found: Comparison,
) -> dict[str, Any]:
    """Edits a copy of the tree; returns what the public code makes of it, and checks that ours does what it should."""
    name = variant["name"]
    if name not in _EDITS:
        found.differs(f"variants.{name}", "not compared: this script does not know the edit")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "mevis"
        shutil.copytree(base, root, copy_function=shutil.copyfile)
        _EDITS[name](root)
        after = _public_mevis(root)
        _check_ours(root, variant, after, strict, found)
    scored = {key: score for key, score in after.items() if score is not None}
    return {
        "n_scored": len(scored),
        "dropped": sorted(key for key in public if public[key] is not None and after[key] is None),
        "changed": {k: list(s) for k, s in scored.items() if public[k] is not None and s != public[k]},
        **_means(scored.values()),
    }


def _check_ours(
    root: Path,
    variant: Mapping[str, Any],
    after: Mapping[str, Score | None],
    strict: Sequence[ExpressionResult],
    found: Comparison,
) -> None:
    name, said = variant["name"], variant["good_implementation"]
    where = f"variants.{name}.ours"
    if said.startswith("error"):
        found.raises(where, lambda: _score_mevis(root))
        if numbers := re.search(r"becomes J (\S+) F (\S+)", said):
            changed = variant["dropped"][0]
            ours = {_flat(one): one.score for one in _score_mevis(root, missing_as_empty=True)}[changed]
            found.trees(f"{where}.missing_as_empty", list(ours), [float(number) for number in numbers.groups()])
        return
    ours = {_flat(one): one.score for one in _score_mevis(root)}
    if name == "frames_reversed":  # the only edit that changes what is right
        for key, score in after.items():
            if score is not None:
                found.trees(f"{where}.{key}", list(ours[key]), list(score))
        return
    for one in strict:
        found.trees(f"{where}.{_flat(one)}", list(ours[_flat(one)]), list(one.score))


def _edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    edit(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


def _edit_meta(edit: Callable[[Any], None]) -> Callable[[Path], None]:
    return lambda root: _edit_json(root / "valid_u" / META_FILE, lambda tree: edit(tree["videos"]))


def _remove_annotations(videos: Any) -> None:
    for entry in videos.values():
        for about in entry["expressions"].values():
            about.pop("anno_id", None)


def _converted(names: str, convert: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        for path in sorted((root / "pred").glob(names)):
            with Image.open(path) as image:
                converted = convert(image)
            converted.save(path)

    return edit


def _shrunk(image: Image.Image) -> Image.Image:
    return image.resize((32, 24), Image.Resampling.NEAREST)


def _start_later(root: Path) -> None:
    _edit_meta(lambda videos: videos["0f1e2d3c4b5a"]["frames"].__setitem__(0, "00001"))(root)
    for path in (root / "pred" / "0f1e2d3c4b5a").glob("*/00000.png"):
        path.rename(path.with_name("00001.png"))


_EDITS: dict[str, Callable[[Path], Any]] = {
    "frame_missing": lambda root: (root / "pred/a1b2c3d4e5f6/0/00002.png").unlink(),
    "first_frame_missing": lambda root: (root / "pred/a1b2c3d4e5f6/0/00000.png").unlink(),
    "wrong_size_with_target": _converted("a1b2c3d4e5f6/0/*.png", _shrunk),
    "wrong_size_no_target": _converted("a1b2c3d4e5f6/4/*.png", _shrunk),
    "wrong_size_one_later_frame": _converted("a1b2c3d4e5f6/0/00003.png", _shrunk),
    "rgb_png": _converted("a1b2c3d4e5f6/0/*.png", lambda image: image.convert("RGB")),
    "anno_id_absent": _edit_meta(_remove_annotations),
    "rle_list_short": lambda root: _edit_json(root / "valid_u/mask_dict.json", lambda masks: masks["0"].pop()),
    "video_not_starting_at_00000": _start_later,
    "empty_video_folder": lambda root: (root / "pred/123456789abc").mkdir(),
    "frames_reversed": _edit_meta(lambda videos: videos["a1b2c3d4e5f6"]["frames"].reverse()),
    "anno_id_repeated_256": _edit_meta(
        lambda videos: videos["a1b2c3d4e5f6"]["expressions"]["0"].update(anno_id=[0] * 256)
    ),
}


# ---- Ref-YouTube-VOS ----


def ref_ytvos(folder: Path, found: Comparison) -> None:
    """Both splits under three rules, and which videos are those of valid."""
    root = folder / "ref_ytvos"
    found.known(
        root,
        {
            "meta_expressions",
            "train",
            "valid",
            "test",
            "valid_gt",
            "pred_train",
            "pred_valid",
            "counts",
            "expected.json",
        },
    )
    expected = _read(root / "expected.json")
    found.none_left("sets", (path.name.removeprefix("pred_") for path in root.glob("pred_*")), expected["sets"])
    sets: dict[str, Any] = {}
    number = str(len(_splits(root / "meta_expressions")[2]))
    for split in expected["sets"]:
        videos = read_truth("ref-ytvos", root, split, mapping={"valid_videos": number})
        results = score_expressions(videos, PngTree.of(root / f"pred_{split}"), workers=1)
        rows = expression_numbers(results)
        names = dict(zip(("all_frames", "only_meta_frames", "from_first_appearance"), rows.values(), strict=True))
        sets[split] = {"n_videos": len(videos), "n_expressions": len(results), **names}
        labels = {f"{v.name}/{e}": of_frames[0][0].label for v in videos for e, of_frames in v.referents.items()}
        sets[split]["expressions"] = {one.name: _ytvos_expression(one, labels[one.name]) for one in results}
        found.none_left(f"sets.{split}.expressions", labels, expected["sets"][split].get("expressions", {}))
    some, many = (_splits(root / name) for name in ("meta_expressions", "counts/meta_expressions"))
    found.trees(
        "ref_ytvos",
        {
            "sets": sets,
            "split": {"valid_json": some[0], "test_json": some[1], "valid_after_subtraction": some[2]},
            "counts": {
                "valid_json": len(many[0]),
                "test_json": len(many[1]),
                "after_subtraction": len(many[2]),
                "first_3_sorted": many[2][:3],
                "last_sorted": many[2][-1],
            },
        },
        expected,
    )


_VALID_AND_TEST = 507  # videos in the JSON of the real valid


def _splits(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """The videos in the JSONs of valid and test, and those of valid alone."""
    valid, test = (sorted(read_videos(folder / split / META_FILE)) for split in ("valid", "test"))
    number = len(set(valid) - set(test))
    # the real number is the reader's default, so the made-up ids of counts/ are read without naming it
    mapping = {} if len(valid) == _VALID_AND_TEST else {"valid_videos": str(number)}
    options = PrepareOptions("ref-ytvos", str(folder.parent), Path("out"), splits=("valid",), mapping=mapping)
    return valid, test, [video.name for video in RefYtvosReader(options).videos["valid"] if isinstance(video, Video)]


def _ytvos_expression(one: ExpressionResult, label: int) -> dict[str, Any]:
    def part(positions: Sequence[int]) -> dict[str, Any]:
        score = mean_score(one.frames[position] for position in positions)
        return {"n": len(positions), "J": score.j, "F": score.f}

    own = one.own_frames or ()
    return {
        "obj_id": label,
        "J": one.score.j,
        "F": one.score.f,
        "J_per_frame": [frame.j for frame in one.frames],
        "F_per_frame": [frame.f for frame in one.frames],
        "only_meta_frames": part(own),
        "from_first_appearance": part(range(min(own), len(one.frames))),
    }


# ---- Ref-DAVIS17 ----


def ref_davis(folder: Path, found: Comparison) -> None:
    """Protocols A and B from the scores, and from the PNGs that the public code wrote of them."""
    root = folder / "ref_davis"
    found.known(
        root,
        {
            "davis_text_annotations", "meta_expressions", "DAVIS", "valid", "scores.npz", "pred_A", "pred_B", "expected.json",
        },
    )  # fmt: skip
    expected = _read(root / "expected.json")
    with np.load(root / "scores.npz") as stored:
        scores = {tuple(name.split("__anno_")): stored[name] for name in stored}
    sequences = read_davis(root / "DAVIS", unsupervised=True)
    ours: dict[str, Any] = {"protocol_A": {}, "protocol_B": {}}
    for letter in "AB":
        if (pngs := root / f"pred_{letter}").is_dir():
            found.none_left(pngs.name, (path.name for path in pngs.iterdir()), expected[f"protocol_{letter}"])
    for name in expected["protocol_A"]:
        asked = {key: _edited(value, name, key[0], expected) for key, value in scores.items()}
        ours["protocol_A"][name] = _protocol_a(root / "pred_A" / name, sequences, asked, found)
    for name in expected["protocol_B"]:
        asked = {key: _edited(value, name, key[0], expected) for key, value in scores.items()}
        ours["protocol_B"][name] = _protocol_b(root, name, asked, found)
        if name == "normal":
            ours["protocol_B_wrong_if_ids_sorted_numerically"] = _numerically_sorted(root, asked)
    converted = _read(root / "meta_expressions" / "valid" / META_FILE)["videos"]
    for video in read_truth("ref-davis", root, "val"):
        entries = converted[video.name]["expressions"]
        found.trees(f"texts.{video.name}", dict(video.phrases), {e: entry["exp"] for e, entry in entries.items()})
        found.trees(f"frames.{video.name}", list(video.frames), converted[video.name]["frames"])
    found.trees("ref_davis", ours, expected, ("order", "swap_permutation", "sets", "proposal_unique"))


def _edited(scores: np.ndarray, name: str, video: str, expected: Mapping[str, Any]) -> np.ndarray:
    """The scores (objects, T, H, W) of a set."""
    if name == "swapped":
        return scores[expected["swap_permutation"][video]]
    return np.floor(scores * 4) / 4 if name == "ties" else scores


def _protocol_a(
    pngs: Path, sequences: Sequence[DavisSequence], scores: Mapping[Any, np.ndarray], found: Comparison
) -> dict[str, Any]:
    annotators: dict[str, Any] = {}
    for k in range(ANNOTATORS):
        scored: dict[str, SequenceScore] = {}
        for sequence in sequences:
            of_video = scores[sequence.name, str(k)]
            fused = [fuse_expressions(of_video[:, t]) for t in range(of_video.shape[1])]
            for frame, labels in zip(sequence.frames, fused, strict=True):
                png = pngs / f"anno_{k}" / sequence.name / f"{frame}.png"
                found.maps(f"{pngs.name}.anno_{k}.{sequence.name}.{frame}", labels, read_labels(png))
            scored[sequence.name] = unsupervised(sequence.labels(), fused)
        annotators[f"anno_{k}"] = _scores_of(davis_numbers(scored.values()).score) | {
            "objects": {
                f"{name}/{label}": entry for name, one in scored.items() for label, entry in _objects(name, one).items()
            }
        }
    means = mean_score(Score(entry["J"], entry["F"]) for entry in annotators.values())
    return {"mean_of_4": _scores_of(means), "annotators": annotators}


def _protocol_b(root: Path, name: str, scores: Mapping[Any, np.ndarray], found: Comparison) -> dict[str, Any]:
    videos = read_truth("ref-davis", root, "val")
    keys = _mask_keys(videos, sorted)
    by_rle = {video.name: video for video in _from_mask_dict(root, videos, keys)}
    pngs = root / "pred_B" / name
    frames: dict[tuple[str, str], list[Score]] = {}
    for video in videos:
        for t, frame in enumerate(video.frames):
            truths, same = video.masks(t), by_rle[video.name].masks(t)
            for expression, truth in truths.items():
                answer = _answer_b(scores, video.name, expression, t)
                found.maps(f"mask_dict.{video.name}.{expression}.{frame}", same[expression], truth)
                if pngs.is_dir():
                    read = read_mask(pngs / video.name / expression / f"{frame}.png", video.size)
                    found.maps(f"{name}.{video.name}.{expression}.{frame}", answer, read)
                frames.setdefault((video.name, expression), []).append(frame_score(truth, answer))
    total, of_expression = expression_scores(frames)
    if pngs.is_dir():
        from_pngs = mean_score(one.score for one in score_expressions(videos, PngTree.of(pngs), workers=1))
        found.trees(f"protocol_B.{name}.from_png", list(from_pngs), list(total))
    return _scores_of(total) | {
        "expressions": {
            f"{video}/{expression}": _scores_of(score) | {"mask_dict_key": keys[video, expression]}
            for (video, expression), score in of_expression.items()
        }
    }


def _answer_b(scores: Mapping[Any, np.ndarray], video: str, expression: str, t: int) -> np.ndarray:
    which, annotator = object_and_annotator(expression)
    return scores[video, str(annotator)][which, t] > 0.5


def _mask_keys(
    videos: Sequence[TruthVideo], ordered: Callable[[Iterable[str]], list[str]]
) -> dict[tuple[str, str], str]:
    """The key of every (video, expression) in ``mask_dict.json``: a running number over sorted videos and ordered ids."""
    by_name = {video.name: video for video in videos}
    pairs = [(name, expression) for name in sorted(by_name) for expression in ordered(by_name[name].phrases)]
    return {pair: str(number) for number, pair in enumerate(pairs)}


def _from_mask_dict(root: Path, videos: Sequence[TruthVideo], keys: Mapping[tuple[str, str], str]) -> list[TruthVideo]:
    masks = _read(root / "valid" / "mask_dict.json")
    return [
        replace(
            video,
            referents={
                expression: [[] if rle is None else [rle] for rle in masks[keys[video.name, expression]]]
                for expression in video.phrases
            },
        )
        for video in videos
    ]


def _numerically_sorted(root: Path, scores: Mapping[Any, np.ndarray]) -> dict[str, float]:
    """What comes out if the expression ids are sorted as numbers when masks are looked up."""
    videos = read_truth("ref-davis", root, "val")
    keys = _mask_keys(videos, lambda ids: sorted(ids, key=int))
    frames: dict[tuple[str, str], list[Score]] = {}
    for video in _from_mask_dict(root, videos, keys):
        for t in range(len(video.frames)):
            for expression, truth in video.masks(t).items():
                score = frame_score(truth, _answer_b(scores, video.name, expression, t))
                frames.setdefault((video.name, expression), []).append(score)
    return _scores_of(expression_scores(frames)[0])


# ---- DAVIS ----


def davis(folder: Path, found: Comparison) -> None:
    """Both tasks: the seven numbers, every object, every frame, the matrix of the assignment."""
    root = folder / "davis"
    found.known(
        root,
        {
            "Annotations",
            "Annotations_unsupervised",
            "ImageSets",
            "JPEGImages",
            "pred_semi",
            "pred_unsup",
            "expected.json",
        },
    )
    for task, expected in _read(root / "expected.json").items():
        if not isinstance(expected, dict) or "sequences" not in expected:
            if _holds_numbers(expected):
                found.differs(task, "not compared: no task with sequences")
            continue
        is_unsupervised = task.lower().startswith("un")
        scored = score_davis(
            read_davis(root, unsupervised=is_unsupervised),
            root / ("pred_unsup" if is_unsupervised else "pred_semi"),
            is_unsupervised=is_unsupervised,
            workers=1,
        )
        for name in sorted(set(scored) - set(expected["sequences"])):
            found.differs(f"{task}.{name}", "the sequence is listed in ImageSets, but nothing is expected of it")
        numbers = davis_columns(davis_numbers(scored.values()))
        totals: Any = numbers
        if isinstance(expected.get("global"), list):
            totals = list(numbers.values())
        else:
            totals = numbers | {"JF": numbers["J&F-Mean"], "J&F": numbers["J&F-Mean"], "JF-Mean": numbers["J&F-Mean"]}
            for metric in "JF":
                own = {
                    key.split("-")[1].lower(): value for key, value in numbers.items() if key.startswith(f"{metric}-")
                }
                totals[metric] = own if isinstance(expected["global"].get(metric), dict) else own["mean"]
        ours = {"global": totals, "sequences": {}}
        for name, wanted in expected["sequences"].items():
            if name not in scored:
                found.differs(f"{task}.sequences.{name}", "not compared: not in ImageSets/2017/val.txt")
                continue
            ours["sequences"][name] = _davis_sequence(root, name, scored[name], wanted, is_unsupervised=is_unsupervised)
        found.trees(task, ours, expected, ("proposal_unique", "note"))


def _davis_sequence(
    root: Path, name: str, scored: SequenceScore, wanted: Mapping[str, Any], *, is_unsupervised: bool
) -> dict[str, Any]:
    """Our numbers of a sequence in the form that is wanted: objects as a list or by label, frames as a number or by name."""
    entries = _objects(name, scored)
    objects = wanted["objects"]
    given = objects.values() if isinstance(objects, dict) else objects
    labels = [entry.get("gt_object", i + 1) for i, entry in enumerate(given)]
    chosen = [entries.get(str(label), {}) for label in labels]
    for entry, other in zip(chosen, given, strict=True):
        if other.get("proposal_unique") is False or (not is_unsupervised and other.get("proposal") is None):
            # Of equally good proposals, any may be chosen.
            entry |= {key: other[key] for key in ("proposal", "public_name") if key in other}
    matching = None if scored.matching is None else scored.matching.tolist()
    rows = wanted.get("matching_matrix_JF_proposal_by_object")
    if matching is not None and isinstance(rows, list) and len(rows) == scored.num_answers:
        matching = matching[: scored.num_answers]  # without the empty masks that stand for missing proposals
    frames: Any = scored.num_frames
    if isinstance(wanted.get("frames_scored"), list):
        names = DavisSequence(name, _davis_annotations(root, is_unsupervised=is_unsupervised) / name).frames
        frames = list(names if is_unsupervised else names[1:-1])
    found: dict[str, Any] = {
        "frames_scored": frames,
        "n_gt_objects": len(scored.objects),
        "n_pred_objects": scored.num_answers,
        "objects": dict(zip(objects, chosen, strict=True)) if isinstance(objects, dict) else chosen,
    }
    if matching is not None or rows is None:
        found["matching_matrix_JF_proposal_by_object"] = matching
    return found


def _davis_annotations(root: Path, *, is_unsupervised: bool) -> Path:
    return root / ("Annotations_unsupervised" if is_unsupervised else "Annotations") / "480p"


# ---- shared ----


def _objects(name: str, scored: SequenceScore) -> dict[str, dict[str, Any]]:
    """Label -> numbers of the objects; ``public_name`` numbers the chosen proposals in their order, as the public table does."""
    order = sorted(each.answer_label for each in scored.objects)
    return {
        str(each.label): {
            "gt_object": each.label,
            "proposal": each.answer_label,
            "public_name": f"{name}_{order.index(each.answer_label) + 1}",
            "J": frame_statistics(each.j)._asdict(),
            "F": frame_statistics(each.f)._asdict(),
            "J_per_frame": each.j.tolist(),
            "F_per_frame": each.f.tolist(),
        }
        for each in scored.objects
    }


def _scores_of(score: Score) -> dict[str, float]:
    return {"J": score.j, "F": score.f, "JF": score.jf, "J&F": score.jf}


def _means(scores: Iterable[Score]) -> dict[str, Any]:
    listed = list(scores)
    return {"n_expressions": len(listed), **_scores_of(mean_score(listed))}


def _flat(one: ExpressionResult) -> str:
    return f"{one.video}_{one.expression}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _same_key(ours: Mapping[str, Any], key: str) -> str | None:
    """Our key of the same letters."""
    if key in ours:
        return key
    plain = re.sub(r"[^a-z0-9]", "", key.lower())
    return next((own for own in ours if re.sub(r"[^a-z0-9]", "", own.lower()) == plain), None)


def _holds_numbers(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(map(_holds_numbers, tree.values()))
    if isinstance(tree, list):
        return any(map(_holds_numbers, tree))
    return not isinstance(tree, (str, bool))
