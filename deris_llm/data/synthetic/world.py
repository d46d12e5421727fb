"""Writes a synthetic world in REFER's own format: RefCOCO, RefCOCO+, RefCOCOg (umd) and gRefCOCO over shared images.

Every object that a phrase refers to, alone or among others, is written as polygons; crowds (RLE) are objects that no phrase
names. So REFER's own API, LAVT, LISA and ReLA, which open no crowd, read every split. Images are in images/train2014
(gRefCOCO's API, ReLA) and, by a link, in images/mscoco/images/train2014 (REFER's API, LAVT, LISA).

An image depends on (seed, image id) only, and the image id tells which split it was made for. So neither the order of
work, nor the number of workers, nor the number of images changes an image or its phrases.

A crowd world has 12 to 30 smaller objects in an image, most of them near another one that differs in one attribute, and
as many phrases without a target as gRefCOCO: 9 % in train, 63, 23 and 29 % in val, testA and testB. `families.json`
beside the data sets tells the family of every phrase (`Expression.family`) by data set and sent_id.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from deris_llm.data.masks import decode_segmentation

from . import WORLD_FILE
from .phrases import CROWD_WEIGHTS, Expression, Style, expressions_for, multi_target_expressions, no_target_expressions
from .scene import CROWD, SPARSE, Scene, mask_box_xyxy, sample_scene
from .vocabulary import KINDS, KINDS_A, KINDS_B

GENERATOR_VERSION = (
    2  # 1: referents could be crowds; `bbox` and `area` were those of the scene, not of the written mask
)
WORLD_STREAM = 0xDE215  # seeds of other uses of the generator (pre-training) have another constant here
CROWD_STREAM = 0xC20D
FAMILIES_FILE = "families.json"
DATASETS = ("refcoco", "refcoco+", "refcocog", "grefcoco")
REFS_FILES = {
    "refcoco": "refs(unc).p",
    "refcoco+": "refs(unc).p",
    "refcocog": "refs(umd).p",
    "grefcoco": "grefs(unc).json",
}
# Images are made for a role; ids of one role start at its offset + 1.
_ROLE_OFFSETS = {"train": 0, "val": 100_000, "testA": 200_000, "testB": 300_000, "g_val": 400_000, "g_test": 500_000}
_ROLE_KINDS = {"testA": KINDS_A, "testB": KINDS_B}
_PARTIAL_MARK = "unfinished.json"
_PHRASES_RANGE = (5, 9)
_CROWD_PHRASES = 8  # of gRefCOCO, an image
_NO_TARGET_SHARES = {"train": 0.09, "val": 0.63, "testA": 0.23, "testB": 0.29}  # of gRefCOCO's phrases; crowd worlds
_CROWD_PROBABILITY = 0.03
_OVERLAPPING_PARTS_PROBABILITY = 0.05
_MIN_PART_PX = 6  # smaller parts and holes are left out of polygons
_IMAGE_FOLDER = Path("images", "train2014")
_REFER_IMAGE_FOLDER = Path("images", "mscoco", "images", "train2014")  # where REFER's own API looks
JPEG_QUALITY = 92

Progress = Callable[[int, int], None]
Task = TypeVar("Task")
Made = TypeVar("Made")


def write_world(
    out: Path,
    *,
    seed: int,
    num_train: int = 2400,
    num_val: int = 120,
    num_test: int = 120,
    crowd: bool = False,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> None:
    """Writes the world to `out`, or returns at once when `out` already holds the same world.

    The files are written to `<out>.partial`, which is renamed at the end.

    Args:
        out: folder to make.
        seed: >= 0.
        num_train: images of refcoco/train (refcocog/train has nearly the same ones).
        num_val: images of refcoco/val and of refcocog/val.
        num_test: images of testA, testB and of refcocog/test.
        crowd: 12 to 30 objects in an image instead of 4 to 10, and gRefCOCO's shares of phrases without a target.
        workers: processes; the files do not depend on it.
        on_progress: called with (images done, images in all).

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: `out` holds something else.
    """
    out = Path(out)
    counts = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
    _check_arguments(seed, counts, workers)
    request = {"generator": GENERATOR_VERSION, "seed": seed, **counts, "crowd": crowd}
    if out.exists() and any(out.iterdir()):
        check_same_world(out, request)
        return
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        if any(partial.iterdir()) and not (partial / _PARTIAL_MARK).is_file():
            raise FileExistsError(
                f"write_world: {partial} is needed for unfinished files, but holds something else "
                f"(no {_PARTIAL_MARK}); move it away or give another folder than {out}"
            )
        shutil.rmtree(partial)
    (partial / _IMAGE_FOLDER).mkdir(parents=True)
    (partial / _PARTIAL_MARK).write_text(json.dumps(request))

    splits = assign_splits(num_train=num_train, num_val=num_val, num_test=num_test)
    image_ids = sorted({image_id for by_split in splits.values() for ids in by_split.values() for image_id in ids})
    make = functools.partial(make_image, seed=seed, crowd=crowd, image_folder=partial / _IMAGE_FOLDER)
    records: dict[int, dict[str, Any]] = {}
    for record in in_processes(make, image_ids, workers):
        records[record["image"]["id"]] = record
        if on_progress is not None:
            on_progress(len(records), len(image_ids))
    _link_images(partial)
    families = {dataset: _write_dataset(partial / dataset, dataset, splits[dataset], records) for dataset in DATASETS}
    (partial / FAMILIES_FILE).write_text(json.dumps(families, separators=(",", ":")))
    files = [f"{dataset}/{name}" for dataset in DATASETS for name in ("instances.json", REFS_FILES[dataset])]
    manifest = {**request, "num_images": len(image_ids), "sha256": {name: file_sha256(partial / name) for name in files}}
    (partial / WORLD_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    if out.exists():
        out.rmdir()
    partial.rename(out)
    (
        out / _PARTIAL_MARK
    ).unlink()  # after the renaming: an interruption leaves an unfinished folder that is known as one


def _link_images(world: Path) -> None:
    """Links the images to where REFER's own API looks for them; copies them if links are not supported."""
    place = world / _REFER_IMAGE_FOLDER
    place.parent.mkdir(parents=True)
    try:
        place.symlink_to(os.path.relpath(world / _IMAGE_FOLDER, place.parent), target_is_directory=True)
    except OSError:
        shutil.copytree(world / _IMAGE_FOLDER, place)


