"""The page's images: answers at random, the worst and the best, by quadrant, by phrase of one image, and views inside the model."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from deris_llm.common.html import bounded_jpeg
from deris_llm.data.images import load_image
from deris_llm.data.masks import decode_segmentation
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.overlays import draw_overlay, pick
from deris_llm.evaluation.truth import merged_truth
from deris_llm.evaluation.views import PhraseView, QueryView
from deris_llm.structures import Exif, ReferringRecord

NUM_CASES = 96
"""Images of cases on a page, over all splits: with the limits of one image they bound the page's size."""

_CASE_WIDTH, _CASE_BYTES = 360, 26_000
_TILE_WIDTH, _TILE_BYTES = 240, 14_000
_MANY_PHRASES = 6

QUADRANTS = (
    ("found", "target, answered", True, True),
    ("missed", "target, but “nothing there”", True, False),
    ("imagined", "no target, but answered", False, True),
    ("rightly nothing", "no target, “nothing there”", False, False),
)
"""Name, description, whether the phrase has a target, whether the answer says so."""


@dataclass(frozen=True)
class Group:
    """Cases of one kind."""

    title: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Picture:
    """An image with masks, encoded for the page."""

    uri: str
    width: int  # px
    height: int  # px
    alt: str


@dataclass(frozen=True)
class Figure:
    """An encoded image with its caption."""

    picture: Picture
    title: str = ""  # before the phrase, or instead of one
    phrase: str = ""
    small: str = ""
    badge: tuple[str, str] | None = None  # text, class of the page's style
    is_chosen: bool = False
    score: float | None = None  # drawn as a meter


def choose_groups(
    answers: Sequence[Answer], protocol: str, *, is_generalised: bool, num_each: int, seed: int
) -> list[Group]:
    """Chooses random cases first (what to expect), then the worst and best, on a generalised split of those found, then by quadrant.

    Args:
        answers: of a split.
        protocol: whose IoU decides.
        is_generalised: whether phrases may have no target.
        num_each: cases of a kind.
        seed: of the random ones.
    """
    by_iou = sorted(answers, key=lambda a: a.iou[protocol])
    judged = [a for a in by_iou if a.has_target and a.says_target] if is_generalised else by_iou
    shuffled = random.Random(seed).sample(by_iou, len(by_iou))
    end = max(num_each, min(8 * num_each, len(judged) // 3))  # how far from the very worst another image is looked for
    rankings: list[tuple[str, Sequence[Answer]]] = [
        ("Random", shuffled),
        ("Worst", judged[:end]),
        ("Best", judged[::-1][:end]),
    ]
    if is_generalised:
        for name, about, has_target, says_target in QUADRANTS[1:]:
            quadrant = [a for a in shuffled if (a.has_target, a.says_target) == (has_target, says_target)]
            rankings.append((f"{name.capitalize()}: {about}", quadrant))
    taken: set[str] = set()
    seen: Counter[str] = Counter()
    groups = []
    for title, ranking in rankings:
        chosen = pick([a for a in ranking if a.phrase_id not in taken], num_each, seen)
        taken |= {a.phrase_id for a in chosen}
        if chosen:
            groups.append(Group(title, chosen))
    return groups


def many_phrases(answers: Sequence[Answer], *, seed: int) -> list[Answer]:
    """Chooses the phrases of one image that has many, with and without target if there are such (the paper's figure 13)."""
    by_image: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_image[answer.image_id].append(answer)
    most = max((min(len(found), _MANY_PHRASES) for found in by_image.values()), default=0)
    if most < 3:
        return []
    full = [found for found in by_image.values() if len(found) >= most]
    mixed = [found for found in full if len({a.has_target for a in found}) == 2] or full
    found = random.Random(seed).choice(mixed)
    without = [a for a in found if not a.has_target][: most // 3]
    chosen = [a for a in found if a.has_target][: most - len(without)] + without
    return sorted(chosen, key=found.index)


def quadrants(answers: Sequence[Answer]) -> list[tuple[str, list[tuple[int, str]]]]:
    """Counts how often the answer says that there is a target: a row for phrases with one, and a row for those without.

    Returns:
        label of the row, and for `answered` and `nothing there` the count and its name with the share of the row.
    """
    counts = Counter((a.has_target, a.says_target) for a in answers)
    rows = []
    for has_target, label in ((True, "phrase with a target"), (False, "phrase without a target")):
        total = counts[has_target, True] + counts[has_target, False]
        cells = []
        for name, _, has, says in sorted(QUADRANTS, key=lambda quadrant: not quadrant[3]):
            if has == has_target:
                share = f"{100 * counts[has, says] / total:.1f} %" if total else "–"
                cells.append((counts[has, says], f"{name}, {share}"))
        rows.append((label, cells))
    return rows


def case(answer: Answer, record: ReferringRecord, protocol: str) -> Figure:
    """Draws one answer with its IoU, phrase, scores and id."""
    return Figure(
        answer_picture(answer, record, width=_CASE_WIDTH, max_bytes=_CASE_BYTES),
        phrase=answer.phrase,
        small=" · ".join([*scores(answer), answer.phrase_id]),
        badge=badge(answer, protocol),
    )


def scores(answer: Answer) -> list[str]:
    """Returns the best score and the presence of an answer as texts, where it has them."""
    said = [f"best score {answer.top_scores[0]:.2f}"] if answer.top_scores else []
    return said + ([f"presence {answer.presence:.2f}"] if answer.presence is not None else [])


def badge(answer: Answer, protocol: str) -> tuple[str, str]:
    """Returns the IoU, or the quadrant where an IoU says nothing, and its style; the meaning never hangs on colour alone."""
    if answer.has_target and answer.says_target:
        iou = answer.iou[protocol]
        return f"IoU {iou:.1f}", "good" if iou >= 70 else "fair" if iou >= 50 else "poor"
    name = next(q[0] for q in QUADRANTS if q[2:] == (answer.has_target, answer.says_target))
    return name, "poor" if answer.has_target != answer.says_target else "good"


def answer_picture(
    answer: Answer, record: ReferringRecord, *, width: int = _TILE_WIDTH, max_bytes: int = _TILE_BYTES
) -> Picture:
    """Draws the image with the answer's mask and the ground truth."""
    mask = decode_segmentation(answer.mask, record.height, record.width)
    alt = f"answer to “{answer.phrase}”"
    return mask_picture(record, mask, alt, with_truth=True, width=width, max_bytes=max_bytes)


def truth_figure(record: ReferringRecord) -> Figure:
    """Draws the ground truth alone."""
    picture = mask_picture(record, None, f"ground truth of “{record.phrase}”", with_truth=True)
    return Figure(picture, "ground truth" if record.instances else "no target")


def mask_picture(
    record: ReferringRecord,
    mask: np.ndarray | None,
    alt: str,
    *,
    with_truth: bool,
    width: int = _TILE_WIDTH,
    max_bytes: int = _TILE_BYTES,
) -> Picture:
    """Draws the image with a mask, bool (h, w), or none, and with the ground truth or not."""
    truth = merged_truth(record) if with_truth else None
    image = _image(record.image_path, record.height, record.width, record.exif)
    uri, encoded = bounded_jpeg(draw_overlay(image, mask, truth, width_px=width), max_bytes)
    return Picture(uri, encoded.width, encoded.height, alt)


@dataclass(frozen=True)
class Inside:
    """A phrase as seen from inside the model."""

    phrase: str
    facts: str
    queries: list[Figure]  # the ground truth, then the best queries of the last round
    winner: int  # number of the best query
    rounds: list[Figure]


def inside(seen: PhraseView, answer: Answer | None, record: ReferringRecord) -> Inside:
    """Draws the best queries of a phrase in the last round, and the first of them in every round."""
    size = (record.height, record.width)
    facts = [seen.split, seen.why, f"presence {seen.presence:.2f}"]
    facts.append("" if record.instances else "names nothing in the image")
    if answer is not None and record.instances and not answer.says_target:
        facts.append("answer: nothing there")
    return Inside(
        record.phrase,
        " · ".join(fact for fact in facts if fact),
        [
            truth_figure(record),
            *(_tile(q, size, record, f"query {q.query}", is_chosen=q.is_selected) for q in seen.queries),
        ],
        seen.queries[0].query,
        [_tile(q, size, record, f"round {n}", is_chosen=False) for n, q in enumerate(seen.rounds)],
    )


def _tile(query: QueryView, size: tuple[int, int], record: ReferringRecord, title: str, *, is_chosen: bool) -> Figure:
    mask = decode_segmentation(query.mask, *size)
    return Figure(
        mask_picture(record, mask, f"mask of {title}", with_truth=False),
        f"{title} · in the answer" if is_chosen else title,
        small=f"score {query.score:.2f}" + ("" if query.iou is None else f" · IoU {query.iou:.1f}"),
        is_chosen=is_chosen,
        score=query.score,
    )


@lru_cache(maxsize=16)
def _image(path: str, height: int, width: int, exif: Exif) -> Image.Image:
    return load_image(path, size_hw=(height, width), exif=exif)
