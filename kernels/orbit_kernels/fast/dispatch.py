"""Which way a product goes, by operation, format, shape and number of rows: a table of what was fastest, and a rule.

    decode   `decode`: one pass over the packed bytes for up to 64 rows, forward only
    a Cut    `dense_packed`: unpacked in registers while the tensor core multiplies, cut so
    scratch  `dense`: dequantised to a scratch, multiplied by cuBLAS

`dispatch_table` is data: kernels/bench/tune_dense.py measures and writes it. A weight that it does not list decodes
where it can; else up to 512 rows are cut as `quickest` says, and more go through the scratch. Rows share their bits as
long as their numbers lead to one entry, or to two that cut sums alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from ..formats import FormatSpec, PackedWeight
from .decode import MAX_TOKENS
from .decode import supports as decode_supports
from .dense_packed import supports as fused_supports
from .dispatch_table import TABLE
from .packed_launch import ROUND, Cut

Way = Literal["decode", "scratch"] | Cut
Operation = Literal["forward", "dX"]

MOST = 512  # rows that `quickest` cuts
# On an H200 by INT4, of tiles of so many rows: 128 columns of their sum; all parts of a sum added up.
_MICROSECONDS = {64: (0.5, 2.0), 128: (0.7, 3.0), 256: (1.2, 5.0)}


def named(spec: FormatSpec) -> str:
    """As the table writes it: int4-32, mxfp4-32."""
    return f"{spec.name}-{spec.group_size}"


def choose(operation: Operation, packed: PackedWeight, rows: int) -> Way:
    """The way of x[rows, in] W^T, or of dy[rows, out] W. It never depends on a resident dense weight."""
    if fused_supports(packed):
        for most, way in TABLE.get((operation, named(packed.spec), *packed.shape), ()):
            if 0 < rows <= most:
                return way if way == "decode" or way == "scratch" else Cut(*way)
    if operation == "forward" and 0 < rows <= MAX_TOKENS and decode_supports(packed):
        return "decode"
    if 0 < rows <= MOST and fused_supports(packed):
        out, width = packed.shape
        return quickest(out, width, rows) if operation == "forward" else quickest(width, out, rows)
    return "scratch"


@lru_cache(4096)
def quickest(made: int, length: int, rows: int) -> Cut:
    """By counting rounds of programs and steps: what should take the shortest time. For the listed weights that is 1.01
    times as long as the best that measuring found, at most 1.14."""
    return min(_ways(made, length, rows), key=lambda way: way[0])[1]


def _ways(made: int, length: int, rows: int) -> Iterator[tuple[float, Cut]]:
    """Tiles of each height: all sums whole or in parts that fit one round of programs, or whole rounds of whole sums
    and those that are left over in pieces."""
    tiles, steps = made // 128, length / 128
    for block, (of_step, adding) in _MICROSECONDS.items():
        if block >= 2 * max(64, rows):
            break
        short, bands = max(64, block // 2), -(-rows // block)
        for parts in (1, 2, 3, 4, 6, 8):
            if parts == 1 or (tiles * bands * parts <= ROUND and steps >= 2 * parts):
                rounds = -(-tiles * bands * parts // ROUND)
                teams = 2 if block == 64 and parts == 1 else 1
                yield rounds * steps / parts * of_step + adding * (parts > 1), Cut(128, block, short, parts, teams)
        rounds = tiles * bands // ROUND
        tail = tiles - rounds * ROUND // bands
        for parts in (2, 3, 4, 6):
            if block > 64 and rounds and tail and tail * bands * parts <= ROUND and steps >= 2 * parts:
                cut = Cut(128, block, short, tail=tail, pieces=tail * parts)
                yield (rounds + 1 / parts) * steps * of_step + adding, cut
