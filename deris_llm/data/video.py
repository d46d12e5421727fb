"""Frames of a video, decoded one at a time: of a video file, a folder of images, or a list of images; and the way back.

A file is decoded by PyAV. Its frames are turned as its rotation says (phones store a sideways video with a note to turn it), and
keep their time stamps, which need not be evenly spaced. Frames of a folder are taken in the order of the numbers in their names.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.codec import Codec
from av.error import FFmpegError, InvalidDataError
from PIL import Image

from deris_llm.data.images import MAX_PIXELS, Picture, as_picture, images_in

logger = logging.getLogger(__name__)

VideoSource = str | Path | Sequence[Picture]
"""A video file, a folder of images, or images: files, PIL images, or uint8 (h, w, 3) in RGB."""

_TURNS = {
    90: Image.Transpose.ROTATE_90,  # both count counter-clockwise
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
_TOLERATED_S = 0.5  # by which a video may end before the time that its file states


class VideoError(ValueError):
    """A video that cannot be read; the message says at which frame and time. Earlier frames have been yielded."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a video."""

    index: int  # position in the video, from 0
    name: str  # of its files: "00012", or the name of an image of a folder without its extension
    seconds: float | None  # time stamp; None for images
    image: Image.Image  # RGB, as displayed


class Video(Protocol):
    """What is known of a video before it is decoded, and its frames."""

    name: str  # without folder and extension
    num_frames: int | None  # as the file states it; None = unknown

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """Decodes the frames from `start` on.

        Raises:
            VideoError: a frame cannot be decoded, or its size is not that of the frames before.
        """
        ...


