"""Which phrases of which images make which batch, on which rank.

Both samplers yield lists of `GroupSelection` and know nothing of decoding, so skipping costs nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from deris_llm.data.dataset import GroupSelection, ImageGroup, group_phrase_ids, group_sizes

logger = logging.getLogger(__name__)


class TrainingBatchSampler(Sampler[list[GroupSelection]]):
    """Every phrase once an epoch, k of an image at a time, shuffled by image; as many batches on every rank.

    An image's n phrases are dealt at random into ceil(n / k) chunks whose sizes differ by at most one (9 phrases with
    k = 4: 3 + 3 + 3): work is even and no phrase counts more than another. ``limits`` (a number per group, from
    `token_budget.phrase_limits`) lower k for images whose phrases are long. The chunks of all images are shuffled;
    batch b of all ranks together is the b-th run of ``images_per_device * world_size`` chunks. What a step sees
    depends on that product only, not on how many ranks share it. The last batch is filled with chunks from the start of
    the epoch's order (less than one global batch is seen twice; in training only, evaluation repeats nothing).

    The order is a function of (seed, epoch, groups) alone.
    """

    def __init__(
        self,
        groups: Sequence[ImageGroup],
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
        self._sizes = group_sizes(groups)
        most = [phrases_per_image] * len(groups) if limits is None else [min(phrases_per_image, n) for n in limits]
        self._num_chunks = [-(-size // k) for size, k in zip(self._sizes, most, strict=True)]
        self._limits = None if limits is None else hashlib.sha256(repr(list(limits)).encode()).hexdigest()[:16]
        self._fingerprint = _fingerprint(groups)
        self.phrases_per_image = phrases_per_image
        self.images_per_device = images_per_device
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = epoch
        self._start = 0  # batches that the next iteration skips

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
        start, self._start = self._start, 0
        chunks = self._epoch_chunks()
        per_step = self.images_per_device * self.world_size
        for batch in range(start, len(self)):
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

    def state_dict(self, *, batches_done: int) -> dict[str, int | str | None]:
        """Where the epoch stands after ``batches_done`` batches of this rank were trained on.

        The loader's workers run ahead, so only the training loop knows that number. Progress is stored in chunks over
        all ranks: another number of ranks can go on from it.
        """
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "chunks_done": batches_done * self.images_per_device * self.world_size,
            "phrases_per_image": self.phrases_per_image,
            "limits": self._limits,
            "data": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, int | str | None]) -> None:
        """Makes the next iteration go on where ``state`` was taken.

        Raises:
            ValueError: the state belongs to another order: other data, seed, phrases per image or limits.
        """
        own = {key: self.state_dict(batches_done=0)[key] for key in ("seed", "phrases_per_image", "limits", "data")}
        differ = [
            f"{key}: {state.get(key)!r} then, {value!r} now" for key, value in own.items() if state.get(key) != value
        ]
        if differ:
            raise ValueError(
                f"resuming the data order: expected the data and settings of the saved run, got {'; '.join(differ)}. "
                "Resume with the saved config and files, or start a new run from its weights"
            )
        per_step = self.images_per_device * self.world_size
        chunks_done = int(state["chunks_done"] or 0)
        if chunks_done % per_step:
            logger.warning(
                "resuming the data order: %d images were done, no multiple of the %d of a batch now; %d are seen again",
                chunks_done, per_step, chunks_done % per_step,
            )  # fmt: skip
        self.epoch = int(state["epoch"] or 0)
        self._start = min(chunks_done // per_step, len(self))


@dataclass(frozen=True, eq=False)
class _EpochChunks:
    """The chunks of an epoch in their order, as integers: a hundred thousand objects would take the memory that records don't."""

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
    """Every phrase of every image exactly once over all ranks: disjoint shards by image, no padding, no repetition.

    Rank r takes images r, r + world_size, ... in their order. A batch holds at most ``images_per_device`` images with
    all their phrases and at most ``max_phrases_per_batch`` phrases; an image with more is split over batches, and one
    with more than its number in ``limits`` (from `token_budget.phrase_limits`) into pieces of so many. Ranks may have
    different numbers of batches, so nothing in an evaluation loop may synchronise by batch.
    """

    def __init__(
        self,
        groups: Sequence[ImageGroup],
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
        sizes = group_sizes(groups)
        for index in range(rank, len(groups), world_size):
            size = sizes[index]
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


def _fingerprint(groups: Sequence[ImageGroup]) -> str:
    """Short hash of the phrase ids in their order."""
    digest = hashlib.sha256()
    for phrase_id in group_phrase_ids(groups):
        digest.update(phrase_id.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
