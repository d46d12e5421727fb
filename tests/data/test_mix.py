"""The mix holds every training phrase but those of evaluation pictures."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from deris_llm.config import DataConfig, RunConfig, config_from_dict
from deris_llm.data.errors import DataError
from deris_llm.data.mix import leakage_notice, training_mix
from deris_llm.data.refer import read_split


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


@pytest.mark.parametrize("excluded", [True, False])
def test_the_fields_earlier_name_in_peoples_checkpoints(excluded: bool) -> None:
    tree = {"name": "old", "data": {"root": "elsewhere", "exclude_eval_images": excluded}}
    config = config_from_dict(tree)
    assert config.data.allow_leakage is not excluded
    assert config.data.root == "elsewhere"
