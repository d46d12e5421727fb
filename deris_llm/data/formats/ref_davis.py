"""Reads Ref-DAVIS17: four texts for each object of DAVIS 2017.

    SOURCE/davis_text_annotations/Davis17_annot1.txt   Davis17_annot1_full_video.txt   and annot2
    SOURCE/DAVIS/ImageSets/2017/train.txt   val.txt
    SOURCE/DAVIS/Annotations_unsupervised/480p/VIDEO/00000.png
    SOURCE/DAVIS/JPEGImages/480p/VIDEO/00000.jpg       or SOURCE/{train,valid}/JPEGImages/VIDEO/, as ReferFormer's converter leaves them

A line of a text file is `VIDEO OBJECT "TEXT"`. Expression number 4 i + k is the text of annotator k (annot1, annot1_full_video,
annot2, annot2_full_video) for the i-th object of the video; objects are sorted as text, as ReferFormer does. The frames are those
with an annotation, by name. Void (255) is background.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from deris_llm.data.errors import DataError
from deris_llm.data.formats.base import LabelMask, PrepareOptions, SourceInstance
from deris_llm.data.formats.video import Referents, Sentence, Video, VideoReader, names_of_labels, object_number

ANNOTATORS = ("annot1", "annot1_full_video", "annot2", "annot2_full_video")
CORRECTED_NAMES = {"clasic-car": "classic-car", "dog-scale": "dogs-scale", "motor-bike": "motorbike"}
"""Names of videos in the text files -> in DAVIS."""

_TEXTS = "davis_text_annotations"
_LABELS = "DAVIS/Annotations_unsupervised/480p"
_LISTS = {"train": "train", "val": "valid"}  # split -> its folder in ReferFormer's layout
_LINE = re.compile(r'(?P<video>\S+)\s+(?P<object>\d+)\s+"?(?P<text>.*?)"?\s*')


class RefDavisReader(VideoReader):
    """The videos in the order of DAVIS's lists."""

    format = "ref-davis"
    lists_frames = f"{_LABELS}/VIDEO/"
    expected = f"a folder with {_TEXTS}/ and DAVIS/ (Annotations_unsupervised, ImageSets/2017)"

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        texts = [self._read_texts(annotator) for annotator in ANNOTATORS]
        unlisted = {video for of_annotator in texts for video, _ in of_annotator}
        for split, converted in _LISTS.items():
            listed = self.source / "DAVIS" / "ImageSets" / "2017" / f"{split}.txt"
            names = _text(listed, "utf-8").split() if listed.is_file() else []
            unlisted -= set(names)
            if not names or not self.is_wanted(split):
                continue
            self.files += (listed,)
            images = "DAVIS/JPEGImages/480p"
            images = images if (self.source / images).is_dir() else f"{converted}/JPEGImages"
            self.add_videos(split, {name: self._content(name, texts) for name in names}, images)
            self.files += names_of_labels(self.source / _LABELS, self.videos[split])
        if not self.videos:
            raise self.no_videos_error("DAVIS/ImageSets/2017/train.txt or val.txt with names of videos")
        self.notes = self.describe_frames()
        if unlisted:
            self.notes += (f"texts of videos that DAVIS's lists do not have, left out: {', '.join(sorted(unlisted)[:10])}",)

    def referents(self, video: Video, sentence: Sentence) -> Referents:
        number = object_number(sentence.fields["obj_id"])

        def at(position: int) -> tuple[SourceInstance, ...]:
            return (SourceInstance(LabelMask(f"{_LABELS}/{video.name}/{video.frames[position]}.png", number)),)

        return Referents(at)

    def _content(self, name: str, texts: Sequence[Mapping[tuple[str, str], str]]) -> dict:
        """The video as `META_FILE` would have it.

        A text that one annotator did not write is None, which is reported as a phrase without words.
        """
        objects = sorted({number for of_annotator in texts for video, number in of_annotator if video == name})
        folder = self.source / _LABELS / name
        return {
            "frames": sorted(path.stem for path in folder.glob("*.png")) if folder.is_dir() else [],
            "expressions": {
                str(i * len(texts) + k): {"exp": of_annotator.get((name, number)), "obj_id": number}
                for i, number in enumerate(objects)
                for k, of_annotator in enumerate(texts)
            },
        }

    def _read_texts(self, annotator: str) -> dict[tuple[str, str], str]:
        """(video, object) -> text of one annotator.

        Raises:
            DataError: the file is missing, or a line of it is not as expected.
        """
        path = self.source / _TEXTS / f"Davis17_{annotator}.txt"
        if not path.is_file():
            raise DataError(f"--source {self.source}: expected {_TEXTS}/{path.name}, got no such file. Check the path and --format")
        self.files += (path,)
        found: dict[tuple[str, str], str] = {}
        lines = _text(path, "latin-1" if annotator.startswith("annot2") else "utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            match = _LINE.fullmatch(line)
            key = (CORRECTED_NAMES.get(match["video"], match["video"]), match["object"]) if match else None
            if match is None or key is None or key in found:
                got = f"{line!r}" + ("" if match is None else ", whose object has a text already")
                raise DataError(f'{path} line {number}: expected VIDEO OBJECT "TEXT", each object once, got {got}. Correct the line')
            found[key] = match["text"]
        return found


def _text(path: Path, encoding: str) -> str:
    try:
        return path.read_text(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected text in {encoding}, got byte {error.object[error.start]:#04x} at {error.start}. Use the published file, or "
            f"save it as {encoding}"
        ) from error
