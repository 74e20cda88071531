"""LoRA: y += (x A^T) B^T * scaling, scaling = alpha / r (Hu et al., arXiv 2106.09685).

Two thin products; the order of operations is PEFT's, so that equal inputs give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def lora_delta(x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """x[..., in], A[r, in], B[out, r] -> [..., out]; differentiable in all three.

    Computed in the wider of the dtypes of x and A, returned in the dtype of x.
    Raises ValueError when the shapes do not chain.
    """
    if A.dim() != 2 or B.dim() != 2 or x.shape[-1] != A.shape[1] or A.shape[0] != B.shape[1]:
        raise ValueError(
            "lora_delta: expected x[..., in], A[r, in], B[out, r]; "
            f"found x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}"
        )
    dtype = torch.promote_types(x.dtype, A.dtype)
    narrow = F.linear(x.to(dtype), A.to(dtype))
    return (F.linear(narrow, B.to(dtype)) * scaling).to(x.dtype)
