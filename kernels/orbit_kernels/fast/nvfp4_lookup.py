# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""What NVFP4's scales are in the fused product: a table of all 256 bytes for the weight at hand, by its global scale.

A scale s = scale / global is a float32 number, and bfloat16 products with it would round twice. `unpack.split` gives
two bfloat16 numbers for which code * high + code * low rounds as code * s does. As a scale is a byte, there are 256 of
them: a program makes them when it comes to a weight, not once per group and tile. The scales of a weight lie close to
each other, so that those which a warp asks for at a time are mostly in one or two lines of the cache.

The product multiplies them by code * 2^-126, so the table holds them times 2^(126 - c), and the sum comes out 2^c too
small: c is 0 unless the largest scale would overflow then (that of a weight whose largest element is 12 or more).
Elements whose scale is below 2^-100 may differ in their last bit.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .dequantize import wide_scale
from .unpack import split

ENTRIES = 272  # of int64: one per byte, and 2^c; whole lines of the cache
_ENTRIES = gl.constexpr(ENTRIES)
_UNDOING = gl.constexpr(256)


@gluon.jit
def own(lookups, TEAMS: gl.constexpr, WHICH: gl.constexpr):
    """The table of one of a program's teams."""
    return lookups + (gl.program_id(0) * TEAMS + WHICH) * _ENTRIES


@gluon.jit
def fill(lookup, whole, FORMAT: gl.constexpr):
    """By 8 warps: for each scale byte high, high, low, low from the lowest bits up; 2^c as a float32 number at last."""
    byte = gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [8], [0]))
    scale = wide_scale(byte, whole, FORMAT)
    largest = wide_scale(gl.to_tensor(0x7E), whole, FORMAT)
    c = gl.maximum((largest.to(gl.int32, bitcast=True) >> 23) - 127, 0)
    pair = split(scale * ((253 - c) << 23).to(gl.float32, bitcast=True))
    high, low = pair & 0xFFFF, (pair >> 16) & 0xFFFF
    both = ((low << 16 | low).to(gl.int64) << 32) | ((high << 16 | high).to(gl.int64) & 0xFFFFFFFF)
    gl.store(lookup + byte, both)
    gl.store(lookup + _UNDOING, ((c + 127) << 23).to(gl.int64))


@gluon.jit
def undoing(lookup):
    """2^c, by which a sum is too small."""
    return gl.load(lookup + _UNDOING).to(gl.int32).to(gl.float32, bitcast=True)
