"""LoRA: y += (x A^T) B^T * scaling, scaling = alpha / r (Hu et al., arXiv 2106.09685).

Two thin products; the order of operations is PEFT's, so that equal inputs give equal bits. For rows sorted by expert,
each expert's own pair in two grouped products of torch: nothing waits for the device to say whose rows are whose.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .counts import require_counts


def lora_delta(x: Tensor, A: Tensor, B: Tensor, scaling: float, counts: Tensor | None = None) -> Tensor:
    """x[..., in], A[r, in], B[out, r] -> [..., out]; differentiable in all three.

    With counts[E]: rows of x[tokens, in] sorted by expert as in `grouped_linear`, A[E, r, in] and B[E, out, r].
    Computed in the wider of the dtypes of x and A, returned in the dtype of x.
    Raises ValueError when the shapes do not chain, FormatError when counts do not fit.
    """
    dims = 2 if counts is None else 3
    if A.dim() != dims or B.dim() != dims or x.shape[-1] != A.shape[-1] or A.shape[-2] != B.shape[-1]:
        experts = "" if counts is None else "E, "
        raise ValueError(
            f"lora_delta: expected x[..., in], A[{experts}r, in], B[{experts}out, r]; "
            f"found x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}"
        )
    if counts is not None:
        return _by_expert(x, A, B, scaling, counts)
    dtype = torch.promote_types(x.dtype, A.dtype)
    narrow = F.linear(x.to(dtype), A.to(dtype))
    return (F.linear(narrow, B.to(dtype)) * scaling).to(x.dtype)


def _by_expert(x: Tensor, A: Tensor, B: Tensor, scaling: float, counts: Tensor) -> Tensor:
    require_counts(counts, len(A), x)
    whole = all(size % 8 == 0 for size in (*A.shape[1:], *B.shape[1:]))  # rows of 16 bytes, which the products load
    if x.is_cuda and x.dtype == A.dtype == B.dtype == torch.bfloat16 and whole:
        ends = counts.cumsum(0).to(torch.int32)
        narrow = F.grouped_mm(x, A.transpose(1, 2), offs=ends)
        return F.grouped_mm(narrow, B.transpose(1, 2), offs=ends) * scaling
    parts = [(part, e) for e, part in enumerate(x.split(counts.tolist())) if len(part)]
    answers = [lora_delta(part, A[e], B[e], scaling) for part, e in parts]
    return torch.cat(answers or [x.new_empty(0, B.shape[1])])
