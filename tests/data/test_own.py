"""`train --data`: the template, finding the format, preparing once, a val share."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deris_llm.config import load_config
from deris_llm.data.check import check_data
from deris_llm.data.errors import DataError
from deris_llm.data.mix import training_mix
from deris_llm.data.own import own_data
from deris_llm.data.sources import read_split
from deris_llm.data.template import write_template


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    write_template(tmp_path / "mine")
    return tmp_path / "mine"


def test_the_template_is_accepted_as_written(mine: Path) -> None:
    found = own_data(mine)
    assert found.is_new
    root = found.manifest.folder.parent
    assert root.parent == mine / ".deris_llm"
    counts = {split.name: (split.num_phrases, split.num_images, split.problem) for split in check_data(root)}
    assert counts == {"mine/train": (3, 1, None), "mine/val": (2, 1, None)} or counts == {
        "mine/train": (2, 1, None),
        "mine/val": (3, 1, None),
    }
    records = [*read_split(root, "mine/train"), *read_split(root, "mine/val")]
    assert {record.phrase: len(record.instances) for record in records} == {
        "the red box": 1, "the ball on the right": 1, "the green ball": 1, "both lemons": 2, "the dog": 0
    }  # fmt: skip
    assert found.manifest.is_generalised
    for line in (mine / "README.md").read_text().splitlines():
        assert "NEXT" not in line


def test_what_is_wrong_with_all_images_is_said_not_that_none_is_left_for_val(mine: Path) -> None:
    file = mine / "train.jsonl"
    file.write_text(file.read_text().replace("images/", "imgs/"))
    with pytest.raises(DataError, match="5 of 5 records cannot be used") as caught:
        own_data(mine)
    assert "imgs" in str(caught.value)
    assert "--val-share" not in str(caught.value)


def test_one_image_cannot_be_divided(mine: Path) -> None:
    file = mine / "train.jsonl"
    first = file.read_text().splitlines()[0]
    file.write_text(first)
    with pytest.raises(DataError, match="share of 0.1 for val: expected at least 2 images, got 1. Add images, or a val split"):
        own_data(mine)


def test_the_template_needs_an_empty_folder(mine: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a new folder, got one that is not empty"):
        write_template(mine)
    (tmp_path / "empty").mkdir()
    write_template(tmp_path / "empty")


def test_prepared_once_and_again_when_the_source_changes(mine: Path, tmp_path: Path) -> None:
    before = own_data(mine).manifest.folder
    assert not own_data(mine).is_new
    moved = shutil.move(mine, tmp_path / "elsewhere" / "mine")
    found = own_data(Path(moved))
    assert not found.is_new
    assert found.manifest.folder.name == "mine"
    assert Path(read_split(found.manifest.folder.parent, "mine/train")[0].image_path).is_file()
    lines = Path(moved, "train.jsonl").read_text().replace("the red box", "the red block")
    Path(moved, "train.jsonl").write_text(lines)
    assert own_data(Path(moved)).is_new
    assert own_data(Path(moved)).manifest.folder.parent.name != before.parent.name


def test_the_overrides_are_a_run_config(mine: Path, tmp_path: Path) -> None:
    odd = tmp_path / "my data, [1]"
    shutil.copytree(mine, odd)
    config = load_config("tiny-refcoco", own_data(odd).overrides)
    assert config.data.train == ("my-data-1",)
    assert config.data.eval == ("my-data-1/val",)
    assert config.training.eval_split == "my-data-1/val"
    assert Path(config.data.root).parent == odd / ".deris_llm"
    report = training_mix(config.data).report
    assert (report.num_images, report.num_images_removed) == (1, 0)


def test_a_val_file_is_kept_and_a_test_file_is_evaluated(mine: Path) -> None:
    shutil.copy(mine / "train.jsonl", mine / "val.jsonl")
    shutil.copy(mine / "train.jsonl", mine / "test.jsonl")
    found = own_data(mine)
    assert {name: split["num_phrases"] for name, split in found.manifest.splits.items()} == {
        "train": 5, "val": 5, "test": 5
    }  # fmt: skip
    assert "data.eval=[mine/val, mine/test]" in found.overrides


def test_train_and_test_without_val_divides_train(mine: Path) -> None:
    lines = (mine / "train.jsonl").read_text().splitlines()
    (mine / "test.jsonl").write_text("".join(line + "\n" for line in lines if "box.png" in line))
    splits = own_data(mine).manifest.splits
    assert sum(splits[name]["num_phrases"] for name in ("train", "val")) == 5
    assert splits["test"]["num_phrases"] == 3
    assert splits["val"]["num_images"] == 1


def test_a_single_file_and_a_prepared_set(mine: Path) -> None:
    found = own_data(mine / "train.jsonl")
    assert found.manifest.folder.name == "train"
    again = own_data(found.manifest.folder)
    assert not again.is_new
    assert again.overrides == found.overrides


def test_every_annotation_format_is_recognised(world: Any, tmp_path: Path) -> None:
    world.images("a.png", "b.png")
    shape = {"label": "dog", "points": [[2, 2], [12, 2], [12, 12], [2, 12]], "shape_type": "polygon"}
    folders = {name: tmp_path / name for name in ("labelme", "coco", "cvat")}
    for folder in folders.values():
        shutil.copytree(world.folder, folder)
    for name in ("a", "b"):
        content = {"imagePath": f"{name}.png", "imageHeight": 30, "imageWidth": 40, "shapes": [shape]}
        (folders["labelme"] / f"{name}.json").write_text(json.dumps(content))
    content = {
        "images": [{"id": i, "file_name": f"{name}.png", "width": 40, "height": 30} for i, name in enumerate("ab")],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "segmentation": [[2, 2, 12, 2, 12, 12]]} for i in range(2)
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (folders["coco"] / "_annotations.coco.json").write_text(json.dumps(content))
    images = "".join(
        f'<image name="{name}.png" width="40" height="30"><polygon label="dog" points="2,2;12,2;12,12"/></image>'
        for name in "ab"
    )
    (folders["cvat"] / "annotations.xml").write_text(f"<annotations>{images}</annotations>")
    for name, folder in folders.items():
        splits = own_data(folder).manifest.splits
        assert {split: found["num_phrases"] for split, found in splits.items()} == {"train": 1, "val": 1}, name


def test_roboflows_folders_and_cocos_tree(world: Any, tmp_path: Path) -> None:
    def coco(name: str) -> str:
        image = {"id": 1, "file_name": name, "width": 40, "height": 30}
        annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[2, 2, 12, 2, 12, 12]]}
        return json.dumps(
            {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "dog"}]}
        )

    export, tree = tmp_path / "roboflow", tmp_path / "tree"
    (tree / "annotations").mkdir(parents=True)
    for folder, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        world.images(f"{split}.png", folder=export / folder)
        (export / folder / "_annotations.coco.json").write_text(coco(f"{split}.png"))
        world.images(f"{split}.png", folder=tree / "images")
        (tree / "annotations" / f"instances_{split}.json").write_text(coco(f"{split}.png"))
    for source in (export, tree):
        splits = own_data(source).manifest.splits
        assert {name: split["num_phrases"] for name, split in splits.items()} == {"train": 1, "val": 1, "test": 1}


def test_what_is_not_clear_is_an_error(mine: Path, refer_root: Path, tmp_path: Path) -> None:
    (mine / "a.json").write_text('{"shapes": [], "imagePath": "a.png"}')
    with pytest.raises(DataError, match=r"got a\.json \(labelme\), train\.jsonl \(jsonl\)\. .*--data-format labelme\|jsonl"):
        own_data(mine)
    assert own_data(mine, "jsonl").is_new
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="got no file of a known format"):
        own_data(tmp_path / "nothing")
    with pytest.raises(DataError, match="expected a file or folder, got nothing at this path"):
        own_data(tmp_path / "missing")
    with pytest.raises(DataError, match=r"got a data root in REFER's layout\. .*--set data\.root="):
        own_data(refer_root)


def test_a_bad_line_stops_and_says_what_to_do(mine: Path) -> None:
    with (mine / "train.jsonl").open("a") as file:
        file.write('{"image": "images/box.png", "phrase": "a lost mask"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl line 6: (.|\n)*data prepare --format jsonl --source .*--data data/mine"):
        own_data(mine)
