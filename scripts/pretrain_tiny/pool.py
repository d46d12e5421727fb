"""A pool of pre-training scenes on disk: drawn once, read many times as memory-mapped arrays.

Rendering a scene costs more than a training step's share of it, so both pre-trainings read the same stored pictures.
The scenes come from a seed stream of their own, `SeedSequence([seed, 0x9001, index])`, which no split of a world uses.
Scenes with an odd index are crowds (12 to 30 objects).
"""

import json
import logging
import multiprocessing
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image

from deris_llm.data.synthetic.phrases import expressions_for, no_target_expressions
from deris_llm.data.synthetic.scene import CROWD, SPARSE, Layout, Scene, sample_scene

logger = logging.getLogger(__name__)

POOL_STREAM = 0x9001  # third word of the seed, apart from those of the worlds' splits
HELD_OUT_FIRST_INDEX = 1_000_000  # held-out scenes count from here, so that a train pool never reaches them
PERCEPTION_SIZE = 128  # px, side of the perception input and of the instance-id maps
COGNITION_SIZE = 120  # px, side of the cognition input
STYLES = ("refcoco", "refcoco+", "refcocog")
PHRASES_PER_STYLE = 6  # of each object; half as many in a crowd, since phrases take most of the time
NO_TARGET_PHRASES = 3
DESCRIBED_OBJECTS = 6  # of a crowd have phrases
CHUNK_SCENES = 50

ARRAY_SHAPES = {
    "images_128": (PERCEPTION_SIZE, PERCEPTION_SIZE, 3),
    "images_120": (COGNITION_SIZE, COGNITION_SIZE, 3),
    "instance_ids": (PERCEPTION_SIZE, PERCEPTION_SIZE),
}


class ScenePool:
    """Stored scenes, read without loading the pictures into memory.

    Attributes:
        images_128: uint8 (N, 128, 128, 3) RGB, bicubic warp of the original.
        images_120: uint8 (N, 120, 120, 3) RGB, bicubic warp of the original.
        instance_ids: uint8 (N, 128, 128), nearest warp; 0 = background, k + 1 = visible pixels of object k.
        records: per scene `{"height", "width", "objects": [...], "no_target": [{"text", "family"}]}`; object k holds
            `kind, colour, pattern, size, centre_xy_norm` (both in [0, 1]), `box_xyxy_norm`, `depth`, `area_share` and
            `phrases: {style: [{"text", "family", "uses_location"}]}`.
    """

    def __init__(self, path: Path) -> None:
        missing = [name for name in (*ARRAY_SHAPES, "records") if not list(path.glob(f"{name}.*"))]
        if missing:
            raise ValueError(
                f"ScenePool: expected a folder written by write_pool at {path}, got one without {', '.join(missing)}; "
                "write the pool first (scripts/pretrain_tiny/run.py does it)."
            )
        self.images_128, self.images_120, self.instance_ids = (
            np.load(path / f"{name}.npy", mmap_mode="r") for name in ARRAY_SHAPES
        )
        with (path / "records.jsonl").open(encoding="utf-8") as lines:
            self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def __len__(self) -> int:
        return len(self.records)


def write_pool(out: Path, *, num_scenes: int, seed: int, workers: int = 2, first_index: int = 0) -> None:
    """Draw scenes and store them in `out`, which appears only when complete.

    Args:
        out: folder to create.
        num_scenes: N.
        seed: of the stream; the same seed and index give the same scene.
        workers: processes; the result does not depend on it.
        first_index: index of the first scene in the stream.
    """
    aside = out.with_name(out.name + ".partial")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    for name, shape in ARRAY_SHAPES.items():
        open_memmap(aside / f"{name}.npy", mode="w+", dtype=np.uint8, shape=(num_scenes, *shape)).flush()
    chunks = [range(start, min(start + CHUNK_SCENES, num_scenes)) for start in range(0, num_scenes, CHUNK_SCENES)]
    draw = partial(_draw_chunk, aside=aside, seed=seed, first_index=first_index)
    with (
        multiprocessing.get_context("spawn").Pool(workers) as processes,
        (aside / "records.jsonl").open("w", encoding="utf-8") as lines,
    ):
        for chunk, records in zip(chunks, processes.imap(draw, chunks), strict=True):
            lines.writelines(json.dumps(record) + "\n" for record in records)
            if chunk.stop % 1000 == 0 or chunk.stop == num_scenes:
                logger.info("pool %s: %d of %d scenes", out.name, chunk.stop, num_scenes)
    aside.rename(out)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """One scene as stored: the three pictures and its record."""

    arrays: dict[str, np.ndarray]
    record: dict[str, Any]


