"""Products for many tokens: the weight passes through a dense scratch of at most 64 MiB, and cuBLAS multiplies.

Forward cuts W along its rows (outputs) and the gradient along its columns, so that every element of a result is one
product summed in float32 and rounded once; nothing is added up in 16 bits. A weight that fits the scratch is not cut,
and then the result is bit for bit F.linear of the dequantised weight. Cuts depend on the shape of W alone, so a
resident dense weight gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import PackedWeight
from .dequantize import dequantize

SCRATCH_BYTES = 64 << 20


def forward(x: Tensor, packed: PackedWeight, bias: Tensor | None, resident: Tensor | None) -> Tensor:
    """bf16 x[..., in] -> bf16 [..., out]."""
    out, width = packed.shape
    bias = None if bias is None else bias.to(x.dtype)
    rows = list(_cuts(out, width))
    if len(rows) == 1:
        return F.linear(x, _part(packed, resident, rows=rows[0], cols=(0, width)), bias)
    flat = x.reshape(-1, width)
    y = torch.empty(flat.shape[0], out, dtype=x.dtype, device=x.device)
    for first, last in rows:
        weight = _part(packed, resident, rows=(first, last), cols=(0, width)).t()
        if bias is None:
            torch.mm(flat, weight, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], flat, weight, out=y[:, first:last])
    return y.view(*x.shape[:-1], out)


def dgrad(dy: Tensor, packed: PackedWeight, resident: Tensor | None) -> Tensor:
    """bf16 dy[..., out] -> dX = dY W, bf16 [..., in]."""
    out, width = packed.shape
    cols = list(_cuts(width, out))
    if len(cols) == 1:
        return dy @ _part(packed, resident, rows=(0, out), cols=cols[0])
    flat = dy.reshape(-1, out)
    dx = torch.empty(flat.shape[0], width, dtype=dy.dtype, device=dy.device)
    for first, last in cols:
        torch.mm(flat, _part(packed, resident, rows=(0, out), cols=(first, last)), out=dx[:, first:last])
    return dx.view(*dy.shape[:-1], width)


def _cuts(length: int, other: int) -> Iterator[tuple[int, int]]:
    """Ranges of `length`, multiples of 128 long, whose [range, other] bfloat16 part fits the scratch."""
    whole = length * other * 2 <= SCRATCH_BYTES
    step = length if whole else max(128, SCRATCH_BYTES // (2 * other) // 128 * 128)
    for first in range(0, length, step):
        yield first, min(first + step, length)


def _part(packed: PackedWeight, resident: Tensor | None, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
    if resident is not None:
        return resident.to(torch.bfloat16)[rows[0] : rows[1], cols[0] : cols[1]]
    return dequantize(packed, rows, cols)
