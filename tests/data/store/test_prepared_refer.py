"""Reading REFER's files directly and reading the set prepared of them is the same: records, groups, batches."""

import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deris_llm.config import ConversionConfig, RunConfig
from deris_llm.data.loaders import GroupDataset
from deris_llm.data.dataset import (
    GroupSelection,
    group_by_image,
)
from deris_llm.data.loaders import evaluation_loader, phrase_conversion, train_loader
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.mix import training_mix
from deris_llm.data.sources import (
    count_refs,
    images_of_split,
    is_generalised,
    is_there,
    read_split,
    split_names,
)
from deris_llm.data.store.prepare import PrepareOptions, prepare
from deris_llm.data.store.prepared import PreparedSplit
from deris_llm.data.synthetic.world import write_world
from deris_llm.structures import InstanceAnnotation, ReferringRecord

DATASETS = ("refcoco", "refcoco+", "refcocog_umd", "grefcoco")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """REFER's files, and sets of the same names prepared of them; the images are the same folder."""
    folder = tmp_path_factory.mktemp("roots")
    own = folder / "refer"
    write_world(own, seed=3, num_train=16, num_val=16, num_test=3, workers=1)
    made = folder / "prepared"
    made.mkdir()
    os.symlink(own / "images", made / "images")
    for dataset in DATASETS:
        options = PrepareOptions("refer", str(own), made / dataset, images=made / "images/train2014")
        assert not prepare(options).was_there
    return own, made


def _masks(record: ReferringRecord) -> list[np.ndarray]:
    return [decode_segmentation(i.segmentation, record.height, record.width) for i in record.instances]


def _without_masks(record: ReferringRecord, root: Path) -> tuple[Any, ...]:
    bare = dataclasses.replace(
        record,
        instances=tuple(InstanceAnnotation(i.annotation_id, None) for i in record.instances),
        image_path=str(Path(record.image_path).relative_to(root)),
    )
    return bare, record.category, record.num_same_class, record.ref_id  # what a comparison of records leaves out


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_same_records_in_the_same_order(roots: tuple[Path, Path], dataset: str) -> None:
    own, made = roots
    assert split_names(own, dataset) == split_names(made, dataset)
    assert is_generalised(own, dataset) == is_generalised(made, dataset) == (dataset == "grefcoco")
    for split in split_names(own, dataset):
        name = f"{dataset}/{split}"
        assert count_refs(own, name) == count_refs(made, name)
        assert images_of_split(own, name) == images_of_split(made, name)
        for field in ("sent", "raw"):
            direct, lazy = read_split(own, name, phrase_field=field), read_split(made, name, phrase_field=field)
            assert isinstance(lazy, PreparedSplit)
            assert [_without_masks(r, own) for r in direct] == [_without_masks(r, made) for r in lazy]
            assert [lazy[i] for i in range(len(lazy))] == list(lazy)
        for one, two in zip(direct, lazy, strict=True):
            assert all(map(np.array_equal, _masks(one), _masks(two)))


@pytest.mark.parametrize("dataset", DATASETS)
def test_records_are_those_of_a_plain_reading_of_the_files(roots: tuple[Path, Path], dataset: str) -> None:
    """A slow re-write: every sentence of every ref in the order of the file, masks drawn from the polygons of instances.json."""
    folder = roots[0] / {"refcocog_umd": "refcocog"}.get(dataset, dataset)
    instances = json.loads((folder / "instances.json").read_text())
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    (refs_file,) = folder.glob("*refs(*")
    refs = json.loads(refs_file.read_text()) if refs_file.suffix == ".json" else pickle.loads(refs_file.read_bytes())
    for split in split_names(roots[0], dataset):
        records = iter(read_split(roots[0], f"{dataset}/{split}"))
        for ref in refs:
            for sentence in ref["sentences"] if ref["split"] == split else ():
                record, image = next(records), images[ref["image_id"]]
                assert record.phrase_id == f"{dataset}/{split}/{sentence['sent_id']}"
                assert (record.phrase, record.ref_id) == (sentence["sent"], ref["ref_id"])
                assert (record.image_id, record.height, record.width) == (
                    Path(image["file_name"]).stem, image["height"], image["width"],
                )  # fmt: skip
                ids = [i for i in (ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]) if i != -1]
                assert [instance.annotation_id for instance in record.instances] == ids
                drawn = [
                    decode_segmentation(annotations[i]["segmentation"], image["height"], image["width"]) for i in ids
                ]
                assert all(map(np.array_equal, _masks(record), drawn))
        assert next(records, None) is None


def _config(root: Path, **changes: Any) -> RunConfig:
    config = RunConfig()
    conversion = ConversionConfig(rate=0.5, min_words=1)
    data = dataclasses.replace(
        config.data, root=str(root), num_workers=0, phrases_per_image=3, conversion=conversion, **changes
    )
    perception = dataclasses.replace(config.perception, image_size=64)
    return dataclasses.replace(config, data=data, perception=perception)


def _mixes(roots: tuple[Path, Path]) -> tuple[Any, Any]:
    own, made = (training_mix(_config(root, train=DATASETS).data) for root in roots)
    return own, made


def test_the_same_mix(roots: tuple[Path, Path]) -> None:
    own, made = _mixes(roots)
    assert own.report == made.report
    assert own.report.num_images_removed > 0
    assert [r.phrase_id for r in own.records] == [r.phrase_id for r in made.records]
    assert [r.phrase for r in own.records[3:9]] == [r.phrase for r in made.records[3:9]]
    assert own.records[-1].phrase_id == made.records[-1].phrase_id


