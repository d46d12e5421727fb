"""Samples and draws one image of the synthetic world with its exact masks.

Letters: H, W = the image's height and width in pixels; h, w = those of one object's crop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .vocabulary import COLOURS, KINDS, PATTERNS, SIZES, pick

MIN_VISIBLE_FRACTION = 0.55
MIN_VISIBLE_PX = 60
HIDDEN_FRACTION_RANGE = (0.10, 0.45)  # of the back object of an overlapping pair
POLE_PROBABILITY = 0.12
GAP_PX = 3
_UNIT_PX = 160  # height of the cached silhouettes before rotation
_ANGLES_DEG = tuple(range(-12, 13, 3))

_RGB: dict[str, tuple[int, int, int]] = {
    "red": (208, 32, 34),
    "yellow": (243, 208, 32),
    "green": (34, 148, 56),
    "blue": (32, 84, 218),
    "purple": (142, 48, 178),
    "white": (246, 246, 244),
    "black": (26, 26, 30),
}
_DARK_MARKS = frozenset({"yellow", "white"})  # their stripes and dots are darker, those of the others lighter


@dataclass(frozen=True)
class Layout:
    """How many objects an image has, how large they are and how many of them overlap.

    Attributes:
        width_px: range of the image's width.
        height_px: range of its height.
        num_objects: range of the number of objects.
        small: range of the diameter sqrt(w * h) of small objects, as a part of the image's short side.
        large: the same of large objects.
        full_share: share of the image's area from which on all further objects are small.
        pairs: probabilities of one more overlapping pair.
    """

    width_px: tuple[int, int]
    height_px: tuple[int, int]
    num_objects: tuple[int, int]
    small: tuple[float, float]
    large: tuple[float, float]
    full_share: float
    pairs: tuple[float, ...]


SPARSE = Layout((144, 208), (112, 176), (4, 10), (0.20, 0.24), (0.34, 0.42), 0.34, (0.36, 0.08))
CROWD = Layout((208, 288), (160, 224), (12, 30), (0.12, 0.145), (0.20, 0.25), 0.30, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4))


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One object of an image.

    Attributes:
        kind: one of `KINDS`.
        colour: one of `COLOURS`.
        pattern: one of `PATTERNS`.
        size: one of `SIZES`.
        centre_xy: centre of the whole object's box, px.
        depth: order of drawing, 0 = furthest back.
        mask: bool (H, W), True = a visible pixel.
        full_mask: bool (H, W), the same before occlusion.
    """

    kind: str
    colour: str
    pattern: str
    size: str
    centre_xy: tuple[float, float]
    depth: int
    mask: np.ndarray
    full_mask: np.ndarray

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        """Box of the visible mask, px, half-open."""
        return mask_box_xyxy(self.mask)

    @property
    def profile(self) -> tuple[str, str, str, str]:
        """(kind, colour, pattern, size)."""
        return self.kind, self.colour, self.pattern, self.size


