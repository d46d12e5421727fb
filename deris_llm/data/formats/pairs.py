"""Which phrase of a record means which of its masks, where the record holds several of both.

    --mapping pairs=text:mask                            {"text": [t1, t2], "mask": [m1, m2]}: t1 means m1, t2 means m2
    --mapping pairs=samples.sentences:samples.mask       {"samples": [{"sentences": [s1, s2], "mask": m1}, ...]}
    --mapping pairs=all                                  every phrase means all masks of its record

Without it such a record is refused: both readings are common, and the wrong one gives phrases other objects' masks. A mask
of a pair is an RLE, the name or bytes of an image, polygons of one object, or a list of these for several objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deris_llm.data.errors import DataError, describe

_OF_ONE_OBJECT = ("polygons", "segmentation")  # names under which a list of polygons is, by convention, one object's
_OWN_FIELDS = ("raw", "category", "id", "no_target")  # may be given for each pair


@dataclass(frozen=True)
class Pairing:
    """What `--mapping pairs=...` says."""

    phrases: str = ""  # path of the list of phrases, or of lists of phrases; "" if there are no pairs
    masks: str = ""
    is_all: bool = False  # every phrase means all masks

    @classmethod
    def of(cls, declared: str) -> Pairing:
        """Parses the declaration, "" if there is none.

        Raises:
            DataError: it is of another form.
        """
        phrases, _, masks = declared.partition(":")
        if declared and declared != "all" and not (phrases and masks):
            raise DataError(
                f"--mapping pairs={declared}: expected PHRASES:MASKS or all, got neither. Name the two lists, e.g. pairs=text:mask"
            )
        return cls(is_all=True) if declared == "all" else cls(phrases, masks)

    def fields_by_pair(
        self, row: Mapping[str, Any], found: Mapping[str, Any], first_id: object
    ) -> list[dict[str, Any]] | str:
        """Divides a record.

        Args:
            row: the record as the source has it.
            found: its mapped fields.
            first_id: of the record.

        Returns:
            For each pair its `phrases` and `masks` (lists), its `id`, and the fields that the record gives for each pair;
            or what is wrong with the record.
        """
        texts, masks = member(row, self.phrases), member(row, self.masks)
        for path, value in ((self.phrases, texts), (self.masks, masks)):
            if not isinstance(value, list) or not value:
                return f"expected a list in `{path}`, as --mapping pairs says, got {describe(value)}"
        if len(texts) != len(masks):
            return (
                f"expected as many phrases as masks, as --mapping pairs={self.phrases}:{self.masks} says, got {len(texts)} and "
                f"{len(masks)}"
            )
        lists = {name: found[name] for name in _OWN_FIELDS if isinstance(found.get(name), list)}
        if wrong := [f"`{name}` has {len(values)}" for name, values in lists.items() if len(values) != len(texts)]:
            return f"expected a value for each of {len(texts)} pairs, got others: {', '.join(wrong)}"
        pairs: list[dict[str, Any]] = []
        for number, (text, mask) in enumerate(zip(texts, masks, strict=True)):
            own = {name: values[number] for name, values in lists.items()}
            phrases, objects = text if isinstance(text, list) else [text], _masks_of_object(mask)
            if len(phrases) > 1 and len(objects) > 1:
                return (
                    f"expected one phrase or one mask in each pair, got {len(phrases)} and {len(objects)} in pair {number}: which of "
                    "them belong together is not clear; write a record for each"
                )
            if isinstance(own.get("raw"), str):
                own["raw"] = [own["raw"]]
            pairs.append({"id": f"{first_id}-{number}", **own, "phrases": phrases, "masks": objects})
        return pairs

    def fault(self, texts: Sequence[Any], masks: Sequence[Any], *, phrases: str, field: str, path: str) -> str | None:
        """What keeps a record from being read as phrases that all mean all of the masks, or None.

        Args:
            texts: of the record.
            masks: of the record.
            phrases: path of the texts in the source.
            field: ours that the masks are mapped to.
            path: of the masks in the source.
        """
        is_list = field != "masks" and len(masks) == 1 and isinstance(masks[0], list)
        may_be_parallel = is_list and len(masks[0]) == len(texts) and path.rpartition(".")[2] not in _OF_ONE_OBJECT
        number = len(masks[0]) if may_be_parallel else len(masks)
        declare = f"--mapping pairs={phrases}:{path}"
        if any(isinstance(text, list) for text in texts):
            return f"expected texts in `{phrases}`, got lists of texts: if each belongs to one mask, give {declare}"
        if self.is_all or len(texts) < 2 or number < 2:
            return None
        return (
            f"expected to be told which of {len(texts)} phrases means which of {number} masks, got two lists: if the first phrase "
            f"means the first mask, give {declare}; if every phrase means all masks, give --mapping pairs=all"
        )


def member(row: Any, path: str) -> Any:
    """The member ``a.b`` of a record, of a list that of each; None if there is none."""
    for name in path.split("."):
        if isinstance(row, list):
            row = [each.get(name) if isinstance(each, dict) else None for each in row]
        else:
            row = row.get(name) if isinstance(row, dict) else None
    return row


def _masks_of_object(mask: Any) -> list[Any]:
    """The masks of one pair: several only where a list cannot be polygons of one object."""
    if mask is None:
        return []
    if not isinstance(mask, list) or not mask:
        return [mask]
    if isinstance(mask[0], (int, float)):
        return [[mask]]  # one polygon
    is_one_object = isinstance(mask[0], list) and not (mask[0] and isinstance(mask[0][0], list))
    return [mask] if is_one_object else mask