def open_video(source: VideoSource) -> Video:
    """Finds the frames of a video without decoding them.

    Raises:
        VideoError: there is no such file, it is not a video, or a folder or list has no images.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise VideoError(f"video {path}: expected a video file or a folder of frames, got no such file; correct it.")
        return _images_of_folder(path) if path.is_dir() else VideoFile(path)
    if isinstance(source, (Image.Image, np.ndarray)):
        raise VideoError(
            f"video: expected a file, a folder or a list of frames, got one {type(source).__name__}; give a list such as list(array)."
        )
    return ImageSequence("video", tuple(source))


class ImageSequence:
    """Images as frames, without time stamps."""

    def __init__(self, name: str, images: Sequence[Picture]) -> None:
        """Names the frames.

        Args:
            name: of the video.
            images: in order.

        Raises:
            VideoError: no image, or two files of the same name.
        """
        if not images:
            raise VideoError(f"{name}: expected at least one frame, got none; give images.")
        self.name = name
        self.num_frames: int | None = len(images)
        self._images = images
        self._names = [
            Path(image).stem if isinstance(image, (str, Path)) else frame_name(index) for index, image in enumerate(images)
        ]
        if repeated := [each for each, times in Counter(self._names).items() if times > 1]:
            raise VideoError(
                f"{name}: expected frames of different names, got {repeated[0]!r} {self._names.count(repeated[0])} times; rename or "
                "remove the others, since a frame's masks have its name."
            )

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """See `Video`."""
        size_wh: tuple[int, int] | None = None
        for index in range(start, len(self._images)):
            where = f"{self.name}, frame {index} ({self._names[index]})"
            try:
                image = as_picture(self._images[index])
            except ValueError as error:
                raise VideoError(f"{where}: {error}") from error
            size_wh = _checked_size(where, image, size_wh)
            yield Frame(index, self._names[index], None, image)


class VideoFile:
    """A video file, decoded by PyAV from its beginning; its sound is not read."""

    def __init__(self, path: Path) -> None:
        """Reads the head of the file.

        Raises:
            VideoError: it is not a video.
        """
        self.path = path
        self.name = path.stem
        with self._opened() as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise VideoError(
                    f"{path}: expected frames of at most {MAX_PIXELS:,} pixels, got {stream.width:,} x {stream.height:,} px."
                )
            self.size_wh: tuple[int, int] = (stream.width, stream.height)  # px, as stored
            self.seconds = None if container.duration is None else container.duration / 1e6  # as the file states it
            self.num_frames: int | None = stream.frames or _estimated_frames(container, stream)
            self.has_sound = bool(container.streams.audio)
            self.rate = stream.average_rate  # frames per second, a Fraction; None = unknown

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """See `Video`; the frames before `start` are decoded too, because only then is each frame found exactly."""
        index, seconds, size_wh = 0, None, None
        with self._opened() as container:
            stream = container.streams.video[0]
            decoded = _Decoded(container, stream)
            try:
                for frame in decoded:
                    seconds = None if frame.pts is None else frame.time
                    if index >= start:
                        image = _turned(frame.to_image(), frame.rotation)
                        size_wh = _checked_size(f"{self.path}, frame {index}", image, size_wh)
                        yield Frame(index, frame_name(index), seconds, image)
                    index += 1
                problem = decoded.missing(index, seconds)
            except FFmpegError as error:
                problem = f"{error.strerror or error}"
        if problem:
            raise VideoError(
                f"{self.path}: cannot be decoded at frame {index}, {_after(seconds)}: {problem}. The {index:,} frames before it were "
                "decoded. Copy the file again, or convert what can be read with `ffmpeg -err_detect ignore_err -i VIDEO NEW.mp4`."
            )

    def _opened(self) -> Any:
        """Opens the file, as an `av.container.InputContainer` with at least one stream of frames."""
        try:
            container = av.open(str(self.path))
        except (FFmpegError, OSError) as error:
            raise VideoError(
                f"{self.path}: expected a video, got a file that cannot be opened as one ({error.strerror or error}); an MP4 whose "
                "recording or copying was interrupted lacks its index: copy it again."
            ) from error
        if not container.streams.video:
            container.close()
            raise VideoError(f"{self.path}: expected a video, got a file without frames (only sound?); give another file.")
        return container


class _Decoded:
    """The frames of a stream. Those that the decoder still held when an error occurs are not used: they may be half decoded."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._container, self._stream = container, stream
        self._num_packets = 0

    def __iter__(self) -> Iterator[Any]:
        for packet in self._container.demux(self._stream):
            frames = packet.decode()
            self._num_packets += packet.size > 0
            for frame in frames:
                if frame.is_corrupt:
                    raise InvalidDataError(errno.EILSEQ, "the frame is damaged")
                yield frame

    def missing(self, num_frames: int, seconds: float | None) -> str:
        """Says what a file lacks that ended without an error; empty if it is complete.

        Args:
            num_frames: that were decoded.
            seconds: time of the last one.
        """
        stated = self._stream.frames
        if num_frames == 0:
            return "the file has no frame"
        if self._num_packets < stated:
            return f"the file ends here, but states {stated:,} frames"
        end = _stated_end(self._stream)
        step = 1 / self._stream.average_rate if self._stream.average_rate else 0
        if not stated and end is not None and (seconds or 0) + float(step) < end - _TOLERATED_S:
            return f"the file ends here, but states a length of {end:.2f} s"
        return ""


def frame_name(index: int) -> str:
    """Returns the name of a frame without one of its own, e.g. 00012."""
    return f"{index:05d}"


def _estimated_frames(container: Any, stream: Any) -> int | None:
    """About how many frames a file has that does not state their number, from its length; None if it states neither."""
    if container.duration is None or not stream.average_rate:
        return None
    return max(1, round(container.duration / 1e6 * float(stream.average_rate)))


def _stated_end(stream: Any) -> float | None:
    """Returns the length in seconds that Matroska and WebM files state for a stream, e.g. 00:00:01.600000000."""
    parts = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return int(parts[1]) * 3600 + int(parts[2]) * 60 + float(parts[3]) if parts else None


def _turned(image: Image.Image, rotation: int) -> Image.Image:
    turn = _TURNS.get(round(rotation / 90) * 90 % 360)
    return image if turn is None else image.transpose(turn)


