"""Words in messages: numbers with nouns, and names of others in a form that any terminal can show."""

import re

_UNPRINTABLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")


def printable(text: str) -> str:
    """Escapes control characters, except tabs and newlines, and lone surrogates.

    File names and phrases of others may hold both: a terminal would obey the ones, and UTF-8 cannot hold the others.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def count_of(number: int, noun: str) -> str:
    """Says how many: `1 phrase`, `2,300 phrases`.

    Args:
        number: at least 0.
        noun: in the singular; its plural ends in s or, after a consonant and y, in ies.
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1]}ies" if noun.endswith(("ry", "ty")) else f"{number:,} {noun}s"


def shortened(value: object, length: int = 80) -> str:
    """Returns the beginning of a value as Python writes it, in at most so many characters.

    Python's own repr of thirty lists that hold each other twice has a billion parts, that of a list in itself no end.
    """
    text = _beginning(value, length)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _beginning(value: object, room: int) -> str:
    """At least `room` characters of a value, as far as it has so many; each level of it takes one at least."""
    if isinstance(value, (str, bytes, bytearray)):
        return repr(value[: max(room, 0) + 1])
    if isinstance(value, int) and value.bit_length() > 400:
        return f"a number of {value.bit_length():,} bits"
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
        return repr(value)
    opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")") if isinstance(value, tuple) else ("{", "}")
    text = opening
    for number, item in enumerate(value):
        if len(text) > room:
            return f"{text}..."
        text += (", " if number else "") + _beginning(item, room - len(text))
        if isinstance(value, dict):
            text += f": {_beginning(value[item], room - len(text))}"
    return text + ("," if isinstance(value, tuple) and len(value) == 1 else "") + closing
