"""Reads RefSegRS, phrases about aerial images, in its authors' own files.

    RefSegRS/output_phrase_train.txt, output_phrase_val.txt, output_phrase_test.txt: a line is "1361 paved road"
    RefSegRS/images/1361.tif, RefSegRS/masks/1361.tif

The layout is the one that public loaders read; like theirs, a mask is inside where its value is above 50.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deris_llm.data.errors import DataError
from deris_llm.data.formats.base import PrepareOptions, SourceEntry, SourceFault, SourceInstance, SourcePhrase, SourceReader
from deris_llm.data.images import BROKEN, MAX_PIXELS, opened_image
from deris_llm.data.masks import encode_mask

_INSIDE_ABOVE = 50


class RefSegRSReader(SourceReader):
    """The lines of all splits in their order."""

    format = "refsegrs"
    expected = "RefSegRS' folder with output_phrase_train.txt, output_phrase_val.txt or output_phrase_test.txt"

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        found = {split: self.source / f"output_phrase_{split}.txt" for split in ("train", "val", "test")}
        self._phrases = {split: path for split, path in found.items() if path.is_file()}
        if not self._phrases:
            raise self.no_files_error()
        self.image_folder = self.options.images or self.source / "images"
        masks = self.source / "masks"
        if not self.image_folder.is_dir() or not masks.is_dir():
            raise DataError(f"--source {self.source}: expected the folders images and masks in it, got others. Unpack RefSegRS.zip")
        self.files = (*self._phrases.values(), *sorted(masks.glob("*.tif")))
        self._masks: dict[str, Any] = {}

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for split, path in self._phrases.items():
            for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                if line.strip():
                    yield self._entry(split, f"{path.name} line {number}", number, line)

    def _entry(self, split: str, where: str, number: int, line: bytes) -> SourceEntry | SourceFault:
        try:
            name, _, phrase = line.decode("utf-8-sig").strip().partition(" ")
        except UnicodeDecodeError as error:
            return SourceFault(where, split, "structure", f"expected text in UTF-8, got {error}")
        if not name.isdecimal() or not phrase.strip():
            return SourceFault(where, split, "structure", f"expected the number of an image and a phrase, got {line.decode()!r}")
        if name not in self._masks:
            self._masks[name] = _mask(self.source / "masks" / f"{name}.tif")
        return SourceEntry(
            where=where,
            split=split,
            image=f"{name}.tif",
            phrases=(SourcePhrase(f"{name}-{number}", phrase),),
            instances=(SourceInstance(self._masks[name], int(name)),),
            may_be_empty=True,
        )


def _mask(path: Path) -> dict[str, Any] | ValueError:
    """The RLE of a mask, or what is wrong with it."""
    try:
        with opened_image(path) as file:
            if len(file.getbands()) != 1 or file.width * file.height > MAX_PIXELS:
                return ValueError(f"mask {path.name}: expected one channel, got mode {file.mode} of {file.width} x {file.height} px")
            return encode_mask(np.asarray(file) > _INSIDE_ABOVE)
    except BROKEN as error:
        return ValueError(f"mask {path.name}: expected an image, got {type(error).__name__}: {error}")
