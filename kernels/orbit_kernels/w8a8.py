"""y = x W^T + bias with both sides in FP8: packed weights as stored, activations quantised on the way in.

    codes, scales = quantize_activations(x)                     one scale per row and 128 columns
    y[m, o] = sum over g of scales[m, g] * s[o // 128, g] * (codes[m, g] . weight[o, g])

where g runs over groups of 128 columns, and s are the scales of the weight's 128 x 128 blocks. This is the product of
fine-grained FP8 as DeepSeek-V3 trains and DeepGEMM computes it: the codes of one group are multiplied and summed by the
tensor core, and each such sum is scaled and added up in float32.

The weight's values are code times scale without a rounding in between, so they are those of `dequantize(packed,
float32)` for float32 scales; `linear` rounds them to bfloat16 first.

Gradient, for x only: dX = dY W with the bfloat16 weight, as `linear` has it. Quantising x passes it on unchanged
(straight-through): its derivative is zero almost everywhere, and what is trained must not see that.

The tensor core of Hopper adds the products of a group with fewer bits than float32 keeps (14 or so below the largest),
so the fast path is near the reference and not equal to it; activations' codes and scales are equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .formats import FormatError, PackedWeight
from .formats.base import divide
from .formats.fp8 import E4M3, E4M3_MAX, scale_key
from .linear import dgrad, fast

GROUP = 128  # columns that share a scale of the activations; the block of the weights is as wide


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[..., in] -> e4m3 codes[..., in], float32 scales[..., ceil(in / 128)]: x is about codes * scales.

    scale = amax / 448 of a row's 128 columns (1 where they are all zero), codes = nearest E4M3 of x / scale. The last
    group may be narrower. NaN and infinities make their group's scale, and with it every product, not finite.
    Scales lie with rows side by side (stride 1 along rows), as the product reads them.
    """
    if not x.is_floating_point() or x.dim() == 0:
        raise FormatError(f"activations: expected float [..., in]; found {x.dtype} {tuple(x.shape)}")
    flat = x.detach().reshape(-1, x.shape[-1])
    if flat.is_cuda and fast().quantizes_activations(flat):
        codes, scales = fast().quantize_activations(flat)
    else:
        codes, scales = _quantize(flat)
    return codes.view(x.shape), scales.view(*x.shape[:-1], scales.shape[1])


def linear_w8a8(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x[..., in] -> y[..., out] in the dtype of x, by FP8 codes on both sides; differentiable in x only.

    packed  fp8 with blocks of 128 x 128
    bias    [out] or None; frozen
    Raises FormatError for another format or block, when widths disagree, and for a bias that asks for a gradient.
    """
    out, width = packed.shape
    if packed.spec.name != "fp8" or packed.block != (GROUP, GROUP):
        raise FormatError(f"W8A8 weight: expected fp8 in blocks of (128, 128); found {packed.spec.name} {packed.block}")
    if x.dim() == 0 or x.shape[-1] != width or not x.is_floating_point():
        raise FormatError(f"W8A8 input: expected float [..., {width}]; found {x.dtype} {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (out,):
        raise FormatError(f"W8A8 bias: expected ({out},); found {tuple(bias.shape)}")
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        raise FormatError("W8A8 bias: expected a frozen tensor; found requires_grad=True")
    return _LinearW8A8.apply(x, packed, bias)


class _LinearW8A8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        out, width = packed.shape
        codes, scales = quantize_activations(x.reshape(-1, width))
        if x.is_cuda and fast().takes_w8a8(x, packed):
            y = fast().product_w8a8(codes, scales, packed, bias)
        else:
            y = _product(codes, scales, packed, bias).to(x.dtype)
        return y.view(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return dgrad(grad, ctx.packed, None), None, None


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[rows, in] -> codes[rows, in], scales[rows, groups]: the reference."""
    rows, width = x.shape
    groups = -(-width // GROUP)
    padded = F.pad(x.to(torch.float32), (0, groups * GROUP - width)).view(rows, groups, GROUP)
    scales = divide(padded.abs().amax(dim=2), E4M3_MAX)
    scales = scales.masked_fill(scales == 0, 1.0)
    codes = (padded / scales[:, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return codes.view(rows, -1)[:, :width].contiguous(), scales.t().contiguous().t()


def _product(codes: Tensor, scales: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """float32 y[rows, out], group after group: the reference."""
    out, width = packed.shape
    weight = packed.tensors["weight"]
    weight_scales = packed.tensors[scale_key(packed.tensors)].to(torch.float32)
    y = torch.zeros(codes.shape[0], out, dtype=torch.float32, device=codes.device)
    for group, first in enumerate(range(0, width, GROUP)):
        columns = slice(first, min(first + GROUP, width))
        inner = codes[:, columns].to(torch.float32) @ weight[:, columns].to(torch.float32).t()
        beside = weight_scales[:, group].repeat_interleave(GROUP)[:out]
        y.addcmul_(inner, scales[:, group, None] * beside)
    return y if bias is None else y + bias.to(torch.float32)
