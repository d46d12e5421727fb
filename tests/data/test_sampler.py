"""Every phrase once; equal work on all ranks in training, exact shards in evaluation."""

from collections import Counter
from typing import Any

import pytest

from deris_llm.data.dataset import GroupSelection, ImageGroups, group_by_image
from deris_llm.data.sampler import EvaluationBatchSampler, TrainingBatchSampler

SIZES = [9, 1, 4, 7, 2, 12, 3, 5, 8, 1, 6]


@pytest.fixture
def groups(make_records: Any) -> ImageGroups:
    return group_by_image(make_records(SIZES))


def _training(groups: ImageGroups, **changes: Any) -> TrainingBatchSampler:
    options = {"phrases_per_image": 4, "images_per_device": 2, "seed": 7, **changes}
    return TrainingBatchSampler(groups, **options)


def _seen(batches: list[list[GroupSelection]]) -> Counter[tuple[int, int]]:
    return Counter((piece.group, k) for batch in batches for piece in batch for k in piece.phrases)


ALL = Counter({(group, k): 1 for group, size in enumerate(SIZES) for k in range(size)})


def test_every_phrase_once_an_epoch(groups: ImageGroups) -> None:
    sampler = _training(groups, images_per_device=1)
    batches = list(sampler)
    assert _seen(batches) == ALL
    assert len(batches) == len(sampler) == sampler.num_chunks == sum(-(-size // 4) for size in SIZES)
    assert sampler.num_phrases == sum(SIZES)


def test_chunks_are_even_and_ascending(groups: ImageGroups) -> None:
    sizes: dict[int, list[int]] = {}
    for (piece,) in _training(groups, images_per_device=1):
        assert list(piece.phrases) == sorted(piece.phrases)
        sizes.setdefault(piece.group, []).append(len(piece.phrases))
    assert sorted(sizes[0]) == [3, 3, 3]
    assert sorted(sizes[3]) == [3, 4]
    assert sizes[1] == [1]
    assert max(map(max, sizes.values())) <= 4


def test_one_phrase_of_an_image_at_a_time(groups: ImageGroups) -> None:
    sampler = _training(groups, phrases_per_image=1, images_per_device=3)
    batches = list(sampler)
    assert {len(piece.phrases) for batch in batches for piece in batch} == {1}
    assert _seen(batches).keys() == ALL.keys()
    assert sampler.num_chunks == sampler.num_phrases == sum(SIZES)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_have_equally_many_batches_and_see_all(groups: ImageGroups, world_size: int) -> None:
    by_rank = [list(_training(groups, rank=r, world_size=world_size)) for r in range(world_size)]
    samplers = [_training(groups, rank=r, world_size=world_size) for r in range(world_size)]
    assert {len(batches) for batches in by_rank} == {len(s) for s in samplers} == {len(by_rank[0])}
    assert all(len(batch) == 2 for batches in by_rank for batch in batches)
    seen = _seen([batch for batches in by_rank for batch in batches])
    assert seen.keys() == ALL.keys()
    # the last batch repeats less than one global batch of chunks
    num_pieces = sum(len(batch) for batches in by_rank for batch in batches)
    assert 0 <= num_pieces - samplers[0].num_chunks < 2 * world_size


def test_the_global_batch_does_not_depend_on_the_number_of_ranks(groups: ImageGroups) -> None:
    def global_batches(images_per_device: int, world_size: int) -> list[list[GroupSelection]]:
        ranks = [
            _training(groups, images_per_device=images_per_device, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        return [[piece for batch in step for piece in batch] for step in zip(*ranks, strict=True)]

    assert global_batches(4, 1) == global_batches(2, 2) == global_batches(1, 4)


def test_order_depends_on_seed_and_epoch_alone(groups: ImageGroups) -> None:
    first = list(_training(groups))
    assert list(_training(groups)) == first
    assert list(_training(groups, seed=8)) != first
    sampler = _training(groups)
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert second == list(_training(groups, epoch=1))
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_fewer_chunks_than_a_global_batch(make_records: Any) -> None:
    groups = group_by_image(make_records([2]))
    by_rank = [list(_training(groups, rank=r, world_size=3)) for r in range(3)]
    assert by_rank == [[[GroupSelection(0, (0, 1))] * 2]] * 3


def test_empty_training_mix() -> None:
    with pytest.raises(ValueError, match="is the training mix empty"):
        _training(group_by_image([]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("max_phrases", [3, 8, 64])
def test_evaluation_shards_are_exact(groups: ImageGroups, world_size: int, max_phrases: int) -> None:
    shards = []
    for rank in range(world_size):
        sampler = EvaluationBatchSampler(
            groups, images_per_device=3, max_phrases_per_batch=max_phrases, rank=rank, world_size=world_size
        )
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(1 <= len(batch) <= 3 for batch in batches)
        assert all(sum(len(piece.phrases) for piece in batch) <= max_phrases for batch in batches)
        shards.append(batches)
    assert _seen([batch for batches in shards for batch in batches]) == ALL
    images = [{piece.group for batch in batches for piece in batch} for batches in shards]
    assert sum(map(len, images)) == len(set().union(*images)) == len(SIZES)


def test_evaluation_keeps_an_images_phrases_together(groups: ImageGroups) -> None:
    pieces = [
        p for batch in EvaluationBatchSampler(groups, images_per_device=4, max_phrases_per_batch=12) for p in batch
    ]
    assert [p.group for p in pieces] == list(range(len(SIZES)))
    assert [len(p.phrases) for p in pieces] == SIZES


def test_wrong_rank(groups: ImageGroups) -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        EvaluationBatchSampler(groups, images_per_device=1, max_phrases_per_batch=1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        _training(groups, rank=2, world_size=2)
