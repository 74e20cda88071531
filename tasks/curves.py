"""A curve small enough to travel inside an artifact: an SVG of a few kilobytes as a data URL."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from orbit_core.report.thinning import thinned

WIDTH, HEIGHT, LEFT, MARGIN = 640, 300, 64, 34


def curve_as_data_url(values: Sequence[float], title: str) -> str:
    """`values` by index as a line; the axis names the smallest and the largest value."""
    svg = curve_as_svg(values, title)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def curve_as_svg(values: Sequence[float], title: str) -> str:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    across = (WIDTH - LEFT - MARGIN) / max(1, len(values) - 1)
    up = HEIGHT - 2 * MARGIN
    points = " ".join(
        f"{LEFT + across * index:.1f},{HEIGHT - MARGIN - up * (value - low) / span:.1f}"
        for index, value in thinned(values)
    )
    bottom, top = HEIGHT - MARGIN, MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        f'<text x="{LEFT}" y="{top - 14}" font-size="14">{escape(title)}</text>'
        f'<path d="M{LEFT} {top} V{bottom} H{WIDTH - MARGIN}" stroke="#999" fill="none"/>'
        f'<text x="{LEFT - 6}" y="{top + 5}" font-size="12" text-anchor="end">{high:.3g}</text>'
        f'<text x="{LEFT - 6}" y="{bottom}" font-size="12" text-anchor="end">{low:.3g}</text>'
        f'<text x="{WIDTH - MARGIN}" y="{bottom + 18}" font-size="12" text-anchor="end">step {len(values) - 1}</text>'
        f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="2"/></svg>'
    )
