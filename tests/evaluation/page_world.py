"""An evaluation's folder without a model: pictures, predictions and a report, for the page's tests (imported by path)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deris_llm.data.masks import encode_mask

SPLIT_COUNTS = {"refcoco": {"val": 4, "testA": 3}, "grefcoco": {"val": 4}}
HOSTILE = (
    '<script>alert("1")</script> & \x00\ud800 \u202e"><img src=http://evil.example/x.png onerror=alert(1)> </style>'
)


def write_data(root: Path, phrases: dict[str, str] | None = None) -> Path:
    """REFER's files over six pictures of 80 x 60 px with two rectangles each; `phrases` replaces texts by phrase id."""
    images = root / "images" / "train2014"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    names = {number: f"COCO_train2014_{number:012d}.jpg" for number in range(1, 7)}
    for name in names.values():
        Image.fromarray(generator.integers(60, 200, (60, 80, 3), dtype=np.uint8)).save(images / name)
    boxes = [(4, 6, 30, 40), (46, 10, 28, 44)]  # x, y, w, h
    annotations = [
        {
            "id": 10 * image + k, "image_id": image, "category_id": 1, "iscrowd": 0, "area": w * h, "bbox": [x, y, w, h],
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for image in names
        for k, (x, y, w, h) in enumerate(boxes)
    ]  # fmt: skip
    instances = {
        "images": [{"id": i, "file_name": n, "width": 80, "height": 60} for i, n in names.items()],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "box"}],
    }
    for dataset, splits in SPLIT_COUNTS.items():
        refs, number = [], 0
        for split, num_images in splits.items():
            for image in range(1, num_images + 1):
                for k in range(4):
                    number += 1
                    sent = (phrases or {}).get(f"{dataset}/{split}/{number}", f"box {k} of picture {image}")
                    found = [10 * image + k % 2] if dataset == "refcoco" or k < 3 else [-1]
                    refs.append(
                        {
                            "ref_id": number, "ann_id": found if dataset == "grefcoco" else found[0], "image_id": image,
                            "split": split, "file_name": names[image], "category_id": 1,
                            "sentences": [{"sent_id": number, "sent": sent, "raw": sent, "tokens": sent.split()}],
                        }
                    )  # fmt: skip
        folder = root / dataset
        folder.mkdir()
        (folder / "instances.json").write_text(json.dumps(instances))
        if dataset == "grefcoco":
            (folder / "grefs(unc).json").write_text(json.dumps(refs))
        else:
            import pickle

            (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
    return root


def write_evaluation(folder: Path, *, shift: float = 0.0, seed: int = 0, phrases: dict[str, str] | None = None) -> Path:
    """A report and predictions over `write_data`'s phrases; numbers are not those of the masks, IoU is `shift`ed percent."""
    generator = np.random.default_rng(seed)
    (folder / "predictions").mkdir(parents=True)
    splits: dict[str, Any] = {}
    for dataset, found in SPLIT_COUNTS.items():
        number = 0
        for split, num_images in found.items():
            lines = []
            for image in range(1, num_images + 1):
                for k in range(4):
                    number += 1
                    mask = np.zeros((60, 80), dtype=bool)
                    mask[8:40, 5 + 8 * k : 40] = True
                    has_target = dataset == "refcoco" or k < 3
                    says_target = dataset == "refcoco" or (image + k) % 4 != 0
                    iou = float(np.clip(generator.uniform(0, 100) + shift, 0, 100)) if says_target else 0.0
                    iou = iou if has_target else 100.0 * (not says_target)
                    phrase_id = f"{dataset}/{split}/{number}"
                    line = {
                        "phrase_id": phrase_id, "image": f"COCO_train2014_{image:012d}.jpg",
                        "phrase": (phrases or {}).get(phrase_id, f"box {k} of picture {image}"),
                        "mask": encode_mask(mask), "iou": {"original": round(iou, 3)},
                        "oracle_iou": {"original": round(min(iou + 20, 100), 3)}, "top_scores": [0.9, 0.2], "presence": 0.8,
                        "has_target": has_target, "says_target": says_target,
                    }  # fmt: skip
                    lines.append(line)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "predictions" / f"{dataset}_{split}.jsonl").write_text(text)
            mean = float(np.mean([line["iou"]["original"] for line in lines]))
            counts = {"n_phrases": len(lines), "n_images": num_images}
            if dataset == "refcoco":
                values = {"mIoU": mean, "oIoU": 40.1234, "oracle_mIoU": min(mean + 12.5, 100)}
                values |= {f"Pr@0.{i}": 100.0 - 10.4321 * i for i in range(5, 10)}
            else:
                values = {
                    "gIoU": mean, "cIoU": 33.3333, "N-acc": 25.0, "T-acc": 75.0, "Pr@0.7": 31.25, "Pr@0.8": 20.5,
                    "Pr@0.9": 5.125, "F1": 12.3456, "oracle_gIoU": 88.8888, "always_empty_gIoU": 25.0,
                    "always_empty_cIoU": 0.0, "never_empty_gIoU": 9.8765, "never_empty_cIoU": 8.7654, "n_no_target": 4,
                }  # fmt: skip
            numbers = {name: round(value, 4) for name, value in values.items()} | counts
            second = numbers | {name: value + 0.0625 for name, value in numbers.items() if name in ("mIoU", "gIoU")}
            splits[f"{dataset}/{split}"] = {"original": numbers, "deris": second}
    report = {
        "splits": splits,
        "control": {"refcoco/val": {"original": {"mIoU": 4.3211, "n_phrases": 12}}},
        "step0": {},
        "timing": {"evaluate splits refcoco/val": 1.25},
        "versions": {"torch": "2.14.1", "protocols": {"original": "protocol `original` (0123abcd): as <it> is."}},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder
