"""The training mix: train splits of several datasets over the same images, without any evaluation image.

RefCOCO, RefCOCO+ and RefCOCOg drew their splits independently: an image of RefCOCO's val may be in RefCOCOg's train.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from deris_llm.common.words import count_of
from deris_llm.config import DataConfig, RunConfig
from deris_llm.data.errors import DataError
from deris_llm.data.store.prepared import COCO_STEM, PreparedSplit
from deris_llm.data.store.records import RecordView
from deris_llm.data.formats.refer import OVER_COCO
from deris_llm.data.sources import image_hashes_of_split, images_of_split, read_split, split_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetShare:
    """What one dataset contributes to the mix, and what was removed from it."""

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
            f"{s.dataset}/train: {count_of(s.num_phrases, 'phrase')} of {count_of(s.num_images, 'image')}"
            f" ({count_of(s.num_phrases_removed, 'phrase')} of {count_of(s.num_images_removed, 'evaluation image')} left out)"
            for s in self.shares
        ]
        lines.append(
            f"training mix: {count_of(self.num_phrases, 'phrase')} of {count_of(self.num_images, 'image')}; "
            f"{count_of(self.num_images_removed, 'image')} removed, which an evaluation split has too "
            f"({', '.join(self.eval_splits)})"
        )
        if self.num_eval_images_kept:
            lines.append(f"{self.num_eval_images_kept:,} IMAGES OF EVALUATION SPLITS ARE TRAINED ON")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class TrainingMix:
    """The phrases to train on, dataset after dataset, and their counts."""

    records: RecordView
    report: MixReport


def training_mix(config: DataConfig) -> TrainingMix:
    """Reads the train splits of ``config.train`` and removes the images of every evaluation split.

    Evaluation splits are all splits but train of every mixed dataset, and those of ``config.eval``. Two images are the
    same if their ids are equal (COCO's file names) or, in prepared sets, if the content of their files is equal and
    COCO's names do not tell them apart.

    Raises:
        DataError: unusable files or records, or nothing is left to train on.
    """
    eval_splits = _evaluation_splits(config)
    evaluated_splits = [name for name in eval_splits if not name.endswith("/train")]
    eval_images = set().union(*(images_of_split(config.root, name) for name in evaluated_splits))
    eval_hashes: dict[str, str] = {}
    for name in evaluated_splits:
        eval_hashes |= image_hashes_of_split(config.root, name)
    parts = [read_split(config.root, f"{name}/train", phrase_field=config.phrase_field) for name in config.train]
    found = [part.image_numbers() for part in parts]
    of_eval = [
        _is_of_evaluation(part, ids, eval_images, eval_hashes) for part, (_, ids) in zip(parts, found, strict=True)
    ]
    shares: list[DatasetShare] = []
    trained, removed_images, kept_eval_images = set[str](), set[str](), set[str]()
    positions: list[np.ndarray] = []
    offset = 0
    for dataset, part, (numbers, ids), evaluated in zip(config.train, parts, found, of_eval, strict=True):
        kept = np.ones(len(part), dtype=bool) if config.allow_leakage else ~evaluated[numbers]
        images, removed = np.unique(numbers[kept]), np.unique(numbers[~kept])
        num_removed = len(part) - int(kept.sum())
        shares.append(DatasetShare(dataset, int(kept.sum()), len(images), num_removed, len(removed)))
        trained |= set(ids.take(pa.array(images)).to_pylist())
        removed_images |= set(ids.take(pa.array(removed)).to_pylist())
        kept_eval_images |= set(ids.take(pa.array(images[evaluated[images]])).to_pylist())
        positions.append(np.flatnonzero(kept) + offset)
        offset += len(part)
    chosen = np.concatenate(positions) if positions else np.zeros(0, np.int64)
    if not len(chosen):
        raise DataError(
            f"training mix of {', '.join(config.train) or 'no dataset'}: no phrase is left after "
            f"{len(removed_images):,} evaluation images were removed. Name other datasets in data.train, or set "
            "data.allow_leakage=true knowingly"
        )
    report = MixReport(
        shares=tuple(shares),
        num_phrases=len(chosen),
        num_images=len(trained),
        num_images_removed=len(removed_images),
        num_eval_images_kept=len(kept_eval_images),
        eval_splits=eval_splits,
    )
    if report.num_eval_images_kept:
        logger.warning(
            "data.allow_leakage=true: %s training images belong to an evaluation split (%s). "
            "Numbers on those splits are NOT comparable with anybody's",
            f"{report.num_eval_images_kept:,}",
            ", ".join(eval_splits),
        )
    return TrainingMix(RecordView(parts, chosen), report)


def _evaluation_splits(config: DataConfig) -> tuple[str, ...]:
    names = [f"{dataset}/{split}" for dataset in config.train for split in split_names(config.root, dataset)]
    for name in config.eval:
        dataset, _, split = name.partition("/")
        if split not in (existing := split_names(config.root, dataset)):
            raise DataError(f"data.eval: {name!r} does not exist; {dataset} has {', '.join(existing)}")
    return tuple(dict.fromkeys([*(name for name in names if not name.endswith("/train")), *config.eval]))


def _is_of_evaluation(
    records: PreparedSplit, ids: pa.Array, eval_images: set[str], eval_hashes: Mapping[str, str]
) -> np.ndarray:
    """Returns for each image id whether an evaluation split has the same image, by id or by content.

    Two images that both have COCO names are compared by name only, as in all published splits.
    """
    names = ids.to_pylist()
    found = np.fromiter((image_id in eval_images for image_id in names), bool, len(names))
    if eval_hashes:
        hash_of = dict(zip(records.image_ids.to_pylist(), records.image_hashes.to_pylist(), strict=True))
        for i, image_id in enumerate(names):
            other = eval_hashes.get(hash_of[image_id])
            found[i] |= other is not None and not (COCO_STEM.fullmatch(image_id) and COCO_STEM.fullmatch(other))
    return found


def leakage_notice(config: RunConfig, splits: Sequence[str] = ()) -> str | None:
    """Returns the warning to print with every number of a run that may have been trained on evaluation images.

    What the base weights were trained on is not considered.

    Args:
        config: of the training run, as its checkpoint records it.
        splits: the evaluated ``dataset/split``; those of REFER's datasets, which share their images, are compared with
            the splits that were removed from the training mix.

    Returns:
        None if there is nothing to warn of.
    """
    if config.data.allow_leakage:
        return (
            "LEAKAGE (data.allow_leakage=true): trained on images of evaluation splits; "
            "these numbers are not comparable with anybody's"
        )
    mixed = OVER_COCO.intersection(config.data.train)
    apart = [
        name
        for name in splits
        if mixed and (name.partition("/")[0] in OVER_COCO - mixed) and name not in config.data.eval
    ]
    if not apart:
        return None
    return (
        f"POSSIBLE LEAKAGE: images of {', '.join(apart)} were not removed from the training mix ({', '.join(sorted(mixed))}), "
        "whose datasets share these images; name these splits in data.eval before training"
    )
