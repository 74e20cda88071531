# mypy: disable-error-code="no-untyped-def"
# (constants of a Triton kernel, which Python types do not describe)
"""In which order a program of `decode_rows` works, and what its kernel asks of that order while it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
from triton.experimental import gluon


class Place(NamedTuple):
    """Of a pair."""

    chunk: int
    group: int
    before: int  # the pair of the same group before it; -1: none


@dataclass(frozen=True)
class Order:
    """In which order a program takes its pairs of a chunk of columns and a group of rows: chunk by chunk, so that a
    chunk of x serves all groups."""

    groups: int
    chunks: int
    ahead: int  # pairs whose words are on their way

    @property
    def pairs(self) -> int:
        return self.groups * self.chunks

    def place(self, pair: int) -> Place:
        chunk, group = divmod(pair, self.groups)
        return Place(chunk, group, pair - self.groups if chunk else -1)


@gluon.constexpr_function
def place_of(pair, order):
    return order.place(pair)


@gluon.constexpr_function
def begins(pair, order):
    """Whether a pair is the first that multiplies its x."""
    return pair < order.pairs and order.place(pair).group == 0


@gluon.constexpr_function
def last(group, order):
    """The last pair of a group."""
    return order.pairs - order.groups + group


@gluon.constexpr_function
def least(order):
    """The first group of which a pair is not loaded at once."""
    return min(order.place(pair).group for pair in range(order.ahead, order.pairs))


@gluon.constexpr_function
def room(order):
    """Its groups as a power of two."""
    return triton.next_power_of_2(order.groups)


@gluon.constexpr_function
def side_by_side(pair, order):
    """Whether a pair and the next are of two groups."""
    return pair + 1 < order.pairs and order.groups > 1
