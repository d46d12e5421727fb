"""What reads foreign input: for each reader a valid source, the files in it that are spoiled, and the command that reads it.

A reader's `run` is called in the folder of a case: `in/` has the source, `out/` takes what is written, `outside/` must not be
read. Commands are given as their arguments, with these folders named relative to the case.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts.rehearse import hostile_content

WIDTH, HEIGHT = 40, 30
_LEFT = [4, 5, 16, 5, 16, 25, 4, 25]
_RIGHT = [24, 5, 36, 5, 36, 25, 24, 25]
_FRAMES = ("00000", "00005")
_VIDEO = "aa"


@dataclass(frozen=True)
class Reader:
    """One way in which foreign input is read."""

    name: str
    write: Callable[[Path], None]  # writes a valid source into a folder
    files: Mapping[str, str]  # glob in the source -> kind of file, as of `hostile_content.of_kind`
    run: Callable[[], int]  # in the folder of a case; returns an exit status
    is_accepted: bool = True  # the valid source is; otherwise it has a clear error, as weights of no real model
    may_write: tuple[str, ...] = ("out",)  # folders of a case
    prepare: Callable[[], object] = field(default=lambda: None)  # in the parent process, before any case


def _command(*arguments: str) -> Callable[[], int]:
    def run() -> int:
        from deris_llm.cli.main import main

        return main(["--debug", *arguments])

    return run


def _prepare(form: str, *more: str, source: str = "in", name: str = "mine") -> Callable[[], int]:
    return _command("data", "prepare", "--format", form, "--source", source, "--out", f"out/{name}", *more)


# -- sources -----------------------------------------------------------------------------------------------------------


def write_image(path: Path, seed: int = 0, **options: Any) -> None:
    """An image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def _write_mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:25, 4:16] = 255
    Image.fromarray(mask).save(path)


def _dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _coco_name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


def _instances(numbers: Sequence[int]) -> dict[str, Any]:
    return {
        "images": [{"id": n, "file_name": _coco_name(n), "width": WIDTH, "height": HEIGHT} for n in numbers],
        "annotations": [
            {"id": 10 * n + k, "image_id": n, "segmentation": [side], "iscrowd": 0, "category_id": 1}
            for n in numbers
            for k, side in enumerate((_LEFT, _RIGHT))
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }


def _refs(numbers: Sequence[int], *, several: bool) -> list[dict[str, Any]]:
    return [
        {
            "ref_id": n,
            "ann_id": [10 * n, 10 * n + 1] if several else 10 * n,
            "image_id": n,
            "split": "val" if n == numbers[-1] else "train",
            "sentences": [{"sent_id": n, "sent": f"left thing {n}", "raw": "Left thing", "tokens": ["left", "thing"]}],
            "category_id": 1,
        }
        for n in numbers
    ]


def _write_refer(folder: Path) -> None:
    for number in (1, 2, 3):
        write_image(folder / "images/train2014" / _coco_name(number), number)
    for name, several in (("refcoco", False), ("grefcoco", True)):
        _dump(folder / name / "instances.json", _instances((1, 2, 3)))
        refs = _refs((1, 2, 3), several=several)
        if several:
            _dump(folder / name / "grefs(unc).json", refs)
        else:
            (folder / name / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))


def _write_coco(folder: Path) -> None:
    for number in (1, 2):
        write_image(folder / "images" / _coco_name(number), number)
    _dump(folder / "instances_train.json", _instances((1, 2)))


