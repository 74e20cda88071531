"""LoRA on many tokens: y = x W^T + bias + s (x A^T) B^T with W packed, and its gradients, added up in matrix products.

    t = x A^T,  u = s dY B:    y += s t B^T,  dX = dY W + u A,  dA = u^T x,  dB = s dY^T t

What costs is not arithmetic but passes over y and dX: each is written by the product with W and touched once more, by
the thin product that adds to it, where separate torch operations touch y four times more. t is kept, x W^T is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import PackedWeight
from . import dense


def takes_low_rank(x: Tensor, packed: PackedWeight, A: Tensor, B: Tensor) -> bool:
    """Whether x goes with A and B through the products below."""
    from . import takes

    return takes(x, packed) and A.dtype == B.dtype == x.dtype and A.device == B.device == x.device


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
        y = dense.forward(x, packed, bias, resident)
        y.view(-1, y.shape[-1]).addmm_(t, B.t(), alpha=scaling)
        ctx.save_for_backward(x, t, A, B)
        ctx.packed, ctx.resident, ctx.scaling = packed, resident, scaling
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, t, A, B = ctx.saved_tensors
        need_dx, _, need_dA, need_dB = ctx.needs_input_grad[:4]
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        u = (dy @ B).mul_(ctx.scaling) if need_dx or need_dA else None
        dx = dA = dB = None
        if need_dx:
            dx = dense.dgrad(dy, ctx.packed, ctx.resident).addmm_(u, A).view(x.shape)
        if need_dA:
            dA = u.t() @ x.reshape(-1, x.shape[-1])
        if need_dB:
            dB = (dy.t() @ t).mul_(ctx.scaling)
        return dx, None, dA, dB, None, None, None
