"""Queries chosen for a whole video, on drawn cases: a score that flickers, objects that cross, an object that leaves."""

import numpy as np
import pytest
import torch

from deris_llm.models.postprocess import FrameChoice, select_queries
from deris_llm.models.video_slots import (
    FrameQueries,
    VideoSlots,
    chosen_over_video,
    frame_queries,
    mask_ious,
)
from deris_llm.structures import DerisOutput, RoundOutput

SIZE = 32
RULE = {"score_threshold": 0.5, "selection": "threshold_or_best"}


def square(x, y=12, side=8):
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    if x is not None:
        mask[y : y + side, max(x, 0) : max(x + side, 0)] = True
    return mask


def frame(masks, scores, presence=1.0):
    bits = np.packbits(np.stack(masks).reshape(len(masks), -1), axis=-1)
    return FrameQueries(bits, np.array(scores, dtype=np.float32), presence)


def queries_of(frames, **rule):
    return [choice.queries for choice in chosen_over_video(frames, **(RULE | rule))]


def per_frame(frames):
    return [select_queries(each.scores, **RULE) for each in frames]


def test_a_score_that_flickers():
    """Query 0 follows the referent; in two frames the score of another object is higher."""
    scores = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.6], [0.9, 0.1], [0.4, 0.7], [0.8, 0.2]]
    frames = [frame([square(t), square(20 - t, 22)], row) for t, row in enumerate(scores)]
    assert per_frame(frames) == [(0,), (0,), (1,), (0,), (1,), (0,)]
    assert queries_of(frames) == [(0,)] * 6


def test_queries_that_change_places_are_followed_by_their_masks():
    """The network gives the referent another query in every frame; only the masks tell."""
    frames, expected = [], []
    for t in range(8):
        masks, scores = [square(t), square(t, 22), square(20, 2)], [0.8, 0.1, 0.2]
        if t in (3, 6):
            scores[0], scores[1] = 0.3, 0.55
        order = np.random.default_rng(t).permutation(3) if t else np.arange(3)
        frames.append(frame([masks[i] for i in order], [scores[i] for i in order]))
        expected.append((int(np.flatnonzero(order == 0)[0]),))
    assert queries_of(frames) == expected
    assert per_frame(frames) != expected


def test_objects_that_cross():
    """Two objects pass at different heights and touch; the overlap with itself is larger than with the other one."""
    frames, expected = [], []
    for t in range(12):
        masks = [square(2 * t, 10), square(22 - 2 * t, 14)]
        order = [0, 1] if t < 6 else [1, 0]  # queries change places in the middle
        scores = [0.9, 0.05] if t != 6 else [0.4, 0.6]
        frames.append(frame([masks[i] for i in order], [scores[i] for i in order]))
        expected.append((order.index(0),))
    assert queries_of(frames) == expected


def test_an_object_that_leaves_and_comes_back():
    """While it is away, its query draws another object with a low score; the slot is silent and finds the object again."""
    frames, expected = [], []
    for t in range(12):
        is_away = 4 <= t < 8
        referent = square(20) if is_away else square(1)
        score = 0.1 if is_away else 0.95
        frames.append(frame([referent, square(20, 22)], [score, 0.2]))
        expected.append(() if is_away else (0,))
    assert queries_of(frames) == expected
    # An empty mask stays chosen: the answer is empty there anyway. What it was before is remembered.
    frames = [frame([square(None if 4 <= t < 8 else 1), square(20, 22)], [0.9, 0.2]) for t in range(12)]
    assert queries_of(frames) == [(0,)] * 12


def test_an_object_that_comes_late_or_moves_far():
    frames = [frame([square(None if t < 3 else 5), square(20, 22)], [0.1 if t < 3 else 0.9, 0.3]) for t in range(12)]
    assert queries_of(frames) == [(0,)] * 12  # empty until it comes
    jumps = [frame([square(x), square(20, 22)], [0.8, 0.3]) for x in (0, 12, 24, 2, 14)]  # no overlap between frames
    assert queries_of(jumps) == [(0,)] * 5


def test_rules():
    two = [frame([square(1), square(20, 22), square(10, 1)], [0.9, 0.8 if t else 0.3, 0.1]) for t in range(4)]
    assert queries_of(two) == [(0, 1)] * 4  # several referents: the mean of the second is 0.675
    assert queries_of(two, selection="best") == [(0,)] * 4
    assert queries_of(two, score_threshold=0.95, selection="threshold") == [()] * 4
    guess = chosen_over_video(two, score_threshold=0.95, selection="threshold_or_best")
    assert guess == [FrameChoice((0,), is_guess=True)] * 4
    assert not any(choice.is_guess for choice in chosen_over_video(two, **RULE))
    absent = [frame([square(1)], [0.9], presence=0.2 if t == 1 else 0.9) for t in range(3)]
    assert queries_of(absent) == [(0,)] * 3
    assert queries_of(absent, presence_use="gate") == [(0,), (), (0,)]
    assert queries_of(absent, presence_use="multiply", selection="threshold", score_threshold=0.59) == [(0,)] * 3  # 0.6
    assert queries_of(absent, presence_use="multiply", selection="threshold", score_threshold=0.61) == [()] * 3
    assert chosen_over_video([], **RULE) == []


def test_one_frame_is_chosen_as_an_image():
    rng = np.random.default_rng(0)
    for _ in range(20):
        one = frame(list(rng.random((10, SIZE, SIZE)) > 0.7), rng.random(10))
        assert queries_of([one]) == per_frame([one])


def test_little_is_kept_of_a_frame():
    slots = VideoSlots(**RULE)
    masks = list(np.random.default_rng(0).random((10, SIZE, SIZE)) > 0.7)
    for _ in range(50):
        slots.add(frame(masks, np.linspace(0, 1, 10)))
    kept = sum(each.nbytes for name, value in vars(slots).items() if name == "_queries" for each in value)
    assert kept == 50 * 20
    assert len(slots.choices()) == 50


def test_overlaps_equal_those_of_whole_masks():
    rng = np.random.default_rng(1)
    ours, theirs = rng.random((3, 7, 9)) > 0.5, rng.random((4, 7, 9)) > 0.5
    ours[0] = False
    packed = [np.packbits(masks.reshape(len(masks), -1), axis=-1) for masks in (ours, theirs)]
    expected = [[(a & b).sum() / max((a | b).sum(), 1) for b in theirs] for a in ours]
    np.testing.assert_allclose(mask_ious(*packed), expected)
    assert mask_ious(packed[0][:1], packed[0][:1]) == 0


def test_what_is_taken_from_an_output():
    generator = torch.Generator().manual_seed(0)
    last = RoundOutput(torch.randn(2, 5, 6, 7, generator=generator), torch.randn(2, 5, generator=generator))
    output = DerisOutput((last,), torch.tensor([0.0, 3.0]))
    first, second = frame_queries(output)
    bits = np.unpackbits(second.masks, axis=-1)[:, :42].reshape(5, 6, 7)
    np.testing.assert_array_equal(bits, last.mask_logits[1].numpy() > 0)
    np.testing.assert_allclose(second.scores, last.referring_logits[1].sigmoid().numpy())
    assert (first.presence, second.presence) == (0.5, pytest.approx(0.9526, abs=1e-4))