def test_the_same_groups(roots: tuple[Path, Path]) -> None:
    own, made = (group_by_image(mix.records) for mix in _mixes(roots))
    assert len(own) == len(made)
    assert own.sizes.tolist() == made.sizes.tolist()
    for one, two in zip(own, made, strict=True):
        assert [r.phrase_id for r in one.records] == [r.phrase_id for r in two.records]
    assert any(len({r.dataset for r in group.records}) > 1 for group in made)  # an image of several sets is one group
    assert [r.phrase_id for r in own.every_nth(20)] == [r.phrase_id for r in made.every_nth(20)]
    assert [r.phrase_id for r in made[-1].records] == [r.phrase_id for r in own[-1].records]
    with pytest.raises(IndexError):
        made[len(made)]


def test_the_same_conversions(roots: tuple[Path, Path]) -> None:
    own_groups, made_groups = (group_by_image(mix.records) for mix in _mixes(roots))
    own, made = (
        phrase_conversion(_config(root), groups, seed=5)
        for root, groups in zip(roots, (own_groups, made_groups), strict=True)
    )
    assert own is not None
    assert made is not None
    records = [record for group in own_groups for record in group.records]
    assert own.statistics(records, 1) == made.statistics(records, 1)
    for record in records:
        one, two = own.convert(record, 2), made.convert(record, 2)
        assert (one.outcome, one.record.phrase, one.tries) == (two.outcome, two.record.phrase, two.tries)


def test_the_same_batches(roots: tuple[Path, Path], processor: Any) -> None:
    loaders = [
        train_loader(_config(root), group_by_image(mix.records), processor, rank=1, world_size=2, epoch=1)
        for root, mix in zip(roots, _mixes(roots), strict=True)
    ]
    assert len(loaders[0]) == len(loaders[1]) > 5
    for one, two in zip(*loaders, strict=True):
        _assert_equal(one, two)
    split = [
        evaluation_loader(_config(root), read_split(root, "grefcoco/val"), processor, rank=0, world_size=2)
        for root in roots
    ]
    for one, two in zip(*split, strict=True):
        _assert_equal(one, two)


def _assert_equal(one: Any, two: Any) -> None:
    assert one.phrase_ids == two.phrase_ids
    assert one.phrases == two.phrases
    for tensor in ("perception_image", "image_index"):
        assert torch.equal(getattr(one, tensor), getattr(two, tensor))
    assert torch.equal(one.targets.masks, two.targets.masks)
    assert torch.equal(one.targets.phrase_index, two.targets.phrase_index)
    assert torch.equal(one.cognition.input_ids, two.cognition.input_ids)


def test_a_mix_of_both_kinds(roots: tuple[Path, Path], tmp_path: Path) -> None:
    own, made = roots
    both = tmp_path / "both"
    both.mkdir()
    for path in own.iterdir():
        os.symlink(path, both / path.name)
    os.symlink(made / "refcoco", both / "prepared_refcoco")
    config = dataclasses.replace(RunConfig().data, root=str(both), train=("prepared_refcoco", "refcoco+"))
    mix = training_mix(config)
    plain = training_mix(dataclasses.replace(config, train=("refcoco", "refcoco+")))
    assert mix.report.num_images_removed == plain.report.num_images_removed > 0
    assert [r.phrase for r in mix.records] == [r.phrase for r in plain.records]
    assert group_by_image(mix.records).sizes.tolist() == group_by_image(plain.records).sizes.tolist()


def test_nothing_is_put_into_memory(roots: tuple[Path, Path], processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a run's loader makes no record of a prepared set; a batch makes those that it holds."""
    built: list[str] = []
    real = PreparedSplit._record

    def counted(self: PreparedSplit, row: Any, image: Any) -> ReferringRecord:
        built.append(row["id"])
        return real(self, row, image)

    monkeypatch.setattr(PreparedSplit, "_record", counted)
    config = _config(roots[1])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, conversion=ConversionConfig()))
    mix = training_mix(config.data)
    groups = group_by_image(mix.records)
    loader = train_loader(config, groups, processor)
    assert not built
    batch = next(iter(loader))
    assert len(built) == len(batch.phrase_ids)
    held = len(pickle.dumps(groups))
    assert held < 40 * len(mix.records) + 8000  # integers per record, a few names


def test_the_prepared_set_wins_and_the_log_says_so(
    roots: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = roots[0]
    root = tmp_path / "root"
    root.mkdir()
    os.symlink(own / "images", root / "images")
    (root / "refcoco").mkdir()
    for path in (own / "refcoco").iterdir():
        os.symlink(path, root / "refcoco" / path.name)
    assert is_there(root, "refcoco")
    assert not is_there(root, "refcoco+")
    direct = read_split(root, "refcoco/val")
    with caplog.at_level("INFO"):
        prepare(PrepareOptions("refer", str(root), root / "refcoco"))  # beside REFER's files
        lazy = read_split(root, "refcoco/val")
        read_split(root, "refcoco/train")
    assert isinstance(lazy, PreparedSplit)
    assert [r.image_path for r in direct] == [r.image_path for r in lazy]
    assert caplog.text.count("is a prepared set and is read instead of") == 1
    assert (root / "refcoco/instances.json").is_file()


def test_selection_builds_only_what_was_chosen(roots: tuple[Path, Path]) -> None:
    groups = group_by_image(read_split(roots[1], "refcoco/train"))
    chosen = GroupDataset(groups)[GroupSelection(1, (0, 2))]
    assert [r.phrase_id for r in chosen.records] == [groups[1].records[i].phrase_id for i in (0, 2)]
