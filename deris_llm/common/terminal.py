"""Printing of commands: no file name, phrase, encoding or closed pipe causes a traceback."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import IO, TYPE_CHECKING, Any

from deris_llm.common.words import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

_WIDTH = 160  # columns, if the output is not a terminal and COLUMNS is not set


def console(*, stderr: bool = False) -> Console:
    """Returns a console that prints text as it is: square brackets are not markup, digits are not coloured.

    Control characters are escaped (`printable`).
    """
    from rich.console import Console  # half of the start-up time of --help

    class _Console(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            """Makes the text of a line or a cell printable."""
            return super().render_str(printable(text), **options)

        def on_broken_pipe(self) -> None:
            """Discards further output instead of ending the process, so that the work continues."""
            self.quiet = True
            _drop(self.file)

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH
    return _Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def progress_bar(unit: str = "", *, enabled: bool = True) -> Progress:
    """Returns a progress bar on stderr with the time left, shown on a terminal only; `unit` names what is counted."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    shown = console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        disable=not (enabled and shown.is_terminal),
        console=shown,
    )


def print_anything() -> None:
    """Makes the process print characters that the terminal's encoding lacks as Python escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Flushes stdout and stderr; a reader that closed its pipe (`| head`) is not an error.

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
    """Returns whether stdout is a pipe whose reader closed it."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop(stream: IO[str]) -> None:
    """Redirects a stream, with the text in its buffer, to the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
