"""Phrases for a scene: each is the wording of a logical form that is evaluated on the scene.

A form is evaluated with margins. Where a human could hesitate (an object a little to the left, two fish of about the
same size) the answer is None and the form is not used.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from .scene import Scene
from .vocabulary import (
    COLOURS,
    KIND_WORDS,
    KINDS,
    LIVING_VERBS,
    LOCATION_WORDS,
    PATTERN_NOUNS,
    PATTERNS,
    SIZE_WORDS,
    SIZES,
    pick,
    plural,
)

Style = Literal["refcoco", "refcoco+", "refcocog"]

PLACE_MARGIN = 0.08  # of the image's side: the least gap between an extreme object and the next one
RELATION_MARGIN = 0.10  # of the image's side: the least distance for "left of", "above" ...
NO_RELATION_MARGIN = 0.02  # below it an object is clearly not "left of"; between the two it is unclear
NEAREST_RATIO = 1.5  # the next candidate is at least so much further away
DIAMETER_RATIO = 1.25  # "biggest": at least so much larger than the next one
MIN_OVERLAP_PX = 20  # "behind" and "in front of" need so many common pixels

_SIDES = ("left", "right", "top", "bottom")
_CORNERS = ("top left", "top right", "bottom left", "bottom right")
_ORDINALS = ("first", "second", "third")
_RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "next": ("next to", "beside"),
    "behind": ("behind",),
    "front": ("in front of",),
}


@dataclass(frozen=True)
class Noun:
    """The objects with these attributes; None = any value."""

    kind: str | None = None
    colour: str | None = None
    pattern: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Extreme:
    """The "biggest" or "smallest" object of a noun."""

    noun: Noun
    which: str


@dataclass(frozen=True)
class Place:
    """The objects of a noun at a side, in a corner or in the middle, or ("leftmost" ...) the extreme one."""

    noun: Noun
    where: str


@dataclass(frozen=True)
class Ordinal:
    """The n-th object of a noun (n = 1, 2, 3) counted from "left", "right", "top" or "bottom"."""

    noun: Noun
    n: int
    side: str


@dataclass(frozen=True)
class Relation:
    """The objects of a noun that stand in a relation (a key of `_RELATION_WORDS`) to the only object of `anchor`."""

    noun: Noun
    relation: str
    anchor: Noun


@dataclass(frozen=True)
class Union:
    """The objects of any of several forms."""

    parts: tuple[Noun, ...]


Form = Noun | Extreme | Place | Ordinal | Relation | Union


@dataclass(frozen=True)
class Expression:
    """A phrase.

    Attributes:
        text: lower case words.
        family: "attribute", "comparative", "location", "ordinal", "relation", "behind", "description", "multi" or
            "no_target".
        uses_location: whether a word of `LOCATION_WORDS` occurs.
        form: what the text means.
    """

    text: str
    family: str
    uses_location: bool
    form: Form


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Facts:
    profiles: tuple[tuple[str, str, str, str], ...]
    xy_px: tuple[tuple[float, float], ...]
    side_px: tuple[int, int]  # width, height
    diameter_px: tuple[float, ...]
    is_in_front: tuple[tuple[bool, ...], ...]  # [i][j]: i hides a part of j


@functools.lru_cache(maxsize=8)
def _facts(scene: Scene) -> _Facts:
    objects = scene.objects
    xy_px = []
    for item in objects:
        x0, y0, x1, y1 = item.box_xyxy
        xy_px.append(((x0 + x1) / 2, (y0 + y1) / 2))
    in_front = tuple(
        tuple(a.depth > b.depth and int((a.full_mask & b.full_mask).sum()) >= MIN_OVERLAP_PX for b in objects)
        for a in objects
    )
    height, width = scene.image.shape[:2]
    return _Facts(
        tuple(item.profile for item in objects),
        tuple(xy_px),
        (width, height),
        tuple(float(np.sqrt(item.full_mask.sum())) for item in objects),
        in_front,
    )


def resolve(scene: Scene, form: Form) -> frozenset[int] | None:
    """Returns the indices of the objects that a form names; empty = clearly none; None = a human could hesitate."""
    facts = _facts(scene)
    match form:
        case Noun():
            return _matching(facts, form)
        case Union():
            return frozenset().union(*(_matching(facts, part) for part in form.parts))
        case Extreme():
            return _resolve_extreme(facts, form)
        case Place():
            return _resolve_place(facts, form)
        case Ordinal():
            ranked = _ranked(facts, _matching(facts, form.noun), form.side)
            return None if ranked is None or len(ranked) < form.n else frozenset((ranked[form.n - 1],))
        case Relation():
            return _resolve_relation(facts, form)


@functools.lru_cache(maxsize=4096)
def _matching(facts: _Facts, noun: Noun) -> frozenset[int]:
    wanted = (noun.kind, noun.colour, noun.pattern, noun.size)
    return frozenset(
        index
        for index, profile in enumerate(facts.profiles)
        if all(want is None or want == has for want, has in zip(wanted, profile, strict=True))
    )


def _ranked(facts: _Facts, indices: frozenset[int], side: str) -> list[int] | None:
    """Returns the indices in order from a side; None when two neighbours are too close along the axis."""
    axis = 0 if side in ("left", "right") else 1
    ranked = sorted(indices, key=lambda i: facts.xy_px[i][axis], reverse=side in ("right", "bottom"))
    values = [facts.xy_px[i][axis] / facts.side_px[axis] for i in ranked]
    if any(abs(a - b) < PLACE_MARGIN for a, b in itertools.pairwise(values)):
        return None
    return ranked


def _resolve_extreme(facts: _Facts, form: Extreme) -> frozenset[int] | None:
    ranked = sorted(_matching(facts, form.noun), key=lambda i: facts.diameter_px[i], reverse=form.which == "biggest")
    if len(ranked) < 2:
        return frozenset(ranked)
    first, second = facts.diameter_px[ranked[0]], facts.diameter_px[ranked[1]]
    return frozenset(ranked[:1]) if max(first, second) >= DIAMETER_RATIO * min(first, second) else None


def _resolve_place(facts: _Facts, form: Place) -> frozenset[int] | None:
    indices = _matching(facts, form.noun)
    if form.where.endswith("most"):
        side = form.where.removesuffix("most")
        axis, sign = (0 if side in ("left", "right") else 1), (1 if side in ("left", "top") else -1)
        ranked = sorted(indices, key=lambda i: sign * facts.xy_px[i][axis])
        if len(ranked) < 2:
            return frozenset(ranked)
        gap = abs(facts.xy_px[ranked[0]][axis] - facts.xy_px[ranked[1]][axis]) / facts.side_px[axis]
        return frozenset(ranked[:1]) if gap >= PLACE_MARGIN else None
    truths = {i: _place_truth(facts, i, form.where) for i in indices}
    return None if None in truths.values() else frozenset(i for i, truth in truths.items() if truth)


def _place_truth(facts: _Facts, index: int, where: str) -> bool | None:
    """Whether an object is at a place; None = unclear."""
    x, y = (value / side for value, side in zip(facts.xy_px[index], facts.side_px, strict=True))
    if where == "middle":
        reach = max(abs(x - 0.5), abs(y - 0.5))
        return True if reach <= 0.14 else (False if reach >= 0.24 else None)
    reaches = {"left": 0.5 - x, "right": x - 0.5, "top": 0.5 - y, "bottom": y - 0.5}
    reach = min(reaches[side] for side in where.split())
    return True if reach >= 0.09 else (False if reach <= 0.01 else None)


def _resolve_relation(facts: _Facts, form: Relation) -> frozenset[int] | None:
    anchors = _matching(facts, form.anchor)
    if len(anchors) != 1:
        return None
    (anchor,) = anchors
    indices = _matching(facts, form.noun) - anchors
    if form.relation == "next":
        return _resolve_nearest(facts, indices, anchor)
    if form.relation in ("behind", "front"):
        is_front = form.relation == "front"
        return frozenset(
            i for i in indices if (facts.is_in_front[i][anchor] if is_front else facts.is_in_front[anchor][i])
        )
    truths = {i: _direction_truth(facts, i, anchor, form.relation) for i in indices}
    return None if None in truths.values() else frozenset(i for i, truth in truths.items() if truth)


def _touch(facts: _Facts, i: int, j: int) -> bool:
    return facts.is_in_front[i][j] or facts.is_in_front[j][i]


def _resolve_nearest(facts: _Facts, indices: frozenset[int], anchor: int) -> frozenset[int] | None:
    def distance(i: int) -> float:
        (x, y), (ax, ay) = facts.xy_px[i], facts.xy_px[anchor]
        return float(np.hypot(x - ax, y - ay))

    ranked = sorted(indices, key=distance)
    if not ranked:
        return frozenset()
    if distance(ranked[0]) > 0.5 * min(facts.side_px):
        return None
    if len(ranked) > 1 and distance(ranked[1]) < NEAREST_RATIO * distance(ranked[0]):
        return None
    return frozenset(ranked[:1])


def _direction_truth(facts: _Facts, index: int, anchor: int, relation: str) -> bool | None:
    axis = 0 if relation in ("left", "right") else 1
    sign = 1 if relation in ("left", "above") else -1
    along = sign * (facts.xy_px[anchor][axis] - facts.xy_px[index][axis])
    aside = abs(facts.xy_px[anchor][1 - axis] - facts.xy_px[index][1 - axis])
    if along < NO_RELATION_MARGIN * facts.side_px[axis]:
        return False
    return True if along >= RELATION_MARGIN * facts.side_px[axis] and aside <= 0.9 * along else None


# ---------------------------------------------------------------------------------------------------------------------
# Wording
# ---------------------------------------------------------------------------------------------------------------------


def noun_text(rng: np.random.Generator, noun: Noun, *, is_plural: bool = False) -> str:
    head = pick(rng, KIND_WORDS[noun.kind]) if noun.kind else ("thing" if rng.random() < 0.5 else "object")
    words = [pick(rng, SIZE_WORDS[noun.size])] if noun.size else []
    tail = ""
    adjectives = [noun.colour] if noun.colour else []
    if noun.pattern in PATTERN_NOUNS and rng.random() < 0.3:
        tail = f" with {pick(rng, PATTERN_NOUNS[noun.pattern])}"
    elif noun.pattern:
        adjectives.insert(0 if rng.random() < 0.7 else len(adjectives), noun.pattern)
    return " ".join([*words, *adjectives, plural(head) if is_plural else head]) + tail


def _anchor_text(rng: np.random.Generator, noun: Noun) -> str:
    return f"the {noun_text(rng, noun)}"


def _place_text(rng: np.random.Generator, form: Place) -> str:
    noun, where = noun_text(rng, form.noun), form.where
    if where.endswith("most"):
        side = where.removesuffix("most")
        word = {"top": "top", "bottom": "lowest"}.get(side, where)
        return f"{word} {noun}"
    if where == "middle":
        return pick(rng, (f"{noun} in the middle", f"middle {noun}", f"{noun} in the centre"))
    preposition = "on" if where in ("left", "right") else ("in" if where in _CORNERS and rng.random() < 0.3 else "at")
    corner = " corner" if preposition == "in" else ""
    return pick(rng, (f"{noun} {preposition} the {where}{corner}", f"{noun} {where}", f"{where} {noun}"))


def _expression(text: str, family: str, form: Form) -> Expression:
    return Expression(text, family, not LOCATION_WORDS.isdisjoint(text.split()), form)


# ---------------------------------------------------------------------------------------------------------------------
# Proposals: each returns a form with its words, or None; uniqueness is checked by the caller
# ---------------------------------------------------------------------------------------------------------------------

FIELDS: tuple[str, ...] = ("kind", "colour", "pattern", "size")
FIELD_SUBSETS = tuple(
    subset for length in range(1, 5) for subset in itertools.combinations(FIELDS, length)
)  # sorted by length


def _noun_of(facts: _Facts, index: int, fields: Sequence[str]) -> Noun:
    values: dict[str, str] = dict(zip(FIELDS, facts.profiles[index], strict=True))
    return Noun(**{name: values[name] for name in fields})


def _unique_noun(rng: np.random.Generator, facts: _Facts, index: int, redundancy: float) -> Noun | None:
    """Returns attributes that only this object has: the fewest, or (with probability `redundancy`) any such set."""
    unique = [fields for fields in FIELD_SUBSETS if _matching(facts, _noun_of(facts, index, fields)) == {index}]
    if not unique:
        return None
    if rng.random() >= redundancy:
        unique = [fields for fields in unique if len(fields) == len(unique[0])]
    with_kind = [fields for fields in unique if "kind" in fields]
    if with_kind and rng.random() < 0.85:
        unique = with_kind
    return _noun_of(facts, index, pick(rng, unique))


def _ambiguous_noun(rng: np.random.Generator, facts: _Facts, index: int, density: float = 0.3) -> Noun | None:
    """Returns attributes that this object shares with at least one other object."""
    fields = [name for name in FIELDS if rng.random() < (0.88 if name == "kind" else density)]
    noun = _noun_of(facts, index, fields)
    return noun if fields and len(_matching(facts, noun)) >= 2 else None


def _propose_attribute(rng: np.random.Generator, facts: _Facts, index: int) -> tuple[str, Form] | None:
    noun = _unique_noun(rng, facts, index, redundancy=0.3)
    return None if noun is None else (noun_text(rng, noun), noun)


def _propose_comparative(rng: np.random.Generator, facts: _Facts, index: int) -> tuple[str, Form] | None:
    noun = _noun_of(facts, index, ["kind", *(name for name in ("colour", "pattern") if rng.random() < 0.3)])
    if len(_matching(facts, noun)) < 2:
        return None
    which = "biggest" if facts.profiles[index][3] == "large" else "smallest"
    word = pick(rng, ("biggest", "largest")) if which == "biggest" else "smallest"
    return f"{word} {noun_text(rng, noun)}", Extreme(noun, which)


def _propose_location(rng: np.random.Generator, facts: _Facts, index: int) -> tuple[str, Form] | None:
    noun = _ambiguous_noun(rng, facts, index)
    if noun is None:
        return None
    wheres = [*(f"{side}most" for side in _SIDES), *_SIDES, *_CORNERS, "middle"]
    form = Place(noun, pick(rng, wheres))
    return _place_text(rng, form), form


def _propose_ordinal(rng: np.random.Generator, facts: _Facts, index: int) -> tuple[str, Form] | None:
    noun = _ambiguous_noun(rng, facts, index)
    if noun is None:
        return None
    indices = _matching(facts, noun)
    side = pick(rng, ("left", "right", "left", "right", "top", "bottom"))
    ranked = _ranked(facts, indices, side)
    if ranked is None or len(ranked) < 3 or ranked.index(index) > 2:
        return None
    n = ranked.index(index) + 1
    return f"{_ORDINALS[n - 1]} {noun_text(rng, noun)} from the {side}", Ordinal(noun, n, side)


def _sample_anchor(rng: np.random.Generator, facts: _Facts, index: int, redundancy: float) -> tuple[int, Noun] | None:
    anchor = int(rng.integers(len(facts.profiles)))
    noun = None if anchor == index else _unique_noun(rng, facts, anchor, redundancy)
    return None if noun is None or noun.kind is None else (anchor, noun)


def _propose_relation(rng: np.random.Generator, facts: _Facts, index: int) -> tuple[str, Form] | None:
    noun, anchor = _ambiguous_noun(rng, facts, index), _sample_anchor(rng, facts, index, 0.2)
    if noun is None or anchor is None:
        return None
    relations = [r for r in ("left", "right", "above", "below") if _direction_truth(facts, index, anchor[0], r)]
    relation = pick(rng, [*relations, *relations, "next"])
    words = pick(rng, _RELATION_WORDS[relation])
    return f"{noun_text(rng, noun)} {words} {_anchor_text(rng, anchor[1])}", Relation(noun, relation, anchor[1])


def _propose_behind(rng: np.random.Generator, facts: _Facts, index: int) -> tuple[str, Form] | None:
    partners = [other for other in range(len(facts.profiles)) if _touch(facts, index, other)]
    if not partners:
        return None
    partner = pick(rng, partners)
    anchor = _unique_noun(rng, facts, partner, 0.2)
    noun = _noun_of(facts, index, ["kind", *(name for name in FIELDS[1:] if rng.random() < 0.25)])
    if anchor is None:
        return None
    relation = "front" if facts.is_in_front[index][partner] else "behind"
    words = pick(rng, _RELATION_WORDS[relation])
    return f"{noun_text(rng, noun)} {words} {_anchor_text(rng, anchor)}", Relation(noun, relation, anchor)


def _article(rng: np.random.Generator, text: str) -> str:
    return f"{'the' if rng.random() < 0.7 else 'a'} {text}"


def _propose_long_relation(rng: np.random.Generator, facts: _Facts, index: int) -> tuple[str, Form] | None:
    noun = _ambiguous_noun(rng, facts, index, density=0.6) if rng.random() < 0.7 else None
    noun = _noun_of(facts, index, FIELDS) if noun is None else noun
    anchor = _sample_anchor(rng, facts, index, 0.8)
    if anchor is None:
        return None
    other, anchor_noun = anchor
    if _touch(facts, index, other) and rng.random() < 0.7:
        relation = "front" if facts.is_in_front[index][other] else "behind"
        words = _RELATION_WORDS[relation][0]
    else:
        relations = [r for r in ("left", "right", "above", "below") if _direction_truth(facts, index, other, r)]
        relation = pick(rng, [*relations, *relations, "next"])
        words = _RELATION_WORDS[relation][1 if relation in ("left", "right") else int(rng.integers(2))]
    verb = LIVING_VERBS.get(facts.profiles[index][0]) if noun.kind else None
    link = verb if verb and rng.random() < 0.4 else "that is"
    text = f"{_article(rng, noun_text(rng, noun))} {link} {words} {_anchor_text(rng, anchor_noun)}"
    return text, Relation(noun, relation, anchor_noun)


def _propose_long_place(rng: np.random.Generator, facts: _Facts, index: int) -> tuple[str, Form] | None:
    noun = _ambiguous_noun(rng, facts, index, density=0.7)
    if noun is None:
        return None
    if rng.random() < 0.8:
        form = Place(noun, pick(rng, _SIDES))
        return f"{_article(rng, noun_text(rng, noun))} on the {form.where} side of the picture", form
    form = Place(noun, pick(rng, _CORNERS))
    return f"{_article(rng, noun_text(rng, noun))} in the {form.where} corner of the picture", form


def _propose_description(rng: np.random.Generator, facts: _Facts, index: int) -> tuple[str, Form] | None:
    noun = _unique_noun(rng, facts, index, redundancy=0.9)
    if noun is None or noun.kind is None or noun.pattern is None:
        return None
    bare = replace(noun, pattern=None, size=None)
    marks = "no stripes or dots" if noun.pattern == "plain" else pick(rng, PATTERN_NOUNS[noun.pattern])
    verb = LIVING_VERBS.get(noun.kind)
    choices = [f"{_article(rng, noun_text(rng, replace(noun, pattern=None)))} that has {marks} on it"]
    if noun.size:
        size = pick(rng, SIZE_WORDS[noun.size])
        choices.append(f"{_article(rng, noun_text(rng, bare))} that is {size} and has {marks} on it")
    if verb:
        choices.append(f"{_article(rng, noun_text(rng, noun))} that is {verb} in the picture")
    else:
        choices.append(f"{_article(rng, noun_text(rng, noun))} that you see in the picture")
    return pick(rng, choices), noun


_Proposer = Callable[[np.random.Generator, _Facts, int], tuple[str, Form] | None]
_STYLES: dict[str, tuple[tuple[str, float, _Proposer], ...]] = {
    "refcoco": (
        ("attribute", 0.30, _propose_attribute),
        ("location", 0.24, _propose_location),
        ("ordinal", 0.10, _propose_ordinal),
        ("relation", 0.28, _propose_relation),
        ("behind", 0.08, _propose_behind),
    ),
    "refcoco+": (
        ("attribute", 0.55, _propose_attribute),
        ("comparative", 0.25, _propose_comparative),
        ("behind", 0.20, _propose_behind),
    ),
    "refcocog": (
        ("relation", 0.60, _propose_long_relation),
        ("location", 0.12, _propose_long_place),
        ("description", 0.28, _propose_description),
    ),
}
CROWD_WEIGHTS = {
    "attribute": 0.25,
    "location": 0.20,
    "ordinal": 0.35,
    "relation": 0.30,
    "behind": 0.20,
    "comparative": 0.25,
}
"""Weights of the families in a crowd world; where a family is impossible for an object, the others take its part."""
_WORDS_RANGE = {"refcoco": (1, 12), "refcoco+": (1, 12), "refcocog": (8, 17)}
_TRIES_PER_FAMILY = 24


def expressions_for(
    scene: Scene,
    index: int,
    rng: np.random.Generator,
    *,
    style: Style,
    count: int,
    weights: Mapping[str, float] | None = None,
) -> list[Expression]:
    """Returns up to `count` different phrases, each of which names exactly the object `index`.

    Args:
        scene: the image and its objects.
        index: of the object.
        rng: the only source of randomness.
        style: "refcoco" (short), "refcoco+" (short, no location words) or "refcocog" (8-17 words).
        count: of phrases; fewer come back where the object is hard to name.
        weights: of the families by name instead of the style's own; families without one keep theirs.
    """
    if style not in _STYLES:
        raise ValueError(f"expressions_for: style must be one of {sorted(_STYLES)}, got {style!r}; use one of these")
    families = _STYLES[style]
    weight_of_slot = np.array([(weights or {}).get(family, weight) for family, weight, _ in families])
    facts = _facts(scene)
    found: dict[str, Expression] = {}
    failed: set[int] = set()
    while len(found) < count and len(failed) < len(families):
        left = np.where([slot in failed for slot in range(len(families))], 0.0, weight_of_slot)
        slot = int(rng.choice(len(families), p=left / left.sum()))
        family, _, propose = families[slot]
        for _ in range(_TRIES_PER_FAMILY):
            proposal = propose(rng, facts, index)
            if proposal is None or resolve(scene, proposal[1]) != {index}:
                continue
            text, form = proposal
            low, high = _WORDS_RANGE[style]
            if text not in found and low <= len(text.split()) <= high:
                article = "the " if style != "refcocog" and rng.random() < 0.2 else ""
                found[text] = _expression(article + text, family, form)
                break
        else:
            failed.add(slot)
    return list(found.values())


def multi_target_expressions(
    scene: Scene, rng: np.random.Generator, count: int
) -> list[tuple[Expression, tuple[int, ...]]]:
    """Returns up to `count` phrases that name two or more objects, with the sorted indices of these."""
    facts = _facts(scene)
    found: dict[str, tuple[Expression, tuple[int, ...]]] = {}
    for _ in range(_TRIES_PER_FAMILY * count):
        if len(found) == count:
            break
        index = int(rng.integers(len(facts.profiles)))
        if rng.random() < 0.5:
            noun = _ambiguous_noun(rng, facts, index)
            if noun is None:
                continue
            form: Form = noun
            counted = {2: ("the two", "both"), 3: ("the three",)}.get(len(_matching(facts, noun)), ())
            starts = ["all", "all the", *counted]
            text = f"{pick(rng, starts)} {noun_text(rng, noun, is_plural=True)}"
        else:
            noun, anchor = _unique_noun(rng, facts, index, 0.2), _sample_anchor(rng, facts, index, 0.2)
            if noun is None or anchor is None:
                continue
            form = Union((noun, anchor[1]))
            text = f"the {noun_text(rng, noun)} and the {noun_text(rng, anchor[1])}"
        indices = resolve(scene, form)
        if indices is not None and len(indices) >= 2:
            found.setdefault(text, (_expression(text, "multi", form), tuple(sorted(indices))))
    return list(found.values())


def no_target_expressions(scene: Scene, rng: np.random.Generator, count: int) -> list[Expression]:
    """Returns up to `count` phrases that name nothing here, each one attribute away from an object of the image."""
    facts = _facts(scene)
    values: dict[str, tuple[str, ...]] = {"kind": KINDS, "colour": COLOURS, "pattern": PATTERNS, "size": SIZES}
    found: dict[str, Expression] = {}
    for _ in range(_TRIES_PER_FAMILY * count):
        if len(found) == count:
            break
        index = int(rng.integers(len(facts.profiles)))
        fields = ["kind", *(name for name in FIELDS[1:] if rng.random() < 0.6)]
        if len(fields) == 1 and rng.random() < 0.8:
            continue
        noun = _noun_of(facts, index, fields)
        name = pick(rng, fields)
        noun = Noun(**{**asdict(noun), name: pick(rng, values[name])})
        if not _matching(facts, noun):
            text = f"{'the ' if rng.random() < 0.3 else ''}{noun_text(rng, noun)}"
            found.setdefault(text, _expression(text, "no_target", noun))
    return list(found.values())
