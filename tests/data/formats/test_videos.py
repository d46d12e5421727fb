"""Videos of three layouts become images and phrases; what is wrong with them is named, and nothing is lost."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deris_llm.cli.data import add_data_commands
from deris_llm.data.check import known_num_images, known_num_phrases
from deris_llm.data.errors import DataError
from deris_llm.data.formats.video import evenly_spaced
from deris_llm.data.masks import encode_mask
from deris_llm.data.sources import has_truth, read_split
from deris_llm.evaluation.truth import merged_truth
from deris_llm.structures import ReferringRecord

HEIGHT, WIDTH = 16, 20
FRAMES = ("00000", "00005", "00010", "00015")


def _square(t: int, top: int) -> np.ndarray:
    """An object that moves right by 4 px a frame."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top : top + 5, 4 * t : 4 * t + 5] = True
    return mask


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_frames(folder: Path, names: tuple[str, ...] = FRAMES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for t, name in enumerate(names):
        random = np.random.default_rng([t, *map(ord, str(folder))])
        Image.fromarray(random.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(folder / f"{name}.jpg")


def _write_labels(folder: Path, *, absent: tuple[int, ...] = (), void: bool = False) -> None:
    """Palette images of object 1 above object 3, which is in no frame of `absent`."""
    folder.mkdir(parents=True, exist_ok=True)
    for t, name in enumerate(FRAMES):
        labels = np.where(_square(t, 1), 1, 0).astype(np.uint8)
        labels[_square(t, 9) & (t not in absent)] = 3
        if void:
            labels[0] = 255
        image = Image.fromarray(labels, mode="P")
        image.putpalette([0, 0, 0, *[value % 256 for value in range(3, 768)]])  # of 256 colours: Pillow stores fewer bits of a shorter one, and 255 becomes 3
        image.save(folder / f"{name}.png")


def _sentences(*texts: str, **fields: Any) -> dict[str, Any]:
    return {str(i): {"exp": text, **{key: value[i] for key, value in fields.items()}} for i, text in enumerate(texts)}


@pytest.fixture
def mevis(world: Any) -> Path:
    """One video a split; object 7 is absent in frame 2."""
    meta = {
        "expressions": _sentences(
            "the upper one", "both", "nothing that flies", obj_id=[[0], [0, 1], []], anno_id=[[7], [7, 8], []]
        ),
        "frames": list(FRAMES),
    }
    tracks = {
        "7": [None if t == 2 else encode_mask(_square(t, 1)) for t in range(4)],
        "8": [encode_mask(_square(t, 9)) for t in range(4)],
    }
    for split in ("train", "valid_u", "valid"):
        folder = world.folder / split
        video = meta if split != "valid" else {**meta, "expressions": _sentences("the upper one", "both")}
        _write_json(folder / "meta_expressions.json", {"videos": {f"{split}-v": video}})
        _write_frames(folder / "JPEGImages" / f"{split}-v")
        if split != "valid":
            _write_json(folder / "mask_dict.json", tracks)
    return world.folder


@pytest.fixture
def ytvos(world: Any) -> Path:
    """Train, two videos of valid of which one belongs to test, and the truth of valid."""
    folder = world.folder
    train = {"expressions": _sentences("a car", "a boat", obj_id=["1", "3"]), "frames": list(FRAMES)}
    hidden = {"expressions": _sentences("a car", "a boat"), "frames": list(FRAMES)}
    _write_json(folder / "meta_expressions/train/meta_expressions.json", {"videos": {"aa": train}})
    _write_json(folder / "meta_expressions/valid/meta_expressions.json", {"videos": {"cc": hidden, "bb": hidden}})
    _write_json(folder / "meta_expressions/test/meta_expressions.json", {"videos": {"cc": hidden}})
    classes = {"objects": {"1": {"category": "sedan"}, "3": {"category": "boat"}}}
    _write_json(folder / "train/meta.json", {"videos": {"aa": classes}})
    _write_json(folder / "valid_gt/meta.json", {"videos": {"bb": classes}})
    _write_json(folder / "valid_gt/obj_id.json", {"bb": {"0": "1", "1": "3"}})
    for split, name in (("train", "aa"), ("valid", "bb"), ("test", "cc")):
        _write_frames(folder / split / "JPEGImages" / name)
    _write_labels(folder / "train/Annotations/aa", absent=(0, 1))
    _write_labels(folder / "valid_gt/Annotations/bb")
    return folder


@pytest.fixture
def davis(world: Any) -> Path:
    """A video whose name the texts misspell, with two objects and void."""
    folder = world.folder
    for k, name in enumerate(("annot1", "annot1_full_video", "annot2", "annot2_full_video")):
        lines = [f'clasic-car {number} "the café {number} of {k}"' for number in (3, 1)]
        path = folder / f"davis_text_annotations/Davis17_{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n\n", "latin-1" if k > 1 else "utf-8")
    lists = folder / "DAVIS/ImageSets/2017"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("")
    (lists / "val.txt").write_text("classic-car\n")
    _write_labels(folder / "DAVIS/Annotations_unsupervised/480p/classic-car", void=True)
    _write_frames(folder / "DAVIS/JPEGImages/480p/classic-car")
    return folder


def _by_frame(records: Any, expression: str) -> list[ReferringRecord]:
    return sorted((r for r in records if r.expression == expression), key=lambda r: r.frame or 0)


def _edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def _edit_video(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes the first video of a `meta_expressions.json` of train."""
    return lambda path: _edit(path, lambda content: change(next(iter(content["videos"].values()))) and None)


# Sources ---------------------------------------------------------------------------------------------------------------


def test_mevis_positions_absence_and_no_target(world: Any, mevis: Path) -> None:
    made = world.prepare(mevis, format="mevis")
    assert [*made.manifest["splits"]] == ["train", "valid_u", "valid"]
    split = made.manifest["splits"]["valid_u"]
    assert (split["num_videos"], split["num_sentences"], split["num_images"], split["num_phrases"]) == (1, 3, 4, 12)
    assert split["num_no_target"] == 5
    records = read_split(world.root, "mine/valid_u")
    assert records[1].phrase_id == "mine/valid_u/valid_u-v/1/00000"
    assert {r.image_id for r in records} == {f"mine/valid_u-v/{name}" for name in FRAMES}
    first = _by_frame(records, "0")
    assert [r.is_no_target for r in first] == [False, False, True, False]
    both = _by_frame(records, "1")
    for t, record in enumerate(both):
        truth = _square(t, 9) | (_square(t, 1) & (t != 2))
        assert (merged_truth(record) == truth).all()
        assert len(record.instances) == 1 + (t != 2)
    assert all(r.is_no_target for r in _by_frame(records, "2"))


def test_mevis_position_in_the_list_counts_not_the_name(world: Any, mevis: Path) -> None:
    _edit_video(lambda video: video.update(frames=list(reversed(FRAMES))))(mevis / "train/meta_expressions.json")
    made = world.prepare(mevis, format="mevis", splits=("train",))
    upper = _by_frame(read_split(world.root, "mine/train"), "0")
    assert [Path(r.image_path).stem for r in upper] == [*reversed(FRAMES)]
    assert (merged_truth(upper[0]) == _square(0, 1)).all()
    assert made.manifest["notes"] == [
        "train: 1 video list frames in another order than that of their names; a frame's position in the list counts: train-v"
    ]


def test_two_annotations_with_one_mask_are_one_referent(world: Any, mevis: Path) -> None:
    _edit(mevis / "train/mask_dict.json", lambda tracks: tracks.update({"8": tracks["7"]}))
    world.prepare(mevis, format="mevis", splits=("train",))
    assert [len(r.instances) for r in _by_frame(read_split(world.root, "mine/train"), "1")] == [1, 1, 0, 1]


def test_ytvos_labels_classes_and_hidden_test(world: Any, ytvos: Path) -> None:
    made = world.prepare(ytvos, format="ref-ytvos", mapping={"valid_videos": "1"})
    assert made.manifest["splits"]["train"]["num_no_target"] == 2
    boats = _by_frame(read_split(world.root, "mine/train"), "1")
    assert {r.category for r in boats} == {"boat"}
    assert [r.is_no_target for r in boats] == [True, True, False, False]
    assert (merged_truth(boats[3]) == _square(3, 9)).all()
    valid = read_split(world.root, "mine/valid")
    assert {r.video for r in valid} == {"bb"}
    assert (merged_truth(_by_frame(valid, "0")[2]) == _square(2, 1)).all()
    assert (has_truth(world.root, "mine/valid"), has_truth(world.root, "mine/test")) == (True, False)
    assert {r.video for r in read_split(world.root, "mine/test")} == {"cc"}


def test_ytvos_valid_without_its_truth(world: Any, ytvos: Path) -> None:
    (ytvos / "valid_gt/obj_id.json").unlink()
    world.prepare(ytvos, format="ref-ytvos", mapping={"valid_videos": "1"}, splits=("valid",))
    assert not any(r.has_truth for r in read_split(world.root, "mine/valid"))


def test_ytvos_counts_the_videos_of_valid(world: Any, ytvos: Path) -> None:
    message = (
        r"expected 202 videos that meta_expressions/test/meta_expressions\.json does not have, got 1 \(of 2; test has 1\)\. Use "
        r".*--mapping valid_videos=1"
    )
    with pytest.raises(DataError, match=message):
        world.prepare(ytvos, format="ref-ytvos")
    world.prepare(ytvos, format="ref-ytvos", splits=("train",))  # is not asked for where valid is not read


def test_davis_four_annotators(world: Any, davis: Path) -> None:
    made = world.prepare(davis, format="ref-davis")
    assert (made.manifest["splits"]["val"]["num_videos"], made.manifest["splits"]["val"]["num_sentences"]) == (1, 8)
    records = read_split(world.root, "mine/val")
    texts = {r.expression: r.phrase for r in records}
    assert texts == {str(4 * i + k): f"the café {number} of {k}" for i, number in enumerate((1, 3)) for k in range(4)}
    lower = _by_frame(records, "6")[1]
    assert (merged_truth(lower) == _square(1, 9)).all()  # void is background


def test_davis_frames_in_the_converted_layout(world: Any, davis: Path) -> None:
    (davis / "valid").mkdir()
    (davis / "DAVIS/JPEGImages/480p").rename(davis / "valid/JPEGImages")
    world.prepare(davis, format="ref-davis")
    assert read_split(world.root, "mine/val")[0].image_path.endswith("valid/JPEGImages/classic-car/00000.jpg")


# Frames that are taken -------------------------------------------------------------------------------------------------


def test_evenly_spaced() -> None:
    assert evenly_spaced(4, None) == evenly_spaced(4, 9) == (0, 1, 2, 3)
    assert evenly_spaced(10, 4) == (0, 3, 6, 9)
    assert evenly_spaced(9, 1) == (4,)
    assert evenly_spaced(0, 3) == ()
    assert all(len(set(evenly_spaced(n, k))) == min(n, k) for n in range(1, 40) for k in range(1, 20))


def test_train_frames_thin_out_train_only(world: Any, mevis: Path) -> None:
    made = world.prepare(mevis, format="mevis", train_frames=2)
    assert [made.manifest["splits"][split]["num_images"] for split in ("train", "valid_u", "valid")] == [2, 4, 4]
    assert [r.frame for r in _by_frame(read_split(world.root, "mine/train"), "0")] == [0, 3]
    assert made.manifest["notes"] == [
        "train: 2 of 4 frames of 1 video are taken, at most 2 evenly spaced ones of each (--train-frames 2); other splits keep all"
    ]
    assert made.manifest["source"]["train_frames"] == 2
    assert world.prepare(mevis, format="mevis", train_frames=2).was_there
    with pytest.raises(DataError, match="with other train_frames"):
        world.prepare(mevis, format="mevis")


def test_options_that_videos_do_not_have(world: Any, mevis: Path) -> None:
    with pytest.raises(DataError, match=r"--val-share 0\.1: .* frames of one video would come into both"):
        world.prepare(mevis, format="mevis", val_share=0.1)
    with pytest.raises(DataError, match=r"--images .*: expected none with --format mevis.*--follow-links"):
        world.prepare(mevis, format="mevis", images=mevis)
    with pytest.raises(DataError, match=r"--train-frames 2: .* got --format jsonl"):
        world.prepare(world.lines({"image": "a.png", "phrase": "a", "no_target": True}), train_frames=2)


def test_sentences_group_the_rows(world: Any, mevis: Path) -> None:
    world.prepare(mevis, format="mevis")
    records = read_split(world.root, "mine/train")
    groups = records.sentences()
    assert {key: [records[int(row)].frame for row in rows] for key, rows in groups.items()} == {
        ("train-v", str(i)): [0, 1, 2, 3] for i in range(3)
    }
    world.images("a.png")
    world.prepare(world.lines({"image": "a.png", "phrase": "a", "no_target": True}), "images")
    assert read_split(world.root, "images/train").sentences() == {}


# What is wrong ---------------------------------------------------------------------------------------------------------


def _check_fault(world: Any, source: Path, data_format: str, message: str, lost: dict[str, int], **options: Any) -> None:
    """The fault stops the preparation and leaves nothing; with `skip_bad` it is counted, and the rest can be used."""
    with pytest.raises(DataError, match=message):
        world.prepare(source, format=data_format, splits=("train",), **options)
    assert not (world.root / "mine").exists()
    made = world.prepare(source, format=data_format, splits=("train",), skip_bad=True, **options)
    assert made.manifest["skipped"] == {"train": lost}
    total = made.manifest["splits"]["train"]["num_phrases"] + sum(lost.values())
    assert total == len(json.loads((source / "count.json").read_text()))


def _second_video(path: Path) -> None:
    """Adds a video that can be used, so that something is left beside the fault."""
    folder = path.parent
    _edit(path, lambda c: c["videos"].update(good={**c["videos"]["train-v"], "expressions": _sentences("both", anno_id=[[8]])}))
    _write_frames(folder / "JPEGImages/good")


MEVIS_FAULTS: dict[str, tuple[Callable[[Path], Any], str, dict[str, int]]] = {
    "missing frame": (
        lambda f: (f / "JPEGImages/train-v/00005.jpg").unlink(),
        r"expression 0 frame 00005: image .*00005\.jpg: expected an image, got no file \(3 times",
        {"image": 3},
    ),
    "frame of another size": (
        lambda f: Image.new("RGB", (9, 9)).save(f / "JPEGImages/train-v/00005.jpg"),
        r"expected an RLE of the image's size \[h, w\] = \[9, 9\], got \[16, 20\]",
        {"mask": 2},  # the sentence that names nothing has no mask
    ),
    "empty folder": (
        lambda f: [path.unlink() for path in (f / "JPEGImages/train-v").iterdir()],
        r"train/train-v: expected a folder train/JPEGImages/train-v/ with 4 frames, got an empty one",
        {"image": 12},
    ),
    "no folder": (
        lambda f: (f / "JPEGImages/train-v").rename(f / "elsewhere"),
        r"train/train-v: expected a folder train/JPEGImages/train-v/ with 4 frames, got none",
        {"image": 12},
    ),
    "short list of masks": (
        lambda f: _edit(f / "mask_dict.json", lambda tracks: tracks["7"].pop() and None),
        r"train/train-v expression 0: expected 4 masks of anno_id 7, one for each frame, null where it is absent, got 3",
        {"mask": 8},
    ),
    "damaged mask": (
        lambda f: _edit(f / "mask_dict.json", lambda tracks: tracks["7"][1].update(counts="\x7f")),
        r"expected a compressed RLE of 16 x 20 = 320 pixels, got one of no valid form",
        {"mask": 2},
    ),
    "mask of another kind": (
        lambda f: _edit(f / "mask_dict.json", lambda tracks: tracks.update({"7": [3, None, None, None]})),
        r"expected RLE or null as masks of anno_id 7, got int '3'",
        {"mask": 8},
    ),
    "unknown annotation": (
        lambda f: _edit(f / "mask_dict.json", lambda tracks: tracks.pop("7") and None),
        r"expected anno_id 7 in mask_dict.json, got no such entry",
        {"reference": 8},
    ),
    "no anno_id": (
        lambda f: _edit_video(lambda video: video["expressions"]["0"].pop("anno_id"))(f / "meta_expressions.json"),
        r"expected anno_id, a list of numbers that is empty if the sentence names nothing, got None \(obj_id \[0\]\)",
        {"reference": 4},
    ),
    "no target said in another way": (
        lambda f: _edit_video(lambda video: video["expressions"]["2"].update(anno_id=[-1]))(f / "meta_expressions.json"),
        r"empty if the sentence names nothing, got \[-1\] \(obj_id \[\]\)",
        {"reference": 4},
    ),
    "obj_id against anno_id": (
        lambda f: _edit_video(lambda video: video["expressions"]["1"].update(obj_id=[]))(f / "meta_expressions.json"),
        r"expression 1: expected as many obj_id as anno_id, got \[\] and \[7, 8\]",
        {"reference": 4},
    ),
    "no text": (
        lambda f: _edit_video(lambda video: video["expressions"]["0"].update(exp=" "))(f / "meta_expressions.json"),
        r"expected a phrase train-v/0/00000 of some words",
        {"phrase": 4},
    ),
    "a sentence that is no dict": (
        lambda f: _edit_video(lambda video: video["expressions"].update({"0": 7}))(f / "meta_expressions.json"),
        r"expected anno_id, .*, got None",
        {"reference": 4},
    ),
}


@pytest.mark.parametrize("fault", MEVIS_FAULTS)
def test_faults_of_mevis(world: Any, mevis: Path, fault: str) -> None:
    change, message, lost = MEVIS_FAULTS[fault]
    _second_video(mevis / "train/meta_expressions.json")
    (mevis / "count.json").write_text(json.dumps([0] * 16))
    change(mevis / "train")
    _check_fault(world, mevis, "mevis", message, lost)


VIDEO_FAULTS: dict[str, tuple[Any, str, int]] = {
    "no frames": ({"frames": []}, r"expected frames for its sentences, got none in its list in meta_expressions\.json", 3),
    "a frame twice": ({"frames": ["00000", "00000"]}, "expected each frame once in the list of frames, got '00000' twice", 6),
    "frames are no names": ({"frames": [0, 5]}, "expected names of frames, got 0", 3),
    "a frame elsewhere": ({"frames": ["../00000"]}, r"expected names of frames, got '\.\./00000'", 3),
    "an expression elsewhere": ({"expressions": {"../0": {"exp": "x"}}}, r"expected names of a video and its expressions, got '\.\./0'", 1),
    "an expression of 5,000 letters": ({"expressions": {"9" * 5000: {"exp": "x"}}}, "expected names of a video and its expressions, got '9999", 1),
    "no list of frames": ({"frames": None}, "expected a video with `expressions` and `frames`, got a dict with", 1),
}


@pytest.mark.parametrize("fault", VIDEO_FAULTS)
def test_faults_of_a_video(world: Any, mevis: Path, fault: str) -> None:
    changed, message, num_lost = VIDEO_FAULTS[fault]
    _second_video(mevis / "train/meta_expressions.json")
    (mevis / "count.json").write_text(json.dumps([0] * (4 + num_lost)))
    _edit_video(lambda video: video.update(changed))(mevis / "train/meta_expressions.json")
    _check_fault(world, mevis, "mevis", f"train/train-v: {message}", {"structure": num_lost})


def test_mevis_version_2_has_other_names(world: Any, mevis: Path) -> None:
    for split, name in (("train", "meta_expressions_v2.json"), ("valid", "meta_expressions_v2_release.json")):
        (mevis / split / "meta_expressions.json").rename(mevis / split / name)
    made = world.prepare(mevis, format="mevis")
    assert {*made.manifest["splits"]} == {"train", "valid_u", "valid"}
    (mevis / "train/meta_expressions.json").write_text((mevis / "valid_u/meta_expressions.json").read_text())
    message = r"train: expected the sentences of one version, got meta_expressions\.json, meta_expressions_v2\.json\. Choose with"
    with pytest.raises(DataError, match=message):
        world.prepare(mevis, "both", format="mevis")
    made = world.prepare(mevis, "second", format="mevis", mapping={"version": "2"})
    assert {*made.manifest["splits"]} == {"train", "valid"}
    with pytest.raises(DataError, match="--mapping version=3: expected 1 or 2, got another"):
        world.prepare(mevis, "third", format="mevis", mapping={"version": "3"})


def test_masks_that_are_missing_are_not_hidden_truth(world: Any, mevis: Path) -> None:
    (mevis / "valid_u/mask_dict.json").unlink()
    with pytest.raises(DataError, match=r"expected valid_u/mask_dict.json with the masks of its anno_id, got no such file"):
        world.prepare(mevis, format="mevis", splits=("valid_u",))


def test_a_video_without_sentences_is_noted(world: Any, mevis: Path) -> None:
    _edit(mevis / "train/meta_expressions.json", lambda c: c["videos"].update(silent={"expressions": {}, "frames": ["00000"]}))
    made = world.prepare(mevis, format="mevis", splits=("train",))
    assert made.manifest["notes"] == ["train: 1 video without a sentence: silent"]


def _change_label(convert: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "train/Annotations/aa/00005.png"
        with Image.open(path) as file:
            changed = convert(file.copy())
        changed.save(path)

    return change


YTVOS_FAULTS: dict[str, tuple[Callable[[Path], Any], str, dict[str, int]]] = {
    "labels as colours": (
        _change_label(lambda image: image.convert("RGB")),
        r"mask train/Annotations/aa/00005\.png: expected a PNG with a palette, .* got mode RGB: .* use the published file",
        {"mask": 2},
    ),
    "labels as grey values": (_change_label(lambda image: image.convert("L")), r"got mode L: the numbers cannot be known", {"mask": 2}),
    "labels of 16 bit": (
        _change_label(lambda image: Image.fromarray(np.asarray(image).astype(np.uint16))),
        r"got mode I;16: the numbers cannot be known",
        {"mask": 2},
    ),
    "labels of another size": (
        _change_label(lambda image: image.resize((9, 7))),
        r"mask train/Annotations/aa/00005\.png: expected 20 x 16 px, got 9 x 7 px",
        {"mask": 2},
    ),
    "missing labels": (
        lambda f: (f / "train/Annotations/aa/00005.png").unlink(),
        r"mask train/Annotations/aa/00005\.png: expected a palette PNG, got no file",
        {"mask": 2},
    ),
    "damaged labels": (
        lambda f: (f / "train/Annotations/aa/00005.png").write_bytes(b"no image"),
        r"mask train/Annotations/aa/00005\.png: expected a palette PNG, got UnidentifiedImageError",
        {"mask": 2},
    ),
    "no obj_id": (
        lambda f: _edit_video(lambda v: v["expressions"]["0"].pop("obj_id"))(f / "meta_expressions/train/meta_expressions.json"),
        r"train/aa expression 0: expected obj_id, the number of one object from 1 to 254, got None",
        {"reference": 4},
    ),
    "void as obj_id": (
        lambda f: _edit_video(lambda v: v["expressions"]["0"].update(obj_id="255"))(f / "meta_expressions/train/meta_expressions.json"),
        r"expected obj_id, .*, got '255'",
        {"reference": 4},
    ),
    "unknown object": (
        lambda f: _edit_video(lambda v: v["expressions"]["0"].update(obj_id="2"))(f / "meta_expressions/train/meta_expressions.json"),
        r"train/aa expression 0: expected obj_id 2 among the objects of meta\.json, got 1, 3",
        {"reference": 4},
    ),
}


@pytest.mark.parametrize("fault", YTVOS_FAULTS)
def test_faults_of_ytvos(world: Any, ytvos: Path, fault: str) -> None:
    change, message, lost = YTVOS_FAULTS[fault]
    (ytvos / "count.json").write_text(json.dumps([0] * 8))
    change(ytvos)
    _check_fault(world, ytvos, "ref-ytvos", message, lost)


def test_an_expression_of_valid_that_the_truth_lacks(world: Any, ytvos: Path) -> None:
    _edit(ytvos / "valid_gt/obj_id.json", lambda objects: objects["bb"].pop("1") and None)
    with pytest.raises(DataError, match=r"valid/bb expression 1: expected obj_id, .*, got None"):
        world.prepare(ytvos, format="ref-ytvos", splits=("valid",), mapping={"valid_videos": "1"})


def test_davis_frames_and_texts_that_have_no_partner(world: Any, davis: Path) -> None:
    lists = davis / "DAVIS/ImageSets/2017"
    (lists / "train.txt").write_text("classic-car\n")
    (lists / "val.txt").write_text("")
    for path in (davis / "davis_text_annotations").iterdir():
        path.write_text('dog-scale 1 "a dog"\n' + path.read_text("latin-1"), "utf-8" if "annot1" in path.name else "latin-1")
    made = world.prepare(davis, format="ref-davis")
    assert made.manifest["notes"] == ["texts of videos that DAVIS's lists do not have, left out: dogs-scale"]
    (davis / "DAVIS/Annotations_unsupervised/480p/classic-car").rename(davis / "elsewhere")
    message = r"train/classic-car: expected frames for its sentences, got none in DAVIS/Annotations_unsupervised/480p/VIDEO/"
    with pytest.raises(DataError, match=message):
        world.prepare(davis, "other", format="ref-davis")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), r"expected davis_text_annotations/Davis17_annot1\.txt, got no such file"),
        (lambda path: path.write_text("car one words\n"), r"annot1\.txt line 1: expected VIDEO OBJECT \"TEXT\", .*, got 'car one words'\."),
        (lambda path: path.write_text('car 1 "a"\ncar 1 "b"\n'), r"annot1\.txt line 2: .* whose object has a text already"),
        (lambda path: path.write_text('classic-car 1 "a"\n'), r"val/classic-car expression 4 frame .*expected a phrase classic-car/4/00000"),
    ],
)
def test_faults_of_davis(world: Any, davis: Path, change: Callable[[Path], Any], message: str) -> None:
    change(davis / "davis_text_annotations/Davis17_annot1.txt")
    with pytest.raises(DataError, match=message):
        world.prepare(davis, format="ref-davis")


@pytest.mark.parametrize(
    ("data_format", "message"),
    [
        ("mevis", r"expected one of train/meta_expressions\.json, .*, got strange"),
        ("ref-ytvos", r"expected one of meta_expressions/train/meta_expressions\.json, .*, got strange"),
        ("ref-davis", r"expected davis_text_annotations/Davis17_annot1\.txt, got no such file"),
    ],
)
def test_a_folder_of_something_else(world: Any, data_format: str, message: str) -> None:
    (world.folder / "strange").mkdir(parents=True)
    with pytest.raises(DataError, match=message):
        world.prepare(world.folder, format=data_format)
    with pytest.raises(DataError, match="got a file. Name the folder"):
        world.prepare(world.lines({}), format=data_format)


def test_a_file_of_something_else(world: Any, mevis: Path) -> None:
    (mevis / "train/meta_expressions.json").write_text('{"images": []}')
    with pytest.raises(DataError, match=r"meta_expressions\.json: expected \{'videos': .*got a dict with images\. Use"):
        world.prepare(mevis, format="mevis")


# Commands --------------------------------------------------------------------------------------------------------------


def _run(*words: Any) -> int:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers())
    arguments = parser.parse_args([str(word) for word in words])
    return arguments.run(arguments)


def test_commands_from_files_to_a_page(world: Any, mevis: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = world.root
    assert _run("prepare", "--format", "mevis", "--source", mevis, "--out", root / "mevis", "--train-frames", 3) == 0
    out = capsys.readouterr().out
    assert (
        "mevis/train: 1 video, 3 sentences, 3 frames: 9 phrases, one for each sentence and frame (4 without a target)" in out
    )
    assert "(the truth is not published)" in out
    assert "note: train: 3 of 4 frames of 1 video are taken" in out
    assert _run("check", "--root", root) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "mevis/train 1 3 9 9 4 3 0 1,662 / 23,051" in out
    assert "mevis/valid 1 2 8 8 hidden 4 0 140 / 2,236" in out
    assert "expected the published counts, got others" in out
    sheet, page = root / "strips.png", root / "page.html"
    assert _run("show", "mevis/valid_u", "--root", root, "--out", sheet) == 0
    assert "3 of 3 sentences of mevis/valid_u" in capsys.readouterr().out
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (3 * (44 + 192 + 8), 4 * 240 + 3 * 4 + 8, 3)
    assert _run("show", "mevis/valid", "--root", root, "--out", page, "--count", 1) == 0
    text = page.read_text()
    assert "1 of 2 sentences" in text
    assert "valid-v expression 0: frames 0, 1, 2, 3 of 4, the truth is not published" in text
    assert "no target</span>" not in text
    assert text.count("data:image/") == 1  # no mask


def test_planning_without_data_counts_eight_frames_a_video() -> None:
    assert (known_num_phrases("mevis/train"), known_num_images("mevis/train")) == (8 * 23_051, 8 * 1_662)
    assert known_num_phrases("mine/train") == 0
