"""Dense products with packed INT4 for many tokens, without a dense weight anywhere: `int4_product` over one weight."""

from __future__ import annotations

from torch import Tensor

from ..formats import PackedWeight
from .int4_product import Cut, multiply, supports

__all__ = ["dense_int4", "supports"]


def dense_int4(x: Tensor, packed: PackedWeight, turned: bool, cut: Cut, bias: Tensor | None = None) -> Tensor:
    """bf16 x[rows, in] -> x W^T + bias [rows, out]; turned: dy[rows, out] -> dy W [rows, in]."""
    words, scales = (packed.tensors[key].contiguous() for key in ("weight_packed", "weight_scale"))
    return multiply(x.contiguous(), words, scales, packed.shape, packed.spec.group_size, turned, cut, bias)
