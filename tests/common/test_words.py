import io
import logging
import sys
from typing import Any

import pytest

from deris_llm.cli.main import print_error
from deris_llm.common.messages import _Lines
from deris_llm.common.terminal import console
from deris_llm.common.words import count_of, printable, shortened

ESCAPES = "a\x1b[2Jb\rc\x9b7m\x07\ud800é\tin\na line"
ESCAPED = "a\\x1b[2Jb\\rc\\x9b7m\\x07\\ud800é\tin\na line"


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [(0, "phrase", "0 phrases"), (1, "entry", "1 entry"), (2, "entry", "2 entries"), (12345, "image", "12,345 images")],
)
def test_count_of(number, noun, said):
    assert count_of(number, noun) == said


def test_no_name_reaches_the_terminal_with_control_characters(monkeypatch, capsys):
    assert printable(ESCAPES) == ESCAPED
    record = logging.LogRecord("deris_llm", logging.WARNING, "", 0, "%s", (ESCAPES,), None)
    assert ESCAPED in _Lines(0).format(record)
    print_error(ValueError(ESCAPES))
    assert capsys.readouterr().err.startswith(f"error: {ESCAPED}\n")
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    console().print(ESCAPES.replace("\t", " "))
    assert ESCAPED.replace("\t", " ") in shown.getvalue()


def _entwined() -> Any:
    value: Any = ["x"]
    for _ in range(60):
        value = [value, value]
    return value


def _in_itself() -> Any:
    value: dict[str, Any] = {}
    value["a"] = [value]
    return value


def test_the_beginning_of_any_value():
    for value in (None, 1.5, "text", b"text", [1, [2, (3,)], {"b": 1, "a": [()]}], (), {}, True, -7):
        assert shortened(value) == repr(value)
    assert shortened("x" * 10**6) == repr("x" * 79)[:77] + "..."
    assert shortened(10**5000) == "a number of 16,610 bits"
    assert shortened(_entwined()).startswith("[[[[[[")
    assert shortened(_in_itself()).startswith("{'a': [{'a': [{'a': [")
    assert len(shortened(_entwined(), 40)) == 40
