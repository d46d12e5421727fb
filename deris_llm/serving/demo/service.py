"""Runs the models for many users: one thread that asks, requests that come together in one batch, and limits.

The network runs in one thread, so a model is never used by two at once. Requests that wait while it runs make up the next
batch. What is wrong with a request is said before it waits; if a batch fails, its requests are asked one by one, so that
only the one that is at fault fails.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from deris_llm.data.images import BROKEN, as_picture, opened_image
from deris_llm.serving.inspection import Inspection
from deris_llm.serving.pipeline import DerisPipeline, checked_phrases

logger = logging.getLogger(__name__)

_GATHER_SECONDS = 0.01  # a batch waits so long for requests that come at the same moment


class RequestError(ValueError):
    """A request cannot be answered; the message tells a user of the page why, and what to do."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_megapixels: float = 40.0
    max_phrases: int = 20
    max_letters: int = 300  # of a phrase
    max_seconds: float = 60.0  # from the request to its answer
    max_waiting: int = 32  # requests at a time
    max_file_mb: int = 25
    max_video_seconds: float = 20.0
    max_video_megapixels: float = 2.1  # of a frame: 1920 x 1080 px


class Request(NamedTuple):
    """An image with its phrases, waiting for the network."""

    image: Image.Image
    phrases: tuple[str, ...]
    found: Future[tuple[Inspection, ...]]  # one inspection per model


class DemoService:
    """Answers requests of several threads with one or two models.

    Attributes:
        pipelines: the checkpoint, and the one that it is compared with if there is one.
        limits: of a request.
        num_runs: how often a network ran on a batch.
    """

    def __init__(self, pipelines: Sequence[DerisPipeline], limits: Limits | None = None) -> None:
        """Starts the thread that runs the models.

        Args:
            pipelines: see the class.
            limits: None = the default ones.
        """
        self.pipelines = tuple(pipelines)
        self.limits = limits or Limits()
        self.num_runs = 0
        self._waiting: queue.Queue[Request | None] = queue.Queue()
        self._num_open = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="deris-demo", daemon=True)
        self._thread.start()

    def inspect(self, image: str | Path | Image.Image, phrases: Sequence[str]) -> tuple[Inspection, ...]:
        """Runs the models about an image, and returns when they have.

        Returns:
            One inspection per model.

        Raises:
            RequestError: something about the request is wrong, or it took too long.
        """
        return self.wait(self.submit(image, phrases))

    def submit(self, image: str | Path | Image.Image, phrases: Sequence[str]) -> Request:
        """Checks a request and lets it wait for the models. `request.found.cancel()` frees its place.

        Raises:
            RequestError: something about it is wrong, or too many wait.
        """
        request = Request(self._checked_image(image), self.checked_phrases(phrases), Future())
        with self._lock:
            if self._num_open >= self.limits.max_waiting:
                raise RequestError(
                    f"{self._num_open} requests are waiting, which is as many as this demo takes; try again in some seconds."
                )
            self._num_open += 1
        request.found.add_done_callback(self._leave)
        self._waiting.put(request)
        return request

    def wait(self, request: Request) -> tuple[Inspection, ...]:
        """Returns the inspections of a submitted request.

        Raises:
            RequestError: it cannot be answered, was cancelled, or took too long.
        """
        try:
            return request.found.result(timeout=self.limits.max_seconds)
        except FutureTimeoutError as error:
            request.found.cancel()
            raise RequestError(
                f"There was no answer within {self.limits.max_seconds:g} seconds, because the machine is busy or the request is large; "
                "try again, with fewer phrases."
            ) from error
        except CancelledError as error:
            raise RequestError("This request was cancelled; ask again.") from error

    def close(self) -> None:
        """Ends the thread after the requests that wait."""
        self._waiting.put(None)
        self._thread.join()

    def _leave(self, _: Future[tuple[Inspection, ...]]) -> None:
        with self._lock:
            self._num_open -= 1

    def _checked_image(self, image: str | Path | Image.Image) -> Image.Image:
        try:
            self._check_size(image)
            return as_picture(image)
        except RequestError:
            raise
        except (ValueError, OSError) as error:
            reason = str(error).removeprefix(f"{image}: ").partition(". Restore this file")[0]
            reason = reason.replace(str(image), Path(str(image)).name)  # of the user's file, not of where it lies here
            raise RequestError(f"This file cannot be read as an image: {reason}. Try a JPEG or PNG file.") from error

    def _check_size(self, image: str | Path | Image.Image) -> None:
        """Refuses an image by the size in its header, before it is decoded."""
        if isinstance(image, Image.Image):
            width, height = image.size
        else:
            try:
                with opened_image(image) as file:
                    width, height = file.size
            except BROKEN:
                return  # `as_picture` says what is wrong
        if width * height > 1e6 * self.limits.max_megapixels:
            raise RequestError(
                f"This image has {width:,} x {height:,} px; this demo takes at most {self.limits.max_megapixels:g} megapixels. "
                "Reduce it."
            )

    def checked_phrases(self, phrases: Sequence[str]) -> tuple[str, ...]:
        """Returns the phrases of a request without empty ones.

        Raises:
            RequestError: there is none, or there are too many, or one is too long or cannot be used.
        """
        texts = tuple(text.strip() for text in phrases if text.strip())
        if not texts:
            raise RequestError('There is no phrase; write what to find, one phrase a line, e.g. "the red car".')
        if len(texts) > self.limits.max_phrases:
            raise RequestError(
                f"There are {len(texts)} phrases; this demo takes at most {self.limits.max_phrases} at a time. Ask some of them later."
            )
        for text in texts:
            if len(text) > self.limits.max_letters:
                raise RequestError(
                    f'The phrase "{text[:40]}..." has {len(text):,} letters; this demo takes at most {self.limits.max_letters}. Shorten it.'
                )
        try:
            return checked_phrases(texts)
        except ValueError as error:
            raise RequestError(str(error)) from error

    # -- the thread of the models ------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (first := self._waiting.get()) is not None:
            time.sleep(_GATHER_SECONDS)
            batch, is_last = [first], False
            for _ in range(self._waiting.qsize()):
                request = self._waiting.get()
                is_last = request is None
                if request is None:
                    break
                batch.append(request)
            self._answer([request for request in batch if request.found.set_running_or_notify_cancel()])
            if is_last:
                return

    def _answer(self, batch: Sequence[Request]) -> None:
        """Answers requests together, or one by one if together they fail."""
        if not batch:
            return
        try:
            found = self._run(batch)
        except Exception as error:
            if len(batch) > 1:
                for request in batch:
                    self._answer([request])
                return
            batch[0].found.set_exception(_as_request_error(error))
        else:
            for request, inspections in zip(batch, found, strict=True):
                request.found.set_result(inspections)

    def _run(self, batch: Sequence[Request]) -> list[tuple[Inspection, ...]]:
        pairs = [(request.image, request.phrases) for request in batch]
        self.num_runs += 1
        return list(zip(*(list(pipeline.inspect_all(pairs)) for pipeline in self.pipelines), strict=True))


def _as_request_error(error: Exception) -> Exception:
    """Errors that a user can correct become one; others are defects, which the log shows."""
    if isinstance(error, (ValueError, MemoryError)):
        return RequestError(
            str(error) or "The machine has not enough memory for this request; ask fewer phrases at a time."
        )
    logger.error("a request failed", exc_info=error)
    return RequestError("The demo failed on this request, and its log says why; tell whoever runs it.")
