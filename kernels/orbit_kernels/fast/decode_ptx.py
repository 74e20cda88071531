# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are tensors and constants, which Python types do not describe)
"""What `decode_wave` and `decode_rows` do in instructions of their own, because Gluon has no words for it or would
choose others.

The arithmetic of weights is that of `unpack`, in whose words a `word` is eight codes of four bits; it comes out as
columns (0, 4), (1, 5), (2, 6), (3, 7), times 2^-32. Eight codes of FP8 are two words, and come out as they are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .unpack import INT4, MXFP4, SCALE_PARTS, unpacking

_NVFP4 = unpacking("nvfp4", high="$5", low="$6")
_NVFP4_FACTORS = gl.constexpr(
    f"""{{{SCALE_PARTS.format(scale="$2", pairs="$3")}
    mul.rn.bf16x2 m, m, e;
    prmt.b32 $0, m, m, 0x1010;
    prmt.b32 $1, m, m, 0x3232;
    }}"""
)

_TWO_OF_E4M3 = """
    mov.b32 {{low, high}}, {halves};
    cvt.f32.f16 f, low;
    cvt.f32.f16 g, high;
    mul.rn.f32 f, f, $6;
    mul.rn.f32 g, g, $6;
    cvt.rn.bf16x2.f32 {weights}, g, f;"""


def _e4m3() -> gl.constexpr:
    """Instructions: words $4 and $5 of four codes each -> $0.. $3, neighbours, times $6. See `unpack._e4m3_asm`."""
    lines = ".reg .b16 first, second, low, high; .reg .b32 p, q; .reg .f32 f, g;"
    for word in range(2):
        lines += f"mov.b32 {{first, second}}, ${4 + word};"
        lines += "cvt.rn.f16x2.e4m3x2 p, first; cvt.rn.f16x2.e4m3x2 q, second;"
        lines += _TWO_OF_E4M3.format(halves="p", weights=f"${2 * word}")
        lines += _TWO_OF_E4M3.format(halves="q", weights=f"${2 * word + 1}")
    return gl.constexpr(f"{{{lines}}}")


_E4M3 = _e4m3()


@gluon.jit
def factors(bits, pairs, HALF: gl.constexpr, FORMAT: gl.constexpr):
    """What the codes of a half of a thread's columns are multiplied by; `bits` are their scale or two, as stored, or
    FP8's as float32."""
    if FORMAT == "int4":
        return _int4_factors(bits)
    elif FORMAT == "mxfp4":
        return ((gl.minimum(bits & 0xFF, 161) + 94) * 0x00800080,)
    elif FORMAT == "fp8":
        return (bits,)
    else:
        return _nvfp4_factors((bits >> HALF * 8) & 0xFF, pairs)


