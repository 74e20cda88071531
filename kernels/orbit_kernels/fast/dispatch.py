"""Which way a product goes, by operation, format, shape and number of rows: a table of what was fastest, and a rule.

    decode   `decode`: one pass over the packed bytes for up to 64 rows, forward only
    a Cut    `dense_packed`: unpacked in registers while the tensor core multiplies, cut so
    scratch  `dense`: dequantised to a scratch, multiplied by cuBLAS

`dispatch_table` is data: kernels/bench/tune_dense.py measures and writes it. A weight that it does not list decodes
where it can; else up to 128 rows are cut by `few`, and more go through the scratch. Rows share their bits as long as
their numbers lead to one entry, or to two with as many parts.
"""

from __future__ import annotations

from typing import Literal

from ..formats import FormatSpec, PackedWeight
from .decode import MAX_TOKENS
from .decode import supports as decode_supports
from .dense_packed import supports as fused_supports
from .dispatch_table import TABLE
from .packed_launch import Cut
from .packed_pieces import STEP

_MULTIPROCESSORS = 132  # of an H100 or H200; a constant, so that bits do not depend on the card
Way = Literal["decode", "scratch"] | Cut
Operation = Literal["forward", "dX"]


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
    if 0 < rows <= 128 and fused_supports(packed):
        out, width = packed.shape
        return few(out, width, rows) if operation == "forward" else few(width, out, rows)
    return "scratch"


def few(made: int, length: int, rows: int) -> Cut:
    """For at most 128 rows: tiles and parts of at least four steps for one round of 132 multiprocessors. For the listed
    weights it finds what measuring found."""
    block = 64 if rows <= 64 or made // 64 <= _MULTIPROCESSORS else 128
    tiles = made // 128 * -(-rows // block)
    return Cut(128, block, 64, max(1, min(8, _MULTIPROCESSORS // tiles, length // STEP // 4)))