def _draw_chunk(chunk: range, *, aside: Path, seed: int, first_index: int) -> list[dict[str, Any]]:
    """Draw the scenes of a chunk into the arrays on disk and return their records."""
    arrays = {name: np.load(aside / f"{name}.npy", mmap_mode="r+") for name in ARRAY_SHAPES}
    records = []
    for position in chunk:
        index = first_index + position
        drawn = _draw(
            np.random.default_rng(np.random.SeedSequence([seed, POOL_STREAM, index])), CROWD if index % 2 else SPARSE
        )
        for name, array in drawn.arrays.items():
            arrays[name][position] = array
        records.append(drawn.record)
    return records


def _draw(rng: np.random.Generator, layout: Layout) -> _Drawn:
    scene = sample_scene(rng, layout=layout)
    phrases_per_style, described = PHRASES_PER_STYLE, len(scene.objects)
    if layout is CROWD:
        phrases_per_style, described = PHRASES_PER_STYLE // 2, DESCRIBED_OBJECTS
    height, width = scene.image.shape[:2]
    instance_ids = np.zeros((height, width), np.uint8)
    for index, scene_object in enumerate(scene.objects):
        instance_ids[scene_object.mask] = index + 1
    picture = Image.fromarray(scene.image)
    ids = Image.fromarray(instance_ids).resize((PERCEPTION_SIZE, PERCEPTION_SIZE), Image.Resampling.NEAREST)
    arrays = {
        "images_128": np.asarray(picture.resize((PERCEPTION_SIZE, PERCEPTION_SIZE), Image.Resampling.BICUBIC)),
        "images_120": np.asarray(picture.resize((COGNITION_SIZE, COGNITION_SIZE), Image.Resampling.BICUBIC)),
        "instance_ids": np.asarray(ids),
    }
    no_target = [
        {"text": expression.text, "family": expression.family}
        for expression in no_target_expressions(scene, rng, NO_TARGET_PHRASES)
    ]
    record = {
        "height": height,
        "width": width,
        "objects": [
            _object_record(scene, index, rng, phrases_per_style=phrases_per_style if index < described else 0)
            for index in range(len(scene.objects))
        ],
        "no_target": no_target,
    }
    return _Drawn(arrays=arrays, record=record)


def _object_record(scene: Scene, index: int, rng: np.random.Generator, *, phrases_per_style: int) -> dict[str, Any]:
    scene_object = scene.objects[index]
    height, width = scene.image.shape[:2]
    scale = np.array([width, height, width, height], float)
    phrases = {
        style: [
            {"text": expression.text, "family": expression.family, "uses_location": bool(expression.uses_location)}
            for expression in expressions_for(scene, index, rng, style=style, count=phrases_per_style)
        ]
        for style in STYLES
    }
    return {
        "kind": scene_object.kind,
        "colour": scene_object.colour,
        "pattern": scene_object.pattern,
        "size": scene_object.size,
        "centre_xy_norm": (np.asarray(scene_object.centre_xy, float) / scale[:2]).round(4).tolist(),
        "box_xyxy_norm": (np.asarray(scene_object.box_xyxy, float) / scale).round(4).tolist(),
        "depth": int(scene_object.depth),
        "area_share": round(float(scene_object.mask.mean()), 5),
        "phrases": phrases,
    }
