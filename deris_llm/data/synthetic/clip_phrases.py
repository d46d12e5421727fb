"""Sentences about a clip: what an object looks like, how it moves, or both; each is evaluated on the clip.

A sentence is used only if nobody could hesitate: one about "left" is not used where an object that it could mean goes out on
the left and comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .clip import Clip, ClipObject
from .phrases import FIELD_SUBSETS, FIELDS, Noun, noun_text
from .vocabulary import pick

_WORDINGS: dict[str, tuple[tuple[str, str], ...]] = {  # of one object, of several
    "left": (("that moves left", "that move left"), ("moving to the left", "moving to the left")),
    "right": (("that moves right", "that move right"), ("moving to the right", "moving to the right")),
    "up": (("that moves up", "that move up"), ("going up", "going up")),
    "down": (("that moves down", "that move down"), ("going down", "going down")),
    "still": (("that does not move", "that do not move"), ("that stays in place", "that stay in place")),
    "moves": (("that moves", "that move"),),
    "back": (("that leaves and comes back", "that leave and come back"), ("that goes away and returns", "that go away and return")),
    "leaves": (("that goes out of view", "that go out of view"), ("that leaves", "that leave")),
    "enters": (("that comes into view", "that come into view"),),
}
_PASSES = {"behind": "that passes behind", "front": "that passes in front of"}


@dataclass(frozen=True)
class ClipSentence:
    """A sentence and the indices of the objects that it names.

    `family`: "looks" (no word about motion), "motion" (looks alone would name several objects), "passing" (behind or in front of
    another object), "several" or "none".
    """

    text: str
    family: str
    indices: tuple[int, ...]


def clip_sentences(clip: Clip, rng: np.random.Generator, families: Sequence[str]) -> list[ClipSentence]:
    """Samples a sentence of each of the families, as far as the clip allows; texts are distinct."""
    found: dict[str, ClipSentence] = {}
    for family in families:
        for _ in range(30):
            sentence = _proposed(clip, rng, family)
            if sentence is not None and sentence.text not in found:
                found[sentence.text] = sentence
                break
    return list(found.values())


def _proposed(clip: Clip, rng: np.random.Generator, family: str) -> ClipSentence | None:
    index = int(rng.integers(len(clip.objects)))
    noun = _noun(clip.objects[index], pick(rng, FIELD_SUBSETS))
    alike = _alike(clip, noun)
    if family == "looks":
        return ClipSentence(f"the {noun_text(rng, noun)}", family, (index,)) if alike == [index] else None
    if family == "passing":
        return _passing(clip, rng, index, noun)
    if family == "none":
        return _none(clip, rng, noun)
    motion = pick(rng, [motion for motion in _WORDINGS if _does(clip.objects[index], motion)])
    noun = Noun() if rng.random() < 0.2 else noun
    named = _named(clip, noun, motion)
    if family == "motion" and named == [index] and len(_alike(clip, noun)) > 1:
        return ClipSentence(f"the {noun_text(rng, noun)} {pick(rng, _WORDINGS[motion])[0]}", family, (index,))
    if family == "several" and named is not None and len(named) > 1:
        start = "both" if len(named) == 2 and rng.random() < 0.5 else "all"
        words = pick(rng, _WORDINGS[motion])[1]
        return ClipSentence(f"{start} {noun_text(rng, noun, is_plural=True)} {words}", family, tuple(named))
    return None


def _passing(clip: Clip, rng: np.random.Generator, index: int, noun: Noun) -> ClipSentence | None:
    """An object that another one, which its looks alone name, hides in some frame, or the other way round."""
    relation = pick(rng, tuple(_PASSES))
    one = clip.objects[index]
    others = [k for k, other in enumerate(clip.objects) if (k in one.hidden_by if relation == "behind" else index in other.hidden_by)]
    if not others or one.motion == "still":
        return None
    anchor_index = pick(rng, others)
    anchor = _noun(clip.objects[anchor_index], pick(rng, FIELD_SUBSETS))
    candidates = [k for k in _alike(clip, noun) if k != anchor_index and _passes(clip, k, anchor_index, relation)]
    if _alike(clip, anchor) != [anchor_index] or candidates != [index]:
        return None
    return ClipSentence(f"the {noun_text(rng, noun)} {_PASSES[relation]} the {noun_text(rng, anchor)}", "passing", (index,))


def _passes(clip: Clip, index: int, anchor: int, relation: str) -> bool:
    return anchor in clip.objects[index].hidden_by if relation == "behind" else index in clip.objects[anchor].hidden_by


def _none(clip: Clip, rng: np.random.Generator, noun: Noun) -> ClipSentence | None:
    """A motion that no object of a look has, though there are objects of this look."""
    motion = pick(rng, [motion for motion in _WORDINGS if motion not in ("leaves", "enters")])
    if _named(clip, noun, motion) != []:
        return None
    return ClipSentence(f"the {noun_text(rng, noun)} {pick(rng, _WORDINGS[motion])[0]}", "none", ())


def _named(clip: Clip, noun: Noun, motion: str) -> list[int] | None:
    """The objects of a look that have a motion; None if that is unclear for one of them."""
    truths = {index: _does(clip.objects[index], motion) for index in _alike(clip, noun)}
    return None if None in truths.values() else [index for index, truth in truths.items() if truth]


def _does(one: ClipObject, motion: str) -> bool | None:
    """Whether an object has a motion; None = unclear."""
    if one.motion == "back" and motion in ("left", "right", "leaves", "enters"):
        return None
    if motion in ("leaves", "enters"):
        return getattr(one, motion)
    return one.motion != "still" if motion == "moves" else one.motion == motion


def _noun(one: ClipObject, fields: Sequence[str]) -> Noun:
    values = dict(zip(FIELDS, one.profile, strict=True))
    return Noun(**{name: values[name] for name in fields})


def _alike(clip: Clip, noun: Noun) -> list[int]:
    """The objects of a look."""
    wanted = (noun.kind, noun.colour, noun.pattern, noun.size)
    return [
        index
        for index, one in enumerate(clip.objects)
        if all(want is None or want == has for want, has in zip(wanted, one.profile, strict=True))
    ]
