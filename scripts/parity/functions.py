"""Pure functions against what the public DeRIS code computed: metrics, similarity and conversion, text, preprocessing.

The fixtures (`parity/RECIPE.md` section 5) are data that the public code made. Each check reads one of them and compares
everything in it; an entry that no comparison covers is an error, so a fixture cannot grow unnoticed.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deris_llm.data.masks import decode_segmentation
from deris_llm.data.phrase_conversion import multiset_cosine, multiset_jaccard, phrase_similarity
from deris_llm.evaluation.boxes import boxes_f1, iou_and_union
from deris_llm.evaluation.metrics import PRECISION_LEVELS, Outcome, metric_ratios, overlap, percents
from deris_llm.models.cognition.beit3 import clean_phrase
from deris_llm.models.preprocess import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB, normalised, warp_mask, warp_picture
from scripts.parity.upstream_conversion import UpstreamSettings, upstream_conversion

RIS_TOLERANCE = 1e-5  # percent points; upstream sums in float32, measured worst 4.6e-6
GRES_TOLERANCE = 1e-9  # percent points; float64 on both sides, measured worst 7.1e-15
PIXEL_TOLERANCE = 5e-7  # of normalised values up to 2.6; measured worst 2.4e-7, one step of float32
_NO_DIVISION = "ZeroDivisionError: division by zero"
_TRACE_SEED = 4321


class ParityRow(NamedTuple):
    """One comparison."""

    name: str
    deviation: float  # greatest absolute difference, or number of differences for texts and masks
    tolerance: float

    @property
    def is_equal(self) -> bool:
        return self.deviation <= self.tolerance


def check_metrics(folder: str | Path) -> list[ParityRow]:
    """RIS, GRES and GREC metrics against ``metrics.json``.

    Where the public code has nothing to take a number of it stops (`ZeroDivisionError`) or reports 0, and it reports
    T-acc as 0 in GRES when no phrase is without a target; ours is None there, and T-acc does not depend on other
    phrases. Those entries are compared with what upstream says of the same phrases elsewhere (GREC's T-acc), or with 0
    for None.
    """
    fixture = _read_json(folder, "metrics.json")
    _expect_keys(
        "metrics.json",
        fixture,
        {"notes", "gres_samples", "gres_cases", "ris_samples", "ris_cases", "ris_per_sample"},
    )
    rows: list[ParityRow] = []
    for name, of_masks in (("gres", fixture["gres_samples"]), ("ris", fixture["ris_samples"])):
        rows.append(
            _row(f"{name}_samples.area", (_areas(sample) for sample in of_masks), (_known(s) for s in of_masks), 0)
        )
    choose: dict[str, Callable[[dict[str, Any]], bool]] = {
        "only_targets": lambda sample: not sample["empty"],
        "only_empty": lambda sample: sample["empty"],
    }
    for case, expected in fixture["gres_cases"].items():
        samples = [s for s in fixture["gres_samples"] if choose.get(case, lambda _: True)(s)]
        rows += _gres_rows(case, samples[:5] if case == "first5" else samples, expected)
    for case, expected in fixture["ris_cases"].items():
        count = {"all": len(fixture["ris_samples"]), "first6": 6}[case]
        rows += _ris_rows(f"ris.{case}", fixture["ris_samples"][:count], expected)
    for i, expected in enumerate(fixture["ris_per_sample"]):
        rows += _ris_rows(f"ris.sample{i}", fixture["ris_samples"][i : i + 1], expected)
    return rows


def check_similarity(folder: str | Path) -> list[ParityRow]:
    """Similarity of pairs and the traces of the conversion (``nsc_similarity.json``), cleaned text (``clean_string.json``)."""
    fixture = _read_json(folder, "nsc_similarity.json")
    _expect_keys("nsc_similarity.json", fixture, {"textdistance", "pairs", "train_dict", "annotations", "traces"})
    pairs = fixture["pairs"]
    for pair in pairs:
        _expect_keys("nsc_similarity.json pairs", pair, {"a", "b", "similarity", "jaccard", "cosine"})
    rows = [
        _row("pairs.similarity", (_similar(p) for p in pairs), (p["similarity"] for p in pairs), 1e-12),
        _row("pairs.jaccard", (_part(multiset_jaccard, p) for p in pairs), (p["jaccard"] for p in pairs), 1e-12),
        _row("pairs.cosine", (_part(multiset_cosine, p) for p in pairs), (p["cosine"] for p in pairs), 1e-12),
    ]
    pool = [[each["raw"] for each in entry["expressions"]] for entry in fixture["train_dict"].values()]
    for trace in fixture["traces"]:
        rows += _trace_rows(trace, fixture["annotations"], pool)
    texts = _read_json(folder, "clean_string.json")
    for text in texts:
        _expect_keys("clean_string.json", text, {"raw", "cleaned"})
    wrong = sum(clean_phrase(text["raw"]) != text["cleaned"] for text in texts)
    return [*rows, ParityRow("clean_string", float(wrong), 0)]


def check_preprocess(folder: str | Path) -> list[ParityRow]:
    """Warped and normalised pictures, masks and boxes against ``preproc.npz``."""
    path = Path(folder) / "preproc.npz"
    with np.load(path) as file:
        fixture = {name: file[name] for name in file.files}
    rows: list[ParityRow] = []
    covered: set[str] = set()

    def compare(name: str, ours: np.ndarray, tolerance: float) -> None:
        expected = fixture[name]
        assert ours.shape == expected.shape, f"{path}, {name}: expected shape {expected.shape}, got {ours.shape}"
        covered.add(name)
        rows.append(ParityRow(name, float(np.abs(ours.astype(np.float64) - expected).max()), tolerance))

    for name in sorted(each.removesuffix("_bgr") for each in fixture if each.count("_") == 1 and each.endswith("_bgr")):
        picture = fixture[f"{name}_bgr"]
        covered.add(f"{name}_bgr")
        height, width = picture.shape[:2]
        image = Image.fromarray(np.ascontiguousarray(picture[..., ::-1]))
        large, small = (warp_picture(image, size, "opencv") for size in (384, 224))
        compare(f"{name}_resized384_u8_bgr", large[3::9, 4::9, ::-1], 0)
        compare(f"{name}_resized224_u8_bgr", small[1::6, 2::6, ::-1], 0)
        pixels, mini = (normalised(each, IMAGENET_MEAN_RGB, IMAGENET_STD_RGB).numpy() for each in (large, small))
        compare(f"{name}_img_chw", pixels[:, 3::9, 4::9], PIXEL_TOLERANCE)
        compare(f"{name}_img_mini_chw", mini[:, 1::6, 2::6], PIXEL_TOLERANCE)
        whole = [large.mean(), small.mean()]
        for each in (pixels, mini):
            whole += [each.mean(dtype=np.float64), each.std(dtype=np.float64)]
        compare(f"{name}_stats", np.array(whole), PIXEL_TOLERANCE)
        for mask in ("mask", "part"):
            before = np.unpackbits(fixture[f"{name}_{mask}"], axis=-1, count=width).astype(bool)
            covered.add(f"{name}_{mask}")
            compare(f"{name}_{mask}384", np.packbits(warp_mask(before, 384, "opencv"), axis=-1), 0)
        scale = np.array([384 / width, 384 / height] * 2, dtype=np.float32)
        compare(f"{name}_scale_factor", scale, 0)
        covered.add(f"{name}_box_in")
        compare(f"{name}_box_out", fixture[f"{name}_box_in"] * scale, 1e-9)
    _expect_keys(str(path), fixture, covered)
    return rows


# -- metrics ---------------------------------------------------------------------------------------------------------


def _gres_rows(case: str, samples: Sequence[dict[str, Any]], expected: Mapping[str, Any]) -> list[ParityRow]:
    _expect_keys(f"metrics.json gres_cases.{case}", expected, {"threshold", "gres", "grec"})
    outcomes, of_boxes = [], []
    for sample in samples:
        passes = np.array(sample["scores"]) > expected["threshold"]
        boxes, truth = np.array(sample["boxes"])[passes], np.array(sample["gt_boxes"]).reshape(-1, 4)
        pixels = overlap(*_masks(sample))
        outcomes.append(Outcome(pixels, has_target=not sample["empty"], says_target=bool(passes.any())))
        is_right = boxes_f1(boxes, truth) == 1
        of_boxes.append(Outcome(pixels, has_target=len(truth) > 0, says_target=len(boxes) > 0, boxes_match=is_right))
    gres, grec = (percents(metric_ratios(found, is_generalised=True)) for found in (outcomes, of_boxes))
    precision = [value for name, value in gres.items() if name.startswith("Pr@")]
    rows = _named_rows(
        f"grec.{case}",
        {"F1score": grec["F1"], "N_acc": grec["N-acc"], "T_acc": grec["T-acc"]},
        expected["grec"],
        GRES_TOLERANCE,
    )
    if expected["gres"] == {"error": _NO_DIVISION}:
        undefined = [gres["T-acc"], *precision]
        return [*rows, ParityRow(f"gres.{case}.undefined", float(sum(each is not None for each in undefined)), 0)]
    of_targets = dict(expected["gres"])
    if all(outcome.has_target for outcome in outcomes):  # upstream reports 0 here, whatever was answered
        assert of_targets["T_acc"] == 0, f"metrics.json gres_cases.{case}: expected upstream's T_acc 0"
        of_targets["T_acc"] = expected["grec"]["T_acc"]
    ours = {
        "gIoU": gres["gIoU"],
        "cIoU": gres["cIoU"],
        "T_acc": gres["T-acc"],
        "N_acc": gres["N-acc"],
        "Pr": precision,
    }
    return rows + _named_rows(f"gres.{case}", ours, of_targets, GRES_TOLERANCE)


def _ris_rows(case: str, samples: Sequence[dict[str, Any]], expected: Mapping[str, Any]) -> list[ParityRow]:
    found = percents(metric_ratios([Outcome(overlap(*_masks(sample))) for sample in samples], is_generalised=False))
    accuracy = detection_accuracy(
        [top_box_iou(np.array(s["boxes"]), np.array(s["scores"]), np.array(s["gt_boxes"][0])) for s in samples]
    )
    ours = {
        "DetACC": accuracy[0.5],
        "mIoU": found["mIoU"],
        "oIoU": found["oIoU"],
        "MaskACC": [value for name, value in found.items() if name.startswith("Pr@")],
        "DetACCs": list(accuracy.values()),
    }
    return _named_rows(case, ours, expected, RIS_TOLERANCE)


def top_box_iou(boxes_xyxy_px: np.ndarray, scores: np.ndarray, truth_xyxy_px: np.ndarray) -> float:
    """Returns the IoU of the best-scoring box with the one true box, which detection accuracy (REC) is taken of.

    Args:
        boxes_xyxy_px: float (Q, 4).
        scores: float (Q,).
        truth_xyxy_px: float (4,).
    """
    return float(iou_and_union(boxes_xyxy_px[[int(np.argmax(scores))]], truth_xyxy_px[None])[0][0, 0])


def detection_accuracy(top_box_ious: Sequence[float]) -> dict[float, float]:
    """Returns the percentage of phrases whose best-scoring box reaches each of `PRECISION_LEVELS`; 0.5 is the usual DetACC."""
    iou = np.array(top_box_ious)
    return {level: 100 * float((iou >= level).mean()) if len(iou) else float("nan") for level in PRECISION_LEVELS}


def _named_rows(case: str, ours: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> list[ParityRow]:
    _expect_keys(f"metrics.json {case}", expected, set(ours))
    return [_row(f"{case}.{name}", [_zero_for_none(ours[name])], [expected[name]], tolerance) for name in ours]


def _zero_for_none(value: Any) -> Any:
    return [each or 0.0 for each in value] if isinstance(value, list) else value or 0.0


def _masks(sample: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth."""
    rles = (sample["pred_mask"], sample["gt_mask"])
    prediction, truth = (decode_segmentation(rle, *rle["size"]) for rle in rles)
    return prediction, truth


def _areas(sample: Mapping[str, Any]) -> list[int]:
    _expect_keys(
        "metrics.json sample",
        sample,
        {"kind", "scores", "boxes", "pred_mask", "pred_area", "gt_mask", "gt_area", "gt_boxes", "empty"},
    )
    return [int(mask.sum()) for mask in _masks(sample)]


def _known(sample: Mapping[str, Any]) -> list[int]:
    return [sample["pred_area"], sample["gt_area"]]


# -- similarity and conversion ---------------------------------------------------------------------------------------


def _similar(pair: Mapping[str, str]) -> float:
    return phrase_similarity(pair["a"], pair["b"], mode="characters")


def _part(measure: Callable[[Counter[str], Counter[str]], float], pair: Mapping[str, str]) -> float:
    if not pair["a"] or not pair["b"]:
        return _similar(pair)
    return measure(Counter(pair["a"]), Counter(pair["b"]))


def _trace_rows(
    trace: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], pool: Sequence[Sequence[str]]
) -> list[ParityRow]:
    _expect_keys("nsc_similarity.json trace", trace, {"tag", "settings", "seed", "samples", "rng_after"})
    _expect_keys("nsc_similarity.json settings", trace["settings"], {"sim", "thr", "rate", "minlen"})
    settings = UpstreamSettings(
        rate=trace["settings"]["rate"],
        similarity_threshold=trace["settings"]["thr"],
        min_words=trace["settings"]["minlen"],
        uses_similarity=trace["settings"]["sim"],
    )
    source = random.Random(_TRACE_SEED)
    differ: Counter[str] = Counter()
    for annotation, expected in zip(annotations, trace["samples"], strict=True):
        ours = _converted_sample(annotation, pool, settings, source) | {"i": expected["i"]}
        _expect_keys(f"nsc_similarity.json trace {trace['tag']}", expected, set(ours))
        differ.update({name: ours[name] != expected[name] for name in ours})
    rows = [ParityRow(f"trace.{trace['tag']}.{name}", float(count), 0) for name, count in differ.items() if name != "i"]
    return [*rows, ParityRow(f"trace.{trace['tag']}.rng_after", abs(source.random() - trace["rng_after"]), 0)]


