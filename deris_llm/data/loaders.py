"""PyTorch loaders that join samplers and collator."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader

from deris_llm.config import RunConfig
from deris_llm.data.collate import ReferringCollator
from deris_llm.data.dataset import GroupSelection, ImageGroup, ImageGroups, group_by_image
from deris_llm.data.phrase_conversion import PhraseConversion
from deris_llm.data.sampler import EvaluationBatchSampler, TrainingBatchSampler
from deris_llm.data.token_budget import phrase_limits
from deris_llm.structures import ReferringBatch, ReferringRecord

if TYPE_CHECKING:  # loader workers do not import the model libraries
    from deris_llm.models.cognition import CognitionProcessor

logger = logging.getLogger(__name__)

_PHRASES_IN_STATISTICS = 20_000  # about a second


class GroupDataset:
    """Looks up the phrases that a sampler chose; images are decoded in the collator.

    Args:
        groups: what the sampler numbers.
        conversion: replaces some phrases (training only); None leaves the records as they are.
    """

    def __init__(self, groups: ImageGroups, conversion: PhraseConversion | None = None) -> None:
        self.groups = groups
        self.conversion = conversion

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, selection: GroupSelection) -> ImageGroup:
        records = self.groups.selected(selection)
        if self.conversion is not None:
            records = tuple(self.conversion.convert(record, selection.epoch).record for record in records)
        return ImageGroup(records)


class TrainingLoader(DataLoader[ReferringBatch]):
    """A loader over one rank's `TrainingBatchSampler`, which is its ``batch_sampler``."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration; transformers' Trainer calls it."""
        assert isinstance(self.batch_sampler, TrainingBatchSampler), "built by train_loader"
        self.batch_sampler.set_epoch(epoch)


def train_loader(
    config: RunConfig,
    groups: ImageGroups,
    processor: CognitionProcessor,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int | None = None,
    epoch: int = 0,
) -> TrainingLoader:
    """Makes batches of ``training.images_per_device`` images with up to ``data.phrases_per_image`` phrases each.

    With ``data.conversion.rate`` above 0 some phrases are replaced (`PhraseConversion`); rank 0 logs the counts.

    Args:
        config: sizes and number of workers.
        groups: from `group_by_image`; the same on every rank.
        processor: of the cognition backend.
        rank: whose batches.
        world_size: number of ranks.
        seed: of the order and the conversion; None = ``training.seed``.
        epoch: the first one.
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
        step = max(1, -(-len(groups.records) // _PHRASES_IN_STATISTICS))
        of_which = f" (counted on one phrase in {step})" if step > 1 else ""
        logger.info("%s%s", conversion.statistics(list(groups.every_nth(step)), epoch), of_which)
    return TrainingLoader(
        cast(Any, GroupDataset(groups, conversion)),  # DataLoader is typed by sample, ours by batch
        batch_sampler=sampler,
        collate_fn=ReferringCollator(config, processor),
        persistent_workers=config.data.num_workers > 0,
        **_worker_options(config),
    )


def phrase_conversion(config: RunConfig, groups: ImageGroups, *, seed: int) -> PhraseConversion | None:
    """Returns the conversion that ``data.conversion`` asks for, or None at rate 0."""
    wanted = config.data.conversion
    if wanted.rate == 0:
        return None
    return PhraseConversion(
        groups,
        rate=wanted.rate,
        similarity_threshold=wanted.threshold,
        min_words=wanted.min_words,
        mode=wanted.mode,
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
    """Makes batches of one rank's exact shard of the records, with the batch sizes of ``config.evaluation``."""
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
        cast(Any, GroupDataset(groups)),  # see train_loader
        batch_sampler=sampler,
        collate_fn=ReferringCollator(config, processor, with_targets=with_targets),
        **_worker_options(config),
    )


def _worker_options(config: RunConfig) -> dict[str, Any]:
    # PyTorch itself limits each worker process to one intra-op thread.
    return {
        "num_workers": config.data.num_workers,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _leave_stopping_to_rank,
    }


def _leave_stopping_to_rank(_: int) -> None:
    """Makes a worker ignore what asks the run to stop: its rank finishes a step first, which needs the worker.

    Terminals and launchers signal all processes. SIGTERM from the rank itself ends the worker; without a rank it ends by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for_rank, args=(os.getppid(),), daemon=True).start()


def _end_for_rank(rank_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank_process:
        pass
    os._exit(0)
