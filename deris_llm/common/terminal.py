"""What commands print: text that no file name, phrase, encoding or closed pipe can turn into a traceback."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 160  # columns where the output is no terminal and COLUMNS does not say


def console(*, stderr: bool = False) -> Console:
    """A console that prints names as they are: square brackets are no markup, digits get no colour."""
    from rich.console import Console  # noqa: PLC0415 - half of the start-up time of help and of an error

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            """Drops what is printed from now on instead of ending the process: the work goes on."""
            self.quiet = True
            _drop(self.file)

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH
    return _Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def print_anything() -> None:
    """Lets the process print letters that the terminal's encoding does not have, escaped as in Python."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Writes out what was printed, unless the reader has gone (`| head`).

    Raises:
        OSError: the output cannot be written, for example to a full disk.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            _drop(stream)
            if not isinstance(error, BrokenPipeError):
                raise


def is_reader_gone() -> bool:
    """Whether the output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop(stream: IO[str]) -> None:
    """Sends what a stream still holds, and all that follows, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