def _checked_size(where: str, image: Image.Image, size_wh: tuple[int, int] | None) -> tuple[int, int]:
    if size_wh is not None and image.size != size_wh:
        raise VideoError(
            f"{where}: expected {size_wh[0]} x {size_wh[1]} px, as the frames before it, got {image.width} x {image.height} px; "
            "give frames of one size."
        )
    return image.size


def _after(seconds: float | None) -> str:
    return "time unknown" if seconds is None else f"after {seconds:.3f} s"


def _images_of_folder(folder: Path) -> ImageSequence:
    found, others = images_in(folder)
    if not found:
        there = f", but e.g. {others[0]}" if others else ""
        raise VideoError(
            f"video {folder}: expected a folder with the frames of a video, got one without images{there}; give that of the frames."
        )
    found.sort(key=_number_order)
    _warn_of_gaps(folder, found)
    return ImageSequence(folder.resolve().name, found)


def _warn_of_gaps(folder: Path, images: Sequence[Path]) -> None:
    """Warns if the numbers of frames have one step but for a few places: a frame may be missing there."""
    numbers = [int(parts[-1]) if (parts := re.findall(r"\d+", path.stem)) else None for path in images]
    steps = [b - a if a is not None and b is not None else 0 for a, b in itertools.pairwise(numbers)]
    if not steps or min(steps) <= 0:
        return
    usual, times = Counter(steps).most_common(1)[0]
    gaps = [place for place, step in enumerate(steps) if step > usual]
    if gaps and times > len(steps) / 2:
        before, after = images[gaps[0]].stem, images[gaps[0] + 1].stem
        logger.warning(
            "%s: frame numbers jump from %s to %s, and in %d places in all, where others step by %d: frames may be missing; those that "
            "are there are used as they are",
            folder, before, after, len(gaps), usual,
        )  # fmt: skip


def _number_order(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts frame9 before frame10."""
    parts = re.findall(r"\d+|\D+", path.stem)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


# -- writing ---------------------------------------------------------------------------------------------------------

_ENCODERS = (("libx264", ".mp4", "yuv420p"), ("libopenh264", ".mp4", "yuv420p"), ("mjpeg", ".mov", "yuvj420p"))
_TICKS_PER_SECOND = 90_000  # time stamps of a written video are rounded to these


def write_video(
    path: Path, images: Iterable[tuple[Image.Image, float | None]], *, frames_per_second: float
) -> Path | None:
    """Writes images as a video without sound: H.264, or Motion JPEG in a .mov where this PyAV cannot encode H.264.

    Args:
        path: without extension; the file has its name when it is complete.
        images: RGB of one size, width and height even; each with its time stamp in seconds.
        frames_per_second: of images without time stamps.

    Returns:
        the file; None without images.
    """
    images = iter(images)
    first = next(images, None)
    if first is None:
        return None
    encoder, suffix, pixel_format = next(each for each in _ENCODERS if _can_encode(each[0]))
    if encoder == "mjpeg":
        logger.warning("this PyAV cannot encode H.264: %s%s is Motion JPEG, a larger file", path, suffix)
    aside = path.with_name(f".partial-{path.name}{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    last = -1
    with av.open(str(aside), "w") as container:
        stream: Any = container.add_stream(encoder, rate=Fraction(frames_per_second).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = first[0].width, first[0].height, pixel_format
        stream.codec_context.time_base = Fraction(1, _TICKS_PER_SECOND)
        for index, (image, seconds) in enumerate(itertools.chain([first], images)):
            frame = av.VideoFrame.from_image(image)
            ticks = (index / frames_per_second if seconds is None else seconds) * _TICKS_PER_SECOND
            last = max(round(ticks), last + 1)  # time stamps that do not grow are refused by the container
            frame.pts, frame.time_base = last, Fraction(1, _TICKS_PER_SECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    os.replace(aside, path.with_name(path.name + suffix))
    return path.with_name(path.name + suffix)


def _can_encode(codec: str) -> bool:
    try:
        Codec(codec, "w")
    except (ValueError, FFmpegError):
        return False
    return True
