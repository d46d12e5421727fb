"""Reads Ref-L4's review of RefCOCO's labels: which phrases of the evaluation splits reviewers called wrong.

    refcocos_annotation_reviewed/refcoco_val_reviewed.json, refcoco+_testA_reviewed.json, refcocog_test_reviewed.json, ...
    {"images": [{"id": 0, "original_id": 581857, "caption": "the lady", ...}, ...],
     "annotations": [{"image_id": 0, "original_id": 1719310, "caption_quality": 0, ...}, ...]}

An image is one phrase here: ``original_id`` is COCO's id of the image and of the object, ``caption`` is REFER's text, and
``caption_quality`` 0 means a wrong label. The card of JierunChen/Ref-L4 names ``caption_quality``; the other keys are those that
public code reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import read_json_file

PREFIXES: Mapping[str, str] = {"refcoco": "refcoco", "refcoco+": "refcoco+", "refcocog_umd": "refcocog"}
"""Datasets that were reviewed -> how the names of their files begin."""

PUBLISHED_COUNTS: Mapping[str, tuple[int, int]] = {
    "refcoco": (21_586, 3_054),
    "refcoco+": (21_373, 5_201),
    "refcocog_umd": (14_498, 675),
}
"""Dataset -> phrases of all reviewed splits, and wrong ones, by the card of JierunChen/Ref-L4."""


@dataclass(frozen=True, eq=False)
class Review:
    """The review of one split."""

    file: Path
    verdicts: Mapping[tuple[int, int, str], list[bool]]  # image, object, text -> is right, for each such phrase in order

    def without_wrong(
        self, refs: list[dict[str, Any]], split: str, *, skips_unknown: bool
    ) -> tuple[list[dict[str, Any]], int, int]:
        """Leaves out the phrases whose label is wrong, and refs that have no other.

        Args:
            refs: REFER's, of this split.
            split: ``dataset/split``, for messages.
            skips_unknown: leaves out phrases without a verdict too.

        Returns:
            The refs, the number of wrong phrases, and that of phrases without a verdict.

        Raises:
            DataError: the review is not one of these phrases.
        """
        verdicts = {key: iter(values) for key, values in self.verdicts.items()}
        kept: list[dict[str, Any]] = []
        num_wrong, unknown = 0, []
        for ref in refs:
            right = []
            for sentence in ref["sentences"]:
                verdict = _verdict(verdicts, ref, sentence)
                if verdict is None:
                    unknown.append(f"sent_id {sentence.get('sent_id')} {sentence.get('sent')!r}")
                elif verdict:
                    right.append(sentence)
                else:
                    num_wrong += 1
            kept += [{**ref, "sentences": right}] if right else []
        num_left = sum(1 for values in verdicts.values() for _ in values)
        if (unknown or num_left) and not skips_unknown:
            raise DataError(
                f"{self.file}: expected a review of each phrase of {split}, got none of {len(unknown):,} ({', '.join(unknown[:3])}) and "
                f"{num_left:,} of other phrases. Use the file of this split, and REFER's own refs; or leave out phrases without a "
                "verdict with --skip-bad, which counts them"
            )
        return kept, num_wrong, len(unknown)


def _verdict(
    verdicts: Mapping[tuple[int, int, str], Iterator[bool]], ref: Mapping[str, Any], sentence: Mapping[str, Any]
) -> bool | None:
    """The next verdict on a phrase of this text, cleaned or as typed; None if there is none."""
    if not isinstance(ref["ann_id"], int):
        return None
    for text in (sentence.get("sent"), sentence.get("raw")):
        found = next(verdicts.get((ref["image_id"], ref["ann_id"], _plain(text)), iter(())), None)
        if found is not None:
            return found
    return None


def read_reviews(folder: Path, dataset: str) -> dict[str, Review]:
    """Reads the reviews of a dataset's splits that lie in a folder.

    Raises:
        DataError: another dataset, no file of it, or a file of another form.
    """
    if dataset not in PREFIXES:
        raise DataError(f"--mapping reviewed={folder}: expected one of {', '.join(PREFIXES)}, got {dataset}, which was not reviewed")
    prefix, suffix = f"{PREFIXES[dataset]}_", "_reviewed.json"
    files = sorted(folder.glob(f"{prefix}*{suffix}"))
    if not files:
        raise DataError(
            f"--mapping reviewed={folder}: expected a folder with {prefix}SPLIT{suffix}, got none there. Download "
            "refcocos_annotation_reviewed of JierunChen/Ref-L4 from Hugging Face"
        )
    return {path.name.removeprefix(prefix).removesuffix(suffix): Review(path, _verdicts(path)) for path in files}


def _verdicts(path: Path) -> dict[tuple[int, int, str], list[bool]]:
    tree = read_json_file(path)
    found: defaultdict[tuple[int, int, str], list[bool]] = defaultdict(list)
    try:
        phrases = {image["id"]: image for image in tree["images"]}
        for annotation in tree["annotations"]:
            image = phrases[annotation["image_id"]]
            quality = annotation["caption_quality"]
            if quality not in (0, 1):
                raise DataError(f"{path}: expected caption_quality to be 0 or 1, got {quality!r}. Use the published file")
            found[image["original_id"], annotation["original_id"], _plain(image["caption"])].append(quality == 1)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected images with id, original_id, caption and annotations with image_id, original_id, caption_quality, got "
            f"{describe(tree)} ({type(error).__name__}: {error}). Use the published file"
        ) from error
    return dict(found)


def _plain(text: object) -> str:
    return " ".join(text.lower().split()) if isinstance(text, str) else ""