@dataclass(frozen=True, eq=False)
class Scene:
    """An image, uint8 (H, W, 3) RGB, and its objects."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]


@dataclass(eq=False)
class Placed:
    """An object before it is drawn."""

    profile: tuple[str, str, str, str]
    coverage: np.ndarray  # float32 (h, w) in [0, 1]
    detail: np.ndarray  # float32 (h, w) in [-1, 1]: lighter or darker parts (eyes, windows)
    angle_deg: int
    diameter_px: float
    x0: int
    y0: int
    order: float


def mask_box_xyxy(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Returns the half-open box of a bool (H, W) mask that is not empty."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def sample_scene(
    rng: np.random.Generator, *, target_kinds: Sequence[str] | None = None, layout: Layout = SPARSE
) -> Scene:
    """Samples an image built around distractors: objects that share all but one attribute with another one.

    Args:
        rng: the only source of randomness.
        target_kinds: kinds of the objects that the image is built around; at least 3 objects are of these kinds.
            None = all.
        layout: number and size of the objects.
    """
    kinds = tuple(target_kinds) if target_kinds is not None else KINDS
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(
            f"sample_scene: target_kinds must be some of {list(KINDS)}, got {list(kinds)}; "
            f"leave out {unknown} or give None for all kinds"
        )
    while True:  # a draw fails only when too few objects found room, which is rare
        width = int(rng.integers(layout.width_px[0], layout.width_px[1] + 1))
        height = int(rng.integers(layout.height_px[0], layout.height_px[1] + 1))
        if rng.random() < 0.3:  # portrait
            width, height = min(width, height), min(width, layout.height_px[1])
        profiles = _sample_profiles(rng, kinds, layout)
        placed = _place(rng, profiles, width, height, layout)
        if len(placed) < layout.num_objects[0] or sum(item.profile[0] in kinds for item in placed) < 3:
            continue
        scene = _draw(rng, placed, width, height)
        if scene is not None:
            return scene


def _random_profile(rng: np.random.Generator, kinds: Sequence[str]) -> tuple[str, str, str, str]:
    size = "large" if rng.random() < 0.42 else "small"
    return pick(rng, kinds), pick(rng, COLOURS), pick(rng, PATTERNS), size


def _sample_profiles(rng: np.random.Generator, kinds: Sequence[str], layout: Layout) -> list[tuple[str, str, str, str]]:
    """Samples the profiles of the objects, the most important first."""
    num_objects = int(rng.integers(layout.num_objects[0], layout.num_objects[1] + 1))
    values = (KINDS, COLOURS, PATTERNS, SIZES)
    profiles: list[tuple[str, str, str, str]] = []
    while len(profiles) < num_objects:
        target = _random_profile(rng, kinds)
        group = [target]
        for slot in rng.permutation(4)[: int(rng.integers(1, 4))]:
            changed = list(target)
            changed[slot] = pick(rng, [value for value in values[slot] if value != target[slot]])
            group.append((changed[0], changed[1], changed[2], changed[3]))
        if rng.random() < 0.25:
            group.append(target)
        if rng.random() < 0.5:
            group.append(_random_profile(rng, kinds if rng.random() < 0.5 else KINDS))
        profiles.extend(group)
    return profiles[:num_objects]


# ---------------------------------------------------------------------------------------------------------------------
# Silhouettes
# ---------------------------------------------------------------------------------------------------------------------


class _Pen:
    """Draws a silhouette and its detail in coordinates where the height is 1 and the width is `aspect`."""

    def __init__(self, aspect: float) -> None:
        size = (round(_UNIT_PX * aspect), _UNIT_PX)
        self.mask, self.detail = Image.new("L", size, 0), Image.new("L", size, 128)
        self._mask, self._detail = ImageDraw.Draw(self.mask), ImageDraw.Draw(self.detail)

    def oval(self, x: float, y: float, rx: float, ry: float, detail: int | None = None) -> None:
        box = [_UNIT_PX * value for value in (x - rx, y - ry, x + rx, y + ry)]
        if detail is None:
            self._mask.ellipse(box, fill=255)
        else:
            self._detail.ellipse(box, fill=detail)

    def polygon(self, *xy: float, detail: int | None = None) -> None:
        points = [_UNIT_PX * value for value in xy]
        if detail is None:
            self._mask.polygon(points, fill=255)
        else:
            self._detail.polygon(points, fill=detail)

    def line(self, *xy: float, width: float, detail: int | None = None) -> None:
        points, width_px = [_UNIT_PX * value for value in xy], round(_UNIT_PX * width)
        if detail is None:
            self._mask.line(points, fill=255, width=width_px, joint="curve")
        else:
            self._detail.line(points, fill=detail, width=width_px, joint="curve")


def _cat() -> _Pen:
    pen = _Pen(0.86)
    pen.line(0.58, 0.90, 0.76, 0.86, 0.80, 0.66, 0.72, 0.52, width=0.10)
    pen.oval(0.38, 0.73, 0.28, 0.27)
    pen.oval(0.38, 0.32, 0.27, 0.23)
    pen.polygon(0.11, 0.32, 0.12, 0.00, 0.34, 0.14)
    pen.polygon(0.65, 0.32, 0.64, 0.00, 0.42, 0.14)
    for x in (0.27, 0.49):
        pen.oval(x, 0.29, 0.045, 0.06, detail=10)
    pen.polygon(0.34, 0.38, 0.42, 0.38, 0.38, 0.44, detail=20)
    pen.line(0.38, 0.72, 0.38, 0.98, width=0.025, detail=50)
    return pen


def _duck() -> _Pen:
    pen = _Pen(1.25)
    pen.oval(0.72, 0.68, 0.44, 0.30)
    pen.polygon(0.95, 0.50, 1.24, 0.34, 1.14, 0.72)
    pen.polygon(0.28, 0.30, 0.56, 0.26, 0.62, 0.66, 0.32, 0.66)
    pen.oval(0.42, 0.24, 0.21, 0.22)
    pen.polygon(0.25, 0.18, 0.00, 0.30, 0.25, 0.36)
    pen.polygon(0.24, 0.20, 0.00, 0.30, 0.24, 0.35, detail=40)
    pen.oval(0.40, 0.18, 0.045, 0.05, detail=5)
    pen.line(0.62, 0.64, 0.72, 0.78, 0.92, 0.74, width=0.035, detail=60)
    return pen


def _fish() -> _Pen:
    pen = _Pen(1.75)
    pen.oval(0.66, 0.50, 0.64, 0.36)
    pen.polygon(1.12, 0.50, 1.74, 0.06, 1.58, 0.50, 1.74, 0.94)
    pen.polygon(0.46, 0.22, 0.72, 0.00, 0.98, 0.26)
    pen.polygon(0.60, 0.80, 0.86, 1.00, 0.90, 0.76)
    pen.oval(0.30, 0.42, 0.065, 0.065, detail=5)
    pen.line(0.48, 0.26, 0.54, 0.50, 0.48, 0.74, width=0.04, detail=60)
    return pen


def _person() -> _Pen:
    pen = _Pen(0.60)
    pen.oval(0.30, 0.14, 0.135, 0.14)
    pen.polygon(0.14, 0.29, 0.46, 0.29, 0.43, 0.64, 0.17, 0.64)
    pen.line(0.17, 0.33, 0.05, 0.58, width=0.095)
    pen.line(0.43, 0.33, 0.55, 0.58, width=0.095)
    pen.polygon(0.17, 0.60, 0.295, 0.60, 0.25, 1.00, 0.12, 1.00)
    pen.polygon(0.305, 0.60, 0.43, 0.60, 0.48, 1.00, 0.35, 1.00)
    pen.oval(0.24, 0.12, 0.025, 0.03, detail=5)
    pen.oval(0.36, 0.12, 0.025, 0.03, detail=5)
    pen.line(0.17, 0.63, 0.43, 0.63, width=0.035, detail=40)
    return pen


def _mug() -> _Pen:
    pen = _Pen(1.10)
    pen.polygon(0.02, 0.10, 0.76, 0.10, 0.70, 0.94, 0.08, 0.94)
    pen.oval(0.39, 0.10, 0.37, 0.10)
    pen.oval(0.39, 0.93, 0.31, 0.07)
    pen.oval(0.78, 0.48, 0.31, 0.28)
    pen.oval(0.83, 0.48, 0.15, 0.14, detail=25)
    pen.polygon(0.68, 0.20, 0.755, 0.20, 0.72, 0.80, 0.68, 0.80, detail=128)
    pen.oval(0.39, 0.10, 0.31, 0.065, detail=25)
    return pen


def _car() -> _Pen:
    pen = _Pen(1.85)
    pen.polygon(0.02, 0.50, 0.30, 0.42, 1.62, 0.42, 1.83, 0.54, 1.83, 0.82, 0.02, 0.82)
    pen.polygon(0.38, 0.46, 0.62, 0.02, 1.28, 0.02, 1.54, 0.46)
    for x in (0.44, 1.40):
        pen.oval(x, 0.79, 0.21, 0.21)
        pen.oval(x, 0.79, 0.19, 0.19, detail=15)
        pen.oval(x, 0.79, 0.08, 0.08, detail=190)
    pen.polygon(0.54, 0.42, 0.69, 0.13, 0.92, 0.13, 0.92, 0.42, detail=35)
    pen.polygon(1.00, 0.42, 1.00, 0.13, 1.22, 0.13, 1.38, 0.42, detail=35)
    return pen


def _house() -> _Pen:
    pen = _Pen(1.0)
    pen.polygon(0.14, 0.42, 0.86, 0.42, 0.86, 1.00, 0.14, 1.00)
    pen.polygon(0.00, 0.47, 0.50, 0.00, 1.00, 0.47)
    pen.polygon(0.70, 0.06, 0.84, 0.06, 0.84, 0.40, 0.70, 0.30)
    pen.line(0.02, 0.455, 0.98, 0.455, width=0.045, detail=45)
    pen.polygon(0.42, 0.66, 0.60, 0.66, 0.60, 1.00, 0.42, 1.00, detail=25)
    return pen


def _star() -> _Pen:
    pen = _Pen(1.05)
    points: list[float] = []
    for step in range(10):
        radius = 0.55 if step % 2 == 0 else 0.245
        angle = math.pi * step / 5
        points += [0.525 + radius * math.sin(angle), 0.55 - radius * math.cos(angle)]
    pen.polygon(*points)
    return pen


_SILHOUETTES = {
    "cat": _cat,
    "duck": _duck,
    "fish": _fish,
    "person": _person,
    "mug": _mug,
    "car": _car,
    "house": _house,
    "star": _star,
}


@functools.cache
def _unit_silhouette(kind: str, angle_deg: int, is_flipped: bool) -> tuple[Image.Image, Image.Image, float]:  # noqa: FBT001
    """Returns mask and detail (L images, rotated, cropped) and sqrt(w * h) of the unrotated silhouette in their px."""
    pen = _SILHOUETTES[kind]()
    mask, detail = pen.mask, pen.detail
    left, top, right, bottom = mask.getbbox() or (0, 0, 1, 1)
    diameter = math.sqrt((right - left) * (bottom - top))
    if is_flipped:
        mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        detail = detail.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mask = mask.rotate(angle_deg, Image.Resampling.BILINEAR, expand=True, fillcolor=0)
    detail = detail.rotate(angle_deg, Image.Resampling.BILINEAR, expand=True, fillcolor=128)
    box = mask.getbbox()
    return mask.crop(box), detail.crop(box), diameter


# ---------------------------------------------------------------------------------------------------------------------
# Placement
# ---------------------------------------------------------------------------------------------------------------------


def _place(
    rng: np.random.Generator, profiles: Sequence[tuple[str, str, str, str]], width: int, height: int, layout: Layout
) -> list[Placed]:
    """Finds room for as many objects as possible; some of them overlap one other object."""
    placed: list[Placed] = []
    partner_of: dict[int, int] = {}
    taken = np.zeros((height, width), dtype=np.int16)  # number of object areas, grown by GAP_PX, that cover a pixel
    used_px = 0.0
    num_pairs = sum(int(rng.random() < probability) for probability in layout.pairs)
    for profile in profiles:
        if used_px > layout.full_share * width * height:
            profile = (*profile[:3], "small")
        low, high = layout.small if profile[3] == "small" else layout.large
        item = make_object(rng, profile, float(rng.uniform(low, high)) * min(width, height))
        mask = item.coverage >= 0.5
        # Overlapping objects differ in colour, so that a human sees the border between them.
        free = [i for i, other in enumerate(placed) if i not in partner_of and other.profile[1] != profile[1]]
        done = False
        if num_pairs > len(partner_of) // 2 and free:
            partner = free[int(rng.integers(len(free)))]
            done = _place_overlapping(rng, item, mask, placed[partner], taken)
            if done:
                partner_of[partner], partner_of[len(placed)] = len(placed), partner
        if done or _place_apart(rng, item, mask, taken):
            placed.append(item)
            used_px += item.diameter_px**2
            _add_grown(taken, item, 1)
    return placed


def make_object(
    rng: np.random.Generator, profile: tuple[str, str, str, str], diameter_px: float, *, is_flipped: bool | None = None
) -> Placed:
    """Draws the silhouette of an object at a random angle.

    Args:
        rng: source of randomness.
        profile: (kind, colour, pattern, size).
        diameter_px: sqrt(w * h) before the rotation.
        is_flipped: left and right are exchanged; None = at random.
    """
    angle_deg = _ANGLES_DEG[int(rng.integers(len(_ANGLES_DEG)))]
    is_mirrored = bool(rng.random() < 0.5) if is_flipped is None else is_flipped
    mask, detail, unit_px = _unit_silhouette(profile[0], angle_deg, is_mirrored)
    scale = diameter_px / unit_px
    size = (max(3, round(mask.width * scale)), max(3, round(mask.height * scale)))
    coverage = np.asarray(mask.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255.0
    tone = np.asarray(detail.resize(size, Image.Resampling.BOX), dtype=np.float32) / 127.5 - 1.004
    return Placed(profile, coverage, tone, angle_deg, diameter_px, 0, 0, float(rng.random()))


def _add_grown(taken: np.ndarray, item: Placed, amount: int) -> None:
    """Adds `amount` to `taken` (H, W) over the object's area grown by GAP_PX."""
    padded = np.pad((item.coverage >= 0.5).astype(np.uint8) * 255, GAP_PX)
    grown = np.asarray(Image.fromarray(padded).filter(ImageFilter.MaxFilter(2 * GAP_PX + 1))) > 0
    y0, x0 = item.y0 - GAP_PX, item.x0 - GAP_PX
    top, left = max(0, -y0), max(0, -x0)
    view = taken[max(0, y0) : y0 + grown.shape[0], max(0, x0) : x0 + grown.shape[1]]
    view += amount * grown[top : top + view.shape[0], left : left + view.shape[1]].astype(taken.dtype)


