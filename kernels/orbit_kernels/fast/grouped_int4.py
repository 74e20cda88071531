"""The grouped product of `grouped.py` for INT4 on Hopper: `int4_product` over the tiles of all experts.

Same unpacking, same order of the sum as the general kernel, so the same bits.
"""

from __future__ import annotations

from torch import Tensor

from ..formats.stack import PackedStack
from .int4_product import Cut, multiply, supports
from .schedule import schedule

__all__ = ["grouped_int4", "supports"]


def grouped_int4(x: Tensor, counts: Tensor, experts: PackedStack, turned: bool, cut: Cut | None = None) -> Tensor:
    """As `grouped.grouped_product`, for stacks that `supports` accepts."""
    out, width = experts.shape
    cut = cut or Cut(256 if (width if turned else out) % 256 == 0 else 128, 128, 64)
    table = schedule(counts, x.shape[0], cut.block)
    words, scales = (experts.tensors[key].contiguous() for key in ("weight_packed", "weight_scale"))
    return multiply(x.contiguous(), words, scales, (out, width), experts.spec.group_size, turned, cut, table=table)
