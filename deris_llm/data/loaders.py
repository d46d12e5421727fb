"""Torch loaders over the samplers and the collator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader

from deris_llm.config import RunConfig
from deris_llm.data.collate import ReferringCollator
from deris_llm.data.dataset import GroupDataset, ImageGroup, group_by_image
from deris_llm.data.sampler import EvaluationBatchSampler, TrainingBatchSampler
from deris_llm.structures import ReferringBatch, ReferringRecord

if TYPE_CHECKING:  # the loader's workers need no model library
    from deris_llm.cognition import CognitionProcessor


class TrainingLoader(DataLoader[ReferringBatch]):
    """A loader over a `TrainingBatchSampler`, reachable as ``.batch_sampler``; already this rank's part."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration follows (transformers' Trainer calls it)."""
        assert isinstance(self.batch_sampler, TrainingBatchSampler), "built by train_loader"
        self.batch_sampler.set_epoch(epoch)


def train_loader(
    config: RunConfig,
    groups: Sequence[ImageGroup],
    processor: CognitionProcessor,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int | None = None,
    epoch: int = 0,
) -> TrainingLoader:
    """Batches of ``training.images_per_device`` images with ``data.phrases_per_image`` phrases each, for one rank.

    Args:
        config: sizes and number of workers.
        groups: from `group_by_image`; the same list on every rank.
        processor: the cognition backend's.
        rank: which rank's batches.
        world_size: number of ranks.
        seed: of the order; None takes ``training.seed``.
        epoch: the first epoch to iterate.
    """
    sampler = TrainingBatchSampler(
        groups,
        phrases_per_image=config.data.phrases_per_image,
        images_per_device=config.training.images_per_device,
        rank=rank,
        world_size=world_size,
        seed=config.training.seed if seed is None else seed,
        epoch=epoch,
    )
    return TrainingLoader(
        cast(Any, GroupDataset(groups)),  # DataLoader's type is that of the samples, ours that of the batches
        batch_sampler=sampler,
        collate_fn=ReferringCollator(config, processor),
        persistent_workers=config.data.num_workers > 0,
        **_worker_options(config),
    )


def evaluation_loader(
    config: RunConfig,
    records: Sequence[ReferringRecord],
    processor: CognitionProcessor,
    *,
    rank: int = 0,
    world_size: int = 1,
    with_targets: bool = True,
) -> DataLoader[ReferringBatch]:
    """This rank's exact shard of the records, by image, in batches of the sizes of ``config.evaluation``."""
    groups = group_by_image(records)
    sampler = EvaluationBatchSampler(
        groups,
        images_per_device=config.evaluation.images_per_device,
        max_phrases_per_batch=config.evaluation.max_phrases_per_batch,
        rank=rank,
        world_size=world_size,
    )
    return DataLoader(
        cast(Any, GroupDataset(groups)),  # DataLoader's type is that of the samples, ours that of the batches
        batch_sampler=sampler,
        collate_fn=ReferringCollator(config, processor, with_targets=with_targets),
        **_worker_options(config),
    )


def _worker_options(config: RunConfig) -> dict[str, Any]:
    # Torch gives each worker process a single intra-op thread by itself.
    return {"num_workers": config.data.num_workers, "pin_memory": torch.cuda.is_available()}
