"""Non-referent sample conversion: its filters, its purity, and that workers and ranks change nothing."""

import copy
import dataclasses
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deris_llm.config import RunConfig
from deris_llm.data.loaders import GroupDataset
from deris_llm.data.dataset import GroupSelection, ImageGroups, group_by_image
from deris_llm.data.loaders import train_loader
from deris_llm.data.phrase_conversion import CONVERTED_SUFFIX, PhraseConversion, phrase_similarity
from deris_llm.data.sources import read_split
from deris_llm.structures import InstanceAnnotation, ReferringRecord

_COLOURS = ("red", "blue", "green", "yellow", "dark grey")
_THINGS = ("bus", "woman", "laptop", "pizza slice", "elephant", "chair", "kite")
_PLACES = ("on the left", "near the window", "behind the fence", "", "in the middle of the road")


def _records(num_images: int = 40, phrases: int = 5, *, seed: int = 0) -> list[ReferringRecord]:
    """Phrases of 1 to 8 words, many of them alike, every sixth without a target."""
    random = np.random.default_rng(seed)
    records = []
    for image in range(num_images):
        for k in range(phrases):
            parts = [random.choice(_COLOURS) if k % 2 else "", random.choice(_THINGS), random.choice(_PLACES)]
            number = image * phrases + k
            instances = () if number % 6 == 0 else (InstanceAnnotation(number, [[1, 1, 5, 1, 5, 5]]),)
            text = " ".join(" ".join(parts).split())
            records.append(
                ReferringRecord(
                    phrase_id=f"grefcoco/train/{number}",
                    dataset="grefcoco",
                    split="train",
                    image_id=f"image{image}",
                    image_path=f"image{image}.jpg",
                    width=10,
                    height=10,
                    phrase=text,
                    instances=instances,
                )
            )
    return records


def _conversion(records: list[ReferringRecord], **changes: Any) -> PhraseConversion:
    settings: dict[str, Any] = {
        "rate": 1.0, "similarity_threshold": 0.6, "min_words": 2, "mode": "words", "seed": 7,
    }  # fmt: skip
    return PhraseConversion(group_by_image(records), **{**settings, **changes})


@pytest.mark.parametrize(
    ("one", "other", "similarity"),
    [
        ("the red bus", "the red bus", 1),
        ("The Red bus", "the  red BUS ", 1),  # case and blanks do not count
        ("red bus", "red car", (1 / 3 + 1 / 2) / 2),
        ("red red bus", "red bus", (1 + 3 / np.sqrt(5 * 2)) / 2),  # sets for Jaccard, counts for the cosine
        ("dog", "god", 0),  # an anagram is another word
        ("", "bus", 0),
        ("", " ", 1),
    ],
)
def test_similarity_over_words(one: str, other: str, similarity: float) -> None:
    assert phrase_similarity(one, other, mode="words") == pytest.approx(similarity)
    assert phrase_similarity(other, one, mode="words") == pytest.approx(similarity)


def test_similarity_over_characters_is_another_thing() -> None:
    """Its values are compared with the public code's in tests/scripts/test_parity_functions.py."""
    assert phrase_similarity("dog", "god", mode="characters") == 1
    assert phrase_similarity("Dog", "dog", mode="characters") < 1


