# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Tiles of packed codes -> bfloat16 tiles with the bits of `dequantize`, in the registers that the tensor core reads.

Codes come sixteen bits at a time ("pieces": 4 codes of four bits or 2 of eight), and a piece in a tile of pieces gives
an element in each of 4 or 2 tiles. The instructions work on a 32-bit word, that is on two neighbouring pieces at once:

    int4    a masked code c is the bfloat16 number c * 2^-133 (or, four bits higher, 2^-129), subnormals included; one
            fused operation, c * scale - 8 * scale, rounds once
    e2m1    a multiplication by 2^6 + 2^12 copies a code to two places, a mask keeps the sign of one and the rest of the
            other: the bfloat16 number code * 2^-126 (subnormals included); times the scale
    e4m3    the hardware's conversion to float16, then float32 arithmetic

The scale carries the power of two that makes the number whole again. A scale times 2^133 would be too large for
bfloat16, so weights of four bits come out as W * 2^-32, which is exact for scales from 2^-90 to 2^25 (larger ones
overflow to infinity, not to a wrong number); `GROWN` undoes it in the sum.

All of it is exact but for the one rounding that `dequantize` has too. Where the scale is a float32 number s that
bfloat16 does not hold (NVFP4), `split` gives two bfloat16 numbers, high and low, that do as well:
code * high + code * low rounds to the same bfloat16 number as code * s, for every code of E2M1. A scale of E4M3 is
m * 2^e with m of 0 to 15, so sixteen pairs, one a lane, are all there are but for powers of two; a warp hands them out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dequantize import number, wide_scale

GROWN = tl.constexpr(2.0**32)  # what a sum of products with four-bit weights is multiplied by (where ASM)


