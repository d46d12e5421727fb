"""What kind of phrase a text is, and what each of its words does.

A synthetic world has the family of each of its phrases in a file; other phrases, and all words, are told by keywords.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from deris_llm.data.synthetic.vocabulary import (
    COLOURS,
    KIND_WORDS,
    LOCATION_WORDS,
    PATTERN_NOUNS,
    PATTERNS,
    SIZE_WORDS,
    plural,
)
from deris_llm.data.synthetic.world import FAMILIES_FILE
from deris_llm.structures import ReferringRecord

FAMILIES = (
    "no_target",
    "multi",
    "ordinal",
    "behind",
    "relation",
    "comparative",
    "location",
    "description",
    "attribute",
)
ROLES = ("head", "attribute", "relation", "anchor", "other")
_NOUNS = {word for words in KIND_WORDS.values() for word in words} | {"thing", "object", "one", "people"}
_NOUNS |= {plural(word) for word in _NOUNS}
_ATTRIBUTES = {
    *COLOURS,
    *PATTERNS,
    *(word for words in (*SIZE_WORDS.values(), *PATTERN_NOUNS.values()) for word in words),
    *("biggest", "largest", "smallest"),
}
_RELATIONS = LOCATION_WORDS | {"behind", "front", "between", "near", "nearest"}
_RULES = (
    ("ordinal", r"\b(first|second|third|fourth|fifth)\b"),
    ("behind", r"\bbehind\b|\bin front of\b"),
    ("relation", r"\b(left|right) of\b|\b(above|below|over|under|next to|beside|between|near)\b"),
    ("comparative", r"\b(biggest|largest|smallest)\b"),
    ("location", r"\b(" + "|".join(sorted(LOCATION_WORDS)) + r")\b"),
)
_MARKS = re.compile(r"^##|[\u0120\u2581\u010a]")  # of WordPiece, of byte-level BPE and of SentencePiece


def families_of(records: Sequence[ReferringRecord], root: Path) -> tuple[dict[str, str], str]:
    """Returns the family of each phrase, one of `FAMILIES`, by its id, and where the families come from, in words.

    Args:
        records: phrases.
        root: data root; that of a synthetic world has a file with the families.
    """
    path = root / FAMILIES_FILE
    if not path.is_file():
        return {one.phrase_id: family_of(one.phrase, len(one.instances)) for one in records}, "keywords"
    known = json.loads(path.read_text(encoding="utf-8"))
    found = {one.phrase_id: known[one.dataset.split("_")[0]][one.phrase_id.rsplit("/", 1)[1]] for one in records}
    return found, FAMILIES_FILE


def family_of(phrase: str, num_referents: int) -> str:
    """Returns one of `FAMILIES` by keywords: the first that fits, in this order; "description" has none."""
    if num_referents != 1:
        return "multi" if num_referents else "no_target"
    return next((name for name, pattern in _RULES if re.search(pattern, phrase.lower())), "attribute")


def word_roles(phrase: str) -> list[str]:
    """Returns the role of each word of a phrase, one of `ROLES`.

    The nouns before a relation word are heads; what follows the relation word, if it has a noun, is the anchor ("cat behind
    the red mug": head, relation, other, anchor, anchor).
    """
    words = [re.sub(r"\W", "", word) for word in phrase.lower().split()]
    nouns = [i for i, word in enumerate(words) if word in _NOUNS]
    relations = [i for i, word in enumerate(words) if word in _RELATIONS]
    between = [i for i in relations if nouns and nouns[0] < i < nouns[-1]]
    end = between[0] if between else len(words)
    roles = []
    for i, word in enumerate(words):
        if word in _RELATIONS:
            roles.append("relation")
        elif word not in _NOUNS and word not in _ATTRIBUTES:
            roles.append("other")
        else:
            roles.append("anchor" if i > end else "head" if word in _NOUNS else "attribute")
    return roles


def token_roles(phrase: str, tokens: Sequence[str]) -> list[str]:
    """Returns the role of the word that each token belongs to; "" for tokens outside the phrase.

    Args:
        phrase: the text.
        tokens: as a tokenizer names them, with its marks; the phrase's own come in order.
    """
    words, roles = phrase.lower().split(), word_roles(phrase)
    text = "".join(words)
    role_of_character = [role for word, role in zip(words, roles, strict=True) for _ in word]
    found, place = [], 0
    for token in tokens:
        piece = _MARKS.sub("", token).lower()
        is_next = bool(piece) and text.startswith(piece, place)
        found.append(role_of_character[place] if is_next else "")
        place += len(piece) if is_next else 0
    return found
