"""Words and attribute values of the synthetic world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

KINDS_A = ("cat", "duck", "fish", "person")  # living kinds: the referents of testA
KINDS_B = ("mug", "car", "house", "star")  # things: the referents of testB
KINDS = KINDS_A + KINDS_B
COLOURS = ("red", "yellow", "green", "blue", "purple", "white", "black")
PATTERNS = ("plain", "striped", "dotted")
SIZES = ("small", "large")

KIND_WORDS: dict[str, tuple[str, ...]] = {
    "cat": ("cat",),
    "duck": ("duck",),
    "fish": ("fish",),
    "person": ("person", "guy"),
    "mug": ("mug", "cup"),
    "car": ("car",),
    "house": ("house",),
    "star": ("star",),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little"), "large": ("large", "big")}
PATTERN_NOUNS: dict[str, tuple[str, ...]] = {"striped": ("stripes",), "dotted": ("dots", "spots")}
LIVING_VERBS: dict[str, str] = {"cat": "sitting", "duck": "swimming", "fish": "swimming", "person": "standing"}

LOCATION_WORDS = frozenset(
    "left right top bottom middle centre leftmost rightmost lowest first second third above below over under next beside "
    "corner side".split()
)
"""Words for a position in the image; RefCOCO+ forbids them, but has "behind" and "in front of"."""


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    """Draws one value, each as likely as another."""
    return values[int(rng.integers(len(values)))]


def plural(word: str) -> str:
    """Returns the plural of a kind's word."""
    return {"fish": "fish", "person": "people"}.get(word, word + "s")
