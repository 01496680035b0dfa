"""Line charts as inline SVG: coloured by the page's own CSS variables, so that light and dark mode both work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 30
_POINTS = 240

Series = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """title: heading. svg: the drawing. legend: (CSS class, name, last value) of each line."""

    title: str
    svg: str
    legend: list[tuple[str, str, str]]


def line_chart(title: str, series: Mapping[str, Series], *, smooth: bool = False) -> Chart | None:
    """One chart of (x, y) series; points that are not finite are left out. None when nothing can be drawn.

    smooth: a moving average over the raw line, which is drawn faintly behind it.
    """
    drawn = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return None
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_ticks = _ticks(min(ys), max(ys))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> str:
        px = _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        py = HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)
        return f"{px:.1f},{py:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">']
    for tick in y_ticks:
        y = float(place(x_low, tick).split(",")[1])
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = _LEFT + share * (WIDTH - _LEFT - _RIGHT)
        label = _number(round(x_low + share * (x_high - x_low)))
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{label}</text>')
    legend = []
    for index, name in enumerate(series):
        if name not in drawn:
            continue
        # by its place among all series, so that a run keeps its colour on charts that lack another run
        css, points = f"s{index % 8}", drawn[name]
        raw = _thinned(points)
        if smooth and len(raw) > 20:
            parts.append(_line(raw, place, f"{css} raw"))
            raw = _smoothed(raw)
        parts.append(_line(raw, place, css))
        legend.append((css, name, _number(points[-1][1])))
    parts.append("</svg>")
    return Chart(title, "".join(parts), legend)


def _line(points: Series, place: object, css: str) -> str:
    assert callable(place)
    if len(points) == 1:
        x, y = place(*points[0]).split(",")
        return f'<circle class="{css}" cx="{x}" cy="{y}" r="3"/>'
    return f'<polyline class="{css}" points="{" ".join(place(x, y) for x, y in points)}"/>'


def _thinned(points: Series) -> list[tuple[float, float]]:
    """At most `_POINTS` points: means of equal runs, so that no spike decides what is shown."""
    run = math.ceil(len(points) / _POINTS)
    groups = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _smoothed(points: Series) -> list[tuple[float, float]]:
    reach = max(2, len(points) // 40)
    found = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        found.append((x, sum(near) / len(near)))
    return found


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose both values."""
    if high - low < 1e-12:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 4
    size = 10 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or abs(value) < 1e-3:
        if abs(value) >= 1e4 and value == round(value) and abs(value) < 1e7:
            return f"{value:,.0f}"
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"
