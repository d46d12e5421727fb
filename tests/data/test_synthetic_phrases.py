"""Phrases: unambiguous by their form, and by an independent reading of their words."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from deris_llm.data.synthetic.phrases import (
    Expression,
    Extreme,
    Noun,
    Ordinal,
    Place,
    Relation,
    Style,
    expressions_for,
    multi_target_expressions,
    no_target_expressions,
    resolve,
)
from deris_llm.data.synthetic.scene import Scene, SceneObject, sample_scene
from deris_llm.data.synthetic.vocabulary import COLOURS, KIND_WORDS, LOCATION_WORDS

STYLES: tuple[Style, ...] = ("refcoco", "refcoco+", "refcocog")
KIND_OF_WORD = {word: kind for kind, words in KIND_WORDS.items() for word in words}
PATTERN_OF_WORD = {"plain": "plain", "striped": "striped", "dotted": "dotted"} | {
    "stripes": "striped",
    "dots": "dotted",
    "spots": "dotted",
}
SIZE_OF_WORD = {"small": "small", "little": "small", "large": "large", "big": "large"}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(np.random.default_rng([6, k])) for k in range(40)]


@pytest.fixture(scope="module")
def said(scenes: list[Scene]) -> dict[str, list[tuple[Scene, int, Expression]]]:
    rng = np.random.default_rng(0)
    return {
        style: [
            (scene, index, expression)
            for scene in scenes
            for index in range(len(scene.objects))
            for expression in expressions_for(scene, index, rng, style=style, count=3)
        ]
        for style in STYLES
    }


def read_noun(scene: Scene, text: str) -> set[int]:
    """Reads attributes word by word and returns the objects that have them all."""
    text = text.replace("no stripes or dots", "plain")
    found = set(range(len(scene.objects)))
    for word in text.split():
        if word in KIND_OF_WORD:
            found &= {k for k, item in enumerate(scene.objects) if item.kind == KIND_OF_WORD[word]}
        elif word in COLOURS:
            found &= {k for k, item in enumerate(scene.objects) if item.colour == word}
        elif word in PATTERN_OF_WORD:
            found &= {k for k, item in enumerate(scene.objects) if item.pattern == PATTERN_OF_WORD[word]}
        elif word in SIZE_OF_WORD:
            found &= {k for k, item in enumerate(scene.objects) if item.size == SIZE_OF_WORD[word]}
    return found


@pytest.mark.parametrize("style", STYLES)
def test_every_phrase_names_exactly_its_object(
    said: dict[str, list[tuple[Scene, int, Expression]]], style: Style
) -> None:
    assert len(said[style]) > 300
    for scene, index, expression in said[style]:
        assert resolve(scene, expression.form) == {index}
        assert expression.text == expression.text.lower()
        assert expression.uses_location == bool(LOCATION_WORDS & set(expression.text.split()))


def test_attribute_phrases_read_word_by_word(said: dict[str, list[tuple[Scene, int, Expression]]]) -> None:
    checked = 0
    for style in STYLES:
        for scene, index, expression in said[style]:
            if expression.family in ("attribute", "description"):
                assert read_noun(scene, expression.text) == {index}, expression.text
                checked += 1
    assert checked > 300


def test_relation_phrases_read_word_by_word(said: dict[str, list[tuple[Scene, int, Expression]]]) -> None:
    """Every other candidate of the noun fails the relation, told from the masks' boxes and from the pixels."""

    def centre(item: SceneObject) -> tuple[float, float]:
        x0, y0, x1, y1 = item.box_xyxy
        return (x0 + x1) / 2, (y0 + y1) / 2

    clear_px = 4.5  # a smaller shift is nothing to a human, and never decides
    tests = {
        "left of": lambda a, b: centre(a)[0] < centre(b)[0] - clear_px,
        "right of": lambda a, b: centre(a)[0] > centre(b)[0] + clear_px,
        "above": lambda a, b: centre(a)[1] < centre(b)[1] - clear_px,
        "over": lambda a, b: centre(a)[1] < centre(b)[1] - clear_px,
        "below": lambda a, b: centre(a)[1] > centre(b)[1] + clear_px,
        "under": lambda a, b: centre(a)[1] > centre(b)[1] + clear_px,
        "in front of": lambda a, b: bool((a.full_mask & b.full_mask & a.mask).any()),
        "behind": lambda a, b: bool((a.full_mask & b.full_mask & b.mask).any()),
    }
    seen: Counter[str] = Counter()
    for style in STYLES:
        for scene, index, expression in said[style]:
            for words, holds in tests.items():
                if expression.family in ("relation", "behind") and f" {words} the " in expression.text:
                    noun, anchor = expression.text.split(f" {words} the ")
                    (other,) = read_noun(scene, anchor)
                    candidates = read_noun(scene, noun) - {other}
                    reading = {k for k in candidates if holds(scene.objects[k], scene.objects[other])}
                    assert reading == {index}, expression.text
                    seen[words] += 1
    assert set(seen) == set(tests)


