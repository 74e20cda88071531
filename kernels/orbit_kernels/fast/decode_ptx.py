# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are tensors and constants, which Python types do not describe)
"""What `decode_nvfp4` does in instructions of its own, because Gluon has no words for it or would choose others."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def factors(code, pairs):
    """An E4M3 scale -> the high and the low number of its quotient, each twice in a word. See `unpack._pair`."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 m, e;
        and.b32 m, $2, 7;
        or.b32 m, m, 8;
        min.u32 m, m, $2;
        shr.u32 e, $2, 3;
        max.u32 e, e, 1;
        mad.lo.u32 e, e, 0x00800080, 0x69806980;
        shfl.sync.idx.b32 m, $3, m, 31, -1;
        mul.rn.bf16x2 m, m, e;
        prmt.b32 $0, m, m, 0x1010;
        prmt.b32 $1, m, m, 0x3232;
        }""",
        "=&r,=&r,r,r",
        [code, pairs],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


def _instructions() -> str:
    """Word $4 of eight E2M1 codes -> four pairs, times the factors $5 and $6."""
    pairs = (
        f"and.b32 e, {word}, {mask}; mul.lo.u32 e, e, {spread}; and.b32 e, e, 0x81C081C0;"
        f"mul.rn.bf16x2 ${i}, e, $6; fma.rn.bf16x2 ${i}, e, $5, ${i};"
        for i, (word, mask, spread) in enumerate(
            (word, *place) for word in ("$4", "u") for place in (("0x000F000F", "0x1040"), ("0x00F000F0", "0x104"))
        )
    )
    return "{ .reg .b32 u, e; shr.b32 u, $4, 8;" + "".join(pairs) + "}"


_INSTRUCTIONS = gl.constexpr(_instructions())


@gluon.jit
def eight(word, high, low):
    """A word of eight codes -> weights (0, 4), (1, 5), (2, 6), (3, 7)."""
    return gl.inline_asm_elementwise(
        _INSTRUCTIONS,
        "=&r,=&r,=&r,=&r,r,r,r",
        [word, high, low],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def multiply(first, second, x, acc):
    """Two products of 16 columns: the left operands' four registers each, the right ones' two and two."""
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
