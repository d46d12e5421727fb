"""What readers of records with named fields (JSONL, Hugging Face) share: which phrase of a record means which of its masks.

    --mapping pairs=text:mask                            {"text": [t1, t2], "mask": [m1, m2]}: t1 means m1, t2 means m2
    --mapping pairs=samples.sentences:samples.mask       {"samples": [{"sentences": [s1, s2], "mask": m1}, ...]}
    --mapping pairs=all                                  every phrase means all masks of its record

Without it a record of several phrases and several masks is refused: both readings are common, and the wrong one gives phrases
the masks of other objects. A mask of a pair is an RLE, the name or bytes of an image, polygons of one object, or a list of
these for several objects.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import SourceEntry, SourceFault, PrepareOptions, SourcePhrase, SourceReader

_OF_ONE_OBJECT = ("polygons", "segmentation")  # names under which a list of polygons is, by convention, one object's
_OWN_FIELDS = ("raw", "category", "id", "no_target")  # may be given per pair


class RowReader(SourceReader):
    """A reader of records whose fields `--mapping` names.

    Raises:
        DataError: as `SourceReader`, and a mapping ``pairs`` of another form.
    """

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        self._pairs = self.mapping.pop("pairs")
        first, _, second = self._pairs.partition(":")
        if self._pairs not in ("", "all") and not (first and second):
            raise DataError(
                f"--mapping pairs={self._pairs}: expected PHRASES:MASKS or all, got neither. Name the two lists, e.g. pairs=text:mask"
            )
        self.pair_paths = (first, second) if second else ()

    @abstractmethod
    def entry(self, row: Mapping[str, Any], found: Mapping[str, Any], split: Any, where: str) -> SourceEntry | SourceFault:
        """The entry of a record, or of one pair of it, whose mapped fields are ``found``."""

    def entries_of_row(
        self, row: Mapping[str, Any], found: Mapping[str, Any], split: Any, where: str, number: int
    ) -> Iterator[SourceEntry | SourceFault]:
        """Yields the one entry of a record, or one entry per pair.

        Args:
            row: the record as the source has it.
            found: its mapped fields.
            split: of the record.
            where: the record, for messages.
            number: of the record, for the ids of its pairs if it gives an id per pair.
        """
        if not self.pair_paths:
            yield self.entry(row, found, split, where)
            return
        try:
            pairs = self._divided(row, found, number if isinstance(found["id"], list) else found["id"])
        except ValueError as error:
            yield SourceFault(where, split, "structure", str(error))
            return
        for number_of_pair, fields in enumerate(pairs):
            yield self.entry(row, {**found, **fields}, split, f"{where} pair {number_of_pair}")

    def _divided(self, row: Mapping[str, Any], found: Mapping[str, Any], first_id: object) -> list[dict[str, Any]]:
        """For each pair its `phrases` and `masks` (lists), its `id`, and the fields that the record gives per pair.

        Raises:
            ValueError: the record cannot be divided.
        """
        texts, masks = (member(row, path) for path in self.pair_paths)
        for path, value in zip(self.pair_paths, (texts, masks), strict=True):
            if not isinstance(value, list) or not value:
                raise ValueError(f"expected a list in `{path}`, as --mapping pairs says, got {describe(value)}")
        if len(texts) != len(masks):
            raise ValueError(
                f"expected as many phrases as masks, as --mapping pairs={self._pairs} says, got {len(texts)} and {len(masks)}"
            )
        lists = {name: found[name] for name in _OWN_FIELDS if isinstance(found.get(name), list)}
        if wrong := [f"`{name}` has {len(values)}" for name, values in lists.items() if len(values) != len(texts)]:
            raise ValueError(f"expected a value for each of {len(texts)} pairs, got others: {', '.join(wrong)}")
        pairs: list[dict[str, Any]] = []
        for number, (text, mask) in enumerate(zip(texts, masks, strict=True)):
            own = {name: values[number] for name, values in lists.items()}
            phrases, objects = text if isinstance(text, list) else [text], _masks_of_object(mask)
            if len(phrases) > 1 and len(objects) > 1:
                raise ValueError(
                    f"expected one phrase or one mask in each pair, got {len(phrases)} and {len(objects)} in pair {number}: it is "
                    "unclear which of them belong together; write a record for each"
                )
            if isinstance(own.get("raw"), str):
                own["raw"] = [own["raw"]]
            pairs.append({"id": f"{first_id}-{number}", **own, "phrases": phrases, "masks": objects})
        return pairs

    def fault_of_masks(self, texts: Sequence[Any], masks: Sequence[Any], phrases_field: str, masks_field: str) -> str | None:
        """Says why phrases of a record cannot all mean all of its masks; None if they can.

        Args:
            texts: of the record.
            masks: of the record.
            phrases_field: ours to which the texts are mapped.
            masks_field: ours to which the masks are mapped.
        """
        phrases, path = self.mapping[phrases_field], self.mapping[masks_field]
        is_list = masks_field != "masks" and len(masks) == 1 and isinstance(masks[0], list)
        may_be_parallel = is_list and len(masks[0]) == len(texts) and path.rpartition(".")[2] not in _OF_ONE_OBJECT
        number = len(masks[0]) if may_be_parallel else len(masks)
        declare = f"--mapping pairs={phrases}:{path}"
        if any(isinstance(text, list) for text in texts):
            return f"expected texts in `{phrases}`, got lists of texts: if each belongs to one mask, give {declare}"
        if self._pairs == "all" or len(texts) < 2 or number < 2:
            return None
        return (
            f"expected a statement which of {len(texts)} phrases means which of {number} masks, got two lists: if the first phrase "
            f"means the first mask, give {declare}; if every phrase means all masks, give --mapping pairs=all"
        )


def phrases_of(first_id: Any, texts: Sequence[Any], raws: Sequence[Any] | None) -> tuple[SourcePhrase, ...]:
    """The phrases of an entry; several get the ids ``ID-0``, ``ID-1``, ..."""
    return tuple(
        SourcePhrase(first_id if len(texts) == 1 else f"{first_id}-{k}", text, raws[k] if raws else None)
        for k, text in enumerate(texts)
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
    """The masks of one pair: several only if the list cannot be polygons of one object."""
    if mask is None:
        return []
    if not isinstance(mask, list) or not mask:
        return [mask]
    if isinstance(mask[0], (int, float)):
        return [[mask]]  # one polygon
    is_one_object = isinstance(mask[0], list) and not (mask[0] and isinstance(mask[0][0], list))
    return [mask] if is_one_object else mask
