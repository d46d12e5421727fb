"""What the demo keeps for each of its users, in memory and on disk, until they leave."""

from __future__ import annotations

import shutil
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from deris_llm.serving.demo.service import Request
from deris_llm.serving.inspection import Inspection

_QUALITY = 90


@dataclass(frozen=True, eq=False)
class Asked:
    """A user's last question with what the networks computed about it."""

    inspections: tuple[Inspection, ...]  # one per model
    path: Path  # of the image; its name is that of the user's file
    seconds: float  # that the answer took


@dataclass(eq=False)
class Session:
    """One user. `close` frees everything; a closed session may be asked again."""

    folder: Path  # files that the page shows; made when there is one
    asked: Asked | None = None
    waiting: Request | None = None
    uploads: set[Path] = field(default_factory=set)
    times_closed: int = 0  # work that began before it was closed ends when it sees this
    _number: int = 0

    def write_image(self, name: str, image: Image.Image) -> str:
        """Writes an image that the page shows, and returns its path."""
        path = self.file(f"{name}.jpg")
        image.save(path, quality=_QUALITY, subsampling=0)
        return str(path)

    def file(self, name: str) -> Path:
        """Returns the path of a new file; the folder before it makes the path unique, so that browsers load it anew."""
        self._number += 1
        folder = self.folder / str(self._number)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def close(self) -> None:
        """Frees memory and files, and the place of a request that still waits."""
        self.times_closed += 1
        self.asked = None
        if self.waiting is not None:
            self.waiting.found.cancel()
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.uploads:
            path.unlink(missing_ok=True)
        self.uploads.clear()


class Sessions:
    """The open sessions by key; when there are too many, the one that was used least recently is closed."""

    def __init__(self, folder: Path, *, max_open: int = 100) -> None:
        """Starts without a session.

        Args:
            folder: of all sessions' files.
            max_open: sessions at a time.
        """
        self._folder, self._max_open = folder, max_open
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Session:
        """Returns the session of a user, a new one if there is none."""
        with self._lock:
            session = self._open.setdefault(key, Session(self._folder / f"session-{key}"))
            self._open.move_to_end(key)
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)[1].close()
            return session

    def close(self, key: str) -> None:
        """Closes a user's session, if there is one. Uploads that another session uses stay."""
        with self._lock:
            session = self._open.pop(key, None)
            others = {path for other in self._open.values() for path in other.uploads}
        if session is not None:
            session.uploads -= others
            session.close()

    def uses(self, path: Path) -> bool:
        """Whether an open session asked about this file."""
        with self._lock:
            return any(path in session.uploads for session in self._open.values())

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)
