"""Phrases asked of every frame of a video.

    answers = pipeline.video("street.mp4", ["the red car", "the man who crosses"])
    for frame in answers:  # decoded and answered as you go, a few frames at a time
        frame.index, frame.seconds, frame.answers[0].mask, frame.answers[0].score, frame.answers[0].presence
    answers.save("found")  # PNG masks, JSONL, a video with the masks drawn

Each frame is an image of its own (protocol `per-frame`). What depends on a frame alone is computed once for all its phrases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deris_llm.data.video import Frame, Video, VideoError
from deris_llm.serving.answers import ImageAnswer

if TYPE_CHECKING:
    from deris_llm.serving.pipeline import DerisPipeline
    from deris_llm.serving.video_files import SavedVideo

_PIXELS_AT_ONCE = 2**24
"""Frames that are answered together have at most this many pixels: 2 of 3840 x 2160 px, 8 of 1920 x 1080 px."""


@dataclass(frozen=True, eq=False)
class FrameAnswers(Frame):
    """One frame of a video with the answers to its phrases."""

    answers: tuple[ImageAnswer, ...]  # one per phrase; masks have the frame's size


class VideoAnswers:
    """The answers to phrases about every frame of a video. Iterating computes them, a second time anew; nothing is kept.

    Attributes:
        video: its frames.
        phrases: in the order of each frame's answers.
    """

    def __init__(self, pipeline: DerisPipeline, video: Video, phrases: tuple[str, ...]) -> None:
        self.pipeline = pipeline
        self.video = video
        self.phrases = phrases

    @property
    def num_frames(self) -> int | None:
        """Frames of the video as its file states it, for progress; None if it does not."""
        return self.video.num_frames

    def __iter__(self) -> Iterator[FrameAnswers]:
        """Answers the frames in order.

        Raises:
            VideoError: a frame cannot be decoded; the answers of the frames before it have been yielded.
        """
        return self.from_frame(0)

    def from_frame(self, start: int) -> Iterator[FrameAnswers]:
        """Answers the frames from `start` on.

        Masks equal those of a whole pass to the last bit if `start` is a multiple of `frames_at_once`: then the same frames are
        computed together.

        Raises:
            VideoError: see `__iter__`.
        """
        frames = _Until(self.video.frames(start))
        first = next(frames, None)
        if first is not None:
            at_once = self.frames_at_once(first.image.size)
            for group in _groups(itertools.chain([first], frames), at_once):
                pairs = [(frame.image, self.phrases) for frame in group]
                for frame, answers in zip(group, self.pipeline.answer_all(pairs), strict=True):
                    yield FrameAnswers(**vars(frame), answers=tuple(answers))
        if frames.error is not None:
            raise frames.error

    def frames_at_once(self, size_wh: tuple[int, int]) -> int:
        """Returns how many frames of a size are computed together.

        It is at most `evaluation.images_per_device`, and fewer if their phrases exceed `evaluation.max_phrases_per_batch` or
        their pixels 2**24, which bounds the memory.
        """
        limits = self.pipeline.config.evaluation
        by_phrases = limits.max_phrases_per_batch // len(self.phrases)
        by_pixels = _PIXELS_AT_ONCE // (size_wh[0] * size_wh[1])
        return max(1, min(limits.images_per_device, by_phrases, by_pixels))

    def save(
        self, out: str | Path, *, overlay: bool = True, frames_per_second: float = 10.0, progress: bool = False
    ) -> SavedVideo:
        """Writes masks, JSONL and a video with the masks drawn; an unfinished folder is resumed.

        Args:
            out: folder; see `deris_llm.serving.video_files` for what it holds.
            overlay: writes the video with the masks drawn.
            frames_per_second: of the drawn video where the frames have no time stamps (images).
            progress: shows a progress bar on a terminal.

        Raises:
            VideoError: a frame cannot be decoded; the masks of the frames before it are kept, and drawn.
            ValueError: the folder holds something else, or answers of another checkpoint, rule, phrase or video.
        """
        from deris_llm.serving.video_files import save_video

        return save_video(self, Path(out), overlay=overlay, frames_per_second=frames_per_second, progress=progress)


class _Until(Iterator[Frame]):
    """Frames up to the one that cannot be decoded, so that those before it are answered; then the error is in `error`."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames = frames
        self.error: VideoError | None = None

    def __next__(self) -> Frame:
        try:
            return next(self._frames)
        except VideoError as error:
            self.error = error
            raise StopIteration from None


def _groups(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    while group := list(itertools.islice(frames, size)):
        yield group
