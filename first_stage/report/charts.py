"""Charts as SVG that a page holds inline: lines, stacked shares, histograms.

Colours and text follow the page's style sheet, light or dark. Each chart carries its numbers in
`data-chart`, from which the page's script shows values under the pointer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 10, 34
_MOST_POINTS = 240
_COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: For the legend.
        points: x and y in order of x; y is `None` where there is no value.
        colour: Number of its colour in the style sheet.
        dashed: Draw it dashed.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int = 0
    dashed: bool = False


class _Axis:
    """Places values between two pixels, linearly or by logarithm."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool):
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_range: tuple[float | None, float | None] = (None, None),
    log: bool | None = None,
    note: str = "",
    marks: Sequence[float] = (),
) -> str:
    """Lines over a common axis.

    Args:
        title: What is drawn.
        series: The lines; more than 240 points are averaged in groups.
        x_label: What the axis below counts.
        y_range: Fixed ends of the vertical axis; `None` follows the data.
        log: Logarithmic vertical axis; `None` decides by the data's range.
        note: A sentence under the title.
        marks: Heights to mark by a line across.

    Returns:
        A `figure` with the chart and its legend; empty when there is nothing to draw.
    """
    series = [Series(s.name, _thinned(s.points), s.colour, s.dashed) for s in series]
    values = [y for s in series for _, y in s.points if y is not None]
    if not values:
        return ""
    if log is None:
        log = min(values) > 0 and max(values) / min(values) > 50 and y_range == (None, None)
    if log:
        values = [v for v in values if v > 0]
    low, high = _span([*values, *marks], y_range, log)
    xs = [x for s in series for x, _ in s.points]
    x_axis = _Axis(
        min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, _LEFT, WIDTH - _RIGHT, False
    )
    y_axis = _Axis(low, high, HEIGHT - _BOTTOM, _TOP, log)
    parts = [_frame(x_axis, y_axis, x_label)]
    parts += [
        f'<line class="mark" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y_axis(m):.1f}" '
        f'y2="{y_axis(m):.1f}"/>'
        for m in marks
    ]
    parts += [_line(s, x_axis, y_axis) for s in series]
    return _figure(title, "".join(parts), series, x_axis, note + (" Logarithmic." if log else ""))


def share_chart(title: str, series: Sequence[Series], x_label: str, note: str = "") -> str:
    """Shares of a whole over time, stacked from 0 to 1.

    Args:
        title: What is drawn.
        series: The shares; a missing value counts as 0.
        x_label: What the axis below counts.
        note: A sentence under the title.
    """
    series = [Series(s.name, _thinned(s.points), s.colour) for s in series]
    xs = sorted({x for s in series for x, _ in s.points})
    if not xs:
        return ""
    x_axis = _Axis(xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1, _LEFT, WIDTH - _RIGHT, False)
    y_axis = _Axis(0.0, 1.0, HEIGHT - _BOTTOM, _TOP, False)
    floor = dict.fromkeys(xs, 0.0)
    areas = []
    for s in series:
        given = dict(s.points)
        top = {x: min(floor[x] + (given.get(x) or 0.0), 1.0) for x in xs}
        upper = [f"{x_axis(x):.1f},{y_axis(top[x]):.1f}" for x in xs]
        lower = [f"{x_axis(x):.1f},{y_axis(floor[x]):.1f}" for x in reversed(xs)]
        areas.append(f'<polygon class="c{s.colour} area" points="{" ".join(upper + lower)}"/>')
        floor = top
    body = "".join(areas) + _frame(x_axis, y_axis, x_label)
    return _figure(title, body, series, x_axis, note)


