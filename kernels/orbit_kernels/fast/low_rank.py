# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""LoRA on many tokens: y = x W^T + bias + s (x A^T) B^T with W packed, and its gradients.

    t = x A^T,  u = s dY B:    y += s t B^T,  dX = dY W + u A,  dA = u^T x,  dB = s dY^T t

What costs is not arithmetic but passes over y and dX: each is written by the product with W and read and written once
more by `add_low_rank`, where separate torch operations pass over y six times. The thin products that read x or dY are
cuBLAS's. t is kept for the backward pass, x W^T is not.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import fast
from ..formats import PackedWeight

_ROWS, _COLS = 64, 128  # of y per program


@triton.jit(do_not_specialize=["M", "scaling"])
def _add_low_rank(
    y, t, B, scaling, M, N, B_ROW, B_COL,
    RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    r = tl.arange(0, PADDED)
    narrow = tl.load(t + m * RANK + r[None, :], mask=(m < M) & (r[None, :] < RANK), other=0.0)
    wide = tl.load(B + n * B_ROW + r[:, None] * B_COL, mask=(n < N) & (r[:, None] < RANK), other=0.0)
    at = y + m.to(tl.int64) * N + n
    inside = (m < M) & (n < N)
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    total += tl.dot(narrow, wide, input_precision="ieee") * scaling
    tl.store(at, total.to(y.dtype.element_ty), mask=inside)


def add_low_rank(y: Tensor, t: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y[M, N] += scaling * t[M, r] B[N, r]^T in place, summed in float32; B may be a transposed view."""
    (M, N), rank = y.shape, t.shape[1]
    if M and N:
        _add_low_rank[(triton.cdiv(N, _COLS), triton.cdiv(M, _ROWS))](
            y, t, B, scaling, M, N, *B.stride(), rank, max(16, triton.next_power_of_2(rank)), _ROWS, _COLS, num_warps=8
        )
    return y


def takes_low_rank(x: Tensor, packed: PackedWeight, A: Tensor, B: Tensor) -> bool:
    """Whether x goes with A and B through the products below."""
    return fast.takes(x, packed) and A.dtype == B.dtype == x.dtype and A.device == B.device == x.device


def low_rank(
    x: Tensor, packed: PackedWeight, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None, resident: Tensor | None
) -> Tensor:
    """bf16 x[..., in], A[r, in], B[out, r] -> [..., out]; differentiable once in all three."""
    return _LowRank.apply(x, packed, A, B, scaling, bias, resident)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: PackedWeight, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None,
        resident: Tensor | None,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        t = flat @ A.t()
        y = fast.forward(x, packed, bias, resident)
        add_low_rank(y.view(-1, y.shape[-1]), t, B, scaling)
        ctx.save_for_backward(x, t, A, B)
        ctx.packed, ctx.resident, ctx.scaling = packed, resident, scaling
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, t, A, B = ctx.saved_tensors
        need_dx, _, need_dA, need_dB = ctx.needs_input_grad[:4]
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        u = _times(dy @ B, ctx.scaling)
        dx = dA = dB = None
        if need_dx:
            dx = add_low_rank(fast.dgrad(dy, ctx.packed, ctx.resident), u, A.t(), 1.0).view(x.shape)
        if need_dA:
            dA = u.t() @ x.reshape(-1, x.shape[-1])
        if need_dB:
            dB = _times(dy.t() @ t, ctx.scaling)
        return dx, None, dA, dB, None, None, None


def _times(thin: Tensor, scaling: float) -> Tensor:
    return thin if scaling == 1.0 else thin.mul_(scaling)
