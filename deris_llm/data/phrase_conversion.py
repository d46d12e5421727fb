"""Non-referent sample conversion (NSC): replaces some phrases with a target by a phrase of another image.

Only 9 % of gRefCOCO's training phrases have no target, and a model trained on them nearly always finds one. So, with a
small probability, a phrase is replaced by one that was written for another image, and the record then has no target.
Three filters make it unlikely that the new phrase names something by chance: it belongs to another image, has more than
a minimum number of words, and is not similar to the phrase it replaces. Source: paper section 3.3, eq. 6, appendix D.1.

The conversion is pure: it builds a new record and leaves the data unchanged. The draw depends on (seed, epoch, phrase
id) alone, so it is the same for any number of workers and ranks. We avoid three properties of the public code
(`parity/NOTES.md` 8): its check for the same image compares text with a number and never matches; it changes its data in
place, so that converted phrases stay converted; and it computes similarity over characters, where anagrams are equal and
all long phrases are alike. The last is `mode="characters"`; `scripts.parity.upstream_conversion` replays
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
    """Returns the mean of Jaccard and cosine similarity.

    Args:
        phrase: any text.
        other: any text.
        mode: ``words`` (the paper): sets of words for Jaccard, word counts for cosine, lower case; ``characters`` (the
            public code): multisets of characters for both; case and blanks matter.

    Returns:
        In [0, 1]; 1 for two empty texts, 0 if only one is empty.
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
    """|A and B| / |A or B| of multisets; the public code applies it to characters."""
    return (one & two).total() / (one | two).total()


def multiset_cosine(one: Counter[str], two: Counter[str]) -> float:
    """|A and B| / sqrt(|A| |B|) of multisets; the public code applies it to characters."""
    return (one & two).total() / math.sqrt(one.total() * two.total())


@dataclass(frozen=True)
class Conversion:
    """The outcome for one record."""

    record: ReferringRecord  # the record itself, or a new one without referents
    outcome: Outcome
    tries: int = 0  # phrases drawn
    same_image: int = 0  # refused: of this image, or word for word one of its phrases
    too_short: int = 0
    too_similar: int = 0


@dataclass(frozen=True)
class ConversionStatistics:
    """Sums over an epoch, for the log."""

    num_phrases: int
    num_no_target: int  # before
    converted: int
    gave_up: int  # phrases that stay unchanged because every drawn phrase was refused
    tries: int
    same_image: int
    too_short: int
    too_similar: int

    def __str__(self) -> str:
        share = 100 / max(1, self.num_phrases)
        return (
            f"non-referent conversion: {self.converted:,} of {self.num_phrases - self.num_no_target:,} phrases with a "
            f"target are replaced, no-target phrases {share * self.num_no_target:.1f} % -> "
            f"{share * (self.num_no_target + self.converted):.1f} %; {self.tries:,} phrases drawn, refused: "
            f"{self.same_image:,} of the same image, {self.too_short:,} too short, {self.too_similar:,} too similar; "
            f"{self.gave_up:,} found no replacement"
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
        """Converts a record, or not, as drawn for this epoch; a record without a target is never changed."""
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
        """Counts the outcomes for these records in an epoch."""
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
    """Hashes a text to 64 bits, equal on every machine and in every process, unlike Python's `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
