"""What the readers of video datasets share: a frame is an image, and a sentence of a video is a phrase of each of its frames.

    {"videos": {VIDEO: {"expressions": {ID: {"exp": TEXT, ...}}, "frames": [NAME, ...]}}}          meta_expressions.json

Frame number t is the one at position t of the list, whatever its name. `--train-frames N` takes at most N evenly spaced frames
of each video of train; the other splits keep all. An object that is not in a frame is not a referent there; a sentence of which
no object is in a frame names nothing in it (no target). Frames are decoded one at a time, so a video of any length fits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deris_llm.common.words import shortened
from deris_llm.data.images import is_plain_name
from deris_llm.common.words import count_of
from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import (
    BadEntryError,
    PrepareOptions,
    SourceEntry,
    SourceFault,
    SourceInstance,
    SourcePhrase,
    SourceReader,
    read_json_file,
)

META_FILE = "meta_expressions.json"


@dataclass(frozen=True, eq=False)
class Sentence:
    """A referring expression of a video."""

    id: str
    fields: Mapping[str, Any]  # as the source has them; "exp" is the text


@dataclass(frozen=True, eq=False)
class Video:
    """A video with its frames and sentences."""

    name: str
    split: str
    folder: str  # of its frames, below the source
    frames: tuple[str, ...]  # names without suffix, in the source's order
    taken: tuple[int, ...]  # positions of the frames that become images, ascending
    sentences: tuple[Sentence, ...]

    def fault(self, reason: Any, message: str, sentence: Sentence | None = None) -> SourceFault:
        """A fault of the whole video, or of one of its sentences, with the number of phrases that it costs."""
        where = f"{self.split}/{self.name}" + (f" expression {sentence.id}" if sentence else "")
        num_phrases = max(1, len(self.taken)) * (1 if sentence else max(1, len(self.sentences)))
        return SourceFault(where, self.split, reason, message, num_phrases)


@dataclass(frozen=True, eq=False)
class Referents:
    """The objects that a sentence names."""

    at: Callable[[int], tuple[SourceInstance, ...]] | None  # position of a frame -> its objects; None: not published
    category: str | None = None


class VideoReader(SourceReader):
    """Reads videos frame by frame; a frame comes with all sentences of its video. Frames lie in VIDEO/FRAME.jpg."""

    train_splits: ClassVar[tuple[str, ...]] = ("train",)
    lists_frames: ClassVar[str] = f"its list in {META_FILE}"  # where the names of a video's frames are, for messages

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        if options.images is not None:
            raise DataError(
                f"--images {options.images}: expected none with --format {self.format}, whose frames lie below --source. Leave it out; "
                "if the frames are elsewhere, make a link to them and give --follow-links"
            )
        if not self.source.is_dir():
            raise DataError(f"--source {self.source}: expected {self.expected}, got a file. Name the folder")
        self.image_folder = self.source
        self.videos: dict[str, list[Video | SourceFault]] = {}  # by split
        self.files = ()

    @abstractmethod
    def referents(self, video: Video, sentence: Sentence) -> Referents:
        """The objects that a sentence names.

        Raises:
            BadEntryError: the source does not say them.
        """

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for videos in self.videos.values():
            for video in videos:
                if isinstance(video, SourceFault):
                    yield video
                else:
                    yield from self._entries_of(video)

    def is_wanted(self, split: str) -> bool:
        """Whether `--splits` asks for a split."""
        return not self.options.splits or split in self.options.splits

    def add_videos(self, split: str, contents: Mapping[str, Any], folder: str) -> None:
        """Adds the videos of a split.

        Args:
            split: its name.
            contents: video -> its part of `META_FILE`.
            folder: of the videos' folders of frames, below the source.
        """
        self.videos[split] = [self._video(split, name, content, f"{folder}/{name}") for name, content in contents.items()]

    def no_videos_error(self, expected: str) -> DataError:
        """The error for a source in which no split was found."""
        found = ", ".join(sorted(path.name for path in self.source.iterdir())[:10]) or "nothing"
        return DataError(
            f"--source {self.source}: expected {expected}, got {found}. Check the path, --format and --splits"
        )

    def describe_frames(self) -> tuple[str, ...]:
        """Notes on what was taken of the videos, for the manifest."""
        notes = []
        for split, videos in self.videos.items():
            good = [video for video in videos if isinstance(video, Video)]
            taken, listed = (sum(map(len, each)) for each in ((v.taken for v in good), (v.frames for v in good)))
            if split in self.train_splits and self.options.train_frames is not None:
                notes.append(
                    f"{split}: {taken:,} of {count_of(listed, 'frame')} of {count_of(len(good), 'video')} are taken, at most "
                    f"{self.options.train_frames} evenly spaced ones of each (--train-frames {self.options.train_frames}); other "
                    "splits keep all"
                )
            if unsorted := [video.name for video in good if list(video.frames) != sorted(video.frames)]:
                notes.append(
                    f"{split}: {count_of(len(unsorted), 'video')} list frames in another order than that of their names; a frame's "
                    f"position in the list counts: {', '.join(unsorted[:10])}"
                )
            if silent := [video.name for video in good if not video.sentences]:
                notes.append(f"{split}: {count_of(len(silent), 'video')} without a sentence: {', '.join(silent[:10])}")
        return tuple(notes)

    def _video(self, split: str, name: str, content: Any, folder: str) -> Video | SourceFault:
        where = f"{split}/{name}"
        expressions = content.get("expressions") if isinstance(content, dict) else None
        frames = content.get("frames") if isinstance(content, dict) else None
        if not isinstance(expressions, dict) or not isinstance(frames, list):
            message = f"expected a video with `expressions` and `frames`, got {describe(content)}"
            return SourceFault(where, split, "structure", message)
        if wrong := [each for each in (name, *expressions, *frames) if not is_plain_name(each)]:
            what = "frames" if wrong[0] in frames else "a video and its expressions"
            message = f"expected names of {what}, got {shortened(wrong[0])}; they are those of files and folders too"
            return SourceFault(where, split, "structure", message, max(1, len(expressions)))
        sentences = tuple(
            Sentence(key, fields if isinstance(fields, dict) else {"exp": fields}) for key, fields in expressions.items()
        )
        num_taken = self.options.train_frames if split in self.train_splits else None
        video = Video(name, split, folder, tuple(frames), evenly_spaced(len(frames), num_taken), sentences)
        if sentences and not frames:
            return video.fault("structure", f"expected frames for its sentences, got none in {self.lists_frames}")
        if repeated := next((frame for frame, other in zip(sorted(frames), sorted(frames)[1:], strict=False) if frame == other), None):
            return video.fault("structure", f"expected each frame once in the list of frames, got {repeated!r} twice")
        return video

    def _entries_of(self, video: Video) -> Iterator[SourceEntry | SourceFault]:
        folder = self.source / video.folder
        if video.sentences and (not folder.is_dir() or not any(folder.iterdir())):
            found = "an empty one" if folder.is_dir() else "none"
            message = f"expected a folder {video.folder}/ with {count_of(len(video.frames), 'frame')}, got {found}"
            yield video.fault("image", message)
            return
        named: list[tuple[Sentence, Referents]] = []
        for sentence in video.sentences:
            try:
                named.append((sentence, self.referents(video, sentence)))
            except BadEntryError as error:
                yield video.fault(error.reason, str(error), sentence)
        for position in video.taken:
            for sentence, referents in named:
                yield self._entry(video, position, sentence, referents)

    def _entry(self, video: Video, position: int, sentence: Sentence, referents: Referents) -> SourceEntry:
        frame = video.frames[position]
        instances = () if referents.at is None else referents.at(position)
        return SourceEntry(
            where=f"{video.split}/{video.name} expression {sentence.id} frame {frame}",
            split=video.split,
            image=f"{video.folder}/{frame}.jpg",
            phrases=(SourcePhrase(f"{video.name}/{sentence.id}/{frame}", sentence.fields.get("exp")),),
            instances=instances,
            is_no_target=referents.at is not None and not instances,
            may_be_absent=True,
            image_id=f"{self.options.out.name}/{video.name}/{frame}",
            category=referents.category,
            video=video.name,
            frame=position,
            expression=sentence.id,
            has_truth=referents.at is not None,
        )


def evenly_spaced(num_frames: int, num_taken: int | None) -> tuple[int, ...]:
    """Positions of at most ``num_taken`` frames, the first and the last among them; None takes all."""
    if num_taken is None or num_taken >= num_frames:
        return tuple(range(num_frames))
    if num_taken == 1:
        return (num_frames // 2,)
    return tuple(np.linspace(0, num_frames - 1, num_taken).round().astype(int).tolist())


def read_videos(path: Path) -> Mapping[str, Any]:
    """Reads the videos of a `META_FILE`.

    Raises:
        DataError: it is not such a file.
    """
    content = read_json_file(path)
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, dict):
        raise DataError(f"{path}: expected {{'videos': {{...}}}}, got {describe(content)}. Use the dataset's own {path.name}")
    return videos


def object_number(value: Any) -> int:
    """The number of an object in its palette images, which the sources write as text.

    Raises:
        BadEntryError: it is none.
    """
    is_number = (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.isdecimal() and len(value) < 10)
    if not is_number or not 0 < int(value) < 255:
        raise BadEntryError("reference", f"expected obj_id, the number of one object from 1 to 254, got {value!r:.60}")
    return int(value)


def names_of_labels(folder: Path, videos: Sequence[Video | SourceFault]) -> tuple[Path, ...]:
    """The palette images of the frames that are taken, as far as they exist."""
    paths = (
        folder / video.name / f"{video.frames[position]}.png"
        for video in videos
        if isinstance(video, Video)
        for position in video.taken
    )
    return tuple(path for path in paths if path.is_file())
