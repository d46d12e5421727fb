"""The training mix: train splits of several datasets over the same pictures, without any evaluation picture.

RefCOCO, RefCOCO+ and RefCOCOg drew their splits independently: a picture of RefCOCO's val is one of RefCOCOg's train.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from deris_llm.config import DataConfig, RunConfig
from deris_llm.data.errors import DataError
from deris_llm.data.refer import DATASETS
from deris_llm.data.sources import images_of_split, read_split, split_names
from deris_llm.structures import ReferringRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetShare:
    """What one dataset gives to the mix, and what had to leave."""

    dataset: str
    num_phrases: int
    num_images: int
    num_phrases_removed: int
    num_images_removed: int


@dataclass(frozen=True)
class MixReport:
    """Counts of a training mix."""

    shares: tuple[DatasetShare, ...]
    num_phrases: int
    num_images: int  # distinct over the datasets
    num_images_removed: int  # distinct; 0 when evaluation images stay
    num_eval_images_kept: int  # distinct training images that some evaluation split has too; 0 when they are removed
    eval_splits: tuple[str, ...]  # the splits whose images were looked for

    def __str__(self) -> str:
        lines = [
            f"{s.dataset}/train: {s.num_phrases:,} phrases of {s.num_images:,} images"
            f" ({s.num_phrases_removed:,} phrases of {s.num_images_removed:,} evaluation images left out)"
            for s in self.shares
        ]
        lines.append(
            f"training mix: {self.num_phrases:,} phrases of {self.num_images:,} images; "
            f"{self.num_images_removed:,} images removed because they belong to an evaluation split "
            f"({', '.join(self.eval_splits)})"
        )
        if self.num_eval_images_kept:
            lines.append(f"{self.num_eval_images_kept:,} IMAGES OF EVALUATION SPLITS ARE TRAINED ON")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class TrainingMix:
    """The phrases to train on, dataset after dataset, and how they came about."""

    records: tuple[ReferringRecord, ...]
    report: MixReport


def training_mix(config: DataConfig) -> TrainingMix:
    """Reads the train splits of ``config.train`` and removes the images of every evaluation split.

    Evaluation splits are all splits but train of every mixed dataset, and those of ``config.eval``.

    Raises:
        DataError: unusable files or records, or nothing is left to train on.
    """
    others = [
        f"{dataset}/{split}"
        for dataset in config.train
        for split in split_names(config.root, dataset)
        if split != "train"
    ]
    for name in config.eval:
        dataset, _, split = name.partition("/")
        if split not in split_names(config.root, dataset):
            raise DataError(
                f"data.eval: {name!r} does not exist; {dataset} has {', '.join(split_names(config.root, dataset))}"
            )
    eval_splits = tuple(dict.fromkeys([*others, *config.eval]))
    eval_images = {
        image for name in eval_splits if not name.endswith("/train") for image in images_of_split(config.root, name)
    }

    records: list[ReferringRecord] = []
    shares: list[DatasetShare] = []
    removed_images: set[str] = set()
    for dataset in config.train:
        read = read_split(config.root, f"{dataset}/train", phrase_field=config.phrase_field)
        removed = [r for r in read if r.image_id in eval_images] if not config.allow_leakage else []
        kept = [r for r in read if r.image_id not in eval_images] if not config.allow_leakage else read
        removed_here = {r.image_id for r in removed}
        shares.append(
            DatasetShare(dataset, len(kept), len({r.image_id for r in kept}), len(removed), len(removed_here))
        )
        removed_images |= removed_here
        records.extend(kept)
    if not records:
        raise DataError(
            f"training mix of {', '.join(config.train) or 'no dataset'}: no phrase is left after "
            f"{len(removed_images):,} evaluation images were removed. Name other datasets in data.train, or set "
            "data.allow_leakage=true knowingly"
        )
    images = {r.image_id for r in records}
    report = MixReport(
        shares=tuple(shares),
        num_phrases=len(records),
        num_images=len(images),
        num_images_removed=len(removed_images),
        num_eval_images_kept=len(images & eval_images),
        eval_splits=eval_splits,
    )
    if report.num_eval_images_kept:
        logger.warning(
            "data.allow_leakage=true: %s training images belong to an evaluation split (%s). "
            "Numbers on those splits are NOT comparable with anybody's",
            f"{report.num_eval_images_kept:,}",
            ", ".join(eval_splits),
        )
    return TrainingMix(tuple(records), report)


def leakage_notice(config: RunConfig, splits: Sequence[str] = ()) -> str | None:
    """What every number of a run must be printed with when its model may have seen evaluation pictures; None if not.

    Says nothing about what the weights had seen before this run.

    Args:
        config: of the training run (a checkpoint's own).
        splits: ``dataset/split`` that are evaluated; those of REFER's datasets, which all draw on the same pictures,
            are compared with the splits that left the training mix.
    """
    if config.data.allow_leakage:
        return (
            "LEAKAGE (data.allow_leakage=true): trained on pictures of evaluation splits; "
            "these numbers are not comparable with anybody's"
        )
    mixed = set(config.data.train) & DATASETS.keys()
    apart = [
        name
        for name in splits
        if mixed and (name.partition("/")[0] in DATASETS.keys() - mixed) and name not in config.data.eval
    ]
    if not apart:
        return None
    return (
        f"POSSIBLE LEAKAGE: pictures of {', '.join(apart)} did not leave the training mix ({', '.join(sorted(mixed))}), "
        "whose datasets draw on the same pictures; name these splits in data.eval before training"
    )
