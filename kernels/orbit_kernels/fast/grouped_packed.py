"""The grouped product of `grouped.py` on Hopper: `packed_product` over the tiles of all experts.

Same unpacking, same order of the sum as the general kernel, so the same bits.
"""

from __future__ import annotations

from torch import Tensor

from ..formats.stack import PackedStack
from .packed_product import Cut, multiply, supports
from .schedule import schedule

__all__ = ["grouped_packed", "supports"]


def grouped_packed(x: Tensor, counts: Tensor, experts: PackedStack, turned: bool, cut: Cut | None = None) -> Tensor:
    """As `grouped.grouped_product`, for stacks that `supports` accepts."""
    out, width = experts.shape
    cut = cut or Cut(256 if (width if turned else out) % 256 == 0 else 128, 128, 64)
    table = schedule(counts, x.shape[0], cut.block)
    return multiply(x.contiguous(), experts, turned, cut, table=table)
