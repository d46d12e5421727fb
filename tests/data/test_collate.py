"""Batches: images once, phrases in order, masks where the objects are; the same through worker processes."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deris_llm.models.cognition import build_processor
from deris_llm.config import RunConfig
from deris_llm.data import collate
from deris_llm.data.collate import ReferringCollator
from deris_llm.data.dataset import ImageGroup, group_by_image
from deris_llm.data.errors import DataError
from deris_llm.data.loaders import evaluation_loader, train_loader
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.mix import training_mix
from deris_llm.data.sources import read_split
from deris_llm.data.images import load_image
from deris_llm.models.preprocess import perception_pixels, warp_mask
from deris_llm.structures import ReferringBatch
from deris_llm.testing import tiny_config, tiny_weights


def _config(root: Path, **sections: dict[str, Any]) -> RunConfig:
    small = {
        "data": {"root": str(root), "num_workers": 0, "phrases_per_image": 4},
        "perception": {"image_size": 64},
        "training": {"images_per_device": 2},
        "evaluation": {"images_per_device": 2, "max_phrases_per_batch": 8},
    }
    config = RunConfig()
    for name in small:
        changed = dataclasses.replace(getattr(config, name), **{**small[name], **sections.get(name, {})})
        config = dataclasses.replace(config, **{name: changed})
    return config


def _equal(one: ReferringBatch, other: ReferringBatch) -> None:
    assert one.phrase_ids == other.phrase_ids
    assert one.phrases == other.phrases
    assert torch.equal(one.perception_image, other.perception_image)
    assert torch.equal(one.image_index, other.image_index)
    assert torch.equal(one.cognition.input_ids, other.cognition.input_ids)
    assert one.targets is not None
    assert other.targets is not None
    assert torch.equal(one.targets.masks, other.targets.masks)
    assert torch.equal(one.targets.phrase_index, other.targets.phrase_index)


def test_a_batch(refer_root: Path, processor: Any) -> None:
    groups = group_by_image(read_split(refer_root, "refcoco/train"))[:3]
    groups[1] = ImageGroup(groups[1].records[:2])
    batch = ReferringCollator(_config(refer_root), processor)(groups)
    assert batch.perception_image.shape == (3, 3, 64, 64)
    assert batch.image_index.tolist() == [0] * 5 + [1] * 2 + [2] * 5
    assert batch.image_index.dtype == torch.int64
    assert batch.num_phrases == 12
    assert batch.phrase_ids == tuple(r.phrase_id for g in groups for r in g.records)
    assert batch.phrases[5] == "left thing 0 of refcoco"
    assert batch.cognition.pixel_values.shape[0] == 3
    assert batch.cognition.input_ids.shape[0] == 12
    assert batch.targets is not None
    assert batch.targets.masks.dtype == torch.bool
    assert batch.targets.masks.shape == (12, 64, 64)
    assert batch.targets.phrase_index.tolist() == list(range(12))
    # objects of conftest: rows 5..24 of 30, columns 4..15 or 24..35 of 40
    for phrase, mask in zip(batch.phrases, batch.targets.masks, strict=True):
        first = 4 if phrase.startswith("left") else 24
        expected = torch.zeros(64, 64, dtype=torch.bool)
        expected[round(5 / 30 * 64) : round(25 / 30 * 64), round(first / 40 * 64) : round((first + 12) / 40 * 64)] = (
            True
        )
        assert torch.equal(mask, expected)


def test_resize_reaches_pictures_and_masks(refer_root: Path, processor: Any) -> None:
    """conftest's pictures are 40 x 30 px: at 64 px the two ways of warping differ in both."""
    groups = group_by_image(read_split(refer_root, "refcoco/train"))[:1]
    config = _config(refer_root)
    batches = {
        resize: ReferringCollator(dataclasses.replace(config, compat=compat), processor)(groups)
        for resize, compat in (("antialias", "none"), ("opencv", "deris-2025"))
    }
    record = groups[0].records[0]
    image = load_image(record.image_path)
    for resize, batch in batches.items():
        assert torch.equal(batch.perception_image[0], perception_pixels(image, 64, resize))
        mask = decode_segmentation(record.instances[0].segmentation, record.height, record.width)
        assert batch.targets is not None
        assert (batch.targets.masks[0].numpy() == warp_mask(mask, 64, resize)).all()
    one, other = batches.values()
    assert one.targets is not None
    assert other.targets is not None
    assert not torch.equal(one.perception_image, other.perception_image)
    assert not torch.equal(one.targets.masks, other.targets.masks)