def test_ordinal_phrases_read_word_by_word(said: dict[str, list[tuple[Scene, int, Expression]]]) -> None:
    checked = 0
    for scene, index, expression in said["refcoco"]:
        if expression.family == "ordinal" and expression.text.endswith(("from the left", "from the right")):
            words = expression.text.split()
            n = next(k for k, word in enumerate(("first", "second", "third")) if word in words)
            candidates = read_noun(scene, expression.text)
            ranked = sorted(
                candidates, key=lambda k: sum(scene.objects[k].box_xyxy[0::2]), reverse=words[-1] == "right"
            )
            assert ranked[n] == index
            checked += 1
    assert checked > 10


def test_refcoco_plus_has_no_location_words(said: dict[str, list[tuple[Scene, int, Expression]]]) -> None:
    assert not any(expression.uses_location for _, _, expression in said["refcoco+"])
    assert any(expression.uses_location for _, _, expression in said["refcoco"])


def test_styles_have_their_families_and_lengths(said: dict[str, list[tuple[Scene, int, Expression]]]) -> None:
    families = {style: Counter(expression.family for _, _, expression in said[style]) for style in STYLES}
    assert set(families["refcoco"]) == {"attribute", "location", "ordinal", "relation", "behind"}
    assert set(families["refcoco+"]) == {"attribute", "comparative", "behind"}
    assert set(families["refcocog"]) == {"relation", "location", "description"}
    assert families["refcoco"]["attribute"] < 0.6 * families["refcoco"].total()
    lengths = [len(expression.text.split()) for _, _, expression in said["refcocog"]]
    assert min(lengths) >= 8
    assert max(lengths) <= 17


def test_vocabulary_is_small(said: dict[str, list[tuple[Scene, int, Expression]]]) -> None:
    words = {word for style in STYLES for _, _, expression in said[style] for word in expression.text.split()}
    assert 60 < len(words) <= 120


def test_phrases_depend_on_the_generator_only(scenes: list[Scene]) -> None:
    first, again, other = (
        [e.text for e in expressions_for(scenes[0], 0, np.random.default_rng(seed), style="refcocog", count=4)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_multi_target_and_no_target(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    num_multi = num_none = 0
    for scene in scenes:
        for expression, indices in multi_target_expressions(scene, rng, 3):
            assert len(indices) >= 2
            assert resolve(scene, expression.form) == set(indices)
            num_multi += 1
        for expression in no_target_expressions(scene, rng, 3):
            assert resolve(scene, expression.form) == frozenset()
            assert read_noun(scene, expression.text) == set(), expression.text
            num_none += 1
    assert num_multi >= 2 * len(scenes)
    assert num_none >= 2 * len(scenes)


def box_object(kind: str, x0: int, y0: int, side: int, depth: int, size: str = "small") -> SceneObject:
    mask = np.zeros((100, 200), dtype=bool)
    mask[y0 : y0 + side, x0 : x0 + side] = True
    return SceneObject(kind, "red", "plain", size, (x0 + side / 2, y0 + side / 2), depth, mask, mask)


def test_resolve_on_a_scene_made_by_hand() -> None:
    """Cats at x = 20, 100, 180 (the last one low), a fish at (60, 50), another fish a little larger at (140, 50)."""
    scene = Scene(
        np.zeros((100, 200, 3), dtype=np.uint8),
        (
            box_object("cat", 10, 40, 20, 0),
            box_object("cat", 90, 40, 20, 1),
            box_object("cat", 170, 75, 20, 2),
            box_object("fish", 50, 40, 20, 3),
            box_object("fish", 130, 40, 22, 4),
            box_object("star", 102, 44, 20, 5, "large"),  # in front of the second cat
        ),
    )
    cat, fish, star = Noun(kind="cat"), Noun(kind="fish"), Noun(kind="star")
    assert resolve(scene, cat) == {0, 1, 2}
    assert resolve(scene, Place(cat, "leftmost")) == {0}
    assert resolve(scene, Place(cat, "topmost")) is None  # two at the same height
    assert resolve(scene, Place(cat, "bottommost")) == {2}
    assert resolve(scene, Place(cat, "middle")) == {1}
    assert resolve(scene, Place(cat, "bottom right")) == {2}
    assert resolve(scene, Ordinal(cat, 2, "right")) == {1}
    assert resolve(scene, Ordinal(fish, 3, "left")) is None
    assert resolve(scene, Ordinal(cat, 1, "top")) is None
    assert resolve(scene, Extreme(fish, "biggest")) is None  # 22 px against 20 px
    assert resolve(scene, Relation(cat, "behind", star)) == {1}
    assert resolve(scene, Relation(star, "front", cat)) is None  # three cats: no anchor
    assert resolve(scene, Relation(star, "behind", Noun("fish", "blue"))) is None
    assert resolve(scene, Relation(fish, "left", star)) == {3}
    assert resolve(scene, Relation(fish, "below", star)) == frozenset()
    assert resolve(scene, Relation(fish, "above", star)) is None  # a little above, but far aside
    assert resolve(scene, Relation(cat, "next", star)) == {1}
    assert resolve(scene, Relation(fish, "next", star)) == {4}  # 29 px away, the other one 52 px
    assert resolve(scene, Relation(cat, "next", Noun("fish", size="small"))) is None  # two small fish