def _place_apart(rng: np.random.Generator, item: Placed, mask: np.ndarray, taken: np.ndarray) -> bool:
    """Sets the object's position to a free one; False when 40 tries found none."""
    (h, w), (height, width) = mask.shape, taken.shape
    if w + 3 > width or h + 3 > height:
        return False
    xs, ys = rng.integers(1, width - w, 40), rng.integers(1, height - h, 40)
    for x0, y0 in zip(xs.tolist(), ys.tolist(), strict=True):
        if not taken[y0 : y0 + h, x0 : x0 + w][mask].any():
            item.x0, item.y0 = x0, y0
            return True
    return False


def _place_overlapping(
    rng: np.random.Generator, item: Placed, mask: np.ndarray, partner: Placed, taken: np.ndarray
) -> bool:
    """Sets the object's position and order so that it hides, or is partly hidden by, `partner` only."""
    (h, w), (height, width) = mask.shape, taken.shape
    partner_mask = partner.coverage >= 0.5
    canvas = np.zeros(taken.shape, dtype=bool)
    canvas[partner.y0 : partner.y0 + partner_mask.shape[0], partner.x0 : partner.x0 + partner_mask.shape[1]] = (
        partner_mask
    )
    others = taken.copy()
    _add_grown(others, partner, -1)
    is_front = bool(rng.random() < 0.5)
    back_px = int(partner_mask.sum()) if is_front else int(mask.sum())
    centre_x, centre_y = partner.x0 + partner_mask.shape[1] / 2, partner.y0 + partner_mask.shape[0] / 2
    reach_x, reach_y = (w + partner_mask.shape[1]) / 2, (h + partner_mask.shape[0]) / 2
    for _ in range(40):
        angle, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0.25, 0.85)
        x0 = round(centre_x + reach * reach_x * math.cos(angle) - w / 2)
        y0 = round(centre_y + reach * reach_y * math.sin(angle) - h / 2)
        if x0 < 1 or y0 < 1 or x0 + w >= width or y0 + h >= height:
            continue
        hidden = int(canvas[y0 : y0 + h, x0 : x0 + w][mask].sum()) / back_px
        low, high = HIDDEN_FRACTION_RANGE
        if low <= hidden <= high - 0.02 and not others[y0 : y0 + h, x0 : x0 + w][mask].any():
            item.x0, item.y0 = x0, y0
            first, second = sorted((item.order, partner.order))
            item.order, partner.order = (second, first) if is_front else (first, second)
            return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def _draw(rng: np.random.Generator, placed: list[Placed], width: int, height: int) -> Scene | None:
    """Draws the image; None if an object is hidden too much."""
    placed = sorted(placed, key=lambda item: item.order)
    full_masks = []
    for item in placed:
        full_mask = np.zeros((height, width), dtype=bool)
        h, w = item.coverage.shape
        full_mask[item.y0 : item.y0 + h, item.x0 : item.x0 + w] = item.coverage >= 0.5
        full_masks.append(full_mask)
    masks: list[np.ndarray] = []
    in_front = np.zeros((height, width), dtype=bool)
    for full_mask in reversed(full_masks):
        masks.insert(0, full_mask & ~in_front)
        in_front |= full_mask
    pole_x = _sample_pole(rng, masks, full_masks, width) if rng.random() < POLE_PROBABILITY else None
    if pole_x is not None:
        for mask in masks:
            mask[:, pole_x[0] : pole_x[1]] = False
    if not all(_is_visible(mask, full_mask) for mask, full_mask in zip(masks, full_masks, strict=True)):
        return None

    image = background(rng, width, height)
    light_angle = float(rng.uniform(0, 2 * math.pi))
    light_xy = (math.cos(light_angle), math.sin(light_angle))
    for item in placed:
        paint(rng, image, item, light_xy)
    if pole_x is not None:
        ramp = np.cos(np.linspace(-1.2, 1.2, pole_x[1] - pole_x[0], dtype=np.float32)) * rng.uniform(90, 150)
        image[:, pole_x[0] : pole_x[1]] = ramp[None, :, None] * np.array([1.0, 0.88, 0.74], dtype=np.float32)
    image += rng.standard_normal((height, width, 3), dtype=np.float32) * np.float32(rng.uniform(2.0, 5.0))
    objects = tuple(
        SceneObject(*item.profile, _centre(full_mask), depth, mask, full_mask)
        for depth, (item, mask, full_mask) in enumerate(zip(placed, masks, full_masks, strict=True))
    )
    order = rng.permutation(len(objects))  # the index of an object says nothing about its role
    return Scene(np.clip(image, 0, 255).astype(np.uint8), tuple(objects[index] for index in order))


