"""The mix holds every training phrase but those of evaluation pictures."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from deris_llm.config import DataConfig, RunConfig, config_from_dict
from deris_llm.data.errors import DataError
from deris_llm.data.mix import leakage_notice, training_mix
from deris_llm.data.sources import read_split


# Pictures of conftest: refcoco train 1 2 3 4, refcoco+ train 1 2 3 5, refcocog train 1 2 6 8;
# evaluated: refcoco 5 6 7, refcoco+ 4 6 7, refcocog 9 3.
def _config(root: Path, **changes: Any) -> DataConfig:
    return dataclasses.replace(DataConfig(root=str(root)), **changes)


def _image_numbers(records: Any, dataset: str) -> set[int]:
    return {int(r.image_id[-12:]) for r in records if r.dataset == dataset}


def test_images_of_any_evaluation_split_leave(refer_root: Path) -> None:
    mix = training_mix(_config(refer_root))
    assert _image_numbers(mix.records, "refcoco") == {1, 2}  # 3: refcocog/test, 4: refcoco+/val
    assert _image_numbers(mix.records, "refcoco+") == {1, 2}  # 5: refcoco/val
    assert _image_numbers(mix.records, "refcocog_umd") == {1, 2, 8}  # 6: testA
    assert all(r.split == "train" for r in mix.records)
    assert mix.report.num_phrases == len(mix.records) == 5 * 7
    assert mix.report.num_images == 3
    assert mix.report.num_images_removed == 4
    assert mix.report.num_eval_images_kept == 0
    assert [dataclasses.astuple(share) for share in mix.report.shares] == [
        ("refcoco", 10, 2, 10, 2),
        ("refcoco+", 10, 2, 10, 2),
        ("refcocog_umd", 15, 3, 5, 1),
    ]
    assert "4 images removed" in str(mix.report)


def test_evaluation_splits_of_every_mixed_dataset_count_though_not_evaluated(refer_root: Path) -> None:
    mix = training_mix(_config(refer_root, eval=("refcoco/val",)))
    assert {int(r.image_id[-12:]) for r in mix.records} == {1, 2, 8}


def test_evaluated_datasets_count_though_not_mixed(refer_root: Path) -> None:
    alone = training_mix(_config(refer_root, train=("refcoco",), eval=("refcoco/val",)))
    assert _image_numbers(alone.records, "refcoco") == {1, 2, 3, 4}
    also = training_mix(_config(refer_root, train=("refcoco",), eval=("refcoco/val", "refcocog_umd/test")))
    assert _image_numbers(also.records, "refcoco") == {1, 2, 4}


def test_keeping_evaluation_images_is_loud(refer_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        mix = training_mix(_config(refer_root, allow_leakage=True))
    assert len(mix.records) == 5 * 12
    assert mix.report.num_eval_images_kept == 4
    assert mix.report.num_images_removed == 0
    assert "4 training images belong to an evaluation split" in caplog.text
    assert "TRAINED ON" in str(mix.report)


def test_nothing_left(refer_folder: Any) -> None:
    for dataset in ("refcoco", "refcoco+"):
        refer_folder.refs[dataset] = [r for r in refer_folder.refs[dataset] if r["image_id"] in (4, 5)]
    root = refer_folder.write()
    with pytest.raises(DataError, match="no phrase is left after 2 evaluation images"):
        training_mix(_config(root, train=("refcoco", "refcoco+"), eval=()))


@pytest.mark.parametrize("name", ["refcoco/tset", "refcocog_umd/testA"])
def test_unknown_evaluation_split(refer_root: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}' does not exist"):
        training_mix(_config(refer_root, eval=(name,)))


def test_phrase_field_reaches_the_records(refer_root: Path) -> None:
    mix = training_mix(_config(refer_root, phrase_field="raw"))
    raw = read_split(refer_root, "refcoco/train", phrase_field="raw")
    assert mix.records[0].phrase == raw[0].phrase == raw[0].phrase.upper()


def test_leakage_notice() -> None:
    config = RunConfig(name="run")
    assert leakage_notice(config) is None
    assert leakage_notice(config, config.data.eval) is None
    leaking = dataclasses.replace(config, data=dataclasses.replace(config.data, allow_leakage=True))
    assert "not comparable" in (leakage_notice(leaking) or "")
    one = dataclasses.replace(config, data=dataclasses.replace(config.data, train=("refcoco",), eval=("refcoco/val",)))
    assert leakage_notice(one, ["refcoco/testA", "mine/val"]) is None
    assert "refcocog_umd/test" in (leakage_notice(one, ["refcoco/val", "refcocog_umd/test"]) or "")


def test_the_field_that_allow_leakage_replaces() -> None:
    """Checkpoints of earlier versions carry it; only its default reads as before."""
    tree = {"name": "old", "data": {"root": "elsewhere", "exclude_eval_images": True}}
    assert not config_from_dict(tree).data.allow_leakage
    tree["data"]["exclude_eval_images"] = False  # type: ignore[index]
    with pytest.raises(ValueError, match=r"data\.exclude_eval_images: .* set data\.allow_leakage=true"):
        config_from_dict(tree)


def _mine(world: Any, name: str, pictures: dict[str, str], **options: Any) -> None:
    """A set over pictures: file name -> split; a file's content is that of its first letter."""
    lines = []
    for file, split in pictures.items():
        world.images(file[0], folder=world.folder / "originals")
        (world.folder / file).write_bytes((world.folder / "originals" / file[0]).read_bytes())
        lines.append({"image": file, "phrase": f"thing of {file}", "polygons": world.square, "split": split})
    world.prepare(world.lines(*lines, file=f"{name}.jsonl"), name, **options)


