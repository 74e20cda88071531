# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Cayley-Neumann v -> R and dR -> dv in one kernel each: a program keeps one block on the chip from end to end.

The formulas are those of `oft`: two products forward; backward makes Q^2 again, which costs a product and saves keeping
two matrices per block. Read and written are v and R (or dR and dv), nothing in between, and there is one launch where
the reference has about ten. Products are float32: exactly for b up to 32, as three tf32 products each for b = 64, whose
error is that of float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZES = (16, 32, 64)  # blocks of 128 do not fit the chip, three factors each; the reference takes them


@triton.jit
def _places(B: tl.constexpr):
    """For each element of a block: where its entry of v lies, and +1 above the diagonal, -1 below, 0 on it."""
    i = tl.arange(0, B)[:, None]
    j = tl.arange(0, B)[None, :]
    low, high = tl.minimum(i, j), tl.maximum(i, j)
    at = low * B - low * (low + 1) // 2 + high - low - 1
    sign = tl.where(i < j, 1.0, tl.where(i > j, -1.0, 0.0))
    return at, sign


@triton.jit
def _skew(v, at, sign):
    return tl.load(v + at, mask=sign != 0.0, other=0.0).to(tl.float32) * sign


@triton.jit
def _forward(v, R, B: tl.constexpr, PRECISION: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at, sign = _places(B)
    Q = _skew(v + block * (B * (B - 1) // 2), at, sign)
    P = tl.dot(Q, Q, input_precision=PRECISION)
    S = P + 2.0 * Q
    result = tl.dot(P, S, S, input_precision=PRECISION) + P + tl.where(sign == 0.0, 1.0, 0.0)
    cell = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    tl.store(R + block * (B * B) + cell, result.to(R.dtype.element_ty))


@triton.jit
def _backward(v, dR, dv, B: tl.constexpr, PRECISION: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at, sign = _places(B)
    Q = _skew(v + block * (B * (B - 1) // 2), at, sign)
    cell = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    G = tl.load(dR + block * (B * B) + cell).to(tl.float32)
    P = tl.dot(Q, Q, input_precision=PRECISION)
    dS = tl.dot(P, G, G, input_precision=PRECISION)
    H = tl.dot(G, P - 2.0 * Q, G + dS, input_precision=PRECISION)
    D = 2.0 * dS - tl.dot(H + tl.trans(H), Q, input_precision=PRECISION)
    dv += block * (B * (B - 1) // 2)
    tl.store(dv + at, (D - tl.trans(D)).to(dv.dtype.element_ty), mask=sign > 0.0)


def supports(v: Tensor, b: int) -> bool:
    here = v.device.index == torch.cuda.current_device()
    return here and b in BLOCK_SIZES and v.dtype in (torch.float32, torch.bfloat16, torch.float16)


def cayley_neumann(v: Tensor, b: int) -> Tensor:
    """`oft.cayley_neumann` for what `supports` accepts: v[n, b(b-1)/2] -> R[n, b, b]; differentiable once."""
    return _Cayley.apply(v, b)


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, b: int) -> Tensor:
        ctx.save_for_backward(v)
        ctx.b = b
        return forward(v, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return backward(v, grads[0], ctx.b), None


def forward(v: Tensor, b: int) -> Tensor:
    R = torch.empty(v.shape[0], b, b, dtype=v.dtype, device=v.device)
    if len(v):
        _forward[(len(v),)](v.contiguous(), R, b, _precision(b), num_warps=_warps(b))
    return R


def backward(v: Tensor, dR: Tensor, b: int) -> Tensor:
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if len(v):
        _backward[(len(v),)](v.contiguous(), dR.contiguous(), dv, b, _precision(b), num_warps=_warps(b))
    return dv


def _precision(b: int) -> str:
    return "ieee" if b <= 32 else "tf32x3"


def _warps(b: int) -> int:
    return {16: 1, 32: 4, 64: 8}[b]