def _write_jsonl(folder: Path) -> None:
    for number, name in enumerate(("a.png", "b.png", "c.jpg")):
        write_image(folder / name, number)
    _write_mask(folder / "mask.png")
    rle = {"size": [HEIGHT, WIDTH], "counts": [150, 600, 450]}
    lines = [
        {"image": "a.png", "phrase": "the red car", "polygons": [_LEFT], "id": "u-1", "category": "car"},
        {"image": "b.png", "phrase": "a dog", "rle": rle, "split": "train", "width": WIDTH, "height": HEIGHT},
        {"image": "c.jpg", "phrase": "the cat", "png": "mask.png"},
        {"image": "c.jpg", "phrase": "a unicorn", "no_target": True, "raw": "A unicorn"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    (folder / "val.jsonl").write_text(text, encoding="utf-8")


def _write_labelme(folder: Path) -> None:
    points = [[4, 5], [16, 5], [16, 25], [4, 25]]
    shape = {"label": "dog", "shape_type": "polygon", "points": points, "group_id": None, "description": "the left dog"}
    content = {
        "imagePath": "a.png",
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
        "shapes": [shape, {**shape, "description": "", "points": [[x + 20, y] for x, y in points]}],
    }
    write_image(folder / "a.png")
    _dump(folder / "a.json", content)


def _write_reasonseg(folder: Path) -> None:
    points = [[4, 5], [16, 5], [16, 25], [4, 25]]
    inside = [[6, 8], [10, 8], [10, 12]]
    shapes = [
        {"label": label, "labels": [label], "shape_type": "polygon", "points": drawn}
        for label, drawn in (("target", points), ("ignore", inside))
    ]
    for split in ("train", "val"):
        write_image(folder / split / "1.jpg", len(split))
        _dump(
            folder / split / "1.json",
            {"text": ["something that barks"], "is_sentence": True, "shapes": shapes[: 1 + (split == "val")][::-1]},
        )


def _write_cvat(folder: Path) -> None:
    write_image(folder / "images/a.png")
    (folder / "annotations.xml").write_text(
        '<annotations><version>1.1</version><image id="0" name="a.png" subset="train" width="40" height="30">'
        '<polygon label="dog" points="4.0,5.0;16.0,5.0;16.0,25.0" group_id="1"><attribute name="caption">left</attribute></polygon>'
        '<ellipse label="cat" cx="20" cy="15" rx="5" ry="4"/><mask label="cow" rle="3, 5, 12" left="10" top="20" width="5" height="4"/>'
        "</image></annotations>",
        encoding="utf-8",
    )


def _write_seqtr(folder: Path) -> None:
    write_image(folder / "images/train2014" / _coco_name(5))
    entry = {"image_id": 5, "bbox": [4, 5, 12, 20], "category_id": 1, "expressions": ["left one", "a"], "mask": [_LEFT]}
    _dump(
        folder / "annotations/refcoco/instances.json",
        {"train": [{**entry, "width": WIDTH, "height": HEIGHT}], "val": [entry]},
    )


def _write_refsegrs(folder: Path) -> None:
    write_image(folder / "images/7.tif")
    _write_mask(folder / "masks/7.tif")
    (folder / "output_phrase_train.txt").write_text("7 paved road\n7 the road\n", encoding="utf-8")


def _write_hf(folder: Path) -> None:
    import datasets

    path = folder / "a.png"
    write_image(path)
    rows = [
        {
            "image": {"bytes": path.read_bytes(), "path": None},
            "phrase": "the dog",
            "polygons": [[float(v) for v in _LEFT]],
        }
    ]
    path.unlink()
    datasets.Dataset.from_list(rows).save_to_disk(folder / "train")


def _write_labels(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(_FRAMES):
        labels = np.zeros((HEIGHT, WIDTH), np.uint8)
        labels[5:25, 4 + number : 16] = 1
        image = Image.fromarray(labels, mode="P")
        image.putpalette([0, 0, 0, *[value % 256 for value in range(3, 768)]])
        image.save(folder / f"{name}.png")


def _write_frames(folder: Path) -> None:
    for number, name in enumerate(_FRAMES):
        write_image(folder / f"{name}.jpg", number)


def _write_mevis(folder: Path) -> None:
    track = [{"size": [HEIGHT, WIDTH], "counts": [150, 600, 450]}, None]
    sentences = {
        "0": {"exp": "the upper one", "obj_id": [0], "anno_id": [7]},
        "1": {"exp": "none", "obj_id": [], "anno_id": []},
    }
    _dump(
        folder / "valid_u/meta_expressions.json",
        {"videos": {_VIDEO: {"expressions": sentences, "frames": list(_FRAMES)}}},
    )
    _dump(folder / "valid_u/mask_dict.json", {"7": track})
    _write_frames(folder / "valid_u/JPEGImages" / _VIDEO)


def _write_ytvos(folder: Path) -> None:
    video = {"expressions": {"0": {"exp": "a car", "obj_id": "1"}}, "frames": list(_FRAMES)}
    _dump(folder / "meta_expressions/train/meta_expressions.json", {"videos": {_VIDEO: video}})
    _dump(folder / "train/meta.json", {"videos": {_VIDEO: {"objects": {"1": {"category": "sedan"}}}}})
    _write_frames(folder / "train/JPEGImages" / _VIDEO)
    _write_labels(folder / "train/Annotations" / _VIDEO)


def _write_davis(folder: Path) -> None:
    for annotator in ("annot1", "annot1_full_video", "annot2", "annot2_full_video"):
        path = folder / f"davis_text_annotations/Davis17_{annotator}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{_VIDEO} 1 "the car"\n', encoding="utf-8")
    lists = folder / "DAVIS/ImageSets/2017"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text(f"{_VIDEO}\n")
    _write_labels(folder / "DAVIS/Annotations_unsupervised/480p" / _VIDEO)
    _write_frames(folder / "DAVIS/JPEGImages/480p" / _VIDEO)


def _write_prepared(folder: Path) -> None:
    """A prepared set in a data root, beside its images."""
    from deris_llm.data.store.prepare import PrepareOptions, prepare

    _write_jsonl(folder / "source")
    prepare(PrepareOptions("jsonl", str(folder / "source"), folder / "mine"))


def _write_predictions(folder: Path) -> None:
    _write_refer(folder)
    mask = {"size": [HEIGHT, WIDTH], "counts": [150, 600, 450]}
    line = {
        "phrase_id": "refcoco/val/3",
        "mask": mask,
        "score": 0.9,
        "presence": 0.5,
        "boxes": [[4, 5, 16, 25]],
        "image": _coco_name(3),
    }
    (folder / "pred.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    _write_mask(folder / "masks/refcoco/val/3.png")
    shutil.copytree(folder / "refcoco", folder / "unused")


def _write_video_predictions(folder: Path) -> None:
    _write_mevis(folder / "data")
    for sentence in ("0", "1"):
        for frame in _FRAMES:
            _write_mask(folder / "pred" / _VIDEO / sentence / f"{frame}.png")


def _write_report(folder: Path) -> None:
    """What `deris-llm score` wrote about a prediction."""
    from deris_llm.evaluation.score import run_score

    _write_predictions(folder)
    run_score(folder / "pred.jsonl", data_root=folder, split="refcoco/val", out=folder / "report", workers=1)


def _write_config(folder: Path) -> None:
    (folder / "config.yaml").write_text(
        "base: tiny-refcoco\nname: mine\ndata:\n  train: [refcoco]\n  eval: [refcoco/val]\ntraining:\n  epochs: 3\n"
        "  learning_rate: 1e-4\ncognition:\n  lora:\n    r: 4\n",
        encoding="utf-8",
    )


def _write_overrides(folder: Path) -> None:
    _dump(folder / "overrides.json", ["training.epochs=3"])


def _set() -> int:
    """`config show --set TEXT` with the texts of a file, which a shell would pass."""
    texts = json.loads(Path("in/overrides.json").read_bytes())
    return _command(
        "config", "show", "--config", "tiny-refcoco", "--set", *(text.replace("\0", "") for text in texts)
    )()


def _write_checkpoint(folder: Path) -> None:
    """A copy of the checkpoint that the package ships, without checksums, which would refuse any change."""
    from deris_llm.checkpoints.layout import CHECKSUMS_FILE, shipped_checkpoint

    shutil.copytree(shipped_checkpoint("builtin:tiny"), folder / "best")
    (folder / "best" / CHECKSUMS_FILE).unlink(missing_ok=True)
    write_image(folder / "a.png")


def _write_checked_checkpoint(folder: Path) -> None:
    from deris_llm.checkpoints.layout import write_checksums

    _write_checkpoint(folder)
    write_checksums(folder / "best")


def _load_checkpoint() -> int:
    from deris_llm.serving.pipeline import DerisPipeline

    DerisPipeline.from_pretrained("in/best")
    return 0


def _check_checkpoint() -> int:
    from deris_llm.checkpoints.layout import find_checkpoint

    find_checkpoint("in/best")
    return 0


def _write_weights(names: Mapping[str, Sequence[int]], *, file: str = "weights.pth") -> Callable[[Path], None]:
    """Weights with a few names of a model, which are no whole model."""

    def write(folder: Path) -> None:
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: torch.zeros(*shape) for name, shape in names.items()}
        torch.save({"model": tensors, "epoch": 3}, folder / file)

    return write


_SWIN = {
    "backbone.patch_embed.proj.weight": (8, 3, 4, 4),
    "backbone.layers.0.blocks.0.attn.relative_position_bias_table": (169, 2),
    "backbone.layers.999999999.blocks.999999999.attn.qkv.weight": (2, 2),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.attention_weights.weight": (24, 8),
}
_BEIT3 = {
    "beit3.vision_embed.proj.weight": (768, 3, 16, 16),
    "beit3.text_embed.weight": (10, 768),
    "beit3.encoder.embed_positions.A.weight": (7, 768),
    "beit3.encoder.embed_positions.B.weight": (9, 768),
    "beit3.encoder.layers.0.ffn.A.fc1.weight": (9, 768),
    "beit3.encoder.layers.99999999999999999999.ffn.A.fc1.weight": (9, 768),
}
_DERIS = {
    "understanding_branch.init_query.weight": (10, 768),
    "perception_branch.hier_vision_encoder.patch_embed.proj.bias": (96,),
    "understanding_branch.vis_enc.beit3.encoder.layers.0.ffn.A.fc1.weight": (9, 768),
}


def _write_detectron2(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in list(_SWIN.items())[:2]}
    (folder / "weights.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, 2))


def _write_safetensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: torch.zeros(*shape) for name, shape in _DERIS.items()}, folder / "weights.safetensors", {"format": "pt"}
    )


def _write_tokenizer(folder: Path) -> None:
    _write_weights(_BEIT3)(folder)
    (folder / "beit3.spm").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02" * 4)


# -- the demo ----------------------------------------------------------------------------------------------------------

_PIPELINES: list[Any] = []


def _load_pipeline() -> None:
    from deris_llm.serving.pipeline import DerisPipeline

    if not _PIPELINES:
        _PIPELINES.append(DerisPipeline.from_pretrained("builtin:tiny"))


def _write_request(folder: Path) -> None:
    write_image(folder / "a.png")
    _dump(folder / "request.json", {"image": "a.png", "phrases": ["the red circle", "a dog"], "score": 0.5})


def _request() -> int:
    """A request as the demo's page makes it of what a client sent, and every file that is given away."""
    from deris_llm.serving.demo import files, requests, views
    from deris_llm.serving.demo.service import DemoService

    sent = json.loads(Path("in/request.json").read_bytes())
    sent = sent if isinstance(sent, dict) else {"image": sent}
    service = DemoService(_PIPELINES)
    given = sent.get("image")
    image = requests.upload(f"in/{given}" if isinstance(given, str) else given, Path("in").resolve())
    rule = requests.rule_of(*(sent.get(key) for key in ("score", "selection", "presence")))
    (inspection,) = service.inspect(image, requests.lines_of(sent.get("phrases")))
    requests.phrase_index(sent.get("chosen"), inspection)
    answers = rule.answers(inspection)
    views.annotated_image(inspection, answers)
    Path("out/legend.html").write_text(views.legend(answers), encoding="utf-8")
    files.write_masks(image.name, answers, Path("out/masks.zip"))
    files.write_answers(image.name, answers, Path("out/answers.json"))
    files.predict_command("builtin:tiny", image.name, inspection, rule)
    service.close()
    return 0


# -- the list ----------------------------------------------------------------------------------------------------------

_PICTURES = {"*.png": "image", "*.jpg": "image"}
_OWN = ("out", "in/.deris_llm")

READERS: Sequence[Reader] = (
    Reader("refer pickle", _write_refer, {"refcoco/refs*": "pickle"}, _prepare("refer", name="refcoco")),
    Reader(
        "refer instances",
        _write_refer,
        {"refcoco/instances.json": "json", "images/*/*1.jpg": "image"},
        _prepare("refer", name="refcoco"),
    ),
    Reader(
        "refer, first use",
        _write_refer,
        {"refcoco/*.json": "json", "refcoco/refs*": "pickle"},
        _command("data", "check", "--root", "in", "--datasets", "refcoco", "--images"),
        may_write=_OWN,
    ),
    Reader(
        "grefcoco JSON",
        _write_refer,
        {"grefcoco/grefs*": "json", "grefcoco/instances.json": "json"},
        _prepare("refer", name="grefcoco"),
    ),
    Reader("coco", _write_coco, {"*.json": "json", "images/*1.jpg": "image"}, _prepare("coco")),
    Reader("jsonl", _write_jsonl, {"train.jsonl": "jsonl", **_PICTURES}, _prepare("jsonl")),
    Reader("labelme", _write_labelme, {"*.json": "labelme", "*.png": "image"}, _prepare("labelme")),
    Reader("reasonseg", _write_reasonseg, {"*/*.json": "json", "*/*.jpg": "image"}, _prepare("labelme")),
    Reader("cvat", _write_cvat, {"*.xml": "xml", "images/*": "image"}, _prepare("cvat")),
    Reader("seqtr", _write_seqtr, {"annotations/*/*.json": "json", "images/*/*": "image"}, _prepare("seqtr")),
    Reader(
        "refsegrs",
        _write_refsegrs,
        {"*.txt": "text", "masks/*": "image", "images/*": "image"},
        _prepare("refsegrs", name="refsegrs"),
    ),
    Reader("hf", _write_hf, {"train/*.json": "json", "train/*.arrow": "bytes"}, _prepare("hf", source="in/train")),
    Reader(
        "mevis", _write_mevis, {"valid_u/*.json": "json", "valid_u/*/*/*.jpg": "image"}, _prepare("mevis", name="mevis")
    ),
    Reader(
        "ref-ytvos",
        _write_ytvos,
        {"meta_expressions/*/*.json": "json", "train/meta.json": "json", "train/Annotations/*/*": "image"},
        _prepare("ref-ytvos", name="ref-ytvos"),
    ),
    Reader(
        "ref-davis",
        _write_davis,
        {"davis_text_annotations/*1.txt": "text", "DAVIS/ImageSets/*/*": "text", "DAVIS/Ann*/*/*/*": "image"},
        _prepare("ref-davis", name="ref-davis"),
    ),
    Reader(
        "own data",
        _write_jsonl,
        {"train.jsonl": "jsonl", **_PICTURES},
        _command("data", "show", "--data", "in", "--out", "out/page.html"),
        may_write=_OWN,
    ),
    Reader(
        "prepared set",
        _write_prepared,
        {"mine/manifest.json": "json", "mine/arrow/[it]*": "bytes"},
        _command("data", "show", "mine/train", "--root", "in", "--out", "out/page.html"),
    ),
    Reader(
        "predictions",
        _write_predictions,
        {"pred.jsonl": "jsonl"},
        _command(
            "score",
            "in/pred.jsonl",
            "--data",
            "in",
            "--split",
            "refcoco/val",
            "--output",
            "out/score",
            "--workers",
            "1",
        ),
        may_write=_OWN,
    ),
    Reader(
        "predictions as masks",
        _write_predictions,
        {"masks/*/*/*": "given image"},
        _command(
            "score", "in/masks", "--data", "in", "--split", "refcoco/val", "--output", "out/score", "--workers", "1"
        ),
        may_write=_OWN,
    ),
    Reader(
        "predictions of videos",
        _write_video_predictions,
        {"pred/*/*/*.png": "given image", "data/valid_u/*.json": "json"},
        _command(
            "score",
            "in/pred",
            "--format",
            "mevis",
            "--source",
            "in/data",
            "--split",
            "valid_u",
            "--output",
            "out/score",
            "--workers",
            "1",
        ),
    ),
    Reader(
        "report",
        _write_report,
        {"report/*.json": "json", "report/*/*.json": "json", "report/*.jsonl": "jsonl", "report/*/*.jsonl": "jsonl"},
        _command("report", "in/report", "--data", "in", "--out", "out/page.html"),
        may_write=_OWN,
    ),
    Reader(
        "run config", _write_config, {"config.yaml": "yaml"}, _command("config", "show", "--config", "in/config.yaml")
    ),
    Reader("overrides", _write_overrides, {"overrides.json": "overrides"}, _set),
    Reader(
        "checkpoint",
        _write_checkpoint,
        {
            "best/config.yaml": "yaml",
            "best/base_weights.json": "json",
            "best/trainable.safetensors": "safetensors",
        },
        _load_checkpoint,
    ),
    Reader(
        "export",
        _write_checkpoint,
        {"best/*.json": "json"},
        _command("convert", "export", "in/best", "--out", "out/new"),
    ),
    Reader(
        "checksums",
        _write_checked_checkpoint,
        {"best/checksums.json": "json", "best/trainable.safetensors": "bytes"},
        _check_checkpoint,
    ),
    Reader(
        "predict, image",
        _write_request,
        {"a.png": "given image"},
        _command(
            "predict",
            "--checkpoint",
            "builtin:tiny",
            "--image",
            "in/a.png",
            "--phrase",
            "a dog",
            "--out",
            "out/predict",
            "--quiet",
        ),
    ),
    Reader(
        "convert mask2former",
        _write_weights(_SWIN),
        {"*.pth": "torch"},
        _command("convert", "mask2former", "in/weights.pth", "--out", "out/new"),
        is_accepted=False,
    ),
    Reader(
        "convert, detectron2",
        _write_detectron2,
        {"*.pkl": "torch"},
        _command("convert", "mask2former", "in/weights.pkl", "--out", "out/new"),
        is_accepted=False,
    ),
    Reader(
        "convert beit3",
        _write_tokenizer,
        {"*.pth": "torch", "*.spm": "bytes"},
        _command("convert", "beit3", "in/weights.pth", "--tokenizer", "in/beit3.spm", "--out", "out/new"),
        is_accepted=False,
    ),
    Reader(
        "convert deris",
        _write_weights(_DERIS),
        {"*.pth": "torch"},
        _command("convert", "deris", "in/weights.pth", "--out", "out/new"),
        is_accepted=False,
    ),
    Reader(
        "convert, safetensors",
        _write_safetensors,
        {"*.safetensors": "safetensors"},
        _command("convert", "deris", "in/weights.safetensors", "--out", "out/new"),
        is_accepted=False,
    ),
    Reader("demo, requests", _write_request, {"request.json": "request"}, _request, prepare=_load_pipeline),
    Reader("demo, uploads", _write_request, {"a.png": "given image"}, _request, prepare=_load_pipeline),
)
"""Every reader."""


def kinds_of(reader: Reader, folder: Path) -> list[tuple[str, str]]:
    """The files of a reader's source that are spoiled, relative to it, with their kinds."""
    found: dict[str, str] = {}
    for pattern, kind in reader.files.items():
        for path in sorted(folder.glob(pattern)):
            found.setdefault(str(path.relative_to(folder)), kind)
    return list(found.items())


def spoilings_of(kind: str) -> list[hostile_content.Spoiling]:
    """The ways to spoil a file of a kind."""
    return hostile_content.of_kind(kind)
