"""Geometry of the page's charts; `templates/charts.html.j2` draws them as inline SVG in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 12, 40
NUM_SERIES = 6
"""Series that the page's style tells apart, by colour and by dashes."""

_MAX_POINTS = 240  # of a line: a page stays small however long a run was


@dataclass(frozen=True)
class Line:
    """A series."""

    label: str
    points: Sequence[tuple[float, float]]  # x ascending


@dataclass(frozen=True)
class Marker:
    """A value of x that is marked."""

    x: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A figure in units of its SVG, y downward."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[tuple[str, str]]  # label, the path's `d`; empty without points
    marker: Marker | None  # its x in units of the SVG

    base = HEIGHT - BOTTOM
    middle = (LEFT + WIDTH - RIGHT) / 2
    across = (TOP + HEIGHT - BOTTOM) / 2


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    marker: Marker | None = None,
) -> Chart:
    """Lays out a chart with up to `NUM_SERIES` lines.

    Args:
        title: the caption.
        lines: points that are not finite are left out; a line of more than 240 points is drawn as means of neighbours.
        x_label: what x is, with its unit.
        y_label: what y is.
        x_range: None = that of the points.
        y_range: None = round numbers around that of the points.
        marker: a vertical line.
    """
    assert 0 < len(lines) <= NUM_SERIES, f"1 to {NUM_SERIES} lines, got {len(lines)}"
    drawn = [_thinned([p for p in line.points if math.isfinite(p[0]) and math.isfinite(p[1])]) for line in lines]
    xs = [x for points in drawn for x, _ in points] or [0.0, 1.0]
    ys = [y for points in drawn for _, y in points] or [0.0, 1.0]
    x_low, x_high = x_range or _widened(min(xs), max(xs))
    y_ticks = _ticks(*(y_range or _widened(min(ys), max(ys))), outward=y_range is None)
    y_low, y_high = y_range or (y_ticks[0], y_ticks[-1])

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        y = min(max(y, y_low), y_high)
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def path(points: Sequence[tuple[float, float]]) -> str:
        if not points:
            return ""
        dot = "h0.01" if len(points) == 1 else ""  # a round cap makes it a dot
        return "M" + "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in points) + dot

    return Chart(
        title,
        x_label,
        y_label,
        [(x_at(tick), _number(tick)) for tick in _ticks(x_low, x_high)],
        [(y_at(tick), _number(tick)) for tick in y_ticks],
        [(line.label, path(points)) for line, points in zip(lines, drawn, strict=True)],
        None if marker is None else Marker(x_at(marker.x), marker.label),
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // _MAX_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float, *, outward: bool = False) -> list[float]:
    """Four to seven round numbers within a range, or just around it."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (factor * step) <= 5.5)
    first, last = low / step, high / step
    first, last = (
        (math.floor(first), math.ceil(last)) if outward else (math.ceil(first - 1e-9), math.floor(last + 1e-9))
    )
    return [n * step for n in range(first, last + 1)]


def _number(value: float) -> str:
    text = f"{value:.6g}"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 and value % 100 == 0 else text