def _converted_sample(
    annotation: Mapping[str, Any], pool: Sequence[Sequence[str]], settings: UpstreamSettings, source: random.Random
) -> dict[str, Any]:
    """What upstream's loading code says of a sample, made with our own readers of boxes, masks and text."""
    before, instances = annotation["expressions"]["raw"], annotation["annotations"]
    was_empty = instances[0]["empty"]
    swapped = upstream_conversion(before, pool, settings, source, has_target=not was_empty)
    targets = [] if was_empty or swapped is not None else instances
    text = clean_phrase(before if swapped is None else swapped)
    masks = [decode_segmentation(t["segmentation"], annotation["height"], annotation["width"]) for t in targets]
    return {
        "before": before,
        "was_empty": was_empty,
        "expression": text,
        "converted": swapped is not None,
        "empty": not targets,
        "refer_target_index": list(range(len(targets))),
        "n_boxes": len(targets),
        "boxes": [[x, y, x + w, y + h] for x, y, w, h in (t["bbox"] for t in targets)],
        "n_parts": len(masks),
        "union_area": int(np.logical_or.reduce(masks).sum()) if masks else 0,
        "n_tokens": len(text.split()) + 2,  # the fixture's tokenizer takes words, between begin and end
    }


# -- reading ---------------------------------------------------------------------------------------------------------


def _read_json(folder: str | Path, name: str) -> Any:
    return json.loads((Path(folder) / name).read_text(encoding="utf-8"))


def _expect_keys(where: str, found: Mapping[str, Any] | Iterable[str], expected: set[str]) -> None:
    if set(found) != expected:
        raise ValueError(
            f"{where}: expected {', '.join(sorted(expected))}, got {', '.join(sorted(set(found)))}: every entry of a "
            "fixture is compared, so add a comparison for what is new"
        )


def _row(name: str, ours: Iterable[Any], expected: Iterable[Any], tolerance: float) -> ParityRow:
    difference = np.array(list(ours), dtype=np.float64) - np.array(list(expected), dtype=np.float64)
    return ParityRow(name, float(np.abs(difference).max()), tolerance)
