"""Small video trees in the published layouts, drawn from a seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deris_llm.data.masks import encode_mask

SIZE = (24, 32)
FRAMES = ("00000", "00005", "00010", "00015")
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, *[64] * (3 * 251), 255, 255, 255]


def box(top: int, left: int, height: int = 8, width: int = 10, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A filled box."""
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def moving(label: int, frame: int) -> np.ndarray:
    """An object of its own size that moves to the right."""
    return box(2 + 6 * label, 1 + 2 * label + 2 * frame, 5, 6 + label)


def save_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def save_labels(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(PALETTE)
    image.save(path)


def save_json(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")


def labels_at(frame: int, num_objects: int = 2) -> np.ndarray:
    """Label map of objects that move; they do not overlap."""
    labels = np.zeros(SIZE, dtype=np.uint8)
    for label in range(1, num_objects + 1):
        labels[moving(label - 1, frame)] = label
    return labels


def write_mevis(split: Path) -> Path:
    """Writes a split with two videos; object 1 is absent from the last frame, expression 2 of `one` names nothing.

    Returns:
        The folder of the split.
    """
    rle = [[encode_mask(moving(label, t)) for t in range(len(FRAMES))] for label in range(2)]
    rle[1][-1] = None
    videos = {
        "one": {
            "frames": list(FRAMES),
            "expressions": {
                "0": {"exp": "the upper box", "obj_id": [0], "anno_id": [7]},
                "1": {"exp": "both boxes", "obj_id": [0, 1], "anno_id": [7, 8]},
                "2": {"exp": "the box that stands still", "obj_id": [], "anno_id": []},
            },
        },
        "two": {"frames": list(FRAMES[:2]), "expressions": {"0": {"exp": "a box", "obj_id": [0], "anno_id": [9]}}},
    }
    save_json(split / "meta_expressions.json", {"videos": videos})
    save_json(split / "mask_dict.json", {"7": rle[0], "8": rle[1], "9": rle[0][:2]})
    return split


def mevis_truth() -> dict[tuple[str, str], list[np.ndarray]]:
    """The masks of `write_mevis`, by video and expression."""
    nothing = np.zeros(SIZE, dtype=bool)
    first = [moving(0, t) for t in range(len(FRAMES))]
    second = [moving(1, t) if t < len(FRAMES) - 1 else nothing for t in range(len(FRAMES))]
    return {
        ("one", "0"): first,
        ("one", "1"): [a | b for a, b in zip(first, second, strict=True)],
        ("one", "2"): [nothing] * len(FRAMES),
        ("two", "0"): first[:2],
    }


def write_predictions(root: Path, masks: Mapping[tuple[str, str], list[np.ndarray]]) -> Path:
    """Writes a tree of PNGs."""
    for (video, expression), of_frames in masks.items():
        for frame, mask in zip(FRAMES, of_frames, strict=False):
            save_mask(root / video / expression / f"{frame}.png", mask)
    return root


def write_ytvos(root: Path) -> Path:
    """Writes train of Ref-YouTube-VOS: object 2 is listed from the second frame on.

    Returns:
        The folder of the dataset.
    """
    expressions = {"0": {"exp": "the upper box", "obj_id": "1"}, "1": {"exp": "the lower box", "obj_id": "2"}}
    save_json(
        root / "meta_expressions" / "train" / "meta_expressions.json",
        {"videos": {"aa": {"frames": list(FRAMES), "expressions": expressions}}},
    )
    save_json(
        root / "train" / "meta.json",
        {"videos": {"aa": {"objects": {"1": {"frames": list(FRAMES)}, "2": {"frames": list(FRAMES[1:])}}}}},
    )
    for t, frame in enumerate(FRAMES):
        labels = labels_at(t)
        if t == 0:
            labels[labels == 2] = 0
        save_labels(root / "train" / "Annotations" / "aa" / f"{frame}.png", labels)
    return root


def write_davis(root: Path, labels: Mapping[str, list[np.ndarray]]) -> Path:
    """Writes a DAVIS tree with both annotations."""
    lists = root / "ImageSets" / "2017"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in labels))
    for name, of_frames in labels.items():
        for folder in ("Annotations", "Annotations_unsupervised"):
            write_labels(root / folder / "480p" / name, of_frames)
    return root


def write_labels(folder: Path, labels: list[np.ndarray]) -> Path:
    for t, one in enumerate(labels):
        save_labels(folder / f"{t:05d}.png", one)
    return folder


def write_ref_davis(root: Path) -> Path:
    """Writes Ref-DAVIS17 with one video of two objects: eight expressions."""
    for k, name in enumerate(("annot1", "annot1_full_video", "annot2", "annot2_full_video")):
        path = root / "davis_text_annotations" / f"Davis17_{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f'balls {i + 1} "text {4 * i + k}"\n' for i in range(2)), encoding="latin-1")
    write_davis(root / "DAVIS", {"balls": [labels_at(t) for t in range(3)]})
    expressions = {str(i): {"exp": f"text {i}", "obj_id": str(i // 4 + 1)} for i in range(8)}
    names = [f"{t:05d}" for t in range(3)]
    save_json(
        root / "meta_expressions" / "valid" / "meta_expressions.json",
        {"videos": {"balls": {"frames": names, "expressions": expressions}}},
    )
    return root
