# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""What NVFP4's scales are in the fused product: a table of all 256 bytes for each weight, made by its global scale.

A scale s = scale / global is a float32 number, and bfloat16 products with it would round twice. `unpack.split` gives
two bfloat16 numbers for which code * high + code * low rounds as code * s does. As a scale is a byte, there are 256 of
them: they are made once per call and weight, not once per group and tile.

The product multiplies them by code * 2^-126, so the table holds them times 2^(126 - c), and the sum comes out 2^c too
small: c is 0 unless the largest scale would overflow then (that of a weight whose largest element is 24 or more).
Elements whose scale is below 2^-100 may differ in their last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dequantize import wide_scale
from .unpack import split

ENTRIES = 257  # of a weight: one per byte, and 2^c


@triton.jit
def _lookup(whole, words, ENTRIES: tl.constexpr, FORMAT: tl.constexpr):
    weight = tl.program_id(0)
    byte = tl.arange(0, 256)
    scale = wide_scale(byte, whole + weight, FORMAT)
    largest = tl.max(tl.where(byte < 0x7F, scale, 0.0), 0)
    c = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127, 0)
    pair = split(scale * ((253 - c) << 23).to(tl.float32, bitcast=True))
    high, low = pair & 0xFFFF, (pair >> 16) & 0xFFFF
    both = ((low << 16 | low).to(tl.int64) << 32) | ((high << 16 | high).to(tl.int64) & 0xFFFFFFFF)
    tl.store(words + weight * ENTRIES + byte, both)
    tl.store(words + weight * ENTRIES + 256, ((c + 127) << 23).to(tl.int64))


def nvfp4_lookup(whole: Tensor, kind: str) -> Tensor:
    """float32 per-tensor scales of some weights -> int64[weights, 257]: for each scale byte high, high, low, low as
    bfloat16 numbers from the lowest bits up; at last 2^c as a float32 number. `kind` is that of `operands`."""
    words = torch.empty(whole.numel(), ENTRIES, dtype=torch.int64, device=whole.device)
    _lookup[(whole.numel(),)](whole.contiguous(), words, ENTRIES, kind, num_warps=4)
    return words
