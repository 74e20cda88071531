# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Packed bytes -> dense bfloat16, bit for bit what the reference computes, at the speed of a copy.

One thread turns one 32-bit word (8 codes of four bits or 4 of eight) into one contiguous store, so reads and writes are
both whole sectors. Codes become floats by placing their bits, never through a table:

    int4    OR under the exponent of 2^23, subtract 2^23 + 8
    e2m1    bits 2..0 to the exponent and mantissa of a float16, times 2^14
    e4m3    bits 6..0 to the exponent and mantissa of a float16, times 2^8

each of which is exact, subnormals included. From there the arithmetic is the one that each format's file states.
A part of the weight (rows, columns) can be asked for, so that a big weight passes through a small scratch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FormatSpec, PackedWeight
from ..formats.fp8 import scale_key

_WORDS = 1024  # per program


@triton.jit
def _e2m1(code):
    half = (((code & 7) << 9) | ((code & 8) << 12)).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 16384.0


@triton.jit
def _e4m3(code):
    half = (((code & 0x7F) << 7) | ((code & 0x80) << 8)).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0


@triton.jit
def _e8m0(exponent):
    wide = exponent.to(tl.int32)
    bits = tl.where(wide == 0, 0x00400000, wide << 23)  # 2^-127 is subnormal
    return tl.where(wide == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def number(word, shift, FORMAT: tl.constexpr):
    """The code at bit `shift` of a 32-bit word as a float32 number."""
    code = word >> shift
    if FORMAT == "int4":
        return ((code & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    elif FORMAT == "fp8":
        return _e4m3(code & 0xFF)
    else:
        return _e2m1(code & 15)


@triton.jit
def wide_scale(scale, whole, FORMAT: tl.constexpr):
    """A stored scale as the float32 number that its code is multiplied by; `whole` points at the per-tensor scale."""
    if FORMAT == "mxfp4":
        return _e8m0(scale)
    elif FORMAT == "nvfp4-divide":
        return tl.div_rn(_e4m3(scale.to(tl.int32)), tl.load(whole))
    elif FORMAT == "nvfp4-multiply":
        return _e4m3(scale.to(tl.int32)) * tl.load(whole)
    else:
        return scale.to(tl.float32)


@triton.jit
def _dequantize(
    words,
    scales,
    whole,
    dense,
    row0,
    word0,
    total,
    WORDS_PER_ROW: tl.constexpr,  # of the part asked for
    WORDS_STORED: tl.constexpr,  # of the weight
    SCALES_STORED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PER_WORD: tl.constexpr = 4 if FORMAT == "fp8" else 8
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    row = row0 + at // WORDS_PER_ROW
    word = word0 + at % WORDS_PER_ROW
    value = tl.load(words + row.to(tl.int64) * WORDS_STORED + word, mask=inside, other=0)
    which = (row // BLOCK_ROWS) * SCALES_STORED + (word * PER_WORD) // BLOCK_COLS
    scale = tl.load(scales + which, mask=inside, other=0)
    bits = tl.arange(0, PER_WORD)[None, :] * (32 // PER_WORD)
    product = number(value[:, None], bits, FORMAT) * wide_scale(scale, whole, FORMAT)[:, None]
    if FORMAT == "int4" or FORMAT == "fp8":
        product = product.to(scale.dtype)  # their product is rounded in the dtype of the scale
    target = dense + at[:, None].to(tl.int64) * PER_WORD + tl.arange(0, PER_WORD)[None, :]
    tl.store(target, product.to(dense.dtype.element_ty), mask=inside[:, None])


def supports(packed: PackedWeight) -> bool:
    """Whether the words of a row are whole; everything but bf16 (whose bytes need no work) and odd widths."""
    per_word = 4 if packed.spec.name == "fp8" else 8
    return packed.spec.name != "bf16" and packed.shape[1] % per_word == 0


def dequantize(
    packed: PackedWeight,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The bits of `dequantize(packed, out.dtype)[rows, cols]`; a part must begin and end at whole words (8 columns).

    rows, cols  (first, past the last); left out: all
    out         contiguous [rows, cols] to write to; left out: a new bfloat16 tensor
    """
    name = packed.spec.name
    height, width = packed.shape
    first_row, last_row = rows or (0, height)
    first_col, last_col = cols or (0, width)
    per_word = 4 if name == "fp8" else 8
    shape = (last_row - first_row, last_col - first_col)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=packed.device)
    assert tuple(out.shape) == shape and out.is_contiguous()
    assert first_col % per_word == 0 and last_col % per_word == 0
    codes, scales, whole, kind = operands(packed.spec, packed.tensors)
    total = shape[0] * shape[1] // per_word
    _dequantize[(triton.cdiv(total, _WORDS),)](
        codes.contiguous().view(torch.int32),
        scales.contiguous(),
        whole,
        out,
        first_row,
        first_col // per_word,
        total,
        shape[1] // per_word,
        width // per_word,
        scales.shape[1],
        packed.block[0],
        packed.block[1],
        kind,
        _WORDS,
        num_warps=8,
    )
    return out


def operands(spec: FormatSpec, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, str]:
    """Codes, scales in a dtype that the kernels take, the per-tensor scale (or any tensor), and the kind."""
    name = spec.name
    if name == "int4":
        return tensors["weight_packed"], tensors["weight_scale"], tensors["weight_scale"], name
    if name == "fp8":
        scales = tensors[scale_key(tensors)]
        return tensors["weight"], scales, scales, name
    scales = tensors["weight_scale"].view(torch.uint8)
    if name == "mxfp4":
        return tensors["weight_packed"], scales, scales, name
    if "weight_scale_2" in tensors:
        return tensors["weight"], scales, tensors["weight_scale_2"], "nvfp4-multiply"
    return tensors["weight_packed"], scales, tensors["weight_global_scale"], "nvfp4-divide"
