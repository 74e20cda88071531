# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Which rows a program works on when rows are sorted into groups whose sizes only the device knows.

A group of c rows is cut into ceil(c / BLOCK) tiles. How many there are in all is not known to the host, their largest
possible number is: rows // BLOCK + groups. A table of that length is filled by one small kernel; entries past the last
tile say -1 and their programs return at once. So a launch never waits for the counts, and can be captured in a graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PER_PROGRAM = 16


@triton.jit
def _schedule(counts, table, groups, length, BLOCK: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr):
    g = tl.arange(0, GROUPS)
    count = tl.load(counts + g, mask=g < groups, other=0).to(tl.int32)
    tiles = (count + BLOCK - 1) // BLOCK
    tiles_end = tl.cumsum(tiles, 0)
    rows_end = tl.cumsum(count, 0)
    t = tl.program_id(0) * TILES + tl.arange(0, TILES)
    group = tl.sum((tiles_end[None, :] <= t[:, None]).to(tl.int32), 1)  # GROUPS when t is past the last tile
    mine = group[:, None] == g[None, :]
    end = tl.sum(tl.where(mine, rows_end[None, :], 0), 1)
    back = tl.sum(tl.where(mine, (tiles_end * BLOCK - rows_end + count - tiles * BLOCK)[None, :], 0), 1)
    there = t < length
    tl.store(table + t * 3, tl.where(group < groups, group, -1), mask=there)
    tl.store(table + t * 3 + 1, t * BLOCK - back, mask=there)
    tl.store(table + t * 3 + 2, end, mask=there)


def schedule(counts: Tensor, rows: int, block: int) -> Tensor:
    """counts[groups] -> int32[rows // block + groups, 3]: (group or -1, first row, end of the group's rows)."""
    groups = counts.shape[0]
    length = rows // block + groups
    table = torch.empty(length, 3, dtype=torch.int32, device=counts.device)
    padded = triton.next_power_of_2(groups)
    _schedule[(triton.cdiv(length, _PER_PROGRAM),)](
        counts.contiguous(), table, groups, length, block, padded, _PER_PROGRAM, num_warps=4
    )
    return table
