"""Non-referent sample conversion: some phrases with a target are swapped for a phrase of another picture.

gRefCOCO has few phrases that name nothing (9 % in train), and a model trained on it finds a target nearly always. So,
with a small probability, a phrase becomes one that was written for another picture, and the record then has no target.
Three filters keep the new phrase from naming something by chance: it belongs to another picture, is longer than some
words, and is not similar to the phrase it replaces. Source: paper section 3.3, eq. 6, appendix D.1.

The conversion is pure: it makes a new record, the data stay as they are, and the draw depends on (seed, epoch, phrase
id) alone, so it is the same for any number of workers and ranks. The public code differs in three ways that we do not
want (`parity/NOTES.md` 8): its check for the same picture compares text with a number and never fires, it changes its
data in place, so that converted phrases stay converted, and similarity is taken over characters, where anagrams are
equal and long phrases are all alike. The last is `mode="characters"`; `scripts.parity.upstream_conversion` replays
all of them to compare with its traces.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deris_llm.data.dataset import ImageGroups
from deris_llm.structures import ReferringRecord

CONVERTED_SUFFIX = "#converted"
"""Ends the phrase id of a converted record; what precedes it is the id of the record that it was."""

MAX_TRIES = 51
"""Phrases drawn before a record is left as it is, as in the public code."""

Outcome = Literal["kept", "converted", "gave_up"]


def phrase_similarity(phrase: str, other: str, *, mode: Literal["words", "characters"]) -> float:
    """Mean of Jaccard and cosine similarity.

    Args:
        phrase: any text.
        other: any text.
        mode: ``words`` (the paper): sets of words for Jaccard, word counts for cosine, lower case; ``characters`` (the
            public code): multisets of characters for both, case and blanks count.

    Returns:
        in [0, 1]; two empty texts are equal, an empty one is unlike any other.
    """
    if mode == "words":
        one, two = Counter(phrase.lower().split()), Counter(other.lower().split())
        jaccard, cosine = word_jaccard, word_cosine
    else:
        one, two = Counter(phrase), Counter(other)
        jaccard, cosine = multiset_jaccard, multiset_cosine
    if not one or not two:
        return float(not one and not two)
    return (jaccard(one, two) + cosine(one, two)) / 2


def word_jaccard(one: Counter[str], two: Counter[str]) -> float:
    """Shared words / all words, each word once (paper eq. 9)."""
    return len(one.keys() & two.keys()) / len(one.keys() | two.keys())


def word_cosine(one: Counter[str], two: Counter[str]) -> float:
    """Cosine of the angle between the word counts (paper eq. 10)."""
    dot = sum(count * two[word] for word, count in one.items())
    return dot / math.sqrt(sum(c * c for c in one.values()) * sum(c * c for c in two.values()))


def multiset_jaccard(one: Counter[str], two: Counter[str]) -> float:
    """|A and B| / |A or B| of multisets, as the public code takes it over characters."""
    return (one & two).total() / (one | two).total()


def multiset_cosine(one: Counter[str], two: Counter[str]) -> float:
    """|A and B| / sqrt(|A| |B|) of multisets, as the public code takes it over characters."""
    return (one & two).total() / math.sqrt(one.total() * two.total())


@dataclass(frozen=True)
class Conversion:
    """What became of one record."""

    record: ReferringRecord  # the record itself, or a new one without instances
    outcome: Outcome
    tries: int = 0  # phrases drawn
    same_image: int = 0  # of them refused: of this picture, or word for word one of its phrases
    too_short: int = 0
    too_similar: int = 0


@dataclass(frozen=True)
class ConversionStatistics:
    """Sums of an epoch, for the log."""

    num_phrases: int
    num_no_target: int  # before
    converted: int
    gave_up: int  # phrases that stay as they are because no try passed
    tries: int
    same_image: int
    too_short: int
    too_similar: int

    def __str__(self) -> str:
        share = 100 / max(1, self.num_phrases)
        return (
            f"non-referent conversion: {self.converted:,} of {self.num_phrases - self.num_no_target:,} phrases with a "
            f"target are swapped, no-target phrases {share * self.num_no_target:.1f} % -> "
            f"{share * (self.num_no_target + self.converted):.1f} %; {self.tries:,} phrases drawn, refused: "
            f"{self.same_image:,} of the same picture, {self.too_short:,} too short, {self.too_similar:,} too similar; "
            f"{self.gave_up:,} found none and stay"
        )


class PhraseConversion:
    """Converts some records of a training set.

    Args:
        groups: the training set. An image is drawn first, uniformly, then one of its phrases, as in the public code.
        rate: probability in [0, 1] that a phrase with a target is converted.
        similarity_threshold: only phrases less similar than this are taken.
        min_words: only phrases of more words than this are taken.
        mode: what `phrase_similarity` compares.
        seed: of the draws.

    Raises:
        ValueError: there are fewer than two images to draw from.
    """

    def __init__(
        self,
        groups: ImageGroups,
        *,
        rate: float,
        similarity_threshold: float,
        min_words: int,
        mode: Literal["words", "characters"],
        seed: int,
    ) -> None:
        if len(groups) < 2:
            raise ValueError(
                f"data.conversion: expected phrases of at least two images to draw from, got {len(groups)}; "
                "set data.conversion.rate=0 or give more data"
            )
        self._groups = groups
        self.rate = rate
        self.similarity_threshold = similarity_threshold
        self.min_words = min_words
        self.mode: Literal["words", "characters"] = mode
        self.seed = seed

    def convert(self, record: ReferringRecord, epoch: int) -> Conversion:
        """Draws what becomes of a record in an epoch; a record without a target is never touched."""
        if record.is_no_target:
            return Conversion(record, "kept")
        random = np.random.default_rng([self.seed, epoch, _text_number(record.phrase_id)])
        if random.random() >= self.rate:
            return Conversion(record, "kept")
        own = frozenset(map(_plain, self._groups.phrases_of(record.image_id)))
        refused: Counter[str] = Counter()
        for tries in range(1, MAX_TRIES + 1):
            image = int(random.integers(len(self._groups)))
            number = int(random.integers(self._groups.sizes[image]))
            phrase = self._groups.phrases(image, slice(number, number + 1))[0]
            if self._groups.image_id(image) == record.image_id or _plain(phrase) in own:
                refused["same_image"] += 1
            elif len(phrase.split()) <= self.min_words:
                refused["too_short"] += 1
            elif phrase_similarity(phrase, record.phrase, mode=self.mode) >= self.similarity_threshold:
                refused["too_similar"] += 1
            else:
                swapped = dataclasses.replace(
                    record, phrase_id=f"{record.phrase_id}{CONVERTED_SUFFIX}", phrase=phrase, instances=()
                )
                return Conversion(swapped, "converted", tries, **refused)
        return Conversion(record, "gave_up", MAX_TRIES, **refused)

    def statistics(self, records: Sequence[ReferringRecord], epoch: int) -> ConversionStatistics:
        """What the conversion does to these records in an epoch."""
        found = [self.convert(record, epoch) for record in records]
        outcomes = Counter(each.outcome for each in found)
        return ConversionStatistics(
            num_phrases=len(records),
            num_no_target=sum(record.is_no_target for record in records),
            converted=outcomes["converted"],
            gave_up=outcomes["gave_up"],
            tries=sum(each.tries for each in found),
            same_image=sum(each.same_image for each in found),
            too_short=sum(each.too_short for each in found),
            too_similar=sum(each.too_similar for each in found),
        )


def _plain(phrase: str) -> str:
    return " ".join(phrase.lower().split())


def _text_number(text: str) -> int:
    """64 bits of a text, the same on every machine and in every process, which Python's `hash` is not."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
