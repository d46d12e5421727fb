"""What a rank does when it is asked to stop: it finishes the training step that has begun, saves and ends.

SIGINT (Ctrl-C), SIGTERM (launchers, schedulers) and SIGUSR1 (a scheduler's warning ahead of the time limit) ask for it. While
weights load or an evaluation runs nothing is unsaved, so the rank ends at once. Launchers repeat signals: a second SIGTERM or
SIGUSR1 changes nothing, a second Ctrl-C after two seconds ends the rank without saving.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_SECONDS_OF_ONE_REQUEST = 2.0  # torchrun passes on the Ctrl-C that a terminal has already sent to every rank


class _State:
    asked_at: float | None = None  # time.monotonic()
    finishes_step = False


def install() -> None:
    """Handles `SIGNALS` in this process."""
    _State.asked_at, _State.finishes_step = None, False
    for number in SIGNALS:
        signal.signal(number, _receive)


def is_asked() -> bool:
    """Returns whether this rank was asked to stop."""
    return _State.asked_at is not None


@contextlib.contextmanager
def after_the_step() -> Iterator[None]:
    """Inside, a request waits until the training loop has saved (`is_asked`)."""
    with _finishing_steps(True):
        yield


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside, nothing is unsaved: a request, also an earlier one, raises KeyboardInterrupt."""
    with _finishing_steps(False):
        if is_asked():
            raise KeyboardInterrupt
        yield


@contextlib.contextmanager
def _finishing_steps(value: bool) -> Iterator[None]:  # noqa: FBT001
    before, _State.finishes_step = _State.finishes_step, value
    try:
        yield
    finally:
        _State.finishes_step = before


def _receive(number: int, _: object) -> None:
    asked_before, _State.asked_at = _State.asked_at, _State.asked_at or time.monotonic()
    if asked_before is None:
        if not _State.finishes_step:
            raise KeyboardInterrupt
    elif number == signal.SIGINT and time.monotonic() - asked_before > _SECONDS_OF_ONE_REQUEST:
        raise KeyboardInterrupt
