"""Dense products with packed weights for many tokens, without a dense weight anywhere: `packed_product` over one."""

from __future__ import annotations

from torch import Tensor

from ..formats import PackedWeight
from .packed_launch import Cut, multiply, supports

__all__ = ["dense_packed", "supports"]


def dense_packed(x: Tensor, packed: PackedWeight, turned: bool, cut: Cut, bias: Tensor | None = None) -> Tensor:
    """bf16 x[rows, in] -> x W^T + bias [rows, out]; turned: dy[rows, out] -> dy W [rows, in]."""
    return multiply(x.contiguous(), packed, turned, cut, bias)
