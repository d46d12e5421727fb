"""Videos in the demo: every frame is a request of its own, so that users with images do not wait for somebody's video."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from deris_llm.data.images import Picture, as_picture
from deris_llm.data.video import VideoError, VideoFile
from deris_llm.models.postprocess import AnswerRule
from deris_llm.serving.answers import ImageAnswer
from deris_llm.serving.demo.service import DemoService, Limits, RequestError
from deris_llm.serving.demo.sessions import Session
from deris_llm.serving.demo.views import Rule
from deris_llm.serving.inspection import Inspection, last_round
from deris_llm.serving.video import VideoAnswers
from deris_llm.serving.video_files import SavedVideo, write_answers
from deris_llm.structures import DerisOutput

_FRAMES_AT_ONCE = 4  # requests of one video that wait together: few, because others wait too
_MOST_FRAMES_PER_SECOND = 60


class ServedModel:
    """Answers frames by the demo's thread, in turn with the requests of others; see `FrameModel`."""

    def __init__(
        self,
        service: DemoService,
        rule: Rule,
        session: Session,
        *,
        most_frames: int,
        on_frame: Callable[[int], None],
    ) -> None:
        """Prepares to answer the frames of one video.

        Args:
            service: the models; the first one answers.
            rule: of the page.
            session: of the user; when it is closed, the next frame is an error.
            most_frames: of a video.
            on_frame: is told how many frames are answered.
        """
        pipeline = service.pipelines[0]
        default = pipeline.config.evaluation
        self.fingerprint = pipeline.fingerprint
        self.config = SimpleNamespace(
            evaluation=SimpleNamespace(
                score_threshold=default.score_threshold if rule.score_threshold is None else rule.score_threshold,
                selection=rule.selection or default.selection,
                presence=rule.presence or default.presence,
                video_selection=default.video_selection,
                images_per_device=_FRAMES_AT_ONCE,
                max_phrases_per_batch=default.max_phrases_per_batch,
            )
        )
        self._service, self._session, self._times_closed = service, session, session.times_closed
        self._most_frames, self._on_frame, self._num_frames = most_frames, on_frame, 0

    @property
    def answer_rule(self) -> AnswerRule:
        options = self.config.evaluation
        return {
            "score_threshold": options.score_threshold,
            "selection": options.selection,
            "presence_use": options.presence,
        }

    def answer_all(self, pairs: Iterable[tuple[Picture, Sequence[str]]]) -> Iterator[list[ImageAnswer]]:
        """See `DerisPipeline.answer_all`."""
        options = self.config.evaluation
        for inspection in self._inspected(pairs):
            yield inspection.answers(
                score_threshold=options.score_threshold, selection=options.selection, presence=options.presence
            )

    def outputs(self, pairs: Iterable[tuple[Picture, Sequence[str]]]) -> Iterator[DerisOutput]:
        """See `DerisPipeline.outputs`."""
        for inspection in self._inspected(pairs):
            yield last_round(inspection.output)

    def _inspected(self, pairs: Iterable[tuple[Picture, Sequence[str]]]) -> Iterator[Inspection]:
        requests = [self._service.submit(as_picture(image), phrases) for image, phrases in pairs]
        try:
            for request in requests:
                self._session.waiting = request
                if self._session.times_closed != self._times_closed:
                    raise RequestError("The page was closed before its video was answered.")
                if self._num_frames == self._most_frames:
                    raise RequestError(
                        f"This video has more than {self._most_frames:,} frames, which is as many as this demo takes; cut it."
                    )
                inspection = self._service.wait(request)[0]
                self._num_frames += 1
                self._on_frame(self._num_frames)
                yield inspection
        finally:
            self._session.waiting = None
            for request in requests:
                request.found.cancel()


def answer_video(
    service: DemoService,
    session: Session,
    path: Path,
    phrases: Sequence[str],
    rule: Rule,
    *,
    on_frame: Callable[[int, int | None], None],
) -> SavedVideo:
    """Writes the answers about an uploaded video into a folder of the session.

    Args:
        service: the models.
        session: of the user.
        path: of the upload.
        phrases: as they were written.
        rule: of the page.
        on_frame: is told how many frames are answered, and how many there are if the file states it.

    Raises:
        RequestError: something about the request is wrong, or the page was closed.
    """
    texts = service.checked_phrases(phrases)
    video = checked_video(path, service.limits)
    times_closed, out = session.times_closed, session.file("video")
    most_frames = math.ceil(service.limits.max_video_seconds * _MOST_FRAMES_PER_SECOND)
    model = ServedModel(
        service, rule, session, most_frames=most_frames, on_frame=lambda number: on_frame(number, video.num_frames)
    )
    try:
        return write_answers(VideoAnswers(model, video, texts), out)
    except VideoError as error:  # of the first frame
        raise _unreadable(path, error) from error
    finally:
        if session.times_closed != times_closed:
            shutil.rmtree(session.folder, ignore_errors=True)  # what was written after the session had been emptied


def checked_video(path: Path, limits: Limits) -> VideoFile:
    """Returns an uploaded video, if it is not too long or too large.

    Raises:
        RequestError: it is, or it is no video.
    """
    if not path.is_file():
        raise RequestError("This video is not here any more; upload it again.")
    try:
        video = VideoFile(path)
    except VideoError as error:
        raise _unreadable(path, error) from error
    width, height = video.size_wh
    if width * height > 1e6 * limits.max_video_megapixels:
        raise RequestError(
            f"This video has {width:,} x {height:,} px; this demo takes at most {limits.max_video_megapixels:g} megapixels a frame, e.g. "
            "1920 x 1080. Reduce it, or use deris-llm predict --video."
        )
    if video.seconds is not None and video.seconds > limits.max_video_seconds:
        raise RequestError(
            f"This video has {video.seconds:.1f} seconds; this demo takes at most {limits.max_video_seconds:g}. Cut it, or use "
            "deris-llm predict --video."
        )
    return video


def told(path: Path, error: VideoError) -> str:
    """Returns the message of an error with the name of the user's file instead of where it lies here."""
    return str(error).replace(str(path), path.name).partition(" Copy the file again")[0]


def _unreadable(path: Path, error: VideoError) -> RequestError:
    return RequestError(f"This file cannot be read as a video: {told(path, error)}. Try an MP4 file.")
