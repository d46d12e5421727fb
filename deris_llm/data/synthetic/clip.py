"""Samples and draws a short video of the synthetic world: objects that move, cross, hide each other, leave and come back.

An object keeps its look in all frames. Ducks and fish face the way they go, as in real videos; nothing else in a single frame
shows a motion. Letters: T frames, H, W = height and width in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .scene import SPARSE, Placed, background, make_object, paint
from .vocabulary import COLOURS, KINDS, PATTERNS, SIZES, pick

MOTIONS = ("left", "right", "up", "down", "still", "back")
"""`back`: leaves the frame and comes back."""

_OPPOSITES = (("left", "right"), ("right", "left"), ("up", "down"), ("down", "up"), ("left", "still"), ("still", "right"))
_FACING_LEFT = ("duck", "fish")  # as their silhouettes are drawn
_NUM_OBJECTS = (3, 5)
_ENTERS_PROBABILITY = 0.2  # of objects that move in one direction; as many leave
_CROSSING_PROBABILITY = 0.7
_MIN_VISIBLE_PX = 25
_MIN_VISIBLE_SHARE = 0.5  # of an object in a frame, for the frame to count
_MIN_VISIBLE_FRAMES = 0.4  # of the frames


@dataclass(frozen=True, eq=False)
class ClipObject:
    """One object of a clip.

    Attributes:
        profile: (kind, colour, pattern, size).
        motion: one of `MOTIONS`.
        enters: it is outside in the first frame.
        leaves: it is outside in the last one.
        hidden_by: indices of objects that hide a part of it in some frame.
        masks: bool (T, H, W), True = a visible pixel.
    """

    profile: tuple[str, str, str, str]
    motion: str
    enters: bool
    leaves: bool
    hidden_by: frozenset[int]
    masks: np.ndarray


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames, uint8 (T, H, W, 3) RGB, and the objects in them."""

    frames: np.ndarray
    objects: tuple[ClipObject, ...]


@dataclass(eq=False)
class _Mover:
    item: Placed
    motion: str
    enters: bool
    leaves: bool
    xy: np.ndarray  # int (T, 2): top left corner, px; may be outside


def sample_clip(rng: np.random.Generator, *, num_frames: int, size_px: int) -> Clip:
    """Samples a clip around objects that look alike and move differently.

    Args:
        rng: the only source of randomness.
        num_frames: at least 4.
        size_px: width; the height is 3/4 to 1 of it.
    """
    width, height = size_px, int(round(size_px * rng.uniform(0.75, 1.0)))
    while True:
        movers = _sample_movers(rng, num_frames, width, height)
        masks, hidden_by = _masks(movers, num_frames, width, height)
        if all(_is_seen(mover, mask) for mover, mask in zip(movers, masks, strict=True)):
            break
    frames = _draw(rng, movers, num_frames, width, height)
    objects = tuple(
        ClipObject(mover.item.profile, mover.motion, mover.enters, mover.leaves, hidden, mask)
        for mover, mask, hidden in zip(movers, masks, hidden_by, strict=True)
    )
    return Clip(frames, objects)


def _sample_movers(rng: np.random.Generator, num_frames: int, width: int, height: int) -> list[_Mover]:
    """Samples the objects from the back to the front."""
    looks = _sample_looks(rng)
    first, second = pick(rng, _OPPOSITES)
    motions = [first, second, *(pick(rng, MOTIONS) for _ in looks[2:])]
    movers: list[_Mover] = []
    for profile, motion in zip(looks, motions, strict=True):
        low, high = SPARSE.small if profile[3] == "small" else SPARSE.large
        facing = {"left": False, "right": True}.get(motion) if profile[0] in _FACING_LEFT else None
        item = make_object(rng, profile, float(rng.uniform(low, high)) * height, is_flipped=facing)
        chance, is_straight = rng.random(), motion not in ("still", "back")
        enters = is_straight and chance < _ENTERS_PROBABILITY
        leaves = is_straight and chance > 1 - _ENTERS_PROBABILITY
        movers.append(_Mover(item, motion, enters, leaves, np.zeros((num_frames, 2), int)))
    rows = rng.random(len(movers))  # of horizontal movers, as a share of the free height
    for i, one in enumerate(movers):
        crossed = next((k for k in range(i) if _would_cross(movers[k], one)), None)
        if crossed is not None and rng.random() < _CROSSING_PROBABILITY:
            rows[i] = rows[crossed]
        one.xy = _track(rng, one, float(rows[i]), num_frames, width, height)
    return [movers[i] for i in rng.permutation(len(movers))]


def _sample_looks(rng: np.random.Generator) -> list[tuple[str, str, str, str]]:
    """Two objects of the same look, then ones that differ from it in one attribute, or in all."""
    values = (KINDS, COLOURS, PATTERNS, SIZES)
    target = (pick(rng, KINDS), pick(rng, COLOURS), pick(rng, PATTERNS), "large" if rng.random() < 0.42 else "small")
    looks: list[tuple[str, str, str, str]] = [target, target]
    for _ in range(int(rng.integers(_NUM_OBJECTS[0], _NUM_OBJECTS[1] + 1)) - 2):
        changed = list(target)
        for slot in rng.permutation(4)[: 1 if rng.random() < 0.6 else 4]:
            changed[slot] = pick(rng, [value for value in values[slot] if value != target[slot]])
        looks.append((changed[0], changed[1], changed[2], changed[3]))
    return looks


