"""Fast paths for Hopper GPUs in Triton, behind the doors of the references.

    decode        weight-only product for 1 to 64 tokens, reading W once as stored
    decode_wave   the same for weights of four bits, an even share of W for every program
    decode_rows   the same for up to 16 tokens, FP8 too, whole rows for every program
    dequantize    every packed format -> dense bfloat16, the reference's bits
    quantize      float weights -> every packed format, the reference's bits
    dense         many tokens: scratch of at most 64 MiB and cuBLAS, forward and gradient
    dense_packed  many tokens: no dense weight anywhere, forward and gradient
    dispatch      which of these three a product takes: data, measured
    beside        what a decode product does for an adapter in the same launch
    low_rank      LoRA added up in the products of many tokens
    cayley        Cayley-Neumann v -> R and dR -> dv
    rotate        OFT rotation, dX and dR, by slot, by expert, several of one input
    grouped       products with the packed weights of many experts, forward and gradient
    w8a8          activations to FP8, and the product of FP8 with FP8

Imported only when a CUDA tensor comes by: without a GPU Triton is never loaded. What these do not take (see `takes`)
goes to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import PackedWeight
from . import dense
from .cayley import cayley_neumann
from .cayley import supports as cayley_supports
from .decode import Adapter, decode, supports_adapter
from .dense_packed import dense_packed
from .dequantize import dequantize
from .dequantize import supports as dequantize_supports
from .dispatch import choose
from .grouped import grouped_product, takes_grouped
from .low_rank import low_rank, takes_low_rank
from .quantize import quantize
from .quantize import supports as quantize_supports
from .rotations import rotate, slices
from .rotations import supports as rotate_supports
from .rotations import supports_slices as slices_support
from .w8a8 import product_w8a8, quantize_activations, quantizes_activations, takes_w8a8

__all__ = [
    "cayley_neumann",
    "cayley_supports",
    "decode_adapted",
    "decodes_adapted",
    "dequantize",
    "dgrad",
    "forward",
    "grouped_product",
    "low_rank",
    "product_w8a8",
    "quantize",
    "quantize_activations",
    "quantize_supports",
    "quantizes_activations",
    "rotate",
    "rotate_supports",
    "slices",
    "slices_support",
    "takes",
    "takes_grouped",
    "takes_low_rank",
    "takes_w8a8",
]


def takes(x: Tensor, packed: PackedWeight) -> bool:
    """Whether the product of x (or of a gradient in its dtype) with this weight has a fast path."""
    here = x.device == packed.device and x.device.index == torch.cuda.current_device()
    return here and x.dtype == torch.bfloat16 and dequantize_supports(packed)


def forward(x: Tensor, packed: PackedWeight, bias: Tensor | None, resident: Tensor | None) -> Tensor:
    """x W^T + bias for x that `takes` accepts. Which way it goes never depends on a resident weight."""
    out, width = packed.shape
    rows = x.numel() // width
    way = choose("forward", packed, rows)
    if way == "scratch":
        return dense.forward(x, packed, bias, resident)
    flat = x.reshape(rows, width).contiguous()
    cast_bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = decode(flat, packed, cast_bias) if way == "decode" else dense_packed(flat, packed, False, way, cast_bias)
    return y.view(*x.shape[:-1], out)


def decodes_adapted(x: Tensor, packed: PackedWeight, a: Tensor, b: Tensor | None) -> bool:
    """Whether x (without gradients) goes with R, or A and B, through the decode kernel."""
    whole = x.shape[-1] == packed.shape[1] and x.is_floating_point() and takes(x, packed)
    if not whole or not supports_adapter(x, Adapter(a, b)):
        return False
    return choose("forward", packed, x.numel() // x.shape[-1]) == "decode"


def decode_adapted(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, a: Tensor, b: Tensor | None, scaling: float,
    slot: Tensor | None,
) -> Tensor:  # fmt: skip
    """(x R) W^T + bias where b is None; else x W^T + bias + scaling (x A^T) B^T; for what `decodes_adapted` accepts."""
    out, width = packed.shape
    flat = x.reshape(-1, width).contiguous()
    cast_bias = None if bias is None else bias.to(x.dtype).contiguous()
    slot = None if slot is None else slot.reshape(1)
    return decode(flat, packed, cast_bias, adapter=Adapter(a, b, scaling, slot)).view(*x.shape[:-1], out)


def dgrad(dy: Tensor, packed: PackedWeight, resident: Tensor | None) -> Tensor:
    """dY W for dY that `takes` accepts."""
    out, width = packed.shape
    rows = dy.numel() // out
    way = choose("dX", packed, rows)
    if way == "scratch" or way == "decode":
        return dense.dgrad(dy, packed, resident)
    return dense_packed(dy.reshape(rows, out), packed, True, way).view(*dy.shape[:-1], width)
