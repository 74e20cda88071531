"""Which way a product goes, by operation, format, shape and number of rows: a table of what was fastest, and a rule.

    decode   `decode`: one pass over the packed bytes for up to 64 rows, forward only
    a Cut    `dense_int4`: unpacked in registers while the tensor core multiplies, cut so
    scratch  `dense`: dequantised to a scratch, multiplied by cuBLAS

`dispatch_table` is data: kernels/bench/tune_dense.py measures and writes it. A weight that it does not list decodes
where it can and else goes through the scratch. Rows share their bits as long as their numbers lead to one entry, or to
two with as many parts: a table says so in as few entries as cost at most a few percent of time.
"""

from __future__ import annotations

from typing import Literal

from ..formats import PackedWeight
from .decode import MAX_TOKENS
from .decode import supports as decode_supports
from .dense_int4 import supports as fused_supports
from .dispatch_table import TABLE
from .int4_product import Cut

Way = Literal["decode", "scratch"] | Cut
Operation = Literal["forward", "dX"]


def choose(operation: Operation, packed: PackedWeight, rows: int) -> Way:
    """The way of x[rows, in] W^T, or of dy[rows, out] W. It never depends on a resident dense weight."""
    if fused_supports(packed):
        name = f"{packed.spec.name}-{packed.spec.group_size}"
        for most, way in TABLE.get((operation, name, *packed.shape), ()):
            if rows <= most:
                return way if way == "decode" or way == "scratch" else Cut(*way)
    if operation == "forward" and 0 < rows <= MAX_TOKENS and decode_supports(packed):
        return "decode"
    return "scratch"
