"""The public DeRIS code's non-referent conversion, draw by draw, for comparison with its traces only.

Our own is `deris_llm.data.phrase_conversion`. This replay keeps what that one leaves out on purpose (`parity/NOTES.md`
8): Python's `random` as the source, the check for the same picture that never fires, similarity over characters.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from deris_llm.data.phrase_conversion import phrase_similarity

UPSTREAM_TRIES = 50  # accepted at most at this try; the one after it is drawn and thrown away


@dataclass(frozen=True)
class UpstreamSettings:
    """The public code's options."""

    rate: float
    similarity_threshold: float
    min_words: int
    uses_similarity: bool


def upstream_conversion(
    phrase: str,
    pool: Sequence[Sequence[str]],
    settings: UpstreamSettings,
    source: random.Random,
    *,
    has_target: bool,
) -> str | None:
    """The phrase that replaces ``phrase``, or None where it stays.

    Draws, in this order: one ``random()`` per phrase with a target, then two ``choice`` per try, of the picture's key
    and of one of its phrases.

    Args:
        phrase: as annotated, before any cleaning.
        pool: phrases by picture, in the order of the file they come from.
        settings: rate, threshold, length.
        source: goes on from where the phrase before left it.
        has_target: a phrase without a target stays and draws nothing.
    """
    if not has_target or source.random() > settings.rate:
        return None
    for _ in range(UPSTREAM_TRIES):
        other = source.choice(source.choice(pool))
        alike = settings.uses_similarity and (
            phrase_similarity(other, phrase, mode="characters") >= settings.similarity_threshold
        )
        if len(other.split()) > settings.min_words and not alike:
            return other
    source.choice(source.choice(pool))
    return None
