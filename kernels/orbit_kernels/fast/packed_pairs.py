# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Two neighbouring packed elements -> bfloat16, two in a register, with the bits of `dequantize`.

int4    Their byte goes to the low end of both halves of a register, and a mask leaves one code in each: the
        bfloat16 numbers low * 2^-133 and high * 2^-129 (subnormals are numbers too). A fused product with 2^127
        makes them (low - 8) / 64 and (high - 8) / 4, exactly, and the scale, times 64 and 4, gives the weight with
        its one rounding (scales below 2^121; larger ones overflow).
e2m1    Each code goes to bits 7..4 of its half and its sign to the byte above. Two bits further up, and masked,
        sign and magnitude lie where bfloat16 has them: the number code * 2^-126.
        MXFP4: times 2^125, times 2^(scale - 126): exact (scales up to 2^126, all that a weight can have).
        NVFP4: the sum of two products, with the words of `nvfp4_lookup`.
e4m3    The hardware's conversion to float16, then the product in float32, rounded as `dequantize` does.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _straight_and_turned(numbers: str) -> tuple[gl.constexpr, gl.constexpr]:
    """The code that leaves two numbers in register a: as it is, and passing them on to where the transpose has them."""
    ends = ("mov.b32 $0, a;", "movmatrix.sync.aligned.m8n8.trans.b16 $0, a;")
    straight, turned = (gl.constexpr(f"{{\n    .reg .b32 a;{numbers}{end}\n    }}") for end in ends)
    return straight, turned


# $1, $2 are the words of two neighbours, $3, $4 the selectors of their places, $5, $6 their scales
_INT4, _INT4_TURNED = _straight_and_turned("""
    .reg .b32 lift, less;
    mov.b32 lift, 0x7F007F00;
    mov.b32 less, 0xC000BE00;
    prmt.b32 a, $1, 0, $3;
    and.b32 a, a, 0x00F0000F;
    fma.rn.bf16x2 a, a, lift, less;
    mul.rn.bf16x2 a, a, $5;
    """)
_E2M1 = """
    shl.b32 a, $1, 4;
    prmt.b32 a, a, $1, $3;
    shl.b32 a, a, 2;
    and.b32 a, a, 0x81C081C0;"""
_MXFP4, _MXFP4_TURNED = _straight_and_turned(f"""
    .reg .b32 lift;
    mov.b32 lift, 0x7E007E00;{_E2M1}
    mul.rn.bf16x2 a, a, lift;
    mul.rn.bf16x2 a, a, $5;
    """)
_NVFP4, _NVFP4_TURNED = _straight_and_turned(f"""
    .reg .b32 high, low;
    mov.b64 {{high, low}}, $5;{_E2M1}
    mul.rn.bf16x2 low, a, low;
    fma.rn.bf16x2 a, a, high, low;
    """)
# $1, $2 the first words of their eights, $3, $4 the second, $5, $6 selectors, $7, $8 scales
_FP8, _FP8_TURNED = _straight_and_turned("""
    .reg .b16 both, none, half0, half1;
    .reg .f32 f0, f1;
    prmt.b32 a, $1, $3, $5;
    mov.b32 {both, none}, a;
    cvt.rn.f16x2.e4m3x2 a, both;
    mov.b32 {half0, half1}, a;
    cvt.f32.f16 f0, half0;
    cvt.f32.f16 f1, half1;
    mul.rn.f32 f0, f0, $7;
    mul.rn.f32 f1, f1, $8;
    cvt.rn.bf16x2.f32 a, f1, f0;
    """)


@gluon.jit
def unpack(words, place, scale, FORMAT: gl.constexpr, TURNED: gl.constexpr):
    """Tensors of one layout, element by element: the word it lies in (fp8: the two words of its eight), its place
    (0..7) among eight, its scale as `packed_scales` has it. Neighbours must lie in one thread."""
    if FORMAT == "int4":
        return _two(_INT4_TURNED if TURNED else _INT4, "=r,r,r,r,r,r,r", [words, place // 2 * 0x0101 + 0x4040, scale])
    elif FORMAT == "fp8":
        operands = [words[0], words[1], place * 0x11 + 0x10, scale]
        return _two(_FP8_TURNED if TURNED else _FP8, "=r,r,r,r,r,r,r,r,r", operands)
    else:
        operands = [words, place // 2 * 0x1111 + 0xC480, scale]
        if FORMAT == "mxfp4":
            return _two(_MXFP4_TURNED if TURNED else _MXFP4, "=r,r,r,r,r,r,r", operands)
        else:
            return _two(_NVFP4_TURNED if TURNED else _NVFP4, "=r,r,r,r,r,l,l", operands)


@gluon.jit
def _two(code: gl.constexpr, constraints: gl.constexpr, operands):
    return gl.inline_asm_elementwise(code, constraints, operands, dtype=gl.bfloat16, is_pure=True, pack=2)
