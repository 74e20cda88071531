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
    visit: int  # which x it multiplies


@dataclass(frozen=True)
class Order:
    """In which order a program takes its pairs of a chunk of columns and a group of rows: band by band of groups, in a
    band chunk by chunk, so that x of a chunk serves all groups of the band."""

    groups: int
    chunks: int
    band: int  # groups
    ahead: int  # pairs whose words are on their way
    keep: bool  # x of all chunks stays in registers; else that of the next chunk is on its way

    @property
    def pairs(self) -> int:
        return self.groups * self.chunks

    @property
    def visits(self) -> int:
        """How often x of a chunk is loaded."""
        return self.chunks if self.keep else -(-self.groups // self.band) * self.chunks

    def place(self, pair: int) -> Place:
        band, at = divmod(pair, self.band * self.chunks)
        together = min(self.band, self.groups - band * self.band)
        chunk, group = divmod(at, together)
        visit = chunk if self.keep else band * self.chunks + chunk
        return Place(chunk, band * self.band + group, pair - together if chunk else -1, visit)


@gluon.constexpr_function
def place_of(pair, order):
    return order.place(pair)


@gluon.constexpr_function
def begins(pair, order):
    """Whether a pair is the first that multiplies its x."""
    visited = {order.place(other).visit for other in range(pair)}
    return pair < order.pairs and order.place(pair).visit not in visited


@gluon.constexpr_function
def last(group, order):
    """The last pair of a group."""
    return max(pair for pair in range(order.pairs) if order.place(pair).group == group)


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
    return pair + 1 < order.pairs and order.place(pair).group != order.place(pair + 1).group
