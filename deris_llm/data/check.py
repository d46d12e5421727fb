"""Compares the counts of a data folder with the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deris_llm.data.formats import refer
from deris_llm.data.errors import DataError
from deris_llm.data.store.prepared import ARROW_FOLDER, Manifest, file_sha256, prepared_sets
from deris_llm.data.sources import (
    check_root,
    count_refs,
    images_of_split,
    is_refer,
    manifest_of,
    read_split,
    split_names,
    split_notes,
)

KNOWN_COUNTS: dict[str, tuple[int, int, int]] = {
    "refcoco/train": (42_404, 120_624, 16_994),
    "refcoco/val": (3_811, 10_834, 1_500),
    "refcoco/testA": (1_975, 5_657, 750),
    "refcoco/testB": (1_810, 5_095, 750),
    "refcoco+/train": (42_278, 120_191, 16_992),
    "refcoco+/val": (3_805, 10_758, 1_500),
    "refcoco+/testA": (1_975, 5_726, 750),
    "refcoco+/testB": (1_798, 4_889, 750),
    "refcocog_umd/train": (42_226, 80_512, 21_899),
    "refcocog_umd/val": (2_573, 4_896, 1_300),
    "refcocog_umd/test": (5_023, 9_602, 2_600),
    "refcocog_google/train": (44_822, 85_474, 24_698),
    "refcocog_google/val": (5_000, 9_536, 4_650),
    "refcoco-m/validation": (2_080, 5_598, 1_190),  # by its card; a ref is a mask
    "reasonseg/val": (200, 200, 200),  # by LISA's README
    "reasonseg/test": (779, 779, 779),
}
"""Refs, phrases, images of the published files."""

KNOWN_PHRASES: dict[str, tuple[int, int]] = {
    "grefcoco/train": (209_344, 19_140),
    "grefcoco/val": (14_229, 8_905),
    "grefcoco/testA": (19_200, 4_448),
    "grefcoco/testB": (16_063, 4_673),
}
"""Phrases, and those of them without a target, of the published files that may have such."""

KNOWN_VIDEOS: dict[str, tuple[int, int | None]] = {
    "mevis/train": (1_662, 23_051),
    "mevis/valid_u": (50, 793),
    "mevis/valid": (140, 2_236),
    "mevis/test": (154, 2_490),
    "mevis-v2/train": (1_662, 27_502),
    "mevis-v2/valid_u": (50, 907),
    "mevis-v2/valid": (140, 2_523),
    "ref-ytvos/train": (3_471, 12_913),
    "ref-ytvos/valid": (202, None),
    "ref-ytvos/test": (305, None),
    "ref-davis/train": (60, None),
    "ref-davis/val": (30, None),
}
"""Videos and sentences of the published files; None: not known."""

PLANNED_FRAMES = 8
"""Frames of a video of train with which `plan` counts where the data are not there, as with `--train-frames 8`."""


_PUBLISHERS = {
    "grefcoco": "grefs(unc).json and instances.json from the gRefCOCO project again",
    "reasonseg": "ReasonSeg from the LISA project again",
    "refcoco-m": "moondream/refcoco-m from Hugging Face again",
    **dict.fromkeys(("mevis", "mevis-v2", "ref-ytvos", "ref-davis"), "it from where docs/video.md says, or rename this set"),
}
"""Where a dataset that is not REFER's own comes from."""


def known_num_phrases(split: str) -> int:
    """Phrases of the published ``dataset/split``, of videos with `PLANNED_FRAMES`; 0 where it is not known."""
    if split in KNOWN_VIDEOS:
        return PLANNED_FRAMES * (KNOWN_VIDEOS[split][1] or 0)
    return KNOWN_PHRASES[split][0] if split in KNOWN_PHRASES else KNOWN_COUNTS.get(split, (0, 0, 0))[1]


def known_num_images(split: str) -> int:
    """Images of the published ``dataset/split``, of videos with `PLANNED_FRAMES`; 0 where it is not known."""
    if split in KNOWN_VIDEOS:
        return PLANNED_FRAMES * KNOWN_VIDEOS[split][0]
    return KNOWN_COUNTS.get(split, (0, 0, 0))[2]


@dataclass(frozen=True)
class SplitCounts:
    """The counts of a split, or why it cannot be read."""

    name: str  # dataset/split
    num_refs: int
    num_phrases: int
    num_images: int
    num_images_in_train: int  # of its own dataset's train split; 0 for train itself
    num_no_target: int = 0  # phrases without a target
    num_videos: int = 0  # of which the images are frames
    num_sentences: int = 0  # of the videos; each is a phrase of each frame
    has_truth: bool = True
    problem: str | None = None
    notes: tuple[str, ...] = ()  # what a reader of the split's numbers must know
    source: str = ""  # the file that was counted, with size and hash

    @property
    def known(self) -> tuple[int, int, int] | None:
        """Refs, phrases, images of the published split."""
        return KNOWN_COUNTS.get(self.name)

    @property
    def known_phrases(self) -> tuple[int, int] | None:
        """Phrases, and those without a target, of the published split."""
        return KNOWN_PHRASES.get(self.name)

    @property
    def known_videos(self) -> tuple[int, int | None] | None:
        """Videos and sentences of the published split."""
        return KNOWN_VIDEOS.get(self.name)

    @property
    def is_known(self) -> bool:
        """Whether counts of the published split are known."""
        return bool(self.known or self.known_phrases or self.known_videos)

    @property
    def is_as_published(self) -> bool:
        """Whether all known counts of the published split are met."""
        if self.known_videos is not None:
            return self.known_videos in ((self.num_videos, self.num_sentences), (self.num_videos, None))
        if self.known_phrases is not None:
            return self.known_phrases == (self.num_phrases, self.num_no_target)
        return self.known == (self.num_refs, self.num_phrases, self.num_images)