def _would_cross(one: _Mover, other: _Mover) -> bool:
    """Whether two objects in the same row meet; their colours must differ, so that the border between them is visible."""
    meet = {one.motion, other.motion} == {"left", "right"} or (one.motion == "still") != (other.motion == "still")
    are_horizontal = not {one.motion, other.motion} & {"up", "down", "back"}
    return meet and are_horizontal and one.item.profile[1] != other.item.profile[1]


def _track(
    rng: np.random.Generator, mover: _Mover, row: float, num_frames: int, width: int, height: int
) -> np.ndarray:
    """Top left corners of an object, int (T, 2)."""
    h, w = mover.item.coverage.shape
    room = np.array([max(1, width - w - 2), max(1, height - h - 2)])
    near, far = rng.uniform(0.0, 0.2), rng.uniform(0.8, 1.0)
    start = np.array([rng.uniform(0.1, 0.9), row]) * room + 1
    times = np.linspace(0, 1, num_frames)
    axis = 1 if mover.motion in ("up", "down") else 0
    outside = (-w - 4, width + 4) if axis == 0 else (-h - 4, height + 4)
    if mover.motion == "still":
        path = np.full(num_frames, start[0])
    elif mover.motion == "back":
        side = outside[int(start[0] > room[0] / 2)]
        path = np.interp(times, (0, 0.3, 0.6, 1), (start[0], side, side, start[0]))
    else:
        if axis == 1:
            start[0] = rng.uniform(0.05, 0.95) * room[0] + 1
        is_back = mover.motion in ("left", "up")
        ends = [far, near] if is_back else [near, far]
        ends = [share * room[axis] + 1 for share in ends]
        if mover.enters:
            ends[0] = outside[int(is_back)]
        if mover.leaves:
            ends[1] = outside[int(not is_back)]
        path = np.interp(times, (0, 1), ends)
    track = np.tile(start, (num_frames, 1))
    track[:, axis] = path
    if mover.motion != "still":
        track[:, 1 - axis] += 1.5 * np.sin(2 * math.pi * (times * rng.uniform(0.8, 1.6) + rng.random()))
    return track.round().astype(int)


def _pad_px(movers: list[_Mover]) -> int:
    return max(max(mover.item.coverage.shape) for mover in movers) + 12  # shadows reach out of an object


def _masks(movers: list[_Mover], num_frames: int, width: int, height: int) -> tuple[list[np.ndarray], list[frozenset[int]]]:
    """Visible masks, bool (T, H, W) each, and which objects hide a part of each one."""
    pad = _pad_px(movers)
    full = []
    for mover in movers:
        canvas = np.zeros((num_frames, height + 2 * pad, width + 2 * pad), dtype=bool)
        h, w = mover.item.coverage.shape
        for t, (x, y) in enumerate(mover.xy):
            canvas[t, y + pad : y + pad + h, x + pad : x + pad + w] = mover.item.coverage >= 0.5
        full.append(canvas[:, pad : pad + height, pad : pad + width])
    masks, hidden_by = [], []
    for i, mask in enumerate(full):
        in_front = [k for k in range(i + 1, len(full)) if (mask & full[k]).sum() >= _MIN_VISIBLE_PX]
        visible = mask.copy()
        for k in range(i + 1, len(full)):
            visible &= ~full[k]
        masks.append(visible)
        hidden_by.append(frozenset(in_front))
    return masks, hidden_by


def _is_seen(mover: _Mover, masks: np.ndarray) -> bool:
    """Whether an object is well visible in enough frames, and in the first and last one unless it is outside there."""
    whole = int((mover.item.coverage >= 0.5).sum())
    visible = masks.sum((1, 2))
    seen = (visible >= _MIN_VISIBLE_PX) & (visible >= _MIN_VISIBLE_SHARE * whole)
    is_outside = visible == 0
    ends_are_right = (bool(seen[0]) or mover.enters) and (bool(seen[-1]) or mover.leaves)
    return bool(seen.mean() >= _MIN_VISIBLE_FRAMES) and ends_are_right and (mover.motion != "back" or is_outside.sum() >= 2)


def _draw(rng: np.random.Generator, movers: list[_Mover], num_frames: int, width: int, height: int) -> np.ndarray:
    pad = _pad_px(movers)
    ground = np.pad(background(rng, width, height), ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    angle = float(rng.uniform(0, 2 * math.pi))
    light_xy = (math.cos(angle), math.sin(angle))
    seeds = rng.integers(0, 2**31, len(movers)).tolist()
    noise = np.float32(rng.uniform(2.0, 5.0))
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for t in range(num_frames):
        canvas = ground.copy()
        for mover, seed in zip(movers, seeds, strict=True):
            mover.item.x0, mover.item.y0 = int(mover.xy[t, 0]) + pad, int(mover.xy[t, 1]) + pad
            paint(np.random.default_rng(seed), canvas, mover.item, light_xy)  # the same look in every frame
        shown = canvas[pad : pad + height, pad : pad + width]
        shown += rng.standard_normal((height, width, 3), dtype=np.float32) * noise
        frames[t] = np.clip(shown, 0, 255).astype(np.uint8)
    return frames
