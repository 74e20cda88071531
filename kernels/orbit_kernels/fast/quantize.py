# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Float weights -> packed bytes, bit for bit what the references of `formats` make, each element read once.

    int4, mxfp4   a program takes whole groups: their extremes, their scales, their codes
    fp8           a program takes a block of 128 x 128
    nvfp4         the largest magnitude of all comes first, so a pass before only reads; the second goes backwards,
                  where the cache still has the end of the first

Quotients are rounded as the standard says (`div_rn`). Numbers become codes by addition: in [2^23, 2^24) a float32 is an
integer in its low bits, so adding 1.5 * 2^23 rounds half to even and leaves the integer there. Of E2M1, whose steps are
a half below 2, 1 up to 4, and 2 above, three such integers are made, and the smallest is the code.

Magnitudes are compared as integers, whose order is that of the floats with NaN above infinity: one comparison finds
what is not finite. Its magnitude is noted, and the host looks once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.base import FormatSpec, PackedWeight, require

_ELEMENTS = 4096  # per program, 4-bit formats
_BLOCK = 128  # rows and columns of an FP8 block
_INFINITE = tl.constexpr(0x7F800000)
_INTEGERS = tl.constexpr(12582912.0)  # 1.5 * 2^23
E4M3 = torch.float8_e4m3fn


@triton.jit
def _magnitude(values):
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _e2m1(values):
    """float32 -> codes 0..15 of the nearest E2M1 number, in int32."""
    size = tl.minimum(tl.abs(values), 6.0)
    index = tl.minimum(size * 2.0 + _INTEGERS, size + (_INTEGERS + 2.0))
    index = tl.minimum(index, size * 0.5 + (_INTEGERS + 4.0))
    return (index.to(tl.int32, bitcast=True) & 7) | tl.where(values < 0.0, 8, 0)


@triton.jit
def _e4m3_number(bits):
    """The float32 number of an E4M3 code without sign."""
    half = (bits << 7).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0