@pytest.mark.parametrize("mode", ["words", "characters"])
def test_what_is_taken_passes_every_filter(mode: str) -> None:
    """1,000 draws: never of the same picture, nor a text that the picture has too; long enough; not alike."""
    records = _records()
    own = {(record.image_id, record.phrase) for record in records}
    texts = {record.phrase for record in records}
    conversion = _conversion(records, mode=mode)
    targets = [record for record in records if not record.is_no_target]
    taken = 0
    for epoch in range(1 + 1000 // len(targets)):
        for record in targets:
            found = conversion.convert(record, epoch)
            assert found.outcome in ("converted", "gave_up")
            assert found.tries == found.same_image + found.too_short + found.too_similar + (
                found.outcome == "converted"
            )
            if found.outcome == "gave_up":
                assert found.record is record
                continue
            taken += 1
            new = found.record
            assert new.phrase in texts
            assert (record.image_id, new.phrase) not in own
            assert len(new.phrase.split()) > 2
            assert phrase_similarity(new.phrase, record.phrase, mode=mode) < 0.6
            assert new.is_no_target
            assert new.phrase_id == f"{record.phrase_id}{CONVERTED_SUFFIX}"
            assert (new.image_id, new.image_path, new.width) == (record.image_id, record.image_path, record.width)
    assert taken >= 990


def test_phrases_without_a_target_stay() -> None:
    records = _records()
    conversion = _conversion(records)
    for record in records:
        if record.is_no_target:
            assert conversion.convert(record, 0).record is record


def test_nothing_is_mutated() -> None:
    records = _records()
    before = copy.deepcopy(records)
    conversion = _conversion(records)
    for epoch in range(2):
        for record in records:
            conversion.convert(record, epoch)
    assert records == before


def test_a_draw_depends_on_seed_epoch_and_phrase_alone() -> None:
    records = _records()
    conversion = _conversion(records, rate=0.3)
    forwards = [conversion.convert(record, 3).record.phrase for record in records]
    assert [pickle.loads(pickle.dumps(conversion)).convert(r, 3).record.phrase for r in reversed(records)] == forwards[
        ::-1
    ]
    assert forwards == [_conversion(records, rate=0.3).convert(record, 3).record.phrase for record in records]
    assert forwards != [conversion.convert(record, 4).record.phrase for record in records]
    assert forwards != [_conversion(records, rate=0.3, seed=8).convert(record, 3).record.phrase for record in records]


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_rate(rate: float) -> None:
    """Over 20,000 draws the share is within four deviations of a fair coin's."""
    records = [record for record in _records(100) if not record.is_no_target]
    conversion = _conversion(records, rate=rate)
    draws = [conversion.convert(r, epoch).outcome != "kept" for epoch in range(20_000 // len(records)) for r in records]
    assert abs(np.mean(draws) - rate) < 4 * np.sqrt(rate * (1 - rate) / len(draws))


def test_it_gives_up_and_leaves_the_phrase() -> None:
    records = _records(2, 2)
    found = _conversion(records, min_words=30).convert(records[1], 0)
    assert (found.outcome, found.record, found.tries) == ("gave_up", records[1], 51)
    assert found.too_short + found.same_image == 51


def test_one_picture_is_not_enough() -> None:
    with pytest.raises(ValueError, match="expected phrases of at least two images to draw from, got 1"):
        _conversion(_records(1))


def test_statistics_are_sums_of_the_draws() -> None:
    records = _records()
    conversion = _conversion(records, rate=0.4)
    statistics = conversion.statistics(records, 2)
    found = [conversion.convert(record, 2) for record in records]
    assert statistics.num_phrases == 200
    assert statistics.num_no_target == sum(record.is_no_target for record in records)
    assert statistics.converted == sum(each.outcome == "converted" for each in found)
    assert statistics.too_similar == sum(each.too_similar for each in found) > 0
    assert statistics.tries == sum(each.tries for each in found)
    assert f"{statistics.converted} of {200 - statistics.num_no_target} phrases with a target are replaced" in str(
        statistics
    )


def test_the_dataset_converts_by_the_epoch_of_the_selection() -> None:
    groups = group_by_image(_records())
    conversion = _conversion([record for group in groups for record in group.records], rate=0.5)
    dataset = GroupDataset(groups, conversion)
    for epoch in (0, 1):
        got = dataset[GroupSelection(3, (0, 1, 4), epoch)].records
        assert got == tuple(conversion.convert(groups[3].records[i], epoch).record for i in (0, 1, 4))
    assert GroupDataset(groups)[GroupSelection(3, (0, 1, 4), 1)].records == tuple(
        groups[3].records[i] for i in (0, 1, 4)
    )


def _groups(root: Path) -> ImageGroups:
    """Of conftest's pictures, which all have the same phrases: told apart by their number."""
    records = read_split(root, "refcoco/train")
    return group_by_image([dataclasses.replace(r, phrase=f"{r.phrase} in {r.image_id}") for r in records])


def _config(root: Path, rate: float, num_workers: int = 0) -> RunConfig:
    config = RunConfig()
    conversion = dataclasses.replace(config.data.conversion, rate=rate, min_words=1, threshold=0.95)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, root=str(root), num_workers=num_workers, phrases_per_image=3, conversion=conversion
        ),
        perception=dataclasses.replace(config.perception, image_size=32),
        training=dataclasses.replace(config.training, images_per_device=2),
    )


def test_the_training_loader_converts(refer_root: Path, processor: Any, caplog: pytest.LogCaptureFixture) -> None:
    groups = _groups(refer_root)
    with caplog.at_level(logging.INFO):
        loader = train_loader(_config(refer_root, 0.5), groups, processor)
    assert "non-referent conversion: " in caplog.text
    batches = list(loader)
    converted = [p for b in batches for p in b.phrase_ids if p.endswith(CONVERTED_SUFFIX)]
    assert 0 < len(converted) < sum(b.num_phrases for b in batches)
    for batch in batches:
        assert batch.targets is not None
        with_target = set(batch.targets.phrase_index.tolist())
        for i, phrase_id in enumerate(batch.phrase_ids):
            assert (i in with_target) != phrase_id.endswith(CONVERTED_SUFFIX)
    assert converted != [p for b in _second_epoch(loader) for p in b.phrase_ids if p.endswith(CONVERTED_SUFFIX)]


def _second_epoch(loader: Any) -> list[Any]:
    loader.set_epoch(1)
    return list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_ranks_change_nothing(refer_root: Path, processor: Any, num_workers: int) -> None:
    """Two ranks of one image see together what one rank of two sees, converted alike."""
    groups = _groups(refer_root)
    reference = train_loader(_config(refer_root, 0.5), groups, processor)
    half = _config(refer_root, 0.5, num_workers)
    half = dataclasses.replace(half, training=dataclasses.replace(half.training, images_per_device=1))
    ranks = [train_loader(half, groups, processor, rank=rank, world_size=2) for rank in (0, 1)]
    for epoch in (0, 1):
        for loader in (reference, *ranks):
            loader.set_epoch(epoch)
        for whole, *parts in zip(reference, *ranks, strict=True):
            assert whole.phrase_ids == sum((part.phrase_ids for part in parts), ())
            assert whole.phrases == sum((part.phrases for part in parts), ())
