"""What a run cannot learn is counted before it starts."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal

import numpy as np
import pytest

from deris_llm.config import load_config
from deris_llm.data.lost_referents import LostReferents, lost_referents, warn_of_lost_referents
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.data.store.records import RecordList, RecordView
from deris_llm.models.preprocess import warp_mask
from deris_llm.structures import InstanceAnnotation, ReferringRecord

WIDTH, HEIGHT = 640, 480


def record(number: int, *segmentations: object, image: str = "a") -> ReferringRecord:
    instances = tuple(InstanceAnnotation(100 * number + i, each) for i, each in enumerate(segmentations))
    return ReferringRecord(
        f"mine/train/{number}", "mine", "train", image, f"{image}.jpg", WIDTH, HEIGHT, f"phrase {number}", instances
    )


def box(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def counted(records: list[ReferringRecord], **changes: Any) -> LostReferents:
    return lost_referents(records, **{"num_queries": 2, "image_size": 64, "resize": "antialias"} | changes)


def test_phrases_of_more_objects_than_queries() -> None:
    large = box(100, 100, 90, 90)
    records = [record(1, large), record(2, large, large, large), record(3), record(4, large, large), record(5, *[large] * 5)]
    found = counted(records)
    assert (found.num_phrases, found.num_phrases_of_too_many, found.most_objects) == (5, 2, 5)
    assert found.first_of_too_many == "mine/train/2"
    assert (found.num_vanished, found.num_phrases_of_vanished, found.first_of_vanished) == (0, 0, "")
    assert counted(records, num_queries=5).num_phrases_of_too_many == 0


def test_objects_that_no_sampled_pixel_hits() -> None:
    # 640 x 480 to 64 x 64: of every 10 x 7.5 px the pixel under the centre is taken, columns 5, 15, ..., rows 3, 11, 18, ...
    gone, kept = box(6, 4, 8, 6), box(4, 2, 8, 6)
    counts = decode_segmentation(gone, HEIGHT, WIDTH)
    rle = encode_mask(counts)
    flat = counts.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    uncompressed = {"size": [HEIGHT, WIDTH], "counts": np.diff(np.array([0, *changes.tolist(), flat.size])).tolist()}
    found = counted([record(1, gone), record(2, kept, rle), record(3, uncompressed), record(4, kept)])
    assert (found.num_vanished, found.num_phrases_of_vanished, found.first_of_vanished) == (3, 3, "mine/train/1")
    for size in (640, 1024):
        assert counted([record(1, gone), record(2, box(0, 0, 1, 1))], image_size=size).num_vanished == 0


@pytest.mark.parametrize("resize", ["antialias", "opencv"])
def test_the_short_cut_agrees_with_warping_each_mask(resize: Literal["antialias", "opencv"]) -> None:
    draw = np.random.default_rng(0)
    records = [
        record(i, box(draw.uniform(0, 600), draw.uniform(0, 440), draw.uniform(1, 40), draw.uniform(1, 40))) for i in range(150)
    ]
    masks = [decode_segmentation(each.instances[0].segmentation, HEIGHT, WIDTH) for each in records]
    expected = sum(mask.any() and not warp_mask(mask, 64, resize).any() for mask in masks)
    assert counted(records, resize=resize).num_vanished == expected > 10


def test_an_object_of_several_phrases_counts_once() -> None:
    first = record(1, box(6, 4, 8, 6))
    again = dataclasses.replace(first, phrase_id="mine/train/9")
    found = counted([first, again])
    assert (found.num_vanished, found.num_phrases_of_vanished) == (1, 2)


def test_the_log_names_field_count_and_first_phrase(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config("tiny-refcoco", ["loopback.num_queries=1", "perception.image_size=64"])
    with caplog.at_level(logging.WARNING):
        warn_of_lost_referents([record(1, box(6, 4, 8, 6), box(9, 9, 99, 99)), record(2, box(9, 9, 99, 99))], config)
    assert "1 of 2 training phrases name more objects than loopback.num_queries=1 (up to 2; first mine/train/1)" in caplog.text
    assert "1 objects of 1 training phrases have no pixel at perception.image_size=64 (first mine/train/1)" in caplog.text
    caplog.clear()
    warn_of_lost_referents([record(2, box(9, 9, 99, 99))], config)
    assert caplog.text == ""


def test_iterating_a_view_gives_its_records_by_number() -> None:
    numbers = (range(5), range(10, 13), [20])
    parts = [RecordList([record(i) for i in of_part]) for of_part in numbers]
    for positions in ([0, 2, 4, 5, 8], [8], [], [1, 6, 7], list(range(9))):
        view = RecordView(parts, np.array(positions, dtype=np.int64))
        assert list(view) == [view[i] for i in range(len(view))]