def _centre(mask: np.ndarray) -> tuple[float, float]:
    x0, y0, x1, y1 = mask_box_xyxy(mask)
    return (x0 + x1) / 2, (y0 + y1) / 2


def _is_visible(mask: np.ndarray, full_mask: np.ndarray) -> bool:
    visible_px = int(mask.sum())
    return visible_px >= MIN_VISIBLE_PX and visible_px >= MIN_VISIBLE_FRACTION * int(full_mask.sum())


def _sample_pole(
    rng: np.random.Generator, masks: list[np.ndarray], full_masks: list[np.ndarray], width: int
) -> tuple[int, int] | None:
    """Returns columns [x0, x1) of a post in front of everything that cuts an object in two, or None."""
    for index in rng.permutation(len(masks)).tolist():
        x0, _, x1, _ = mask_box_xyxy(masks[index])
        thickness = int(rng.integers(3, 6))
        x = int(x0 + rng.uniform(0.3, 0.7) * (x1 - x0 - thickness))
        kept = [mask.sum() - mask[:, x : x + thickness].sum() for mask in masks]
        whole = [full_mask.sum() for full_mask in full_masks]
        if x + thickness <= width and all(
            now >= MIN_VISIBLE_PX and now >= MIN_VISIBLE_FRACTION * all_px
            for now, all_px in zip(kept, whole, strict=True)
        ):
            return x, x + thickness
    return None


