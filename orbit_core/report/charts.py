"""Small charts as inline SVG: lines over steps, stacked bars over steps, and intervals on a 0-to-100% rule.

Colours and fonts come from the page's style sheet, so the charts follow light and dark. Each point carries its value
as a tooltip. Long runs are thinned to what a picture can show: see report.thinning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orbit_core.report.markup import Markup, element
from orbit_core.report.thinning import buckets, thinned

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 40
TARGET_TICKS = 5
MOST_BARS = 200


@dataclass(frozen=True)
class Series:
    name: str
    values: Sequence[float | None]  # one per step; None where it was not measured
    colour: str = "a"  # a class of the style sheet: a, b, c, ...


@dataclass(frozen=True)
class Axis:
    label: str  # with its unit
    low: float
    high: float
    ticks: Sequence[float]
    write: Callable[[float], str]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the bottom, 1 at the top; outside values lie on the edge."""
        low, high, at = (self.low, self.high, value)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        return min(1.0, max(0.0, (at - low) / (high - low)))


def linear_axis(label: str, values: Sequence[float], low: float | None = 0.0, high: float | None = None) -> Axis:
    """An axis over the values with round ticks; `low` and `high` fix its ends."""
    bottom = min(values, default=0.0) if low is None else low
    top = max(values, default=1.0) if high is None else high
    if top <= bottom:
        top = bottom + (abs(bottom) or 1.0)
    step = _round_step((top - bottom) / TARGET_TICKS)
    first, last = math.floor(bottom / step + 1e-9), math.ceil(top / step - 1e-9)
    ticks = [step * i for i in range(first, last + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    return Axis(label, ticks[0], ticks[-1], ticks, lambda value: f"{value:.{digits}f}")


def percent_axis(label: str) -> Axis:
    return Axis(label, 0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0], lambda value: f"{value:.0%}")


def log_axis(label: str, values: Sequence[float]) -> Axis:
    """Whole decades around the values; zeros lie on the lowest."""
    positive = [value for value in values if value > 0] or [1e-9]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    if high == low:
        high += 1
    every = max(1, math.ceil((high - low) / TARGET_TICKS))
    ticks = [10.0**power for power in range(low, high + 1) if (high - power) % every == 0]
    return Axis(label, 10.0**low, 10.0**high, ticks, lambda value: f"1e{round(math.log10(value))}", log=True)


def line_chart(
    title: str, series: Sequence[Series], axis: Axis, references: Sequence[tuple[float, str]] = ()
) -> Markup:
    """Values over steps; `references` are dashed lines with a label."""
    count = max((len(line.values) for line in series), default=0)
    parts: list[Markup] = [_frame(axis, count)]
    parts += [_reference(axis, value, label, series) for value, label in references]
    for line in series:
        points = [(_x(i, count), _y(axis, v), i, v) for i, v in thinned(line.values)]
        path = " ".join(f"{x},{y}" for x, y, _, _ in points)
        parts.append(element("polyline", points=path, class_=f"curve {line.colour}"))
        parts += [
            element("circle", element("title", f"{line.name}, step {i}: {v:.4g}"), cx=x, cy=y, r=4, class_="point")
            for x, y, i, v in points
        ]
    return _svg(title, parts)


def _reference(axis: Axis, value: float, label: str, series: Sequence[Series]) -> Markup:
    """A dashed line; its label stands at the end where the curves are farther away."""
    y = _y(axis, value)
    known = [[v for v in line.values if v is not None] for line in series]
    ends = [min((abs(_y(axis, values[i]) - y) for values in known if values), default=0.0) for i in (0, -1)]
    place = {"x": LEFT + 4, "class_": "note"} if ends[0] > ends[1] else {"x": WIDTH - RIGHT, "class_": "note end"}
    return element(
        "g",
        element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="reference"),
        element("text", label, y=round(y + (-5 if y > TOP + 16 else 15), 1), **place),
    )