def test_phrases_with_no_or_several_targets(refer_root: Path, processor: Any) -> None:
    records = read_split(refer_root, "refcoco/val")
    left, right = records[0].instances[0], records[2].instances[0]
    changed = [
        dataclasses.replace(records[0], instances=()),
        dataclasses.replace(records[1], instances=(left, right)),
        dataclasses.replace(records[2], instances=()),
        records[3],
    ]
    collator = ReferringCollator(_config(refer_root), processor)
    targets = collator([ImageGroup(tuple(changed))]).targets
    assert targets is not None
    assert targets.phrase_index.tolist() == [1, 1, 3]
    assert torch.equal(targets.masks[1], targets.masks[2])
    assert not (targets.masks[0] & targets.masks[1]).any()
    none = collator([ImageGroup((changed[0],))]).targets
    assert none is not None
    assert none.masks.shape == (0, 64, 64)
    assert none.phrase_index.shape == (0,)
    assert none.phrase_index.dtype == torch.int64


def test_unknown_answers(refer_root: Path, processor: Any) -> None:
    groups = group_by_image(read_split(refer_root, "refcoco/val"))
    assert ReferringCollator(_config(refer_root), processor, with_targets=False)(groups).targets is None


def test_an_instance_is_decoded_once_per_image(
    refer_root: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = collate.decode_segmentation
    monkeypatch.setattr(collate, "decode_segmentation", lambda *a: decoded.append(a) or decode(*a))
    ReferringCollator(_config(refer_root), processor)(group_by_image(read_split(refer_root, "refcoco/val")))
    assert len(decoded) == 2  # of 5 phrases


def test_truncated_picture_names_file_and_phrases(refer_folder: Any, processor: Any) -> None:
    root = refer_folder.write()
    path = refer_folder.image_path(5)
    path.write_bytes(path.read_bytes()[:-300])
    groups = group_by_image(read_split(root, "refcoco/val"))
    with pytest.raises(DataError, match="refcoco/val/20") as caught:
        ReferringCollator(_config(root), processor)(groups)
    assert str(path) in str(caught.value)


def test_the_collator_travels_to_workers(refer_root: Path, processor: Any) -> None:
    collator = ReferringCollator(_config(refer_root), processor)
    again = pickle.loads(pickle.dumps(collator))
    groups = group_by_image(read_split(refer_root, "refcoco/val"))
    _equal(collator(groups), again(groups))


def test_training_loader(refer_root: Path, processor: Any) -> None:
    config = _config(refer_root)
    mix = training_mix(config.data)
    groups = group_by_image(mix.records)
    loader = train_loader(config, groups, processor)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert {p for b in batches for p in b.phrase_ids} == {r.phrase_id for r in mix.records}
    assert all(b.perception_image.shape[0] == 2 for b in batches)
    assert all(np.bincount(b.image_index.numpy()).max() <= 4 for b in batches)
    loader.set_epoch(1)
    assert [b.phrase_ids for b in loader] != [b.phrase_ids for b in batches]
    loader.set_epoch(0)
    for one, other in zip(loader, batches, strict=True):
        _equal(one, other)


def test_workers_change_nothing(refer_root: Path, processor: Any) -> None:
    groups = group_by_image(training_mix(_config(refer_root).data).records)
    alone = train_loader(_config(refer_root), groups, processor)
    with_workers = train_loader(_config(refer_root, data={"num_workers": 2}), groups, processor)
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        with_workers.set_epoch(epoch)
        for one, other in zip(alone, with_workers, strict=True):
            _equal(one, other)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_loader_covers_all_phrases_once(refer_root: Path, processor: Any, world_size: int) -> None:
    records = read_split(refer_root, "refcoco/train")
    seen: list[str] = []
    for rank in range(world_size):
        for batch in evaluation_loader(_config(refer_root), records, processor, rank=rank, world_size=world_size):
            assert batch.num_phrases <= 8
            seen.extend(batch.phrase_ids)
    assert sorted(seen) == sorted(r.phrase_id for r in records)


def test_a_phrases_row_does_not_depend_on_its_batch(refer_root: Path, processor: Any) -> None:
    records = read_split(refer_root, "refcoco/train")
    config = _config(refer_root)
    whole = ReferringCollator(config, processor)(group_by_image(records))
    assert whole.targets is not None
    for i, record in enumerate(records[::3]):
        alone = ReferringCollator(config, processor)([ImageGroup((record,))])
        assert alone.targets is not None
        assert torch.equal(alone.targets.masks[0], whole.targets.masks[3 * i])
        assert torch.equal(alone.perception_image[0], whole.perception_image[whole.image_index[3 * i]])


def test_with_the_real_processor(refer_root: Path, tmp_path: Path) -> None:
    config = tiny_config(*tiny_weights(tmp_path), f"data.root={refer_root}", "training.images_per_device=3")
    groups = group_by_image(training_mix(config.data).records)
    batch = next(iter(train_loader(config, groups, build_processor(config))))
    assert batch.cognition.input_ids.shape[0] == batch.num_phrases == len(batch.image_index)
    assert batch.cognition.pixel_values.shape[0] == batch.perception_image.shape[0] == 3
    assert (batch.cognition.text_feature_mask & ~batch.cognition.token_padding_mask).any(dim=1).all()