def _smooth_noise(rng: np.random.Generator, width: int, height: int, cells: tuple[int, int]) -> np.ndarray:
    """Returns low-frequency noise, float32 (H, W), about in [-1, 1]."""
    grid = rng.uniform(-1, 1, cells).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Returns a textured background, float32 (H, W, 3) in [0, 255]: middle values, little saturation."""
    hue, saturation = float(rng.random()), float(rng.uniform(0.05, 0.30))
    value = float(rng.uniform(0.44, 0.62))
    turned = np.array([hue, hue + 1 / 3, hue + 2 / 3]) * 2 * math.pi
    base = value * (1 - saturation * (0.5 - 0.5 * np.cos(turned)))
    other = value * (1 - float(rng.uniform(0.05, 0.25)) * (0.5 - 0.5 * np.cos(turned + rng.uniform(-1.2, 1.2))))
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    gradient = (xs / width - 0.5) * math.cos(angle) + (ys / height - 0.5) * math.sin(angle)
    slow = _smooth_noise(rng, width, height, (4, 5))
    along, across = (xs, ys) if rng.random() < 0.5 else (ys, xs)
    match int(rng.integers(5)):
        case 0:  # wood
            texture = np.sin((across + 7 * slow + 0.06 * along) * np.float32(rng.uniform(0.25, 0.5)))
            texture = 0.5 * texture + 0.5 * _smooth_noise(rng, width, height, (60, 6) if across is ys else (6, 60))
        case 1:  # tiles
            step = int(rng.integers(18, 34))
            lines = ((xs + int(rng.integers(step))) % step < 1.5) | ((ys + int(rng.integers(step))) % step < 1.5)
            tone = _smooth_noise(rng, width // step + 2, height // step + 2, (4, 4))
            tile = tone[(ys // step).astype(np.int32), (xs // step).astype(np.int32)]
            texture = 0.7 * tile - 1.3 * lines
        case 2:  # grass
            blades = rng.standard_normal((height // 4 + 2, width), dtype=np.float32)
            texture = 0.6 * np.repeat(blades, 4, axis=0)[:height] + 0.4 * slow
        case 3:  # sand
            texture = 0.5 * rng.standard_normal((height, width), dtype=np.float32)
            texture += 0.7 * _smooth_noise(rng, width, height, (14, 16))
        case _:  # cloudy
            texture = _smooth_noise(rng, width, height, (8, 9)) + 0.3 * _smooth_noise(rng, width, height, (24, 28))
    mix = np.clip(0.5 + 0.8 * gradient + 0.4 * slow, 0, 1)[..., None].astype(np.float32)
    tone = 1 + np.float32(rng.uniform(0.06, 0.13)) * texture + np.float32(rng.uniform(0.0, 0.35)) * gradient
    colour = base.astype(np.float32) * (1 - mix) + other.astype(np.float32) * mix
    return 255 * colour * tone[..., None].astype(np.float32)


def paint(rng: np.random.Generator, image: np.ndarray, item: Placed, light_xy: tuple[float, float]) -> None:
    """Draws one object with its soft shadow onto `image`, float32 (H, W, 3), in place."""
    (h, w), pad = item.coverage.shape, 6
    blurred_image = Image.fromarray(np.pad((item.coverage * 255).astype(np.uint8), pad)).filter(ImageFilter.BoxBlur(2))
    blurred = np.asarray(blurred_image, dtype=np.float32) / 255.0
    _darken(image, blurred, item.x0 - pad - round(3 * light_xy[0]), item.y0 - pad - round(3 * light_xy[1]))

    base = np.array(_RGB[item.profile[1]], dtype=np.float32)
    base = np.clip(base * rng.uniform(0.90, 1.06) + rng.uniform(-6, 6, 3), 0, 255).astype(np.float32)
    if item.profile[1] in _DARK_MARKS:
        mark = base * 0.42
    else:
        lightness = 0.5 if item.profile[1] == "black" else 0.72
        mark = base * (1 - lightness) + 238 * lightness
    ys, xs = np.mgrid[0:h, 0:w].astype(np.float32)
    xs, ys = xs - np.float32((w - 1) / 2), ys - np.float32((h - 1) / 2)
    marks = _pattern(rng, item, xs, ys)
    colour = base + marks[..., None] * (mark - base)
    slope = (xs * (2 * light_xy[0] / w) + ys * (2 * light_xy[1] / h)).astype(np.float32)
    # The blurred silhouette is below 1 near the edge: a darker rim.
    shade = (1.0 + 0.17 * slope) * (0.55 + 0.45 * np.clip(2.0 * blurred[pad:-pad, pad:-pad] - 0.9, 0, 1))
    colour = colour * shade[..., None]
    dark, bright = np.clip(-item.detail, 0, 1)[..., None], np.clip(item.detail, 0, 1)[..., None]
    colour = colour * (1 - 0.75 * dark) + (70.0 if item.profile[1] == "black" else 12.0) * dark
    colour = colour * (1 - bright) + 235.0 * bright
    view = image[item.y0 : item.y0 + h, item.x0 : item.x0 + w]
    view += item.coverage[..., None] * (colour - view)


def _darken(image: np.ndarray, shadow: np.ndarray, x0: int, y0: int) -> None:
    height, width = image.shape[:2]
    top, left = max(0, -y0), max(0, -x0)
    bottom, right = min(shadow.shape[0], height - y0), min(shadow.shape[1], width - x0)
    image[y0 + top : y0 + bottom, x0 + left : x0 + right] *= 1 - 0.38 * shadow[top:bottom, left:right, None]


def _pattern(rng: np.random.Generator, item: Placed, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Returns where the stripes or dots are, float32 (h, w) in [0, 1]; xs, ys are px from the centre."""
    pattern, d = item.profile[2], np.float32(item.diameter_px)
    if pattern == "plain":
        return np.zeros(xs.shape, dtype=np.float32)
    if pattern == "striped":
        angle = math.radians(_ANGLES_DEG[int(rng.integers(len(_ANGLES_DEG)))] * 1.5) + (
            math.pi / 2 if rng.random() < 0.5 else 0.0
        )
        position = xs * math.cos(angle) + ys * math.sin(angle)
        period = max(5.5, float(d) * float(rng.uniform(0.20, 0.25)))
        distance = np.abs((position / period + rng.random()) % 1 - 0.5) * period  # px from the stripe's middle
        return np.clip(0.21 * period - distance + 0.5, 0, 1).astype(np.float32)
    step = max(6.5, float(d) * float(rng.uniform(0.25, 0.29)))
    angle = math.radians(-item.angle_deg + 45)
    u = xs * math.cos(angle) + ys * math.sin(angle) + rng.uniform(0, step)
    v = ys * math.cos(angle) - xs * math.sin(angle) + rng.uniform(0, step)
    radius = np.hypot((u + step / 2) % step - step / 2, (v + step / 2) % step - step / 2)
    return np.clip(0.31 * step - radius + 0.5, 0, 1).astype(np.float32)
