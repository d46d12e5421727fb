"""Torch loaders over the samplers and the collator."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader

from deris_llm.config import RunConfig
from deris_llm.data.collate import ReferringCollator
from deris_llm.data.dataset import GroupDataset, ImageGroup, ImageGroups, every_nth_record, group_by_image
from deris_llm.data.phrase_conversion import PhraseConversion
from deris_llm.data.sampler import EvaluationBatchSampler, TrainingBatchSampler
from deris_llm.data.token_budget import phrase_limits
from deris_llm.structures import ReferringBatch, ReferringRecord

if TYPE_CHECKING:  # the loader's workers need no model library
    from deris_llm.models.cognition import CognitionProcessor

logger = logging.getLogger(__name__)

_PHRASES_IN_STATISTICS = 20_000  # about a second


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

    With ``data.conversion.rate`` above 0 some phrases are swapped (`PhraseConversion`); rank 0 logs what that does.

    Args:
        config: sizes and number of workers.
        groups: from `group_by_image`; the same list on every rank.
        processor: the cognition backend's.
        rank: which rank's batches.
        world_size: number of ranks.
        seed: of the order and the conversion; None takes ``training.seed``.
        epoch: the first epoch to iterate.
    """
    seed = config.training.seed if seed is None else seed
    sampler = TrainingBatchSampler(
        groups,
        phrases_per_image=config.data.phrases_per_image,
        images_per_device=config.training.images_per_device,
        rank=rank,
        world_size=world_size,
        seed=seed,
        epoch=epoch,
        limits=phrase_limits(config, groups, processor, is_swapped=config.data.conversion.rate > 0),
    )
    conversion = phrase_conversion(config, groups, seed=seed)
    if conversion is not None and rank == 0:
        records, step = every_nth_record(groups, _PHRASES_IN_STATISTICS)
        of_which = f" (counted on one phrase in {step})" if step > 1 else ""
        logger.info("%s%s", conversion.statistics(records, epoch), of_which)
    return TrainingLoader(
        cast(Any, GroupDataset(groups, conversion)),  # DataLoader's type is that of the samples, ours of the batches
        batch_sampler=sampler,
        collate_fn=ReferringCollator(config, processor),
        persistent_workers=config.data.num_workers > 0,
        **_worker_options(config),
    )


def phrase_conversion(config: RunConfig, groups: Sequence[ImageGroup], *, seed: int) -> PhraseConversion | None:
    """The conversion that ``data.conversion`` asks for over these phrases; None at rate 0."""
    wanted = config.data.conversion
    if wanted.rate == 0:
        return None
    return PhraseConversion(
        groups if isinstance(groups, ImageGroups) else (record for group in groups for record in group.records),
        rate=wanted.rate,
        similarity_threshold=wanted.threshold,
        min_words=wanted.min_words,
        mode=wanted.mode,
        max_tries=wanted.max_tries,
        seed=seed,
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
        limits=phrase_limits(config, groups, processor),
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
