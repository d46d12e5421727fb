"""Charts as inline SVG: lines over an axis, and bars. Colours are classes of the page's style, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from deris_llm.evaluation.page.html import element

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 12, 40
_MAX_POINTS = 240  # of a line: a page stays small however long a run was
NUM_SERIES = 6
"""Series that the page's style tells apart, by colour and by dashes."""


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


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    marker: Marker | None = None,
) -> Element:
    """A figure with up to `NUM_SERIES` lines, axes and a key.

    Args:
        title: the caption.
        lines: points that are not finite are left out; a line of more than 240 points is drawn as means of neighbours.
        x_label: what x is, with its unit.
        y_label: what y is.
        x_range: None = that of the points.
        y_range: None = that of the points, and round numbers around it.
        marker: a vertical line.
    """
    assert 0 < len(lines) <= NUM_SERIES, f"1 to {NUM_SERIES} lines, got {len(lines)}"
    finite = [[(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)] for line in lines]
    drawn = [_thinned(points) for points in finite]
    xs = [x for points in drawn for x, _ in points] or [0.0, 1.0]
    ys = [y for points in drawn for _, y in points] or [0.0, 1.0]
    x_low, x_high = x_range or _widened(min(xs), max(xs))
    y_ticks = _ticks(*(y_range or _widened(min(ys), max(ys))), outward=y_range is None)
    y_low, y_high = y_range or (y_ticks[0], y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    svg = element("svg", viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=title)
    for tick in y_ticks:
        x, y = at(x_low, tick)
        svg.append(element("path", d=f"M{x:.1f} {y:.1f}H{_WIDTH - _RIGHT}", class_="grid-line"))
        svg.append(element("text", _number(tick), x=x - 6, y=y + 4, text_anchor="end"))
    for tick in _ticks(x_low, x_high):
        x, y = at(tick, y_low)
        svg.append(element("path", d=f"M{x:.1f} {y:.1f}v4", class_="axis"))
        svg.append(element("text", _number(tick), x=x, y=y + 17, text_anchor="middle"))
    base = at(x_low, y_low)[1]
    svg.append(element("path", d=f"M{_LEFT} {base:.1f}H{_WIDTH - _RIGHT}", class_="axis"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    svg.append(element("text", x_label, x=middle, y=_HEIGHT - 6.0, text_anchor="middle", class_="axis-label"))
    across = (_TOP + _HEIGHT - _BOTTOM) / 2
    svg.append(
        element("text", y_label, text_anchor="middle", class_="axis-label", transform=f"translate(11 {across:g}) rotate(-90)")
    )  # fmt: skip
    if marker is not None:
        x, top = at(marker.x, y_high)
        svg.append(element("path", d=f"M{x:.1f} {base:.1f}V{top:.1f}", class_="marker"))
        end = "end" if x > middle else "start"
        svg.append(
            element(
                "text",
                marker.label,
                x=x + (-5 if end == "end" else 5),
                y=base - 8,
                text_anchor=end,
                class_="marker-label",
            )
        )
    for number, (line, points) in enumerate(zip(lines, drawn, strict=True)):
        if points:
            path = "L".join("{:.1f} {:.1f}".format(*at(x, min(max(y, y_low), y_high))) for x, y in points)
            dot = "h0.01" if len(points) == 1 else ""  # a round cap makes it a dot
            svg.append(element("path", element("title", line.label), d=f"M{path}{dot}", class_=f"line s{number}"))
    key = [
        element(
            "li", element("svg", element("path", d="M1 5H25", class_=f"line s{n}"), viewBox="0 0 26 10"), line.label
        )
        for n, line in enumerate(lines)
    ]
    one = element("ul", key, class_="legend") if len(lines) > 1 else None
    return element("figure", element("figcaption", title), svg, one, class_="chart")


def share_bar(parts: Sequence[tuple[float, str, str]]) -> Element:
    """A bar of 100 percent in parts.

    Args:
        parts: percent, class of the page's style, and what it is, from the left.
    """
    bar = element("svg", viewBox="0 0 100 8", class_="share-bar", preserveAspectRatio="none", role="img",
                  aria_label=", ".join(f"{about} {value:.1f}" for value, _, about in parts))  # fmt: skip
    x = 0.0
    for value, style, about in parts:
        title = element("title", f"{about} {value:.1f}")
        bar.append(element("rect", title, x=f"{x:.2f}", width=f"{max(value, 0):.2f}", height=8, class_=style))
        x += max(value, 0)
    return bar


def value_bar(value: float, *, interval: tuple[float, float] | None = None, oracle: float | None = None) -> Element:
    """A bar from 0 to 100 with, where there are some, its 95 % interval and a tick at what the best query would get."""
    bar = element("svg", viewBox="0 0 100 10", class_="value-bar", preserveAspectRatio="none", role="img",
                  aria_label=f"{value:.1f} of 100")  # fmt: skip
    bar.append(element("rect", width=100, height=10, class_="bar-rest"))
    bar.append(element("rect", width=f"{value:.2f}", height=10, class_="bar-value"))
    if oracle is not None:
        tick = element("title", f"best query {oracle:.1f}")
        bar.append(element("rect", tick, x=f"{max(oracle - 0.5, 0):.2f}", width=1, height=10, class_="bar-oracle"))
    if interval is not None:
        low, high = interval
        whole = element("title", f"95 %: {low:.1f} to {high:.1f}")
        bar.append(
            element("path", whole, d=f"M{low:.2f} 5H{high:.2f}M{low:.2f} 3v4M{high:.2f} 3v4", class_="bar-interval")
        )
    return bar


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
