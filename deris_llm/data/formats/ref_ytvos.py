"""Reads Ref-YouTube-VOS: each sentence names one object of a video.

    SOURCE/meta_expressions/train/meta_expressions.json     and valid/, test/
    SOURCE/train/     JPEGImages/VIDEO/00005.jpg  Annotations/VIDEO/00005.png  meta.json
    SOURCE/valid/     JPEGImages/
    SOURCE/valid_gt/  Annotations/VIDEO/00005.png  obj_id.json  meta.json           optional
    SOURCE/test/      JPEGImages/

`obj_id` of a sentence is the object's number in the palette images; the names of frames step by 5 and need not start at 00000.
The file of valid holds the videos of test too; those that test does not have are valid. They must be 202, or as many as `--mapping
valid_videos=N` declares for a set of one's own.

The truth of test is not published, and that of valid was not until March 2026. Its layout was not seen, so valid_gt/ is ours:
palette images as in train, `{VIDEO: {EXPRESSION: obj_id}}` in obj_id.json, and train's meta.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import BadEntryError, LabelMask, PrepareOptions, SourceInstance, read_json_file
from deris_llm.data.formats.video import (
    META_FILE,
    Referents,
    Sentence,
    Video,
    VideoReader,
    names_of_labels,
    object_number,
    read_videos,
)

SPLITS = ("train", "valid", "test")
NUM_VALID_VIDEOS = 202
VALID_TRUTH = "valid_gt"
OBJECTS_FILE = "obj_id.json"


class RefYtvosReader(VideoReader):
    """The videos of train and test in the order of their files, those of valid by name."""

    format = "ref-ytvos"
    expected = f"Ref-YouTube-VOS's folder with meta_expressions/{{{','.join(SPLITS)}}}/{META_FILE}"
    mapping_keys = {"valid_videos": str(NUM_VALID_VIDEOS)}

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        self._classes: dict[str, Mapping[str, Any]] = {}  # split -> videos of meta.json
        self._valid_objects: Mapping[str, Any] | None = None  # video -> expression -> obj_id
        for split in filter(self.is_wanted, SPLITS):
            if self._meta_file(split).is_file():
                contents = self._valid_videos() if split == "valid" else read_videos(self._meta_file(split))
                self.files += (self._meta_file(split),)
                self.add_videos(split, contents, f"{split}/JPEGImages")
        if not self.videos:
            raise self.no_videos_error(f"one of {', '.join(f'meta_expressions/{split}/{META_FILE}' for split in SPLITS)}")
        if "valid" in self.videos and (path := self.source / VALID_TRUTH / OBJECTS_FILE).is_file():
            self._valid_objects = _read_objects(path)
            self.files += (path,)
        for split, folder in (("train", "train"), ("valid", VALID_TRUTH)):
            path = self.source / folder / "meta.json"
            if split in self.videos and path.is_file():
                self._classes[split] = read_videos(path)
                self.files += (path,)
            self.files += names_of_labels(self.source / folder / "Annotations", self.videos.get(split, ()))
        self.notes = self.describe_frames()

    def referents(self, video: Video, sentence: Sentence) -> Referents:
        if video.split == "test" or (video.split == "valid" and self._valid_objects is None):
            return Referents(at=None)
        folder, value = "train", sentence.fields.get("obj_id")
        if self._valid_objects is not None and video.split == "valid":
            objects = self._valid_objects.get(video.name)
            folder, value = VALID_TRUTH, objects.get(sentence.id) if isinstance(objects, dict) else None
        number = object_number(value)

        def at(position: int) -> tuple[SourceInstance, ...]:
            return (SourceInstance(LabelMask(f"{folder}/Annotations/{video.name}/{video.frames[position]}.png", number)),)

        return Referents(at, self._class_of(video, number))

    def _class_of(self, video: Video, number: int) -> str | None:
        """The class of an object in meta.json; None if there is no such file.

        Raises:
            BadEntryError: the file does not have the object.
        """
        if video.split not in self._classes:
            return None
        objects = self._classes[video.split].get(video.name)
        objects = objects.get("objects") if isinstance(objects, dict) else None
        if not isinstance(objects, dict) or not isinstance(objects.get(str(number)), dict):
            found = ", ".join(objects) if isinstance(objects, dict) else "no such video"
            raise BadEntryError("reference", f"expected obj_id {number} among the objects of meta.json, got {found or 'none'}")
        return objects[str(number)].get("category")

    def _meta_file(self, split: str) -> Path:
        return self.source / "meta_expressions" / split / META_FILE

    def _valid_videos(self) -> Mapping[str, Any]:
        """The videos of valid's file that test's file does not have, by name.

        Raises:
            DataError: not as many as expected.
        """
        expected, path = self.mapping["valid_videos"], self._meta_file("valid")
        listed = read_videos(path)
        hidden = read_videos(self._meta_file("test")) if self._meta_file("test").is_file() else {}
        names = sorted(set(listed) - set(hidden))
        if str(len(names)) != expected:
            raise DataError(
                f"{path}: expected {expected} videos that meta_expressions/test/{META_FILE} does not have, got {len(names):,} (of "
                f"{len(listed):,}; test has {len(hidden):,}). Use the published files of valid and test; for a set of your own that has "
                f"so many: --mapping valid_videos={len(names)}"
            )
        return {name: listed[name] for name in names}


def _read_objects(path: Path) -> Mapping[str, Any]:
    content = read_json_file(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected {{video: {{expression: obj_id}}}}, got {describe(content)}. Correct the file")
    return content