def assign_splits(*, num_train: int, num_val: int, num_test: int) -> dict[str, dict[str, list[int]]]:
    """Returns dataset -> split -> image ids.

    As in the published sets, some evaluation images of one dataset are training images of another: 10 % of those of
    refcocog/val and refcocog/test are in refcoco/train, and 5 % of those of refcoco/val are in refcocog/train.
    """

    def role(name: str, count: int) -> list[int]:
        return [_ROLE_OFFSETS[name] + 1 + k for k in range(count)]

    train, val = role("train", num_train), role("val", num_val)
    num_shared_val, num_shared_test = min(round(0.1 * num_val), num_train), round(0.1 * num_test)
    shared_val = train[:num_shared_val]
    shared_test = train[num_shared_val : num_shared_val + num_shared_test]
    short = {"train": train, "val": val, "testA": role("testA", num_test), "testB": role("testB", num_test)}
    long = {
        "train": train[len(shared_val) + len(shared_test) :] + val[: round(0.05 * num_val)],
        "val": shared_val + role("g_val", num_val - len(shared_val)),
        "test": shared_test + role("g_test", num_test - len(shared_test)),
    }
    return {"refcoco": short, "refcoco+": short, "refcocog": long, "grefcoco": short}


def _check_arguments(seed: int, counts: dict[str, int], workers: int) -> None:
    problems = [f"{name} must be 1 to 99999, got {count}" for name, count in counts.items() if not 0 < count < 100_000]
    if seed < 0:
        problems.append(f"seed must be >= 0, got {seed}")
    if workers < 1:
        problems.append(f"workers must be >= 1, got {workers}")
    if problems:
        raise ValueError(f"write_world: {'; '.join(problems)}; change these arguments")


