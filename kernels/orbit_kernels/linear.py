"""y = x W^T + bias with a packed, frozen W: the dense weight exists only while it is used.

The forward pass dequantises, multiplies and drops; what autograd keeps is the packed weight (a reference, no copy) and
not x, because W gets no gradient. The backward pass dequantises again: dX = dY W.

Values before precision: W is always the bfloat16 weight that the bytes stand for, cast to the dtype of x. Float32 and
bfloat16 compute see the same weights, so what differs between two engines is only the arithmetic of the product.

bfloat16 tensors on a GPU go to `fast` where it has a path (see there); everything else is the reference below.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .formats import FormatError, PackedWeight, dequantize


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """x[..., in] -> y[..., out] in the dtype of x; differentiable in x only.

    bias    [out] or None; frozen
    weight  `dequantize(packed)` kept by the caller, [out, in]: spares the work, changes no bit of the result
    Raises FormatError when widths disagree, and when weight or bias asks for a gradient that it would not get.
    """
    out, width = packed.shape
    if x.shape[-1] != width or not x.is_floating_point():
        raise FormatError(f"linear input: expected float [..., {width}]; found {x.dtype} {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (out,):
        raise FormatError(f"linear bias: expected ({out},); found {tuple(bias.shape)}")
    if weight is not None and tuple(weight.shape) != (out, width):
        raise FormatError(f"linear dense weight: expected {(out, width)}; found {tuple(weight.shape)}")
    if torch.is_grad_enabled():
        for name, frozen in (("bias", bias), ("dense weight", weight)):
            if frozen is not None and frozen.requires_grad:
                raise FormatError(f"linear {name}: expected a frozen tensor; found requires_grad=True")
    return _PackedLinear.apply(x, packed, bias, weight)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        ctx.packed, ctx.resident = packed, weight
        if _has_fast_path(x, packed):
            return fast().forward(x, packed, bias, weight)
        cast_bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, _dense(packed, weight, x.dtype), cast_bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = grads
        return dgrad(grad, ctx.packed, ctx.resident), None, None, None


def dgrad(grad: Tensor, packed: PackedWeight, resident: Tensor | None) -> Tensor:
    """dY[..., out] -> dX = dY W[..., in] in the dtype of dY, W as `linear` sees it."""
    if _has_fast_path(grad, packed) and not torch.is_grad_enabled():  # a second derivative takes the reference
        return fast().dgrad(grad, packed, resident)
    return grad @ _dense(packed, resident, grad.dtype)


def fast() -> ModuleType:
    """The fast paths; imported with the first CUDA tensor, so that Triton is never loaded without a GPU."""
    from . import fast as module

    return module


def _has_fast_path(x: Tensor, packed: PackedWeight) -> bool:
    return x.is_cuda and fast().takes(x, packed)


def _dense(packed: PackedWeight, resident: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (dequantize(packed, torch.bfloat16) if resident is None else resident).to(dtype)