@triton.jit
def weight_tile(pieces, scale, whole, dtype: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """pieces int16[ROWS, P], scale as stored [ROWS, G] -> [ROWS, P * PER]: the first codes of all pieces, then the
    second codes, and so on. `whole` points at the per-tensor scale. ASM: scale and dtype are such as GPUs see."""
    ROWS: tl.constexpr = pieces.shape[0]
    PIECES: tl.constexpr = pieces.shape[1]
    if FORMAT == "fp8":
        if ASM:
            a0, a1 = _e4m3_asm(pieces, spread(scale.to(tl.float32), ROWS, PIECES))
        else:
            wide = spread(wide_scale(scale, whole, FORMAT), ROWS, PIECES)
            a0 = _plain(pieces, 0, wide, scale.dtype, dtype, FORMAT)
            a1 = _plain(pieces, 8, wide, scale.dtype, dtype, FORMAT)
        return tl.reshape(tl.permute(tl.join(a0, a1), [0, 2, 1]), [ROWS, PIECES * 2])
    else:
        if not ASM:
            wide = spread(wide_scale(scale, whole, FORMAT), ROWS, PIECES)
            a0 = _plain(pieces, 0, wide, scale.dtype, dtype, FORMAT)
            a1 = _plain(pieces, 4, wide, scale.dtype, dtype, FORMAT)
            a2 = _plain(pieces, 8, wide, scale.dtype, dtype, FORMAT)
            a3 = _plain(pieces, 12, wide, scale.dtype, dtype, FORMAT)
        elif FORMAT == "int4":
            by, sixteenth, less = _factors(scale)
            by, sixteenth, less = spread(by, ROWS, PIECES), spread(sixteenth, ROWS, PIECES), spread(less, ROWS, PIECES)
            a0, a1, a2, a3 = _int4_asm(pieces, by, sixteenth, less)
        elif FORMAT == "mxfp4":
            a0, a1, a2, a3 = _e2m1_asm(pieces, spread(_power_of_two(scale), ROWS, PIECES))
        else:
            a0, a1, a2, a3 = _e2m1_split_asm(pieces, spread(_pair(scale, pairs_of(whole, FORMAT)), ROWS, PIECES))
        # [row, piece, high bit, low bit] of the place in a piece
        return tl.reshape(tl.permute(tl.join(tl.join(a0, a2), tl.join(a1, a3)), [0, 2, 3, 1]), [ROWS, PIECES * 4])


@triton.jit
def spread(values, ROWS: tl.constexpr, COLS: tl.constexpr):
    """values[ROWS, G] -> [ROWS, COLS], each column repeated."""
    GROUPS: tl.constexpr = values.shape[1]
    return tl.reshape(tl.broadcast_to(values[:, :, None], [ROWS, GROUPS, COLS // GROUPS]), [ROWS, COLS])


@triton.jit
def _plain(pieces, shift, wide, scale_dtype: tl.constexpr, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """The same in portable arithmetic, for scales and inputs that are not bfloat16 (the interpreter's tests)."""
    product = number(pieces.to(tl.int32), shift, FORMAT) * wide
    if FORMAT == "int4" or FORMAT == "fp8":
        product = product.to(scale_dtype)
    return product.to(dtype)


@triton.jit
def _power_of_two(exponent):
    """E8M0 -> bfloat16 2^94 times as large, infinity from 2^34 on."""
    field = tl.minimum(exponent.to(tl.int32), 161) + 94
    return (field << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def pairs_of(whole, FORMAT: tl.constexpr):
    """In lane m (of 16): the pair of m / whole, or of m * whole."""
    m = (_lane() & 15).to(tl.float32)
    if FORMAT == "nvfp4-divide":
        return split(_quotient(m, tl.load(whole)))
    else:
        return split(m * tl.load(whole))


@triton.jit
def _lane():
    return tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)


# An E4M3 scale m * 2^e and the sixteen pairs of a warp, one a lane -> that of m, and 2^e twice: registers m and e.
SCALE_PARTS = """
    .reg .b32 m, e;
    and.b32 m, {scale}, 7;
    or.b32 m, m, 8;
    min.u32 m, m, {scale};
    shr.u32 e, {scale}, 3;
    max.u32 e, e, 1;
    mad.lo.u32 e, e, 0x00800080, 0x69806980;
    shfl.sync.idx.b32 m, {pairs}, m, 31, -1;
    """
_PAIR = tl.constexpr(f"{{{SCALE_PARTS.format(scale='$1', pairs='$2')} mul.rn.bf16x2 $0, m, e; }}")


@triton.jit
def _pair(scale, pairs):
    """E4M3 (positive) -> the pair of scale / whole, 2^94 times as large: m's from the lane that has it, times 2^e."""
    return tl.inline_asm_elementwise(
        _PAIR,
        "=r,r,r",
        [scale.to(tl.int32), pairs],
        dtype=tl.int32,
        is_pure=False,  # in name only: the compiler would otherwise repeat it in every thread that needs the scale
        pack=1,
    )


@triton.jit
def _quotient(number, divisor):
    """number / divisor as float32 rounds it, for numbers of E4M3 and divisors of 2^-100 to 2^100: the rounded
    reciprocal and two steps with the remainder, which is exact (Markstein 1990)."""
    inverse = tl.div_rn(1.0, divisor)
    guess = number * inverse
    guess = tl.fma(tl.fma(-guess, divisor, number), inverse, guess)
    return tl.fma(tl.fma(-guess, divisor, number), inverse, guess)


@triton.jit
def _rounded(s):
    """A float32 number rounded to bfloat16 (nearest, ties to even), as float32: ten times the rate of a conversion."""
    bits = s.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def split(s):
    """float32 s -> two bfloat16 numbers, the low and the high half of an int32: high = bf16(s) and a correction low,
    such that 1.5 high + 1.5 low rounds to bf16(1.5 s).

    The difference r of that and 1.5 high is a small multiple of half a last place of high, and any low will do that is
    within 1/3 of a last place of r / 1.5 and does not reach half a last place, where high itself would change.
    """
    high = _rounded(s)
    r = _rounded(s * 1.5) - high * 1.5
    last_place = (high.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 0.0078125
    low = tl.minimum(tl.maximum(r * 0.6666667, last_place * -0.45), last_place * 0.45)
    pair = (low.to(tl.int32, bitcast=True) & -65536) | ((high.to(tl.int32, bitcast=True) >> 16) & 0xFFFF)
    # Impure in name only: the compiler would otherwise repeat all this in every thread that needs the scale.
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [pair], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _factors(scale):
    """A bfloat16 scale times 2^101, 2^97 and -2^-29 (Triton makes a bfloat16 constant that small zero)."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 by;
        mov.b16 by, 0x7200;
        mul.rn.bf16 $0, $3, by;
        mov.b16 by, 0x7000;
        mul.rn.bf16 $1, $3, by;
        mov.b16 by, 0xB100;
        mul.rn.bf16 $2, $3, by;
        }""",
        "=&h,=&h,=&h,h",
        [scale],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=1,
    )


_PLACES = (("0x000F000F", "0x1040"), ("0x00F000F0", "0x104"))  # of two codes in a word; what spreads their bits
_E2M1 = "and.b32 e, {word}, {mask}; mul.lo.u32 e, e, {spread}; and.b32 e, e, 0x81C081C0;"
_LINES = {
    "int4": "and.b32 e, {word}, {mask}; fma.rn.bf16x2 ${i}, e, ${by}, $7;",
    "mxfp4": _E2M1 + "mul.rn.bf16x2 ${i}, e, $5;",
    "nvfp4": _E2M1 + "mul.rn.bf16x2 ${i}, e, {low}; fma.rn.bf16x2 ${i}, e, {high}, ${i};",
}


def unpacking(kind: str, high: str = "", low: str = "", before: str = "") -> tl.constexpr:
    """Instructions: word $4 of eight codes -> $0.. $3, codes 0 and 4, 1 and 5, 2 and 6, 3 and 7, times

    int4    $5, codes 1, 3, 5, 7, four bits higher, times $6; added to $7, which is -8 times the scale
    mxfp4   $5
    nvfp4   the numbers `high` and `low`, which `before` may make
    """
    words = [(word, place) for word in ("$4", "u") for place in range(2)]
    lines = (
        _LINES[kind].format(
            i=i, word=word, mask=_PLACES[place][0], spread=_PLACES[place][1], by=5 + place, high=high, low=low
        )
        for i, (word, place) in enumerate(words)
    )
    return tl.constexpr("{ .reg .b32 u, e;" + before + "shr.b32 u, $4, 8;" + "".join(lines) + "}")


INT4 = unpacking("int4")
MXFP4 = unpacking("mxfp4")
_NVFP4 = unpacking(
    "nvfp4",
    "high",
    "low",
    ".reg .b32 high, low; prmt.b32 high, $5, $5, 0x1010; prmt.b32 low, $5, $5, 0x3232;",
)


@triton.jit
def _int4_asm(pieces, scale, sixteenth, less):
    return tl.inline_asm_elementwise(
        INT4,
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [pieces, scale, sixteenth, less],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _e2m1_asm(pieces, scale):
    return tl.inline_asm_elementwise(
        MXFP4,
        "=&r,=&r,=&r,=&r,r,r",
        [pieces, scale],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _e2m1_split_asm(pieces, pairs):
    return tl.inline_asm_elementwise(
        _NVFP4,
        "=&r,=&r,=&r,=&r,r,r,r",
        [pieces, pairs],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _e4m3_asm(pieces, scale):
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 l, h, c0, c1, c2, c3;
        .reg .b32 p;
        .reg .f32 f0, f1, f2, f3;
        mov.b32 {l, h}, $2;
        cvt.rn.f16x2.e4m3x2 p, l;
        mov.b32 {c0, c1}, p;
        cvt.rn.f16x2.e4m3x2 p, h;
        mov.b32 {c2, c3}, p;
        cvt.f32.f16 f0, c0;
        cvt.f32.f16 f1, c1;
        cvt.f32.f16 f2, c2;
        cvt.f32.f16 f3, c3;
        mul.rn.f32 f0, f0, $3;
        mul.rn.f32 f1, f1, $3;
        mul.rn.f32 f2, f2, $4;
        mul.rn.f32 f3, f3, $4;
        cvt.rn.bf16x2.f32 $0, f2, f0;
        cvt.rn.bf16x2.f32 $1, f3, f1;
        }""",
        "=&r,=&r,r,r,r",
        [pieces, scale],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )
