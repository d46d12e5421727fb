"""The page's pictures: answers at random, the worst and the best, by quadrant, by phrase of one picture, and from the inside."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from xml.etree.ElementTree import Element

import numpy as np
from PIL import Image

from deris_llm.data.images import load_image
from deris_llm.data.masks import decode_segmentation
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.overlays import draw_overlay, pick
from deris_llm.evaluation.page.html import Node, element, phrase, picture
from deris_llm.evaluation.page.stored import Evaluation
from deris_llm.evaluation.truth import merged_truth
from deris_llm.evaluation.views import PhraseView, QueryView
from deris_llm.structures import Exif, ReferringRecord

NUM_CASES = 96
"""Pictures of cases on a page, over all splits: with the limits of one picture they bound the page's size."""

_CASE_WIDTH, _CASE_BYTES = 360, 26_000
_TILE_WIDTH, _TILE_BYTES = 240, 14_000
_MANY_PHRASES = 6

QUADRANTS = (
    ("found", "target, answered", True, True),
    ("missed", "target, but “nothing there”", True, False),
    ("imagined", "no target, but answered", False, True),
    ("rightly nothing", "no target, “nothing there”", False, False),
)
"""Name, what it is, whether the phrase has a target, whether the answer says so: `gres_metrics` has what each counts."""


@dataclass(frozen=True)
class Group:
    """Cases of one kind."""

    title: str
    answers: Sequence[Answer]


def choose_groups(
    answers: Sequence[Answer], protocol: str, *, is_generalised: bool, num_each: int, seed: int
) -> list[Group]:
    """Random cases first (what to expect), then worst and best, on a generalised split of those found; then by quadrant.

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
    end = max(num_each, min(8 * num_each, len(judged) // 3))  # other pictures are looked for so far from the very worst
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
    """Phrases of one picture that has many, with and without target if there are such: the paper's figure 13."""
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


def quadrant_table(answers: Sequence[Answer]) -> Element:
    """How often the answer says that there is a target, by whether there is one."""
    counts = Counter((a.has_target, a.says_target) for a in answers)
    rows = []
    for has_target, label in ((True, "phrase with a target"), (False, "phrase without one")):
        total = counts[has_target, True] + counts[has_target, False]
        cells = []
        for name, _, has, says in QUADRANTS:
            if has == has_target:
                share = f"{100 * counts[has, says] / total:.1f} %" if total else "–"
                count = element("div", str(counts[has, says]), class_="value")
                cells.append((says, element("td", count, element("small", f"{name}, {share}"))))
        cells.sort(key=lambda cell: not cell[0])
        rows.append(element("tr", element("th", label, scope="row"), [cell for _, cell in cells]))
    heads = [element("th", text, scope="col") for text in ("", "answered", "“nothing there”")]
    table = element("table", element("thead", element("tr", heads)), element("tbody", rows), class_="quadrants")
    return element("div", table, class_="scroll")


def cases(
    evaluation: Evaluation, split: str, groups: Sequence[Group], records: Mapping[str, ReferringRecord]
) -> list[Node]:
    """The groups of a split as figures."""
    protocol = evaluation.protocol(split)
    made = []
    for group in groups:
        figures = [case(answer, records[answer.phrase_id], protocol) for answer in group.answers]
        made.append(element("div", element("h4", group.title), element("div", figures, class_="grid")))
    return [element("div", made, class_="groups")]


def case(answer: Answer, record: ReferringRecord, protocol: str) -> Element:
    """One answer: picture, IoU, phrase, what the model was sure of."""
    said = [f"best score {answer.top_scores[0]:.2f}"] if answer.top_scores else []
    said += [f"presence {answer.presence:.2f}"] if answer.presence is not None else []
    return element(
        "figure",
        answer_picture(answer, record, width=_CASE_WIDTH, max_bytes=_CASE_BYTES),
        element(
            "figcaption",
            badge(answer, protocol),
            phrase(answer.phrase),
            element("small", " · ".join([*said, answer.phrase_id])),
        ),
        class_="case",
    )


def badge(answer: Answer, protocol: str) -> Element:
    """IoU, or the quadrant where there is none to speak of; never by colour alone."""
    if answer.has_target and answer.says_target:
        iou = answer.iou[protocol]
        return element(
            "span", f"IoU {iou:.1f}", class_=f"badge {'good' if iou >= 70 else 'fair' if iou >= 50 else 'poor'}"
        )
    name = next(q[0] for q in QUADRANTS if q[2:] == (answer.has_target, answer.says_target))
    return element("span", name, class_=f"badge {'poor' if answer.has_target != answer.says_target else 'good'}")


def answer_picture(
    answer: Answer, record: ReferringRecord, *, width: int = _TILE_WIDTH, max_bytes: int = _TILE_BYTES
) -> Element:
    """The picture with the answer's mask and the truth."""
    mask = decode_segmentation(answer.mask, record.height, record.width)
    alt = f"answer to “{answer.phrase}”"
    return mask_picture(record, mask, alt, with_truth=True, width=width, max_bytes=max_bytes)


def mask_picture(
    record: ReferringRecord,
    mask: np.ndarray | None,
    alt: str,
    *,
    with_truth: bool,
    width: int = _TILE_WIDTH,
    max_bytes: int = _TILE_BYTES,
) -> Element:
    """The picture with a mask, bool (h, w), or none, and the truth or not."""
    truth = merged_truth(record) if with_truth else None
    image = _image(record.image_path, record.height, record.width, record.exif)
    return picture(draw_overlay(image, mask, truth, width_px=width), alt, max_bytes=max_bytes)


def key() -> Element:
    """What the lines on the pictures are."""
    answer, truth = element("i", class_="answer"), element("i", class_="truth")
    return element("p", element("span", answer, "answer"), element("span", truth, "ground truth"), class_="key")


def view(seen: PhraseView, answer: Answer | None, record: ReferringRecord) -> Element:
    """A phrase from the inside: its best queries in the last round, and the first of them in every round."""
    size = (record.height, record.width)
    facts = [
        seen.split,
        seen.why,
        f"presence {seen.presence:.2f}",
        "" if record.instances else "names nothing in the picture",
    ]
    if answer is not None and record.instances and not answer.says_target:
        facts.append("answer: nothing there")
    truth = element(
        "figure",
        mask_picture(record, None, f"ground truth of “{record.phrase}”", with_truth=True),
        element("figcaption", "ground truth" if record.instances else "no target"),
        class_="case",
    )
    queries = [_tile(q, size, record, f"query {q.query}", is_chosen=q.is_selected) for q in seen.queries]
    rounds = [_tile(q, size, record, f"round {n}", is_chosen=False) for n, q in enumerate(seen.rounds)]
    winner = seen.queries[0].query
    return element(
        "article",
        element("h3", phrase(record.phrase)),
        element("p", " · ".join(fact for fact in facts if fact), class_="soft"),
        element("h4", "Best queries of the last round; those in the answer are framed"),
        element("div", truth, queries, class_="strip"),
        element("h4", f"Query {winner} by round"),
        element("div", rounds, class_="strip rounds"),
        class_="view",
    )


def _tile(query: QueryView, size: tuple[int, int], record: ReferringRecord, title: str, *, is_chosen: bool) -> Element:
    mask = decode_segmentation(query.mask, *size)
    said = f"score {query.score:.2f}" + ("" if query.iou is None else f" · IoU {query.iou:.1f}")
    meter = element("div", element("i", style=f"width:{100 * query.score:.1f}%"), class_="meter")
    return element(
        "figure",
        mask_picture(record, mask, f"mask of {title}", with_truth=False),
        element("figcaption", title, " · in the answer" if is_chosen else None, meter, element("small", said)),
        class_="case chosen" if is_chosen else "case",
    )


@lru_cache(maxsize=16)
def _image(path: str, height: int, width: int, exif: Exif) -> Image.Image:
    return load_image(path, size_hw=(height, width), exif=exif)