def check_data(root: str | Path, datasets: Sequence[str] | None = None) -> list[SplitCounts]:
    """Reads and checks every split below ``root``. Prepared sets were checked when they were made; only files are hashed.

    Args:
        root: the data folder.
        datasets: dataset names; None = all that exist.

    Raises:
        DataError: no images or no dataset at all, or a named dataset is missing.
    """
    check_root(root)
    there = dict.fromkeys(
        [*(name for name in refer.DATASETS if refer.refs_path(root, name).is_file()), *prepared_sets(root)]
    )
    names = list(dict.fromkeys(datasets)) if datasets else list(there)
    for name in names or ["refcoco"]:
        if is_refer(root, name):
            refer.find_image_folder(root, name if name in refer.DATASETS else "refcoco")
    if not names:
        expected = ", ".join(str(refer.refs_path(root, name)) for name in refer.DATASETS)
        found = ", ".join(sorted(path.name for path in Path(root).iterdir()))
        raise DataError(
            f"{root}: expected at least one of {expected}, or a prepared set; the folder holds {found}. Check the path and the "
            "names"
        )
    counts: list[SplitCounts] = []
    for dataset in names:
        splits = split_names(root, dataset)
        if is_refer(root, dataset):
            source = _described_file(refer.refs_path(root, dataset))
        else:
            source = _described_source(manifest_of(root, dataset))
        train_images: set[str] = set()
        for split in splits:
            name = f"{dataset}/{split}"
            try:
                found = _checked(root, dataset, split)
            except DataError as error:
                counts.append(SplitCounts(name, count_refs(root, name), 0, 0, 0, problem=str(error), source=source))
                continue
            images = images_of_split(root, name)
            shared = len(images & train_images)
            train_images |= images if split == "train" else set()
            counts.append(
                SplitCounts(
                    name,
                    count_refs(root, name),
                    found["num_phrases"],
                    len(images),
                    shared,
                    found["num_no_target"],
                    found.get("num_videos", 0),
                    found.get("num_sentences", 0),
                    found.get("has_truth", True),
                    notes=split_notes(root, name),
                    source=source,
                )
            )
    return counts


def differences(counts: Sequence[SplitCounts]) -> list[str]:
    """Returns a message for each source with other counts than the published ones: splits, file, and what to do."""
    by_source: dict[str, list[SplitCounts]] = {}
    for split in counts:
        if split.problem is None and split.is_known and not split.is_as_published:
            by_source.setdefault(split.source, []).append(split)
    return [
        f"{', '.join(split.name for split in splits)}: expected the published counts, got others from {source}. "
        f"If you meant the published dataset, download {_publisher(splits[0].name)}"
        for source, splits in by_source.items()
    ]


def _checked(root: str | Path, dataset: str, split: str) -> Mapping[str, Any]:
    """Returns the manifest's part of a split that can be used."""
    read_split(root, f"{dataset}/{split}")  # all files exist and have the right size
    manifest = manifest_of(root, dataset)
    found = manifest.splits[split]
    for file in (manifest.content["images"], *found["shards"]):
        path = manifest.folder / ARROW_FOLDER / file["file"]
        if (digest := file_sha256(path)) != file["sha256"]:
            raise DataError(
                f"{path}: expected sha256 {file['sha256'][:12]}, as the manifest says, got {digest[:12]}: the file was changed. "
                f"Remove {manifest.folder} and run `deris-llm data prepare` again"
            )
    return found


def _described_file(path: Path) -> str:
    return f"{path} ({path.stat().st_size:,} bytes, sha256 {file_sha256(path)[:12]})"


def _described_source(manifest: Manifest) -> str:
    source = manifest.content["source"]
    files = ", ".join(
        f"{file['file']} ({file.get('bytes', 0):,} bytes, sha256 {file['sha256'][:12]})" for file in source["files"][:3]
    )
    return f"{manifest.folder}, prepared of {source['source']}: {files or source['identity']}"


def _publisher(name: str) -> str:
    dataset = name.partition("/")[0]
    if dataset in _PUBLISHERS:
        return _PUBLISHERS[dataset]
    folder, split_by = refer.DATASETS[dataset][:2]
    return f"{folder}.zip (it holds refs({split_by}).p) from the REFER project again"
