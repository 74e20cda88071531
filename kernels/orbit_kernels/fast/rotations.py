"""The rotations of `oft` for 16-bit tensors on a GPU, with their gradients; the kernels are in `rotate`.

R and x have one dtype; each function is differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rotate import BLOCK_SIZES, MAX_SLICES, Choice, turn, turn_backward


def supports(x: Tensor, R: Tensor) -> bool:
    """Whether x turned by R (or by each of several) has a fast path."""
    here = x.device == R.device and x.device.index == torch.cuda.current_device()
    return here and x.dtype == R.dtype and x.dtype in (torch.bfloat16, torch.float16) and R.shape[-1] in BLOCK_SIZES


def supports_slices(x: Tensor, R: Tensor) -> bool:
    return supports(x, R) and 1 < R.shape[0] <= MAX_SLICES and R.shape[-1] <= 128


def rotate(x: Tensor, R: Tensor, slot: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """x[..., n*b] by R[n, b, b], by R[slots, n, b, b] of a slot, or by R[E, n, b, b] of each row's expert."""
    return _Rotate.apply(x, R, slot, counts)


def slices(x: Tensor, R: Tensor) -> tuple[Tensor, ...]:
    """x[..., n*b] by each of R[S, n, b, b]: S results."""
    return _Slices.apply(x, R)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, slot: Tensor | None, counts: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, R, slot, counts)
        return turn(x, R, Choice(slot, counts))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, R, slot, counts = ctx.saved_tensors
        need_dx, need_dR = ctx.needs_input_grad[:2]
        if need_dR:
            return *turn_backward(x, R, [grads[0]], Choice(slot, counts), need_dx), None, None
        return (turn(grads[0], R.transpose(-1, -2), Choice(slot, counts)) if need_dx else None), None, None, None


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, R)
        return turn(x, R, sliced=True).unbind(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, R = ctx.saved_tensors
        return turn_backward(x, R, list(grads), need_dx=ctx.needs_input_grad[0], need_dR=ctx.needs_input_grad[1])
