"""Dense products with packed INT4 for many tokens, without a dense weight anywhere: `int4_product` over one weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import PackedWeight
from .int4_product import Cut, multiply


def supports(packed: PackedWeight) -> bool:
    """Whether the copy engine and the tiles take this weight."""
    (out, width), spec = packed.shape, packed.spec
    if spec.name != "int4" or packed.tensors["weight_scale"].dtype != torch.bfloat16:
        return False
    paired = spec.group_size < 128 or width % 256 == 0
    return out % 128 == 0 and width % 128 == 0 and spec.group_size in (32, 64, 128) and paired


def dense_int4(x: Tensor, packed: PackedWeight, turned: bool, cut: Cut, bias: Tensor | None = None) -> Tensor:
    """bf16 x[rows, in] -> x W^T + bias [rows, out]; turned: dy[rows, out] -> dy W [rows, in]."""
    words, scales = (packed.tensors[key].contiguous() for key in ("weight_packed", "weight_scale"))
    return multiply(x.contiguous(), words, scales, packed.shape, packed.spec.group_size, turned, cut, bias)
