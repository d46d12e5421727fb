"""The training mix: train splits of several datasets over the same pictures, without any evaluation picture.

RefCOCO, RefCOCO+ and RefCOCOg drew their splits independently: a picture of RefCOCO's val is one of RefCOCOg's train.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from deris_llm.config import DataConfig, RunConfig
from deris_llm.data.errors import DataError
from deris_llm.data.store.prepared import COCO_STEM, PreparedSplit
from deris_llm.data.store.records import RecordView
from deris_llm.data.formats.refer import DATASETS
from deris_llm.data.sources import image_hashes_of_split, images_of_split, read_split, split_names

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

    records: RecordView
    report: MixReport


def training_mix(config: DataConfig) -> TrainingMix:
    """Reads the train splits of ``config.train`` and removes the images of every evaluation split.

    Evaluation splits are all splits but train of every mixed dataset, and those of ``config.eval``. A picture is the same
    if its id is (COCO's file names; `deris_llm.data.store.prepared`), or, among prepared sets, its file's
    content, unless COCO's names tell two apart.

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

    eval_hashes = {
        digest: image_id
        for name in eval_splits
        if not name.endswith("/train")
        for digest, image_id in image_hashes_of_split(config.root, name).items()
    }
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


def _is_of_evaluation(
    records: PreparedSplit, ids: pa.Array, eval_images: set[str], eval_hashes: Mapping[str, str]
) -> np.ndarray:
    """Which pictures some evaluation split has too, by id or, among prepared sets, by content; bool, per id.

    Two pictures that both have COCO's names are told apart by these, as all published splits are.
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