@gluon.jit
def _int4_factors(scale):
    """Twice in a word each: the scale times 2^101, times 2^97, times -2^-29. See `unpack._factors`."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 s, by;
        prmt.b32 s, $3, $3, 0x1010;
        mov.b32 by, 0x72007200;
        mul.rn.bf16x2 $0, s, by;
        mov.b32 by, 0x70007000;
        mul.rn.bf16x2 $1, s, by;
        mov.b32 by, 0xB100B100;
        mul.rn.bf16x2 $2, s, by;
        }""",
        "=&r,=&r,=&r,r",
        [scale],
        dtype=(gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _nvfp4_factors(code, pairs):
    """An E4M3 scale -> the high and the low number of its quotient, each twice in a word. See `unpack._pair`."""
    return gl.inline_asm_elementwise(
        _NVFP4_FACTORS,
        "=&r,=&r,r,r",
        [code, pairs],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def eight(word, by, FORMAT: gl.constexpr):
    """A word of eight codes, by `factors` -> weights (0, 4), (1, 5), (2, 6), (3, 7). Of FP8 two words -> neighbours."""
    if FORMAT == "int4":
        return gl.inline_asm_elementwise(
            INT4,
            "=&r,=&r,=&r,=&r,r,r,r,r",
            [word, by[0], by[1], by[2]],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    elif FORMAT == "mxfp4":
        return gl.inline_asm_elementwise(
            MXFP4,
            "=&r,=&r,=&r,=&r,r,r",
            [word, by[0]],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    elif FORMAT == "fp8":
        return gl.inline_asm_elementwise(
            _E4M3,
            "=&r,=&r,=&r,=&r,r,r,r",
            [word[0], word[1], by[0]],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return gl.inline_asm_elementwise(
            _NVFP4,
            "=&r,=&r,=&r,=&r,r,r,r",
            [word, by[0], by[1]],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )


@gluon.jit
def multiply(first, second, x, acc, other):
    """Two products of 16 columns, added to two sums, so that the second need not wait for the first: the left operands'
    four registers each, the right ones' two and two."""
    return gl.inline_asm_elementwise(
        """
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$16, $17}, {$20, $21, $22, $23};
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {$4, $5, $6, $7}, {$12, $13, $14, $15}, {$18, $19}, {$24, $25, $26, $27};
        """,
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f,f,f,f,f",
        [first, second, x, acc, other],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def multiply_in_turn(first, second, x, acc):
    """The same two products, added to one sum."""
    return gl.inline_asm_elementwise(
        """
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$12, $13}, {$16, $17, $18, $19};
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$14, $15}, {$0, $1, $2, $3};
        """,
        "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
        [first, second, x, acc],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def prefetch(at, size):
    """Asks for `size` bytes (a multiple of 16, or none) from each address to come to the L2 cache."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred some;
        setp.gt.s32 some, $2, 0;
        @some cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [at.to(gl.int64), size],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def paired(words):
    """Columns (0, 1), (2, 3), (4, 5), (6, 7) -> (0, 4), (1, 5), (2, 6), (3, 7)."""
    return gl.inline_asm_elementwise(
        """
        prmt.b32 $0, $4, $6, 0x5410;
        prmt.b32 $1, $4, $6, 0x7632;
        prmt.b32 $2, $5, $7, 0x5410;
        prmt.b32 $3, $5, $7, 0x7632;
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [words],
        dtype=gl.int32,
        is_pure=True,
        pack=4,
    )


def _receiving() -> str:
    """Loads $0..$15 from four addresses, $16..$19, of which the first $20 count and none where $21 is 0, until no word
    is all ones. The warp goes on together."""
    words = range(16)
    clear = "".join(f"mov.b32 ${i}, 0;" for i in words)
    there = "".join(f"setp.gt.and.s32 p{i}, $20, {i}, there;" for i in range(4))
    loads = "".join(
        f"@p{i} ld.relaxed.gpu.global.v4.b32 {{${4 * i}, ${4 * i + 1}, ${4 * i + 2}, ${4 * i + 3}}}, [${16 + i}];"
        for i in range(4)
    )
    looks = "setp.eq.u32 absent, $0, 0xFFFFFFFF;"
    looks += "".join(f"setp.eq.or.u32 absent, ${i}, 0xFFFFFFFF, absent;" for i in words[1:])
    return (
        "{ .reg .pred there, p0, p1, p2, p3, absent; setp.ne.u32 there, $21, 0;"
        f"{clear}{there} again: {loads}{looks} @absent bra again; bar.warp.sync 0xffffffff; }}"
    )


_RECEIVING = gl.constexpr(_receiving())


@gluon.jit
def receive(first, second, third, fourth, count, when):
    """16 bytes from each of four addresses, of which `count` are meant, as soon as all have been written: sixteen
    int32, zeros for what is not meant. Not written is what is all ones, a NaN that no instruction makes."""
    return gl.inline_asm_elementwise(
        _RECEIVING,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,l,l,l,r,r,~{memory}",
        [first.to(gl.int64), second.to(gl.int64), third.to(gl.int64), fourth.to(gl.int64), count, when],
        dtype=(
            gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32,
            gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32,
        ),
        is_pure=False,
        pack=1,
    )  # fmt: skip
