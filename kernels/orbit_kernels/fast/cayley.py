# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Cayley-Neumann v -> R and dR -> dv in one kernel each: a program keeps one block on the chip from end to end.

The formulas are those of `oft`: two products forward; backward makes Q^2 again, which costs a product and saves keeping
two matrices per block. Read and written are v and R (or dR and dv), nothing in between, and there is one launch where
the reference has about ten. Products are float32. That is for b = 16 and 32; `cayley_wide` takes 64 and 128,
`cayley_tiled` 256, which keeps those two matrices all the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..oft import cayley_gradient
from . import cayley_tiled, cayley_wide

BLOCK_SIZES = (16, 32, *cayley_wide.BLOCK_SIZES, *cayley_tiled.BLOCK_SIZES)


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
def _forward(v, R, B: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at, sign = _places(B)
    Q = _skew(v + block * (B * (B - 1) // 2), at, sign)
    P = tl.dot(Q, Q, input_precision="ieee")
    S = P + 2.0 * Q
    result = tl.dot(P, S, S, input_precision="ieee") + P + tl.where(sign == 0.0, 1.0, 0.0)
    cell = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    tl.store(R + block * (B * B) + cell, result.to(R.dtype.element_ty))


@triton.jit
def _backward(v, dR, dv, B: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at, sign = _places(B)
    Q = _skew(v + block * (B * (B - 1) // 2), at, sign)
    cell = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    G = tl.load(dR + block * (B * B) + cell).to(tl.float32)
    P = tl.dot(Q, Q, input_precision="ieee")
    dS = tl.dot(P, G, G, input_precision="ieee")
    H = tl.dot(G, P - 2.0 * Q, G + dS, input_precision="ieee")
    D = 2.0 * dS - tl.dot(H + tl.trans(H), Q, input_precision="ieee")
    dv += block * (B * (B - 1) // 2)
    tl.store(dv + at, (D - tl.trans(D)).to(dv.dtype.element_ty), mask=sign > 0.0)


def supports(v: Tensor, b: int) -> bool:
    here = v.device.index == torch.cuda.current_device()
    return here and b in BLOCK_SIZES and v.dtype in (torch.float32, torch.bfloat16, torch.float16)


def cayley_neumann(v: Tensor, b: int, dtype: torch.dtype) -> Tensor:
    """`oft.cayley_neumann` for what `supports` accepts: v[n, b(b-1)/2] -> R[n, b, b]; differentiable once."""
    return _Cayley.apply(v, b, dtype)


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, b: int, dtype: torch.dtype) -> Tensor:
        ctx.b, ctx.dtype = b, v.dtype
        if b in cayley_tiled.BLOCK_SIZES and ctx.needs_input_grad[0]:
            R, *kept = forward_kept(v, b, dtype)
            ctx.save_for_backward(*kept)
            return R
        ctx.save_for_backward(v)
        return forward(v, b, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if ctx.b in cayley_tiled.BLOCK_SIZES:
            Q, P = ctx.saved_tensors
            return cayley_gradient(Q, P, grads[0].float()).to(ctx.dtype), None, None
        (v,) = ctx.saved_tensors
        return backward(v, grads[0], ctx.b), None, None


def forward(v: Tensor, b: int, dtype: torch.dtype | None = None) -> Tensor:
    v = v.contiguous()
    R = torch.empty(v.shape[0], b, b, dtype=dtype or v.dtype, device=v.device)
    if len(v) and b in cayley_wide.BLOCK_SIZES:
        cayley_wide.forward(v, R)
    elif len(v) and b in cayley_tiled.BLOCK_SIZES:
        cayley_tiled.forward(v, R)
    elif len(v):
        _forward[(len(v),)](v, R, b, num_warps=b * b // 256)
    return R


def forward_kept(v: Tensor, b: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """R, and Q and P for `oft.cayley_gradient`, for the sizes of `cayley_tiled`."""
    R = torch.empty(v.shape[0], b, b, dtype=dtype, device=v.device)
    Q, P = cayley_tiled.forward_kept(v.contiguous(), R)
    return R, Q, P


def backward(v: Tensor, dR: Tensor, b: int) -> Tensor:
    """dv for b up to 128."""
    v, dR, dv = v.contiguous(), dR.contiguous(), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if len(v) and b in cayley_wide.BLOCK_SIZES:
        cayley_wide.backward(v, dR, dv)
    elif len(v):
        _backward[(len(v),)](v, dR, dv, b, num_warps=b * b // 256)
    return dv