def stacked_bars(title: str, series: Sequence[Series], axis: Axis) -> Markup:
    """One bar per step, or per bucket of steps where there are more than fit, the series on top of each other."""
    count = max((len(line.values) for line in series), default=0)
    step = (WIDTH - LEFT - RIGHT) / max(1, count)
    parts: list[Markup] = [_frame(axis, count, bars=True)]
    for bucket in buckets(count, MOST_BARS):
        below = 0.0
        several = f"steps {bucket.start} to {bucket.stop - 1}, mean"
        where = f"step {bucket.start}" if len(bucket) == 1 else several
        for line in series:
            value = sum(line.values[i] or 0.0 for i in bucket) / len(bucket)
            y0, y1 = _y(axis, below), _y(axis, below + value)
            below += value
            parts.append(
                element(
                    "rect",
                    element("title", f"{line.name}, {where}: {value:.3g} s"),
                    x=round(LEFT + step * (bucket.start + 0.1 * len(bucket)), 2),
                    width=round(step * 0.8 * len(bucket), 2),
                    y=y1,
                    height=round(y0 - y1, 2),
                    class_=f"bar {line.colour}",
                )
            )
    return _svg(title, parts)


def interval_rule(title: str, rows: Sequence[tuple[str, float, tuple[float, float], str]]) -> Markup:
    """(name, value, (low, high), colour) as dots with whiskers on a rule from 0 to 100%."""
    width, left, right, top, pitch = 620, 84, 24, 8, 36
    bottom = top + pitch * len(rows)

    def x(value: float) -> float:
        return round(left + (width - left - right) * value, 1)

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(element("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, class_="grid"))
        parts.append(element("text", f"{tick:.0%}", x=x(tick), y=bottom + 18, class_="tick middle"))
    for i, (name, value, (low, high), colour) in enumerate(rows):
        y = top + pitch * (i + 0.5)
        tooltip = element("title", f"{name}: {value:.1%}, 95% interval {low:.1%} to {high:.1%}")
        parts.append(element("text", name, x=left - 14, y=y + 4, class_="tick end"))
        whisker = {"x": x(low), "y": y - 5, "width": max(2.0, round(x(high) - x(low), 1)), "height": 10, "rx": 5}
        parts.append(element("rect", tooltip, **whisker, class_=f"whisker {colour}"))
        parts.append(element("circle", tooltip, cx=x(value), cy=y, r=6, class_=f"dot {colour}"))
        label = f"{value:.1%} ({low:.1%} to {high:.1%})"
        side = {"x": x(low) - 10, "class_": "end"} if value > 0.5 else {"x": x(high) + 10}
        parts.append(element("text", label, y=y + 4, **side))
    return _svg(title, parts, width, bottom + 26)


def _frame(axis: Axis, count: int, bars: bool = False) -> Markup:
    """Grid, tick labels and axis names; steps are numbered from 0."""
    parts = []
    for tick in axis.ticks:
        y = _y(axis, tick)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", axis.write(tick), x=LEFT - 8, y=y + 4, class_="tick end"))
    every = _round_step(max(1, count) / 6)
    for i in range(0, count, max(1, round(every))):
        x = _x(i, count) if not bars else LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / count
        parts.append(element("text", i, x=round(x, 1), y=HEIGHT - BOTTOM + 17, class_="tick middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(element("text", "step", x=middle, y=HEIGHT - 5, class_="name middle"))
    height = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        element("text", axis.label, x=13, y=height, transform=f"rotate(-90 13 {height})", class_="name middle")
    )
    return element("g", parts)


def _svg(title: str, parts: Sequence[Markup], width: int = WIDTH, height: int = HEIGHT) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)


def _x(i: int, count: int) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * (i / (count - 1) if count > 1 else 0.5), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis.place(value), 1)


def _round_step(step: float) -> float:
    """The next larger of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
