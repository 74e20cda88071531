"""Curves of long runs, as narrow as the picture: a few hundred points however many steps, and no spike lost.

Steps are taken in buckets of equal width. Of a line each bucket keeps its smallest and its largest value, at the steps
where they are: the drawn line reaches wherever the full one does. Of durations each bucket keeps the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

MOST = 400  # points of a line; a chart is about as many pixels wide


def thinned(values: Sequence[float | None]) -> list[tuple[int, float]]:
    """(step, value) of what to draw, in order; every measured value of a run of up to MOST steps."""
    if len(values) <= MOST:
        return [(step, value) for step, value in enumerate(values) if value is not None]
    points: set[tuple[int, float]] = set()
    for bucket in buckets(len(values), MOST // 2):
        known = [(step, value) for step in bucket if (value := values[step]) is not None]
        if known:
            points |= {min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])}
    ends = (0, len(values) - 1)
    return sorted(points | {(step, value) for step in ends if (value := values[step]) is not None})


def buckets(steps: int, most: int) -> Iterator[range]:
    """At most `most` ranges of steps, none empty, that together are all of them."""
    count = min(steps, most)
    edges = [steps * n // count for n in range(count + 1)] if count else []
    return (range(low, high) for low, high in pairwise(edges))