def histogram(
    counts: Sequence[float], low: float, high: float, label: str, width: int = 160
) -> str:
    """A small histogram without axes, its ends named below.

    Args:
        counts: Values per bin.
        low: Lower end.
        high: Upper end.
        label: What it shows, for readers who do not see it.
        width: Width in pixels, for a height of 44.
    """
    height = 44
    top = max(max(counts, default=0), 1)
    step = width / max(len(counts), 1)
    bars = "".join(
        f'<rect class="c0" x="{k * step:.2f}" y="{height - height * c / top:.2f}" '
        f'width="{step * 0.86:.2f}" height="{height * c / top:.2f}"/>'
        for k, c in enumerate(counts)
    )
    ends = (
        f'<text x="0" y="{height + 11}">{number(low)}</text>'
        f'<text x="{width}" y="{height + 11}" text-anchor="end">{number(high)}</text>'
    )
    return (
        f'<svg class="histogram" style="width:{width}px" viewBox="0 0 {width} {height + 14}" '
        f'role="img" aria-label="{escape(label)}">{bars}'
        f'<line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>{ends}</svg>'
    )


def number(value: float) -> str:
    """A number for an axis: three significant digits, thousands as k and M."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"


def ticks(low: float, high: float, log: bool = False, count: int = 5) -> list[float]:
    """Round numbers between two ends, for an axis.

    Args:
        low: Lower end.
        high: Upper end, above it.
        log: Powers of ten (with 2 and 5 between where there are few).
        count: About how many.
    """
    if log:
        return _log_ticks(low, high)
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**d for d in decades for m in multiples]
        found = [t for t in found if low * 0.999 <= t <= high * 1.001]
        if len(found) >= 3:
            break
    every = math.ceil(len(found) / 6)
    return found[::every]


def _span(
    values: Sequence[float], y_range: tuple[float | None, float | None], log: bool
) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low, high) if high > low else (low / 2, high * 2)
    room = 0.06 * (high - low) or max(abs(high) * 0.1, 1e-6)
    bottom = low - room if y_range[0] is None else y_range[0]
    top = high + room if y_range[1] is None else y_range[1]
    if y_range[0] is None and low >= 0:
        bottom = max(bottom, 0.0)
    return bottom, top if top > bottom else bottom + 1.0


def _thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most 240 points, each the mean of a group of neighbours."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return list(points)
    result: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        ys = [y for _, y in group if y is not None]
        result.append((group[-1][0], sum(ys) / len(ys) if ys else None))
    return result


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str) -> str:
    parts = []
    for tick in ticks(y_axis.low, y_axis.high, y_axis.log):
        y = y_axis(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    base = HEIGHT - _BOTTOM
    for tick in ticks(x_axis.low, x_axis.high):
        x = x_axis(tick)
        anchor = "end" if x > WIDTH - _RIGHT - 12 else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{base + 14}" text-anchor="{anchor}">{number(tick)}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'
        f'<text class="label" x="{middle}" y="{base + 29}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return "".join(parts)


def _line(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    points = [
        (x_axis(x), min(max(y_axis(y), _TOP), HEIGHT - _BOTTOM))
        for x, y in series.points
        if y is not None and not (y_axis.log and y <= 0)
    ]
    kind = f"c{series.colour} line" + (" dashed" if series.dashed else "")
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="c{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"/>'


def _figure(title: str, body: str, series: Sequence[Series], x_axis: _Axis, note: str) -> str:
    data = {
        "left": _LEFT,
        "right": WIDTH - _RIGHT,
        "width": WIDTH,
        "low": x_axis.low,
        "high": x_axis.high,
        "series": [
            {"name": s.name, "points": [[x, _short(y)] for x, y in s.points]} for s in series
        ],
    }
    legend = ""
    if len(series) > 1:
        entries = "".join(
            f'<li><i class="c{s.colour}{" dashed" if s.dashed else ""}"></i>{escape(s.name)}</li>'
            for s in series
        )
        legend = f'<ul class="legend">{entries}</ul>'
    note = f"<small>{escape(note.strip())}</small>" if note.strip() else ""
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(data))}">'
        f"<figcaption><b>{escape(title)}</b>{note}<output></output></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}'
        f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/></svg>'
        f"{legend}</figure>"
    )


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def colour_of(place: int) -> int:
    """The colour of the n-th line."""
    return place % _COLOURS
