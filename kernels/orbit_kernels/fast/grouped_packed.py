"""The grouped product of `grouped.py` on Hopper: `packed_product` over the tiles of all experts.

Same unpacking, same order of the sum as the general kernel, so the same bits.
"""

from __future__ import annotations

from torch import Tensor

from ..formats.stack import PackedStack
from .packed_launch import Cut, multiply, supports
from .schedule import schedule

__all__ = ["grouped_packed", "supports"]


def grouped_packed(x: Tensor, counts: Tensor, experts: PackedStack, turned: bool, cut: Cut | None = None) -> Tensor:
    """As `grouped.grouped_product`, for stacks that `supports` accepts. No bit depends on the cut."""
    cut = cut or _cut(x.shape[0] // experts.count, experts.shape[1 if turned else 0], turned)
    table = schedule(counts, x.shape[0], cut.block)
    return multiply(x.contiguous(), experts, turned, cut, table=table)


def _cut(each: int, made: int, turned: bool) -> Cut:
    """Tiles for so many rows an expert, on average: 256 rows of x pay once most experts fill them (measured)."""
    if each >= (256 if turned else 128):
        return Cut(128, 256, 128)
    return Cut(256 if made % 256 == 0 else 128, 128, 64)