def check_same_world(out: Path, request: dict[str, Any], *, images: str = f"{_IMAGE_FOLDER}/*.jpg") -> None:
    """Checks that a folder is a finished, unchanged world.

    Args:
        out: the folder.
        request: what it must have been made of.
        images: pattern of its images, which are counted.

    Raises:
        FileExistsError: it is not.
    """
    start = f"write_world: {out} already holds files; expected the world {request}"
    end = "delete the folder or give another one"
    manifest_path = out / WORLD_FILE
    if not manifest_path.is_file():
        raise FileExistsError(f"{start}, found a folder without {WORLD_FILE}; {end}")
    try:
        manifest = {"crowd": False, **json.loads(manifest_path.read_text())}  # worlds of before have no such entry
        found = {name: manifest[name] for name in request}
        hashes, num_images = dict(manifest["sha256"]), int(manifest["num_images"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileExistsError(f"{start}, found a {WORLD_FILE} that cannot be read ({error!r}); {end}") from error
    if found != request:
        raise FileExistsError(f"{start}, found {found}; {end}")
    changed = [name for name, sha in hashes.items() if not (out / name).is_file() or file_sha256(out / name) != sha]
    if changed:
        raise FileExistsError(f"{start}, found changed or missing files: {changed}; {end}")
    num_found = len(list(out.glob(images)))
    if num_found != num_images:
        raise FileExistsError(f"{start} with {num_images} images, found {num_found} images; {end}")


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_processes(make: Callable[[Task], Made], tasks: list[Task], workers: int) -> Iterator[Made]:
    """Yields what is made of each task, in their order."""
    if workers == 1:
        yield from map(make, tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(make, tasks, chunksize=16)


# ---------------------------------------------------------------------------------------------------------------------
# One image
# ---------------------------------------------------------------------------------------------------------------------


def image_file_name(image_id: int) -> str:
    """Returns the file name of an image, as in COCO 2014."""
    return f"COCO_train2014_{image_id:012d}.jpg"


def image_scene(
    image_id: int, seed: int, *, crowd: bool = False
) -> tuple[Scene, dict[str, list[dict[str, Any]]], np.random.Generator]:
    """Returns an image of the world, its refs by dataset (see `_sample_refs`) and the generator in its later state."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, CROWD_STREAM if crowd else WORLD_STREAM, image_id]))
    role = max((name for name, offset in _ROLE_OFFSETS.items() if image_id > offset), key=_ROLE_OFFSETS.__getitem__)
    kinds = _ROLE_KINDS.get(role)
    while True:  # again when too few phrases are possible in some dataset
        scene = sample_scene(rng, target_kinds=kinds, layout=CROWD if crowd else SPARSE)
        no_target_share = _NO_TARGET_SHARES.get(role) if crowd else None
        refs = _sample_refs(scene, rng, kinds if kinds is not None else KINDS, no_target_share, crowd=crowd)
        if refs is not None:
            return scene, refs, rng


def make_image(image_id: int, *, seed: int, image_folder: Path, crowd: bool = False) -> dict[str, Any]:
    """Draws an image, writes its JPEG and returns its COCO image, annotations and refs (without ref and sent ids)."""
    scene, refs, rng = image_scene(image_id, seed, crowd=crowd)
    height, width = scene.image.shape[:2]
    file_name = image_file_name(image_id)
    Image.fromarray(scene.image).save(image_folder / file_name, quality=JPEG_QUALITY, subsampling=0)
    named = {index for of_dataset in refs.values() for ref in of_dataset for index in ref["indices"]}
    annotations = [
        _annotation(rng, item.mask, image_id, k, item.kind, is_named=k in named) for k, item in enumerate(scene.objects)
    ]
    image = {"license": 1, "file_name": file_name, "height": height, "width": width, "id": image_id}
    return {"image": image, "annotations": annotations, "refs": refs}


def _sample_refs(
    scene: Scene, rng: np.random.Generator, kinds: Iterable[str], no_target_share: float | None, *, crowd: bool
) -> dict[str, list[dict[str, Any]]] | None:
    """Returns dataset -> refs, each {"indices": object indices, "sentences": [{raw, sent, tokens, family}]}, or None.

    None = some dataset would have fewer than 5 phrases.
    """
    refs: dict[str, list[dict[str, Any]]] = {}
    styles: tuple[Style, ...] = ("refcoco", "refcoco+", "refcocog")
    for style in styles:
        refs[style] = _sample_single_refs(
            scene, rng, kinds, style, int(rng.integers(_PHRASES_RANGE[0], 8)), crowd=crowd
        )
    if no_target_share is not None:
        refs["grefcoco"] = _sample_crowd_refs(scene, rng, kinds, no_target_share)
        return refs if all(_is_enough(group) for group in refs.values()) else None
    singles = _sample_single_refs(scene, rng, kinds, "refcoco", 2 * int(rng.integers(1, 3)), per_ref=2, crowd=crowd)
    multi = _sample_multi_refs(scene, rng, int(rng.integers(2, 4)))
    no_target = [_ref(rng, (), no_target_expressions(scene, rng, int(rng.integers(1, 3))))]
    refs["grefcoco"] = [*singles, *multi, *(ref for ref in no_target if ref["sentences"])]
    is_enough = all(_is_enough(group) for group in refs.values())
    return refs if is_enough and no_target[0]["sentences"] and multi else None


def _is_enough(refs: list[dict[str, Any]]) -> bool:
    low, high = _PHRASES_RANGE
    return low <= sum(len(ref["sentences"]) for ref in refs) <= high


def _sample_crowd_refs(
    scene: Scene, rng: np.random.Generator, kinds: Iterable[str], no_target_share: float
) -> list[dict[str, Any]]:
    """Returns about 8 phrases of gRefCOCO; the others than those without a target name one object, or several, by halves."""
    num_no_target = int(no_target_share * _CROWD_PHRASES + rng.random())
    num_single = 2 * ((_CROWD_PHRASES - num_no_target + 1) // 4)
    num_multi = _CROWD_PHRASES - num_no_target - num_single
    singles = _sample_single_refs(
        scene, rng, kinds, "refcoco", num_single, per_ref=2, crowd=True
    )
    no_target = no_target_expressions(scene, rng, num_no_target)
    return [
        *singles,
        *_sample_multi_refs(scene, rng, num_multi),
        *([_ref(rng, (), no_target)] if no_target else []),
    ]


def _sample_multi_refs(scene: Scene, rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Returns refs of two or more objects with about `count` phrases in all."""
    groups: dict[tuple[int, ...], list[Expression]] = defaultdict(list)
    for expression, indices in multi_target_expressions(scene, rng, count):
        groups[indices].append(expression)
    return [_ref(rng, indices, group) for indices, group in groups.items()]


def _sample_single_refs(
    scene: Scene,
    rng: np.random.Generator,
    kinds: Iterable[str],
    style: Style,
    count: int,
    *,
    per_ref: int | None = None,
    crowd: bool,
) -> list[dict[str, Any]]:
    """Returns refs of one object each with about `count` phrases in all, 2 or 3 (or `per_ref`) a ref."""
    kinds = tuple(kinds)
    order = [i for i in rng.permutation(len(scene.objects)).tolist() if scene.objects[i].kind in kinds]
    if rng.random() < 0.5:  # occluded and occluding objects first: "behind" is possible for few objects
        order.sort(key=lambda i: not _overlaps_another(scene, i))
    weights = CROWD_WEIGHTS if crowd else None
    refs: list[dict[str, Any]] = []
    num = 0
    for index in order:
        if num >= count:
            break
        wanted = per_ref if per_ref is not None else int(rng.integers(2, 4))
        expressions = expressions_for(scene, index, rng, style=style, count=wanted, weights=weights)
        if len(expressions) >= 2:
            refs.append(_ref(rng, (index,), expressions))
            num += len(expressions)
    return refs


def _overlaps_another(scene: Scene, index: int) -> bool:
    mask = scene.objects[index].full_mask
    return any(k != index and bool((other.full_mask & mask).any()) for k, other in enumerate(scene.objects))


def _ref(rng: np.random.Generator, indices: tuple[int, ...], expressions: list[Expression]) -> dict[str, Any]:
    sentences = []
    for expression in expressions:
        sent = expression.text
        kind = float(rng.random())  # annotators' own spelling, as in the published files
        raw = sent.capitalize() + "." if kind < 0.2 else (sent.upper() if kind < 0.25 else sent)
        sentences.append({"tokens": sent.split(), "raw": raw, "sent": sent, "family": expression.family})
    return {"indices": list(indices), "sentences": sentences}


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


def _annotation(
    rng: np.random.Generator, mask: np.ndarray, image_id: int, index: int, kind: str, *, is_named: bool
) -> dict[str, Any]:
    """Returns the COCO annotation of a bool (H, W) mask: polygons, or RLE with iscrowd 1 for some that no phrase names."""
    x0, _, x1, _ = mask_box_xyxy(mask)
    is_exact, draw = bool(rng.random() < _CROWD_PROBABILITY), float(rng.random())
    is_crowd = is_exact and not is_named
    if is_crowd:
        segmentation: Any = {"size": list(mask.shape), "counts": rle_counts(mask)}
    elif is_exact:  # generator 1 wrote a crowd: polygons of the same pixels keep what was measured on its worlds
        segmentation = polygons_of(mask, min_part_px=1)
    elif draw < _OVERLAPPING_PARTS_PROBABILITY and x1 - x0 >= 12:
        cut = (x0 + x1) // 2
        left, right = mask.copy(), mask.copy()
        left[:, cut + 3 :], right[:, : cut - 3] = False, False
        segmentation = polygons_of(left) + polygons_of(right)
    else:
        segmentation = polygons_of(mask)
    written = decode_segmentation(segmentation, *mask.shape)  # slivers are left out of polygons
    x0, y0, x1, y1 = mask_box_xyxy(written)
    return {
        "segmentation": segmentation,
        "area": float(written.sum()),
        "iscrowd": int(is_crowd),
        "image_id": image_id,
        "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
        "category_id": KINDS.index(kind) + 1,
        "id": image_id * 100 + index,
    }


def rle_counts(mask: np.ndarray) -> list[int]:
    """Returns COCO's uncompressed run lengths, column by column, of a bool (H, W) mask; the first run is of zeros."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *counts] if flat[0] else counts


def polygons_of(mask: np.ndarray, *, min_part_px: int = _MIN_PART_PX) -> list[list[int]]:
    """Returns polygons [x, y, x, y ...] along the pixels' borders of a bool (H, W) mask.

    A part with a hole is cut in two through the hole, since COCO's polygons have no holes. Parts and holes of fewer
    than `min_part_px` pixels are left out, unless nothing else would remain; with 1 the polygons draw exactly the mask.
    """
    loops = _border_loops(mask)
    for loop, area in loops:
        if area <= -min_part_px:
            xs = loop[:, 0]
            cut = int(xs.min() + xs.max()) // 2
            left, right = mask.copy(), mask.copy()
            left[:, cut:], right[:, :cut] = False, False
            return polygons_of(left, min_part_px=min_part_px) + polygons_of(right, min_part_px=min_part_px)
    outer = [(loop, area) for loop, area in loops if area > 0]
    large = [(loop, area) for loop, area in outer if area >= min_part_px]
    return [_without_collinear(loop).ravel().tolist() for loop, _ in large or outer]


def _border_loops(mask: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Returns the closed pixel borders, (n, 2) corners, with their areas: positive outer borders, negative holes.

    Borders keep the pixels on their right hand; where two pixels touch at a corner only, they are two parts.
    """
    padded = np.pad(mask, 1).astype(np.int8)
    horizontal = np.diff(padded, axis=0)[:, 1:-1]  # (H + 1, W): 1 = top border of pixel (y, x), -1 = bottom border
    vertical = np.diff(padded, axis=1)[1:-1]  # (H, W + 1): 1 = left border, -1 = right border
    follow: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for y, x in np.argwhere(horizontal).tolist():
        if horizontal[y, x] > 0:
            follow[x, y].append((x + 1, y))
        else:
            follow[x + 1, y].append((x, y))
    for y, x in np.argwhere(vertical).tolist():
        if vertical[y, x] > 0:
            follow[x, y + 1].append((x, y))
        else:
            follow[x, y].append((x, y + 1))
    loops = []
    while follow:
        start = next(iter(follow))
        loop, here, step = [start], start, (0, 0)
        while True:
            options = follow[here]
            # Of two ways out, the right turn stays with the same pixel.
            right = (here[0] - step[1], here[1] + step[0])
            there = right if len(options) > 1 and right in options else options[0]
            options.remove(there)
            if not options:
                del follow[here]
            step, here = (there[0] - here[0], there[1] - here[1]), there
            if here == start:
                break
            loop.append(here)
        corners = np.array(loop)
        x, y = corners[:, 0], corners[:, 1]
        loops.append((corners, float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2))
    return loops


def _without_collinear(corners: np.ndarray) -> np.ndarray:
    before, after = corners - np.roll(corners, 1, axis=0), np.roll(corners, -1, axis=0) - corners
    return corners[(before != after).any(1)]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _write_dataset(
    folder: Path, dataset: str, splits: dict[str, list[int]], records: dict[int, dict[str, Any]]
) -> dict[int, str]:
    """Writes instances.json and the refs file of one dataset; returns sent_id -> family of its phrases."""
    folder.mkdir()
    families: dict[int, str] = {}
    is_generalized = dataset == "grefcoco"
    refs: list[dict[str, Any]] = []
    sent_id = 0
    image_ids = sorted((image_id, split) for split, ids in splits.items() for image_id in ids)
    for image_id, split in image_ids:
        record = records[image_id]
        for ref in record["refs"][dataset]:
            sentences = [{**sentence, "sent_id": sent_id + k} for k, sentence in enumerate(ref["sentences"])]
            sent_id += len(sentences)
            families |= {sentence["sent_id"]: sentence.pop("family") for sentence in sentences}
            annotations = [record["annotations"][index] for index in ref["indices"]]
            entry = {
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                "file_name": record["image"]["file_name"],
                "ann_id": [annotation["id"] for annotation in annotations],
                "ref_id": len(refs),
                "image_id": image_id,
                "split": split,
                "sentences": sentences,
                "category_id": [annotation["category_id"] for annotation in annotations],
            }
            if is_generalized:
                entry["no_target"] = not annotations
                if not annotations:
                    entry["ann_id"], entry["category_id"] = [-1], [-1]
            else:
                entry["ann_id"], entry["category_id"] = entry["ann_id"][0], entry["category_id"][0]
                suffix = f"_{ref['indices'][0]}.jpg"
                entry["file_name"] = entry["file_name"].removesuffix(".jpg") + suffix
            refs.append(entry)
    instances = {
        "info": {"description": f"deris_llm synthetic {dataset}", "version": str(GENERATOR_VERSION), "year": 2014},
        "licenses": [{"id": 1, "name": "MIT", "url": "https://opensource.org/license/mit"}],
        "images": [records[image_id]["image"] for image_id, _ in image_ids],
        "annotations": [item for image_id, _ in image_ids for item in records[image_id]["annotations"]],
        "categories": [
            {"supercategory": "living" if kind in KINDS_A else "thing", "id": k + 1, "name": kind}
            for k, kind in enumerate(KINDS)
        ],
    }
    (folder / "instances.json").write_text(json.dumps(instances, separators=(",", ":")))
    if is_generalized:
        (folder / REFS_FILES[dataset]).write_text(json.dumps(refs, separators=(",", ":")))
    else:
        # The pickler's memo marks strings that are the same object; a round trip through JSON makes the bytes depend on
        # the values only, not on which process made them.
        plain = json.loads(json.dumps(refs))
        (folder / REFS_FILES[dataset]).write_bytes(pickle.dumps(plain, protocol=2))
    return families
