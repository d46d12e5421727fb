"""Writes synthetic videos as the published sets are laid out, so that the readers of these sets read them.

    ROOT/source/mevis/       train, valid_u (MeViS)                     8 sentences a video: one object, several, none
    ROOT/source/ref-ytvos/   train, valid with its truth, test          4 sentences a video: one object each
    ROOT/families.json       data set -> SPLIT/VIDEO/EXPRESSION -> family of the sentence (`ClipSentence.family`)
    ROOT/world.json          what it was made of

A video depends on (seed, data set, split, number of the video), the size and the range of frames only.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deris_llm.common.folders import written_aside
from deris_llm.data.masks import encode_mask

from . import WORLD_FILE
from .clip import Clip, sample_clip
from .clip_phrases import ClipSentence, clip_sentences
from .world import FAMILIES_FILE, JPEG_QUALITY, Progress, check_same_world, file_sha256, in_processes

GENERATOR_VERSION = 1
MEVIS, YTVOS = "source/mevis", "source/ref-ytvos"
FRAMES_RANGE = (8, 16)
SIZE_PX = 128
NUM_VAL = 10
_STREAM = 0x71DE0
_MEVIS_FAMILIES = ("motion", "motion", "motion", "looks", "passing", "several", "several", "none")
_YTVOS_FAMILIES = ("motion", "motion", "looks", "looks")
_FRAME_STEP = 5  # of Ref-YouTube-VOS's names of frames
_COLOURS = bytes([0, 0, 0, 236, 95, 103, 249, 145, 87, 250, 200, 99, 153, 199, 148, 98, 179, 178]).ljust(768, b"\x80")


class _Task(NamedTuple):
    """One video to draw."""

    dataset: str  # MEVIS or YTVOS
    split: str
    number: int

    @property
    def name(self) -> str:
        """As the data sets name their videos: 12 or 10 hexadecimal digits."""
        digits = hashlib.sha256(f"{self.dataset}/{self.split}/{self.number}".encode()).hexdigest()
        return digits[: 12 if self.dataset == MEVIS else 10]


class _Drawn(NamedTuple):
    """What the JSON files need of a video."""

    frames: list[str]
    sentences: list[ClipSentence]
    classes: list[str]  # of the objects
    tracks: list[list[dict[str, Any] | None]]  # RLE of each object by frame


def write_video_world(
    out: Path,
    *,
    seed: int,
    num_train: int = 40,
    num_val: int = NUM_VAL,
    num_test: int = 5,
    frames: tuple[int, int] = FRAMES_RANGE,
    size_px: int = SIZE_PX,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> None:
    """Writes the videos to ``out``, or returns at once when ``out`` already holds the same ones.

    Args:
        out: folder to make.
        seed: >= 0.
        num_train: videos of train, of each of the two sets.
        num_val: videos of MeViS's valid_u and of Ref-YouTube-VOS's valid.
        num_test: videos of Ref-YouTube-VOS's test.
        frames: least and greatest number of frames of a video.
        size_px: width of a frame; its height is 3/4 to 1 of it.
        workers: processes; the files do not depend on it.
        on_progress: called with (videos done, videos in all).

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: ``out`` holds something else.
    """
    counts = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
    _check_arguments(seed, counts, frames, size_px)
    request: dict[str, Any] = {"video_generator": GENERATOR_VERSION, "seed": seed, **counts, "frames": list(frames), "size_px": size_px}
    if out.exists() and any(out.iterdir()):
        check_same_world(out, request, images="source/*/*/JPEGImages/*/*.jpg")
        return
    tasks = [_Task(MEVIS, split, k) for split, n in (("train", num_train), ("valid_u", num_val)) for k in range(n)]
    tasks += [
        _Task(YTVOS, split, k) for split, n in (("train", num_train), ("valid", num_val), ("test", num_test)) for k in range(n)
    ]
    with written_aside(out) as partial:
        draw = functools.partial(_draw, root=partial, seed=seed, frames=frames, size_px=size_px)
        drawn: dict[_Task, _Drawn] = {}
        for task, found in zip(tasks, in_processes(draw, tasks, workers), strict=True):
            drawn[task] = found
            if on_progress is not None:
                on_progress(len(drawn), len(tasks))
        files = [*_write_mevis(partial / MEVIS, drawn), *_write_ytvos(partial / YTVOS, drawn)]
        _write_json(partial / FAMILIES_FILE, _families(drawn))
        num_images = sum(len(found.frames) for found in drawn.values())
        hashes = {str(file.relative_to(partial)): file_sha256(file) for file in files}
        (partial / WORLD_FILE).write_text(json.dumps({**request, "num_images": num_images, "sha256": hashes}, indent=2) + "\n")


def _check_arguments(seed: int, counts: dict[str, int], frames: tuple[int, int], size_px: int) -> None:
    problems = [f"{name} must be 1 to 9999, got {count}" for name, count in counts.items() if not 0 < count < 10_000]
    if seed < 0:
        problems.append(f"seed must be >= 0, got {seed}")
    if not 4 <= frames[0] <= frames[1] <= 1000:
        problems.append(f"frames must be two ascending numbers from 4 to 1000, got {frames[0]} {frames[1]}")
    if not 64 <= size_px <= 1024:
        problems.append(f"size_px must be 64 to 1024, got {size_px}")
    if problems:
        raise ValueError(f"write_video_world: {'; '.join(problems)}; change these arguments")


def _draw(task: _Task, *, root: Path, seed: int, frames: tuple[int, int], size_px: int) -> _Drawn:
    """Draws a video and writes its frames and, for Ref-YouTube-VOS, its palette images."""
    place = int(hashlib.sha256(f"{task.dataset}/{task.split}".encode()).hexdigest()[:8], 16)
    rng = np.random.default_rng(np.random.SeedSequence([seed, _STREAM, place, task.number]))
    families = _MEVIS_FAMILIES if task.dataset == MEVIS else _YTVOS_FAMILIES
    while True:  # again when a clip allows few sentences, which is rare
        clip = sample_clip(rng, num_frames=int(rng.integers(frames[0], frames[1] + 1)), size_px=size_px)
        sentences = clip_sentences(clip, rng, families)
        if len(sentences) >= len(families) - 2:
            break
    first = 0 if task.dataset == MEVIS or rng.random() < 0.8 else 2 * _FRAME_STEP  # not all of that set start at 00000
    step = 1 if task.dataset == MEVIS else _FRAME_STEP
    names = [f"{first + step * t:05d}" for t in range(len(clip.frames))]
    folder = root / task.dataset / task.split / "JPEGImages" / task.name
    folder.mkdir(parents=True)
    for name, frame in zip(names, clip.frames, strict=True):
        Image.fromarray(frame).save(folder / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0)
    if task.dataset == YTVOS and task.split != "test":
        _write_labels(root / YTVOS / _truth_folder(task.split) / "Annotations" / task.name, names, clip)
    tracks = [[encode_mask(mask) if mask.any() else None for mask in one.masks] for one in clip.objects]
    return _Drawn(names, sentences, [one.profile[0] for one in clip.objects], tracks)


def _truth_folder(split: str) -> str:
    return "valid_gt" if split == "valid" else split


def _write_labels(folder: Path, names: Sequence[str], clip: Clip) -> None:
    """Palette images; the object of index i has number i + 1."""
    folder.mkdir(parents=True)
    for t, name in enumerate(names):
        labels = np.zeros(clip.frames.shape[1:3], dtype=np.uint8)
        for index, one in enumerate(clip.objects):
            labels[one.masks[t]] = index + 1
        image = Image.fromarray(labels, mode="P")
        image.putpalette(_COLOURS)  # of 256 colours: with fewer, Pillow stores fewer bits
        image.save(folder / f"{name}.png")


def _write_mevis(folder: Path, drawn: dict[_Task, _Drawn]) -> list[Path]:
    """Writes the JSON files; annotations are counted over the videos of a split."""
    files = []
    for split in ("train", "valid_u"):
        videos: dict[str, Any] = {}
        masks: dict[str, Any] = {}
        for task, found in _of(drawn, MEVIS, split):
            first = len(masks)
            masks |= {str(first + index): track for index, track in enumerate(found.tracks)}
            expressions = {
                str(number): {
                    "exp": sentence.text,
                    "obj_id": list(sentence.indices),
                    "anno_id": [first + index for index in sentence.indices],
                }
                for number, sentence in enumerate(found.sentences)
            }
            videos[task.name] = {"expressions": expressions, "frames": found.frames}
        files += [
            _write_json(folder / split / "meta_expressions.json", {"videos": videos}),
            _write_json(folder / split / "mask_dict.json", masks),
        ]
    return files


def _write_ytvos(folder: Path, drawn: dict[_Task, _Drawn]) -> list[Path]:
    """Writes the JSON files; valid's holds the videos of test too and names no object, as the published one."""
    files = []
    for split, parts in (("train", ("train",)), ("valid", ("valid", "test")), ("test", ("test",))):
        videos = {
            task.name: {
                "expressions": {
                    str(number): {"exp": sentence.text, **({"obj_id": _number(sentence)} if split == "train" else {})}
                    for number, sentence in enumerate(found.sentences)
                },
                "frames": found.frames,
            }
            for part in parts
            for task, found in _of(drawn, YTVOS, part)
        }
        files.append(_write_json(folder / "meta_expressions" / split / "meta_expressions.json", {"videos": videos}))
    for split in ("train", "valid"):
        classes = {
            task.name: {
                "objects": {
                    str(index + 1): {
                        "category": found.classes[index],
                        "frames": [name for name, mask in zip(found.frames, track, strict=True) if mask is not None],
                    }
                    for index, track in enumerate(found.tracks)
                }
            }
            for task, found in _of(drawn, YTVOS, split)
        }
        files.append(_write_json(folder / _truth_folder(split) / "meta.json", {"videos": classes}))
    objects = {
        task.name: {str(number): _number(sentence) for number, sentence in enumerate(found.sentences)}
        for task, found in _of(drawn, YTVOS, "valid")
    }
    return [*files, _write_json(folder / "valid_gt" / "obj_id.json", objects)]


def _number(sentence: ClipSentence) -> str:
    """The number of a sentence's only object, as Ref-YouTube-VOS writes it."""
    (index,) = sentence.indices
    return str(index + 1)


def _of(drawn: dict[_Task, _Drawn], dataset: str, split: str) -> list[tuple[_Task, _Drawn]]:
    return [(task, found) for task, found in drawn.items() if (task.dataset, task.split) == (dataset, split)]


def _families(drawn: dict[_Task, _Drawn]) -> dict[str, dict[str, str]]:
    families: dict[str, dict[str, str]] = {Path(MEVIS).name: {}, Path(YTVOS).name: {}}
    for task, found in drawn.items():
        for number, sentence in enumerate(found.sentences):
            families[Path(task.dataset).name][f"{task.split}/{task.name}/{number}"] = sentence.family
    return families


def _write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")))
    return path
