"""Which towers of a run are frozen and may be kept (`data.feature_cache`), and `deris-llm data features`, which does."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deris_llm.checkpoints import checkpoints
from deris_llm.common.ranks import on_first_rank
from deris_llm.config import RunConfig
from deris_llm.data.collate import ReferringCollator
from deris_llm.data.dataset import GroupDataset, GroupSelection, ImageGroup, group_by_image
from deris_llm.data.feature_cache import PYRAMID, SUFFIX, VISION, FeatureCache, Picture
from deris_llm.data.mix import training_mix
from deris_llm.models.cognition import CognitionProcessor, FeatureProcessor, build_processor
from deris_llm.models.cognition.base import say_once
from deris_llm.models.deris import Deris, build_model
from deris_llm.structures import ReferringBatch

logger = logging.getLogger(__name__)

FORMAT = 1  # of a picture's file; another one is another fingerprint


@dataclass(frozen=True)
class FeaturesMade:
    """What `compute_features` did."""

    folder: Path
    num_pictures: int  # of the training mix
    num_computed: int  # the others were there
    num_files: int  # of this fingerprint, also of other mixes
    num_bytes: int  # of these files
    seconds: float


def feature_cache(config: RunConfig, model: Deris, processor: CognitionProcessor) -> FeatureCache:
    """The cache of a run's frozen towers. Every rank calls it: under ZeRO-3 their weights are spread.

    Args:
        config: of the run; `data.feature_cache` is set.
        model: with its weights, on any device.
        processor: the cognition backend's.

    Raises:
        ValueError: nothing is frozen whose features could be kept.
    """
    root, names = Path(config.data.feature_cache).expanduser(), list[str]()
    facts: dict[str, Any] = {"format": FORMAT, "precision": config.training.precision}
    perception, tower = model.perception, model.cognition.vision_tower()
    if perception is not None and perception.freeze_backbone:
        options = config.perception
        facts["perception.backbone"] = tensors_digest(perception.backbone)
        facts["perception pictures"] = f"{options.image_size} px, {options.resize}"
        names += PYRAMID
    if tower is not None and isinstance(processor, FeatureProcessor):
        facts["cognition.vision_tower"] = tensors_digest(tower.module)
        facts["cognition features"] = f"{config.cognition.backend}, {tower.about}"
        names.append(VISION)
    if not names:
        raise ValueError(
            f"data.feature_cache={root}: expected a frozen tower whose features can be kept, got none: "
            f"{_why_no_pyramid(config)} and {_why_no_vision(config)}; leave data.feature_cache empty"
        )
    if VISION not in names:
        say_once(f"data.feature_cache keeps the backbone's pyramid alone: {_why_no_vision(config)}")
    if PYRAMID[0] not in names:
        say_once(f"data.feature_cache keeps the vision tower's features alone: {_why_no_pyramid(config)}")
    return FeatureCache(root, facts, tuple(names))


def _why_no_pyramid(config: RunConfig) -> str:
    if not config.perception.freeze_backbone:
        return "perception.freeze_backbone=false lets the backbone train"
    return f"loopback.structure={config.loopback.structure} has no backbone"


def _why_no_vision(config: RunConfig) -> str:
    return f"cognition.backend={config.cognition.backend} has no frozen tower of one size for all pictures"


def training_features(
    config: RunConfig, model: Deris, processor: CognitionProcessor, groups: Sequence[ImageGroup]
) -> FeatureCache | None:
    """The cache that a training run reads, looked through for every picture; None where the run has none.

    Every rank calls it; rank 0 looks.

    Raises:
        ValueError: see `feature_cache` and `FeatureCache.check`.
    """
    if not config.data.feature_cache:
        return None
    cache = feature_cache(config, model, processor)
    on_first_rank(lambda: cache.check(training_pictures(groups)))
    logger.info("the features of all %s training pictures are in %s", f"{len(groups):,}", cache.folder)
    return cache


def tensors_digest(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and saved buffers, names included, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        with _whole(tensor):
            values = tensor.detach().cpu().contiguous().flatten()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(memoryview(values.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _whole(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Under ZeRO-3 a parameter is whole only where it is asked for."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed  # noqa: PLC0415 - only where it runs

    return deepspeed.zero.GatheredParameters(tensor)


def training_pictures(groups: Sequence[ImageGroup]) -> Iterator[Picture]:
    """The picture of every group, asked for by its first phrase."""
    dataset = GroupDataset(groups)
    for number in range(len(groups)):
        record = dataset[GroupSelection(number, (0,))].records[0]
        yield Picture(record.image_path, (record.height, record.width), (record.phrase_id,), record.exif)


def compute_features(config: RunConfig, *, on_progress: Callable[[int, int], None] | None = None) -> FeaturesMade:
    """Computes what a run's frozen towers make of its training pictures; those that are there are left as they are.

    Args:
        config: of the run; `data.feature_cache` says where to.
        on_progress: see `keep_features`.

    Raises:
        ValueError: no folder is given, nothing is frozen, unusable data or weights, not enough room.
    """
    start = time.monotonic()
    if not config.data.feature_cache:
        raise ValueError(
            "data.feature_cache: expected the folder that features go to, got none; add --set data.feature_cache=DIR here and "
            "to the training command"
        )
    mix = training_mix(config.data)
    logger.info("%s", mix.report)
    groups = group_by_image(mix.records)
    base = checkpoints.base_checkpoint(config)
    used = config if base is None else checkpoints.with_files_of(base, config)
    model = build_model(used, weights=base is None).eval()
    checkpoints.restore_first_weights(model, config)
    processor = build_processor(used)
    cache = feature_cache(config, model, processor)
    about = {
        "perception.weights": config.perception.weights,
        "perception.backbone": config.perception.backbone,
        "cognition.weights": config.cognition.weights,
        "training.start_from": config.training.start_from,
    }
    cache.write_about(about)
    num_computed = keep_features(cache, config, model, processor, groups, on_progress=on_progress)
    sizes = [path.stat().st_size for path in cache.folder.glob(f"??/*{SUFFIX}")]
    cache.write_about({**about, "pictures": len(sizes), "bytes": sum(sizes)})
    return FeaturesMade(cache.folder, len(groups), num_computed, len(sizes), sum(sizes), time.monotonic() - start)


def keep_features(
    cache: FeatureCache,
    config: RunConfig,
    model: Deris,
    processor: CognitionProcessor,
    groups: Sequence[ImageGroup],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Computes and writes the features that are not there yet.

    Runs in this process, on the GPU where there is one, `evaluation.images_per_device` pictures at a time.

    Args:
        cache: from `feature_cache`.
        config: of the run.
        model: its towers go to the GPU.
        processor: the cognition backend's.
        groups: whose pictures.
        on_progress: called with the number of pictures done and of all.

    Returns:
        how many were computed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    towers = _Towers(model, cache.names, device)
    loader = DataLoader(
        cast(Any, GroupDataset(groups)),  # DataLoader's type is that of the samples, ours of the batches
        sampler=cast(Any, [GroupSelection(number, (0,)) for number in range(len(groups))]),
        batch_size=config.evaluation.images_per_device,
        collate_fn=_MissingPictures(ReferringCollator(config, processor, with_targets=False), cache),
        num_workers=config.data.num_workers,
    )
    num_done = num_computed = 0
    for missing in loader:
        if missing.batch is not None:
            for path, size_hw, tensors in zip(missing.paths, missing.sizes_hw, towers(missing.batch), strict=True):
                written = cache.write(path, tensors, size_hw)
                if num_computed == 0:
                    _check_room(cache.folder, written * (len(groups) - num_done), len(groups) - num_done)
                num_computed += 1
        num_done += missing.num_pictures
        if on_progress is not None:
            on_progress(num_done, len(groups))
    return num_computed


@dataclass(frozen=True)
class _Missing:
    """Of some pictures those that have no features yet."""

    num_pictures: int  # all of them
    paths: list[Path]
    sizes_hw: list[tuple[int, int]]
    batch: ReferringBatch | None  # a row for each path


class _MissingPictures:
    """Runs in the loader's workers: decodes only pictures that have no features."""

    def __init__(self, collator: ReferringCollator, cache: FeatureCache) -> None:
        self.collator = collator
        self.cache = cache

    def __call__(self, groups: Sequence[ImageGroup]) -> _Missing:
        pictures = list(training_pictures(groups))
        paths = [self.cache.file(picture) for picture in pictures]
        rows = [row for row, path in enumerate(paths) if not path.is_file()]
        return _Missing(
            len(groups),
            [paths[row] for row in rows],
            [pictures[row].size_hw for row in rows],
            self.collator([groups[row] for row in rows]) if rows else None,
        )


