"""Phrases asked of every frame of a video.

    answers = pipeline.video("street.mp4", ["the red car", "the man who crosses"])
    for frame in answers:  # decoded and answered as you go, a few frames at a time
        frame.index, frame.seconds, frame.answers[0].mask, frame.answers[0].score, frame.answers[0].presence
    answers.save("found")  # PNG masks, JSONL, a video with the masks drawn

Each frame is an image of its own (protocol `per-frame`). What depends on a frame alone is computed once for all its phrases.
With `evaluation.video_selection=video`, the queries that answer are chosen for the whole video (`video_slots`): the video is read
to its end before the first answer, and the outputs of the network wait on disk, 369 kB for each frame and phrase at 384 px.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import safe_open
from safetensors.torch import save_file

from deris_llm.data.images import Picture
from deris_llm.data.video import Frame, Video, VideoError, frame_name
from deris_llm.models.postprocess import AnswerRule, FrameChoice, answer_masks
from deris_llm.models.video_slots import VideoSlots, frame_queries
from deris_llm.serving.answers import ImageAnswer, about_image
from deris_llm.structures import DerisOutput, RoundOutput

if TYPE_CHECKING:
    from deris_llm.serving.video_files import SavedVideo

_PIXELS_AT_ONCE = 2**24
"""Frames that are answered together have at most this many pixels: 2 of 3840 x 2160 px, 8 of 1920 x 1080 px."""


@dataclass(frozen=True, eq=False)
class FrameAnswers(Frame):
    """One frame of a video with the answers to its phrases."""

    answers: tuple[ImageAnswer, ...]  # one per phrase; masks have the frame's size


class FrameModel(Protocol):
    """What answers frames: a `DerisPipeline`, or something that asks one."""

    config: Any  # a `RunConfig`; its `evaluation` is read
    fingerprint: str

    @property
    def answer_rule(self) -> AnswerRule: ...

    def answer_all(self, pairs: Iterable[tuple[Picture, Sequence[str]]]) -> Iterator[list[ImageAnswer]]:
        """See `DerisPipeline.answer_all`."""
        ...

    def outputs(self, pairs: Iterable[tuple[Picture, Sequence[str]]]) -> Iterator[DerisOutput]:
        """See `DerisPipeline.outputs`."""
        ...


class VideoAnswers:
    """The answers to phrases about every frame of a video. Iterating computes them, a second time anew; nothing is kept.

    Attributes:
        video: its frames.
        phrases: in the order of each frame's answers.
    """

    def __init__(self, pipeline: FrameModel, video: Video, phrases: tuple[str, ...]) -> None:
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

    def from_frame(self, start: int, *, kept: Path | None = None) -> Iterator[FrameAnswers]:
        """Answers the frames from `start` on.

        Masks equal those of a whole pass to the last bit if `start` is a multiple of `frames_at_once`: then the same frames are
        computed together.

        Args:
            start: the first frame.
            kept: folder for the network's outputs while queries are chosen for the whole video; what is there is not computed
                again. None = a temporary one.

        Raises:
            VideoError: see `__iter__`.
        """
        if self.pipeline.config.evaluation.video_selection == "frame":
            yield from self._by_frame(start)
        elif kept is None:
            with tempfile.TemporaryDirectory(prefix="deris-video-") as folder:
                yield from self._by_video(start, Path(folder))
        else:
            yield from self._by_video(start, kept)

    def _by_frame(self, start: int) -> Iterator[FrameAnswers]:
        frames = _Until(self.video.frames(start))
        for group in self._groups(frames):
            pairs = [(frame.image, self.phrases) for frame in group]
            for frame, answers in zip(group, self.pipeline.answer_all(pairs), strict=True):
                yield FrameAnswers(**vars(frame), answers=tuple(answers))
        if frames.error is not None:
            raise frames.error

    def _by_video(self, start: int, folder: Path) -> Iterator[FrameAnswers]:
        """Reads the whole video before the first answer; the network's outputs wait on disk."""
        choices, error = self._chosen(folder)
        rule = self.pipeline.answer_rule
        for frame in itertools.islice(self.video.frames(start), max(0, len(choices) - start)):
            sizes = [(frame.image.height, frame.image.width)] * len(self.phrases)
            output = _read_output(_file_of(folder, frame.index))
            answers = answer_masks(output, sizes, **rule, chosen=choices[frame.index])
            yield FrameAnswers(**vars(frame), answers=tuple(about_image(answers, self.phrases, frame.image)))
        if error is not None:
            raise error

    def _chosen(self, folder: Path) -> tuple[list[tuple[FrameChoice, ...]], VideoError | None]:
        """Chooses the queries of each frame and phrase; also returns the error that ended the video early."""
        slots = [VideoSlots(**self.pipeline.answer_rule) for _ in self.phrases]
        frames = _Until(self.video.frames())
        for group in self._groups(frames):
            files = [_file_of(folder, frame.index) for frame in group]
            if not all(file.is_file() for file in files):
                outputs = self.pipeline.outputs((frame.image, self.phrases) for frame in group)
                for file, output in zip(files, outputs, strict=True):
                    _write_output(file, output)
            for file in files:
                for slot, queries in zip(slots, frame_queries(_read_output(file)), strict=True):
                    slot.add(queries)
        return list(zip(*(slot.choices() for slot in slots), strict=True)), frames.error

    def _groups(self, frames: Iterator[Frame]) -> Iterator[list[Frame]]:
        """Divides frames into those that are computed together."""
        first = next(frames, None)
        if first is None:
            return
        frames = itertools.chain([first], frames)
        while group := list(itertools.islice(frames, self.frames_at_once(first.image.size))):
            yield group

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


def _file_of(folder: Path, index: int) -> Path:
    return folder / f"{frame_name(index)}.safetensors"


def _write_output(file: Path, output: DerisOutput) -> None:
    aside = file.with_name(f".partial-{file.name}")
    tensors = {
        "mask_logits": output.final.mask_logits,
        "referring_logits": output.final.referring_logits,
        "presence_logit": output.presence_logit,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, aside, {"mask_upsampling": output.mask_upsampling})
    os.replace(aside, file)


def _read_output(file: Path) -> DerisOutput:
    with safe_open(file, "pt") as stored:
        upsampling: Any = stored.metadata()["mask_upsampling"]
        last = RoundOutput(stored.get_tensor("mask_logits"), stored.get_tensor("referring_logits"))
        return DerisOutput((last,), stored.get_tensor("presence_logit"), upsampling)