@pytest.fixture
def no_suffix(world: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pictures need no suffix in these tests."""
    real = world.images

    def as_png(name: str, *, folder: Path) -> None:
        real(f"{name}.png", folder=folder)
        (folder / f"{name}.png").rename(folder / name)

    monkeypatch.setattr(world, "images", as_png, raising=False)
    return world


def test_a_renamed_picture_of_another_sets_evaluation_leaves(no_suffix: Any) -> None:
    world = no_suffix
    _mine(world, "one", {"a1.png": "train", "b1.png": "train", "c1.png": "val"})
    _mine(world, "two", {"c2.png": "train", "d2.png": "train", "b2.png": "val"})
    config = _config(world.root, train=("one", "two"), eval=())
    mix = training_mix(config)
    assert [r.phrase for r in mix.records] == ["thing of a1.png", "thing of d2.png"]
    assert mix.report.num_images_removed == 2
    alone = training_mix(dataclasses.replace(config, train=("one",)))
    assert [r.phrase for r in alone.records] == ["thing of a1.png", "thing of b1.png"]
    leaking = training_mix(dataclasses.replace(config, allow_leakage=True))
    assert (len(leaking.records), leaking.report.num_eval_images_kept) == (4, 2)
    also = training_mix(dataclasses.replace(config, train=("one",), eval=("two/val",)))
    assert [r.phrase for r in also.records] == ["thing of a1.png"]


def test_cocos_names_tell_equal_files_apart_but_a_renamed_one_leaves(no_suffix: Any) -> None:
    world = no_suffix
    folder = world.folder
    folder.mkdir()
    names = [f"COCO_train2014_{i:012d}.jpg" for i in (1, 2)]
    world.images("a", folder=folder)
    for name in (*names, "renamed.jpg"):
        (folder / name).write_bytes((folder / "a").read_bytes())
    lines = [
        {"image": image, "phrase": image, "polygons": world.square, "split": split}
        for image, split in ((names[0], "train"), ("renamed.jpg", "train"), (names[1], "val"))
    ]
    world.prepare(world.lines(*lines))
    mix = training_mix(_config(world.root, train=("mine",), eval=()))
    assert [r.phrase for r in mix.records] == [names[0]]


def test_pictures_of_refers_files_and_of_a_prepared_set(refer_folder: Any, world: Any) -> None:
    """A set of one's own over COCO's pictures knows REFER's evaluation splits."""
    root = refer_folder.write()
    world.root = root
    lines = [
        {"image": refer_folder.image_path(i).name, "phrase": f"mine in {i}", "polygons": world.square}
        for i in (1, 5, 9)
    ]
    world.prepare(world.lines(*lines), images=root / refer_folder.images)
    mix = training_mix(_config(root, train=("refcoco", "mine"), eval=("refcoco/val",)))
    assert [r.phrase for r in mix.records if r.dataset == "mine"] == ["mine in 1", "mine in 9"]  # 5 is refcoco/val
    assert mix.report.num_images_removed == 1