class _Towers:
    """The frozen towers on a device; the rest of the model stays where it is."""

    def __init__(self, model: Deris, names: Sequence[str], device: torch.device) -> None:
        self.device = device
        self.perception = model.perception if PYRAMID[0] in names else None
        self.tower = model.cognition.vision_tower() if VISION in names else None
        for module in (self.perception, self.tower and self.tower.module):
            if module is not None:
                module.to(device)

    @torch.inference_mode()
    def __call__(self, batch: ReferringBatch) -> list[dict[str, Tensor]]:
        """A picture's tensors by name, for each picture, on the CPU."""
        found: dict[str, Tensor] = {}
        if self.perception is not None:
            maps = self.perception.pyramid(batch.perception_image.to(self.device))
            found |= zip(PYRAMID, maps, strict=True)
        if self.tower is not None:
            found[VISION] = self.tower.features(batch.cognition.pixel_values.to(self.device))
        rows = {name: tensor.cpu().unbind() for name, tensor in found.items()}
        return [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


def _check_room(folder: Path, num_bytes: int, num_pictures: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{folder}: expected room for the features of {num_pictures:,} pictures, {num_bytes / 1e9:,.1f} GB, got "
            f"{free / 1e9:,.1f} GB free; make room or name another folder with --set data.feature_cache=DIR"
        )
