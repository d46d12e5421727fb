"""What frozen towers make of pictures, kept on disk: training then neither decodes a picture nor runs a tower on it.

    DIR/FINGERPRINT/about.json              what the features depend on, in words
    DIR/FINGERPRINT/3f/3fa9....safetensors  of one picture: `pyramid.0` to `pyramid.3`, `vision`; metadata: its height, width

The fingerprint is of all that features depend on: the towers' weights, the pictures' sizes and how they are warped, the
precision. A file's name is the hash of the picture file's content: a picture that was changed is another one, a data set
that was copied or renamed still has its features. `deris-llm data features` writes, the training loader reads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deris_llm.data.errors import DataError
from deris_llm.data.store.prepared import file_sha256
from deris_llm.structures import Exif

ABOUT_FILE = "about.json"
PYRAMID = tuple(f"pyramid.{level}" for level in range(4))  # strides 4, 8, 16, 32
VISION = "vision"
SUFFIX = ".safetensors"
COMMAND = "deris-llm data features"

_THREADS = 8  # that look for files: hashing waits for the disk, and leaves Python alone
_NUM_NAMED = 5


@dataclass(frozen=True)
class Picture:
    """A picture file and what its annotations say of it."""

    path: str
    size_hw: tuple[int, int]  # px
    asked_by: tuple[str, ...]  # ids of phrases that need it, for messages
    exif: Exif = "stored"  # which way up it is read where its size does not say it


@dataclass(frozen=True)
class CachedFeatures:
    """Features of I pictures; what is not kept is empty or None."""

    pyramid: tuple[Tensor, ...] = ()  # four maps (I, c, H / stride, W / stride)
    vision: Tensor | None = None  # (I, N, D_v)


@dataclass(frozen=True)
class FeatureCache:
    """The features of one fingerprint. Picklable: the loader's workers read.

    Attributes:
        root: DIR, `data.feature_cache`.
        facts: what the features depend on, plain values; the fingerprint is theirs.
        names: tensors of a picture's file.
    """

    root: Path
    facts: Mapping[str, Any]
    names: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """DIR/FINGERPRINT."""
        content = json.dumps(self.facts, sort_keys=True)
        return self.root / hashlib.sha256(content.encode()).hexdigest()[:16]

    def file(self, picture: Picture) -> Path:
        """Where a picture's features are to be, whether they are there or not; reads the picture's file.

        Raises:
            DataError: the picture cannot be read.
        """
        try:
            digest = file_sha256(Path(picture.path))
        except OSError as error:
            raise DataError(
                f"{_named(picture)}: expected a picture, got {error.strerror}. Restore this file from its source, or remove "
                "what refers to it"
            ) from error
        way_up = "" if picture.exif == "stored" else "-displayed"
        return self.folder / digest[:2] / f"{digest}{way_up}{SUFFIX}"

    def write(self, path: Path, tensors: Mapping[str, Tensor], size_hw: tuple[int, int]) -> int:
        """Writes a picture's file, aside first: a file with a final name is whole.

        Args:
            path: from `file`.
            tensors: by `names`, without an axis for pictures, on the CPU.
            size_hw: px, of the picture.

        Returns:
            bytes written.
        """
        metadata = {"height": str(size_hw[0]), "width": str(size_hw[1])}
        content = safetensors.torch.save({name: tensors[name].contiguous() for name in self.names}, metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.partial-{os.getpid()}")
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return len(content)

    def write_about(self, about: Mapping[str, Any]) -> None:
        """Writes what the features are of, for readers and for the error that says why they do not fit."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{ABOUT_FILE}.partial-{os.getpid()}"
        partial.write_text(json.dumps({"facts": self.facts, **about}, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.folder / ABOUT_FILE)

    def read(self, pictures: Sequence[Picture]) -> CachedFeatures:
        """The features of pictures, in their order.

        Raises:
            DataError: a picture has none, or a broken file, or is of another size than it was annotated for.
        """
        found = [self._read(picture) for picture in pictures]
        stacked = {name: torch.stack([tensors[name] for tensors in found]) for name in self.names}
        return CachedFeatures(tuple(stacked[name] for name in PYRAMID if name in stacked), stacked.get(VISION))

    def _read(self, picture: Picture) -> dict[str, Tensor]:
        path = self.file(picture)
        if not path.is_file():
            raise self._lacking([picture], num_pictures=1)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                size_hw = int(metadata["height"]), int(metadata["width"])
                tensors = {name: file.get_tensor(name) for name in self.names}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: expected the features {', '.join(self.names)} of {_named(picture)}, got a broken file "
                f"({type(error).__name__}: {error}). Delete it and run `{COMMAND}` again with the run's --config and --set"
            ) from error
        if size_hw != picture.size_hw:
            raise DataError(
                f"{_named(picture)}: expected {picture.size_hw[1]} x {picture.size_hw[0]} px, for which the masks were "
                f"annotated, got features of {size_hw[1]} x {size_hw[0]} px. Use the original file, not a resized one"
            )
        return tensors

    def check(self, pictures: Iterable[Picture]) -> None:
        """Looks for every picture's file, so that a run stops before its first step and not in the middle of an epoch.

        Raises:
            DataError: there are no features of this fingerprint (says in what those that are there differ), or some
                pictures lack theirs (names five).
        """
        if not (self.folder / ABOUT_FILE).is_file():
            others = "".join(f"\n  - {path.parent}: {self._differences(path)}" for path in self._others())
            raise DataError(
                f"data.feature_cache={self.root}: expected the folder {self.folder.name} with features of this run's towers, got "
                + (f"features of others\n{others.lstrip(chr(10))}\n" if others else "none; ")
                + f"run `{COMMAND}` with the run's --config and --set, or leave data.feature_cache empty"
            )
        wanted = list(pictures)
        with ThreadPoolExecutor(_THREADS) as threads:
            is_there = list(threads.map(lambda picture: self.file(picture).is_file(), wanted))
        lacking = [picture for picture, there in zip(wanted, is_there, strict=True) if not there]
        if lacking:
            raise self._lacking(lacking, num_pictures=len(wanted))

    def _lacking(self, pictures: Sequence[Picture], *, num_pictures: int) -> DataError:
        listed = "\n".join(f"  - {_named(picture)}" for picture in pictures[:_NUM_NAMED])
        more = f"\n  - and {len(pictures) - _NUM_NAMED:,} more" if len(pictures) > _NUM_NAMED else ""
        return DataError(
            f"{self.folder}: expected features of every training picture, {len(pictures):,} of {num_pictures:,} have none (they "
            f"are new, or their files were changed)\n{listed}{more}\nRun `{COMMAND}` with the run's --config and --set: it "
            "computes what is missing"
        )

    def _others(self) -> list[Path]:
        return sorted(self.root.glob(f"*/{ABOUT_FILE}"))

    def _differences(self, about: Path) -> str:
        """In what the features of another fingerprint differ."""
        try:
            facts = json.loads(about.read_text(encoding="utf-8"))["facts"]
            names = sorted(name for name in {*facts, *self.facts} if facts.get(name) != self.facts.get(name))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{ABOUT_FILE} cannot be read ({error})"
        return "; ".join(f"{name}: {facts.get(name)} there, {self.facts.get(name)} now" for name in names)


def _named(picture: Picture) -> str:
    return f"{picture.path} (needed by {picture.asked_by[0]}{' …' if len(picture.asked_by) > 1 else ''})"
