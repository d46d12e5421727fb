"""Which phrases of which images make which batch, on which rank.

Both samplers yield lists of `GroupSelection`; nothing is decoded here, so skipping batches costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from deris_llm.data.dataset import GroupSelection, ImageGroups


class TrainingBatchSampler(Sampler[list[GroupSelection]]):
    """Yields every phrase once an epoch, k of an image at a time, shuffled by image; every rank gets as many batches.

    The n phrases of an image are dealt at random into ceil(n / k) chunks whose sizes differ by at most one (9 phrases
    with k = 4: 3 + 3 + 3), so work is even and no phrase counts more than another. ``limits`` (a number per group, from
    `token_budget.phrase_limits`) lowers k for images with long phrases. The chunks of all images are shuffled; global
    batch b is the b-th run of ``images_per_device * world_size`` chunks, so it does not depend on how many ranks share
    it. The last global batch is filled with chunks from the start of the epoch's order; these are seen twice.

    The order depends on (seed, epoch, groups) alone. On resume, Trainer skips the batches that were trained on.
    """

    def __init__(
        self,
        groups: ImageGroups,
        *,
        phrases_per_image: int,
        images_per_device: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        limits: Sequence[int] | None = None,
    ) -> None:
        if not groups:
            raise ValueError(
                "TrainingBatchSampler: expected at least one image group, got none; is the training mix empty?"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"TrainingBatchSampler: expected 0 <= rank < world_size, got rank {rank} of {world_size}")
        if phrases_per_image < 1:
            raise ValueError(f"TrainingBatchSampler: expected phrases_per_image of 1 or more, got {phrases_per_image}")
        self._sizes: list[int] = groups.sizes.tolist()
        most = [phrases_per_image] * len(groups) if limits is None else [min(phrases_per_image, n) for n in limits]
        self._num_chunks = [-(-size // k) for size, k in zip(self._sizes, most, strict=True)]
        self.images_per_device = images_per_device
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = epoch

    @property
    def num_chunks(self) -> int:
        """Images (with k phrases each) seen in an epoch by all ranks together, before the last batch is filled."""
        return sum(self._num_chunks)

    @property
    def num_phrases(self) -> int:
        """Phrases seen in an epoch by all ranks together, before the last batch is filled."""
        return sum(self._sizes)

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch; the same on every rank and in every epoch."""
        return -(-self.num_chunks // (self.images_per_device * self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[GroupSelection]]:
        chunks = self._epoch_chunks()
        per_step = self.images_per_device * self.world_size
        for batch in range(len(self)):
            first = batch * per_step + self.rank * self.images_per_device
            yield [chunks[i % len(chunks)] for i in range(first, first + self.images_per_device)]

    def _epoch_chunks(self) -> _EpochChunks:
        random = np.random.default_rng([self.seed, self.epoch])
        phrases = np.empty(self.num_phrases, np.int32)
        groups = np.empty(self.num_chunks, np.int32)
        starts = np.zeros(self.num_chunks + 1, np.int64)
        made = 0
        for group, (size, number) in enumerate(zip(self._sizes, self._num_chunks, strict=True)):
            for chunk in np.array_split(random.permutation(size), number):
                starts[made + 1] = starts[made] + len(chunk)
                phrases[starts[made] : starts[made + 1]] = np.sort(chunk)
                groups[made] = group
                made += 1
        return _EpochChunks(phrases, starts, groups, random.permutation(made), self.epoch)


@dataclass(frozen=True, eq=False)
class _EpochChunks:
    """The chunks of an epoch in their order, as arrays: a hundred thousand small objects would need far more memory."""

    phrases: np.ndarray  # int32, numbers of phrases in their groups, chunk by chunk
    starts: np.ndarray  # int64 (chunks + 1,), where a chunk begins in `phrases`
    groups: np.ndarray  # int32 (chunks,)
    order: np.ndarray  # int64 (chunks,), the chunk that comes first, second, ...
    epoch: int

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> GroupSelection:
        chunk = self.order[index]
        members = self.phrases[self.starts[chunk] : self.starts[chunk + 1]]
        return GroupSelection(int(self.groups[chunk]), tuple(members.tolist()), self.epoch)


class EvaluationBatchSampler(Sampler[list[GroupSelection]]):
    """Yields every phrase of every image exactly once over all ranks: disjoint shards by image, without padding.

    Rank r takes images r, r + world_size, ... in their order. A batch holds at most ``images_per_device`` images and at
    most ``max_phrases_per_batch`` phrases. An image with more phrases is split over batches, one with more than its
    number in ``limits`` (from `token_budget.phrase_limits`) into pieces of that size. Ranks may have different numbers
    of batches, so an evaluation loop must not synchronise by batch.
    """

    def __init__(
        self,
        groups: ImageGroups,
        *,
        images_per_device: int,
        max_phrases_per_batch: int,
        rank: int = 0,
        world_size: int = 1,
        limits: Sequence[int] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(
                f"EvaluationBatchSampler: expected 0 <= rank < world_size, got rank {rank} of {world_size}"
            )
        self._batches: list[list[GroupSelection]] = []
        batch: list[GroupSelection] = []
        num_phrases = 0
        for index in range(rank, len(groups), world_size):
            size = int(groups.sizes[index])
            most = max_phrases_per_batch if limits is None else min(max_phrases_per_batch, limits[index])
            for first in range(0, size, most):
                piece = GroupSelection(index, tuple(range(first, min(first + most, size))))
                if batch and (
                    len(batch) == images_per_device or num_phrases + len(piece.phrases) > max_phrases_per_batch
                ):
                    self._batches.append(batch)
                    batch, num_phrases = [], 0
                batch.append(piece)
                num_phrases += len(piece.phrases)
        if batch:
            self._batches.append(batch)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[GroupSelection]]:
        return iter(self._batches)
