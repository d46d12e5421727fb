"""What a client of the demo sent, checked: gradio's own checks end in tracebacks, and a client over HTTP may send anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from deris_llm.common.words import shortened
from deris_llm.config import PresenceUse, Selection
from deris_llm.serving.demo.service import RequestError
from deris_llm.serving.demo.views import Rule
from deris_llm.serving.inspection import Inspection


def upload(given: Any, folder: Path, kind: str = "image") -> Path:
    """Returns the file that a client means.

    Args:
        given: what it sent.
        folder: of all uploads; no file outside may be read.
        kind: image or video, for messages.

    Raises:
        RequestError: it sent none, or another path.
    """
    if not given:
        others = ", paste one, or choose an example" if kind == "image" else ""
        raise RequestError(f"There is no {kind}; upload one{others}.")
    try:
        path = Path(str(given)).resolve()
    except (OSError, ValueError, RuntimeError):  # no path of any file
        path = Path("/")
    if not path.is_relative_to(folder):
        raise RequestError(
            f"This {kind} was not uploaded; upload it first, and give the path that the upload returned."
        )
    return path


def lines_of(phrases: Any) -> list[str]:
    """Reads phrases: a text with one a line, or over HTTP also a list of texts."""
    if phrases is None:
        return []
    lines = phrases.splitlines() if isinstance(phrases, str) else phrases
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise RequestError(
            f"phrases: expected text with one phrase a line, or a list of texts, got {shortened(phrases)}."
        )
    return lines


def rule_of(threshold: Any, selection: Any, presence: Any) -> Rule:
    """Returns the rule of an answer; what is None is as the checkpoint says."""
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, (int, float))):
        raise RequestError(f"The score threshold: expected a number from 0 to 1, got {shortened(threshold)}.")
    for name, given, known in (
        ("selection", selection, get_args(Selection)),
        ("presence", presence, get_args(PresenceUse)),
    ):
        if given is not None and given not in known:
            raise RequestError(f"{name}: expected {', '.join(known)} or null, got {shortened(given)}.")
    return Rule(threshold, selection, presence)


def phrase_index(chosen: Any, inspection: Inspection) -> int:
    """Returns the selected phrase; the first one while none is selected."""
    if chosen is None or chosen == [] or chosen == "":
        return 0
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < len(inspection.phrases):
        raise RequestError(
            f"The selected phrase: expected a whole number from 0 to {len(inspection.phrases) - 1}, got {shortened(chosen)}."
        )
    return chosen