@triton.jit
def _bfloat16_code(values):
    """float32 -> the nearest bfloat16, ties to even, as its bits in int32."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def _e4m3_code(values):
    """float32 in [0, 448] -> the nearest E4M3 code, ties to even, in int32."""
    bits = values.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (values * 512.0 + _INTEGERS).to(tl.int32, bitcast=True) & 15  # steps of 2^-9 below 2^-6
    return tl.where(values < 0.015625, small, normal)


@triton.jit
def _largest(weight, peak, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(weight + at, mask=at < total, other=0.0).to(tl.float32)
    tl.atomic_max(peak, tl.max(_magnitude(values)), sem="relaxed")


@triton.jit
def _quantize_groups(
    weight,
    words,
    scales,
    whole,
    peak,
    total,  # groups
    SIZE: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    WORDS: tl.constexpr = SIZE // 8
    program = tl.program_id(0)
    if FORMAT == "nvfp4":
        program = tl.num_programs(0) - 1 - program
    group = program.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    word = group[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    inside = group < total
    place = word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    values = tl.load(weight + place, mask=inside[:, None, None], other=0.0).to(tl.float32)
    bits = tl.max(tl.max(_magnitude(values), 2), 1)
    amax = bits.to(tl.float32, bitcast=True)
    if FORMAT == "int4":
        code = _bfloat16_code(tl.div_rn(amax, 7.5))
        code = tl.where(code == 0, 0x3400, code)  # 2^-23
        stored = code.to(tl.int16)
        scale = (code << 16).to(tl.float32, bitcast=True)
        quotient = tl.div_rn(values, tl.broadcast_to(scale[:, None, None], values.shape))
        rounded = tl.minimum(tl.maximum(quotient, -8.0), 7.0) + (_INTEGERS + 8.0)
        codes = rounded.to(tl.int32, bitcast=True) & 15
    elif FORMAT == "mxfp4":
        exponent = ((bits + 0x200000) >> 23) - 2
        exponent = tl.minimum(tl.maximum(exponent, 0), 252)
        stored = exponent.to(tl.uint8)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^(127 - e), never subnormal
        codes = _e2m1(values * inverse[:, None, None])
    else:
        g = tl.div_rn(1.0, tl.maximum(tl.load(peak).to(tl.float32, bitcast=True), 1.1754943508222875e-38)) * 2688.0
        g = tl.where(g.to(tl.int32, bitcast=True) >= _INFINITE, 1.0, g)
        tl.store(whole, g, mask=program == 0)
        code = _e4m3_code(tl.minimum(g * tl.div_rn(amax, 6.0), 448.0))
        code = tl.where(code == 0, 32, code)  # 0.125
        stored = code.to(tl.uint8)
        scale = tl.div_rn(_e4m3_number(code), g)
        codes = _e2m1(tl.div_rn(values, tl.broadcast_to(scale[:, None, None], values.shape)))
    packed = tl.sum(codes << (tl.arange(0, 8) * 4)[None, None, :], 2)
    tl.store(words + word, packed, mask=inside[:, None])
    tl.store(scales + group, stored, mask=inside)
    if FORMAT != "nvfp4":
        tl.store(peak + tl.zeros_like(bits), bits, mask=bits >= _INFINITE)


@triton.jit
def _quantize_blocks(weight, codes, scales, peak, rows, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < cols)
    place = row.to(tl.int64) * cols + col
    values = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    bits = tl.max(_magnitude(values))
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    quotient = tl.div_rn(values, tl.broadcast_to(scale, values.shape))
    quotient = tl.minimum(tl.maximum(quotient, -448.0), 448.0)
    code = _e4m3_code(tl.abs(quotient)) | ((quotient.to(tl.int32, bitcast=True) >> 24) & 0x80)
    tl.store(codes + place, code.to(tl.uint8), mask=inside)
    tl.store(scales + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)
    if bits >= _INFINITE:
        tl.store(peak, bits)


def supports(weight: Tensor, spec: FormatSpec) -> bool:
    """Whether a weight goes here: 16 or 32 bits, whole groups, of the sizes that `quantize` writes."""
    here = weight.device.index == torch.cuda.current_device()
    if not here or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.numel() == 0:
        return False
    if spec.name == "int4" and spec.group_size not in (32, 128):
        return False
    return spec.name == "fp8" or (spec.name != "bf16" and weight.shape[1] % spec.group_size == 0)


def quantize(weight: Tensor, spec: FormatSpec) -> PackedWeight:
    """`formats.quantize` for what `supports` accepts: the same bytes, and the same refusal of what is not finite."""
    weight, peak = weight.contiguous(), torch.zeros(1, dtype=torch.int32, device=weight.device)
    tensors = pack(weight, spec, peak)
    require(int(peak) < _INFINITE.value, "weight to quantize", "finite numbers in float32", "NaN or infinity")
    if spec.name == "int4":
        tensors["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64, device=weight.device)
    return PackedWeight(spec, (weight.shape[0], weight.shape[1]), tensors)


def pack(weight: Tensor, spec: FormatSpec, peak: Tensor) -> dict[str, Tensor]:
    """Codes and scales of a contiguous weight. peak[1], int32 and zero before, is afterwards the bits of a magnitude
    that is not finite, if there is one."""
    return _fp8(weight, peak) if spec.name == "fp8" else _four_bits(weight, spec, peak)


def _fp8(weight: Tensor, peak: Tensor) -> dict[str, Tensor]:
    (out, width), grid = weight.shape, tuple(triton.cdiv(size, _BLOCK) for size in weight.shape)
    codes = torch.empty(out, width, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(grid, dtype=torch.float32, device=weight.device)
    _quantize_blocks[grid](weight, codes, scales, peak, out, width, _BLOCK, num_warps=16)
    return {"weight": codes.view(E4M3), "weight_scale_inv": scales}


def _four_bits(weight: Tensor, spec: FormatSpec, peak: Tensor) -> dict[str, Tensor]:
    (out, width), name = weight.shape, spec.name
    words = torch.empty(out, width // 8, dtype=torch.int32, device=weight.device)
    dtype = torch.int16 if name == "int4" else torch.uint8
    scales = torch.empty(out, width // spec.group_size, dtype=dtype, device=weight.device)
    whole = scales
    if name == "nvfp4":
        block = 2 * _ELEMENTS
        _largest[(triton.cdiv(weight.numel(), block),)](weight, peak, weight.numel(), block, num_warps=8)
        whole = torch.empty(1, dtype=torch.float32, device=weight.device)
    groups = _ELEMENTS // spec.group_size
    _quantize_groups[(triton.cdiv(scales.numel(), groups),)](
        weight, words, scales, whole, peak, scales.numel(), spec.group_size, name, groups, num_warps=4
    )
    if name == "int4":
        return {"weight_packed": words, "weight_scale": scales.view(torch.bfloat16)}
    octets = words.view(torch.uint8)
    if name == "mxfp4":
        return {"weight_packed": octets, "weight_scale": scales}
    return {"weight_packed": octets, "weight_scale": scales.view(E4M3), "weight_global_scale": whole}
