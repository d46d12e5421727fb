"""Reads MeViS: sentences about motion that name one object, several or none.

    SOURCE/train/    meta_expressions.json  mask_dict.json  JPEGImages/VIDEO/00000.jpg
    SOURCE/valid_u/  the same
    SOURCE/valid/    meta_expressions.json  JPEGImages/         the truth is not published
    SOURCE/test/     the same

`anno_id` of a sentence is a list of keys of mask_dict.json, whose entries are one RLE per frame, null where the object is not in
the frame; an empty list means that the sentence names nothing. Two objects with the same mask in a frame are one referent there.

Version 2 has meta_expressions_v2.json, in valid meta_expressions_v2_release.json, and additional sentences, some of which name nothing.
Its files were not at hand: names and empty lists are as the listing of FudanCVL/MeViSv2 and public code that reads it have them. A
sentence that says in another way that it names nothing is an error that shows what it says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import BadEntryError, PrepareOptions, SourceInstance, read_json_file
from deris_llm.data.formats.video import META_FILE, Referents, Sentence, Video, VideoReader, read_videos

SPLITS = ("train", "valid_u", "valid", "test")
META_FILES = {"1": (META_FILE,), "2": ("meta_expressions_v2.json", "meta_expressions_v2_release.json")}
"""Version -> names of the file of sentences."""
MASK_FILE = "mask_dict.json"


class MevisReader(VideoReader):
    """The videos of each split in the order of its file. The masks of one split are in memory at a time."""

    format = "mevis"
    mapping_keys = {"version": ""}
    expected = f"MeViS's folder with {', '.join(SPLITS)}, each with {META_FILE}"

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        for split in filter(self.is_wanted, SPLITS):
            if (path := self._meta_file(self.source / split)) is not None:
                self.add_videos(split, read_videos(path), f"{split}/JPEGImages")
                masks = path.with_name(MASK_FILE)
                self.files += (path, masks) if masks.is_file() else (path,)
        if not self.videos:
            raise self.no_videos_error(f"one of {', '.join(f'{split}/{META_FILE}' for split in SPLITS)}")
        self.notes = self.describe_frames()
        self._masks: tuple[str, dict[str, Any] | None] = ("", None)  # of the split that was read last

    def _meta_file(self, folder: Path) -> Path | None:
        """The file of sentences of a split; None if there is none.

        Raises:
            DataError: there are several, or the version is unknown.
        """
        version = self.mapping["version"]
        if version and version not in META_FILES:
            raise DataError(f"--mapping version={version}: expected {' or '.join(META_FILES)}, got another. Correct it")
        names = META_FILES[version] if version else [name for names in META_FILES.values() for name in names]
        found = [folder / name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            raise DataError(
                f"{folder}: expected the sentences of one version, got {', '.join(path.name for path in found)}. Choose with --mapping "
                "version=1 or version=2, or remove one of the files"
            )
        return found[0] if found else None

    def referents(self, video: Video, sentence: Sentence) -> Referents:
        masks = self._masks_of(video.split)
        if masks is None:
            if "anno_id" in sentence.fields:
                raise BadEntryError(
                    "reference", f"expected {video.split}/{MASK_FILE} with the masks of its anno_id, got no such file"
                )
            return Referents(at=None)
        tracks = [self._track(masks, each, video) for each in _annotation_ids(sentence)]

        def at(position: int) -> tuple[SourceInstance, ...]:
            return tuple(SourceInstance(track[position]) for track in tracks if track[position] is not None)

        return Referents(at)

    def _masks_of(self, split: str) -> dict[str, Any] | None:
        """Annotation id -> masks by frame; None if the split's truth is not published."""
        if self._masks[0] != split:
            path = self.source / split / MASK_FILE
            content = read_json_file(path) if path.is_file() else None
            if content is not None and not isinstance(content, dict):
                raise DataError(f"{path}: expected lists of masks by anno_id, got {describe(content)}. Download the file again")
            self._masks = (split, content)
        return self._masks[1]

    def _track(self, masks: dict[str, Any], annotation: int, video: Video) -> list[Any]:
        track = masks.get(str(annotation))
        if not isinstance(track, list):
            found = "no such entry" if track is None else describe(track)
            raise BadEntryError("reference", f"expected anno_id {annotation} in {MASK_FILE}, got {found}")
        if len(track) != len(video.frames):
            raise BadEntryError(
                "mask",
                f"expected {len(video.frames)} masks of anno_id {annotation}, one for each frame, null where it is absent, got {len(track)}",
            )
        if wrong := [mask for mask in track if mask is not None and not isinstance(mask, dict)]:
            raise BadEntryError("mask", f"expected RLE or null as masks of anno_id {annotation}, got {describe(wrong[0])}")
        return track


def _annotation_ids(sentence: Sentence) -> list[int]:
    """The annotations that a sentence names.

    Raises:
        BadEntryError: they are malformed, or contradict `obj_id`.
    """
    ids, objects = sentence.fields.get("anno_id"), sentence.fields.get("obj_id", "none given")
    is_list = isinstance(ids, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in ids)
    if not isinstance(ids, list) or not is_list or any(each < 0 for each in ids):
        raise BadEntryError(
            "reference",
            f"expected anno_id, a list of numbers that is empty if the sentence names nothing, got {ids!r} (obj_id {objects!r})",
        )
    ids = list(dict.fromkeys(ids))  # a mask that is named twice counts once
    if isinstance(objects, list) and len(set(map(str, objects))) != len(ids):
        raise BadEntryError("reference", f"expected as many obj_id as anno_id, got {objects} and {ids}")
    return ids
