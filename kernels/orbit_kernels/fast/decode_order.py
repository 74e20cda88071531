# mypy: disable-error-code="no-untyped-def"
# (constants of a Triton kernel, which Python types do not describe)
"""In which order a program of `decode_rows` works, and what its kernel asks of that order while it is compiled."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from triton.experimental import gluon


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

    def place(self, pair: int) -> tuple[int, int, int, int]:
        """Of a pair: its chunk, its group, the pair of the same group before it (-1: none), which x it multiplies."""
        band, at = divmod(pair, self.band * self.chunks)
        together = min(self.band, self.groups - band * self.band)
        chunk, group = divmod(at, together)
        before = pair - together if chunk else -1
        return chunk, band * self.band + group, before, chunk if self.keep else band * self.chunks + chunk


@gluon.constexpr_function
def chunk_of(pair, order):
    return order.place(pair)[0]


@gluon.constexpr_function
def group_of(pair, order):
    return order.place(pair)[1]


@gluon.constexpr_function
def before(pair, order):
    return order.place(pair)[2]


@gluon.constexpr_function
def visit_of(pair, order):
    return order.place(pair)[3]


@gluon.constexpr_function
def begins(pair, order):
    """Whether a pair is the first that multiplies its x."""
    return pair < order.pairs and order.place(pair)[3] not in [order.place(other)[3] for other in range(pair)]


@gluon.constexpr_function
def last(group, order):
    """The last pair of a group."""
    return max(pair for pair in range(order.pairs) if order.place(pair)[1] == group)


@gluon.constexpr_function
def least(order):
    """The first group of which a pair is not loaded at once."""
    return min(order.place(pair)[1] for pair in range(order.ahead, order.pairs))


@gluon.constexpr_function
def room(order):
    """Its groups as a power of two."""
    return triton.next_power_of_2(order.groups)


@gluon.constexpr_function
def side_by_side(pair, order):
    """Whether a pair and the next are of two groups."""
    return pair + 1 < order.pairs and order.place(pair)[1] != order.place(pair + 1)[1]
