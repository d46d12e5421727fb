"""A tiny REFER folder, written by hand: plain images, rectangles for objects."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deris_llm.data.store.prepare import Prepared, PrepareOptions, prepare
from deris_llm.structures import CognitionInputs, InstanceAnnotation, ReferringRecord

WIDTH, HEIGHT = 40, 30
SPLITS = {
    # dataset folder -> split -> image ids; some images are val of one dataset and train of another
    "refcoco": {"train": [1, 2, 3, 4], "val": [5], "testA": [6], "testB": [7]},
    "refcoco+": {"train": [1, 2, 3, 5], "val": [4], "testA": [6], "testB": [7]},
    "refcocog": {"train": [1, 2, 6, 8], "val": [9], "test": [3]},
}


@dataclass
class ReferFolder:
    """What will be written; tests spoil a part of it and call `write`."""

    root: Path
    refs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    instances: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    images: str = "images/train2014"

    def image_path(self, image_id: int) -> Path:
        return self.root / self.images / f"COCO_train2014_{image_id:012d}.jpg"

    def refs_path(self, dataset: str) -> Path:
        return self.root / dataset / f"refs({'umd' if dataset == 'refcocog' else 'unc'}).p"

    def write(self) -> Path:
        for dataset, refs in self.refs.items():
            (self.root / dataset).mkdir(parents=True, exist_ok=True)
            self.refs_path(dataset).write_bytes(pickle.dumps(refs, 2))
            (self.root / dataset / "instances.json").write_text(json.dumps(self.instances[dataset]))
        (self.root / self.images).mkdir(parents=True, exist_ok=True)
        for image_id in sorted({i["id"] for d in self.instances.values() for i in d["images"]}):
            pixels = np.random.default_rng(image_id).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.image_path(image_id))
        return self.root


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


@pytest.fixture
def refer_folder(tmp_path: Path) -> ReferFolder:
    """Two refs an image: a left object (2 sentences) and a right one (3 sentences)."""
    folder = ReferFolder(tmp_path / "data")
    for dataset, splits in SPLITS.items():
        refs: list[dict[str, Any]] = []
        images, annotations = [], []
        sent_id = 0
        for split, image_ids in splits.items():
            for image_id in image_ids:
                images.append(
                    {
                        "id": image_id,
                        "file_name": f"COCO_train2014_{image_id:012d}.jpg",
                        "width": WIDTH,
                        "height": HEIGHT,
                    }
                )
                for side in (0, 1):
                    ann_id = 10 * image_id + side
                    polygon = _rectangle(4 + 20 * side, 5, 16 + 20 * side, 25)
                    annotations.append(
                        {"id": ann_id, "image_id": image_id, "segmentation": [polygon], "iscrowd": 0, "category_id": 1}
                    )
                    sentences = []
                    for k in range(2 + side):
                        text = f"{('left', 'right')[side]} thing {k} of {dataset}"
                        sentences.append(
                            {"sent_id": sent_id, "sent": text, "raw": text.upper(), "tokens": text.split()}
                        )
                        sent_id += 1
                    refs.append(
                        {
                            "ref_id": len(refs),
                            "ann_id": ann_id,
                            "image_id": image_id,
                            "split": split,
                            "sentences": sentences,
                            "sent_ids": [s["sent_id"] for s in sentences],
                            "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",  # with REFER's suffix
                            "category_id": 1,
                        }
                    )
        folder.refs[dataset] = refs
        folder.instances[dataset] = {"images": images, "annotations": annotations, "categories": []}
    return folder


@dataclass
class SourceWorld:
    """Writes sources of `deris-llm data prepare` and prepares them."""

    folder: Path
    root: Path  # where prepared sets go
    square = ((4, 5, 16, 5, 16, 25, 4, 25),)  # polygons of an object
    other = ((24, 5, 36, 5, 36, 25, 24, 25),)

    def images(self, *names: str, size: tuple[int, int] = (WIDTH, HEIGHT), folder: Path | None = None) -> Path:
        """Images of noise, each another; returns their folder."""
        folder = self.folder if folder is None else folder
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            random = np.random.default_rng([ord(letter) for letter in name])
            Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        return folder

    def lines(self, *lines: dict[str, Any] | str | bytes, file: str = "train.jsonl") -> Path:
        """A JSONL file; texts and bytes are written as they are."""
        encoded = [
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / file).write_bytes(b"\n".join(encoded) + b"\n")
        return self.folder / file

    def prepare(self, source: Path, name: str = "mine", *, format: str = "jsonl", **options: Any) -> Prepared:
        return prepare(PrepareOptions(format=format, source=str(source), out=self.root / name, **options))

    def is_untouched(self) -> bool:
        """Nothing was written below the root."""
        return not self.root.exists() or not list(self.root.iterdir())


@pytest.fixture
def world(tmp_path: Path) -> SourceWorld:
    return SourceWorld(tmp_path / "source", tmp_path / "root")


@pytest.fixture
def refer_root(refer_folder: ReferFolder) -> Path:
    return refer_folder.write()


@pytest.fixture
def make_records() -> Callable[..., list[ReferringRecord]]:
    """Records without files: ``make_records([3, 1])`` gives 3 phrases of image 0 and 1 of image 1."""

    def make(phrases_by_image: list[int]) -> list[ReferringRecord]:
        square = InstanceAnnotation(1, [_rectangle(2, 2, 9, 9)])
        return [
            ReferringRecord(
                f"refcoco/train/{i}-{k}",
                "refcoco",
                "train",
                f"image{i}",
                f"image{i}.jpg",
                10,
                10,
                f"phrase {k}",
                (square,),
            )
            for i, count in enumerate(phrases_by_image)
            for k in range(count)
        ]

    return make


class LengthProcessor:
    """The smallest honest processor: image means and character codes, so tests can tell rows apart."""

    def __call__(self, images: list[Image.Image], phrases: tuple[str, ...], image_index: list[int]) -> CognitionInputs:
        assert len(phrases) == len(image_index)
        length = max(map(len, phrases))
        padding = torch.tensor([[k >= len(p) for k in range(length)] for p in phrases])
        means = [np.asarray(image, dtype=np.float32).mean((0, 1)).tolist() for image in images]
        return CognitionInputs(
            pixel_values=torch.tensor(means)[:, :, None, None],
            input_ids=torch.tensor([[ord(c) for c in p.ljust(length)] for p in phrases]),
            token_padding_mask=padding,
            text_feature_mask=~padding,
        )


@pytest.fixture
def processor() -> LengthProcessor:
    return LengthProcessor()
