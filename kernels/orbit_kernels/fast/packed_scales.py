# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""How the scales of each format come to the threads that unpack, and in which shape `packed_pairs` wants them.

    int4    bfloat16 s              -> s * 64 and s * 4, in one word
    mxfp4   exponent e, a byte      -> 2^(e - 126) twice, in one word
    nvfp4   E4M3, a byte            -> high twice and low twice, 64 bits, from `nvfp4_lookup`
    fp8     float32 or bfloat16 s   -> float32 s, of 128 by 128 elements

Straight, outputs are rows of W: a thread loads what its rows need for a step of the sum, a step ahead, and a word holds
all of a row. Turned, rows are steps: the copying warp brings the scales of a step beside its codes; but FP8's, one or
two a tile, are loaded a step ahead as well. The four threads that share a row look up a quarter of its NVFP4 scales
each (`fetched`) and pass them to each other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy


@gluon.jit
def scale_pair(bits):
    """The low 16 bits, a bfloat16 scale -> its products with 64 and with 4, in one word."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, by;
        mov.b32 by, 0x40804280;
        prmt.b32 a, $1, 0, 0x1010;
        mul.rn.bf16x2 $0, a, by;
        }""",
        "=r,r",
        [bits],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _power_pair(exponent):
    """E8M0 e -> the bfloat16 number 2^(e - 126), twice."""
    return exponent * 0x00800080 + 0x00800080


@gluon.jit
def ahead_of(
    scales, high, column, K, OUTS: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr,
    TURNED: gl.constexpr, left: gl.constexpr, scales3: gl.constexpr, fetched: gl.constexpr,
):  # fmt: skip
    """Pointers to the first scales of a tile: of each output [OUTS]; FP8 turned, of each 128 outputs."""
    if FORMAT == "fp8":
        if TURNED:
            block = column // GROUP + gl.arange(0, OUTS // GROUP, layout=gl.SliceLayout(0, gl.SliceLayout(2, scales3)))
            return scales + high // GROUP * (K // GROUP) + block
        else:
            n = high + gl.arange(0, OUTS, layout=gl.SliceLayout(1, left))
            return scales + n // GROUP * (K // GROUP)
    else:
        SHARED: gl.constexpr = FORMAT == "int4" or FORMAT == "mxfp4"
        n = high.to(gl.int64) + gl.arange(0, OUTS, layout=gl.SliceLayout(1, left if SHARED else fetched))
        return scales + n * (K // GROUP)


@gluon.jit
def _of_group(scale_at, group, K, FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr):
    """Of a group of at least STEP columns: for each output its scale."""
    if FORMAT == "fp8":
        return gl.load(scale_at + group * (K // GROUP if TURNED else 1)).to(gl.float32).to(gl.int32, bitcast=True)
    else:
        return gl.load(scale_at + group).to(gl.uint16, bitcast=True).to(gl.int32)


@gluon.jit
def _of_step(scale_at, step, K, STEP: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr):
    """What STEP columns need: for each output its scale, or all of them in one word."""
    if FORMAT == "mxfp4":
        return gl.load(scale_at.to(gl.pointer_type(gl.int16), bitcast=True) + step).to(gl.int32)
    elif GROUP < STEP:
        return gl.load(scale_at.to(gl.pointer_type(gl.int32), bitcast=True) + step)
    else:  # by a shift: a division that knows of no sign was a fifth of the loop
        return _of_group(scale_at, step if GROUP == STEP else step >> 1, K, FORMAT, GROUP, TURNED)


@gluon.jit
def of_place(
    scale_at, place, K, IN_PLACE: gl.constexpr, STEP: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr,
    TURNED: gl.constexpr,
):  # fmt: skip
    """The same for each STEP columns of a place, one or two of them."""
    if IN_PLACE == 1:
        return (_of_step(scale_at, place, K, STEP, FORMAT, GROUP, TURNED),)
    elif GROUP == IN_PLACE * STEP:
        both = _of_group(scale_at, place, K, FORMAT, GROUP, TURNED)
        return both, both
    elif FORMAT == "mxfp4":
        both = gl.load(scale_at.to(gl.pointer_type(gl.int32), bitcast=True) + place)
        return both, both >> 16
    else:
        first = _of_step(scale_at, 2 * place, K, STEP, FORMAT, GROUP, TURNED)
        return first, _of_step(scale_at, 2 * place + 1, K, STEP, FORMAT, GROUP, TURNED)


@gluon.jit
def halves(bits, lookup, STEP: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr, fetched: gl.constexpr):
    """The scales of a step's first and of its second 32 columns, for each output [OUTS]; NVFP4 for each output and 16
    columns [OUTS, 2], a quarter in each of the threads that share them."""
    if FORMAT == "int4":
        early = scale_pair(bits)
        return early, scale_pair(bits >> 16) if GROUP < STEP else early
    elif FORMAT == "mxfp4":
        return _power_pair(bits & 0xFF), _power_pair(bits >> 8 & 0xFF)
    elif FORMAT == "fp8":
        return bits, bits
    else:
        shift = gl.expand_dims(8 * gl.arange(0, 2, layout=gl.SliceLayout(0, fetched)), 0)
        bits = gl.expand_dims(bits, 1)
        return gl.load(lookup + (bits >> shift & 0xFF)), gl.load(lookup + (bits >> (shift + 16) & 0xFF))


@gluon.jit
def of_ring(scales, lookup, odd, FORMAT: gl.constexpr, stored: gl.constexpr, scales3: gl.constexpr,
            fetched: gl.constexpr):  # fmt: skip
    """scales[rows, groups] in shared memory (or, INT4, two neighbouring groups in a word [rows]) -> as `unpack` wants
    them: for each row and group, or for each row."""
    if FORMAT == "int4":
        if len(scales.shape) > 1:
            return scale_pair(scales.load(gl.SliceLayout(2, scales3)).to(gl.int16, bitcast=True).to(gl.int32))
        else:
            return scale_pair(scales.load(gl.SliceLayout(1, stored)) >> (odd * 16))
    elif FORMAT == "mxfp4":
        return _power_pair(scales.load(gl.SliceLayout(2, scales3)).to(gl.int32))
    else:
        words = gl.load(lookup + scales.load(fetched).to(gl.int32))
        return gl.convert_layout(words, gl.SliceLayout(2, scales3))


@gluon.jit
def copy(scales, target, high, column, K, GROUP: gl.constexpr):
    """The scales of STEP rows of W, of each group of the tile's columns; of one group alone with its neighbour's,
    because four bytes are the least that is copied."""
    STEP: gl.constexpr = target.shape[0]
    if len(target.shape) > 1:
        GROUPS: gl.constexpr = target.shape[1]
        BYTES: gl.constexpr = GROUPS * target.dtype.primitive_bitwidth // 8
        layout: gl.constexpr = gl.BlockedLayout([1, GROUPS], [32, 1], [1, 1], [1, 0])
        n = high.to(gl.int64) + gl.arange(0, STEP, layout=gl.SliceLayout(1, layout))
        g = column // GROUP + gl.arange(0, GROUPS, layout=gl.SliceLayout(0, layout))
        source = scales + gl.expand_dims(n * (K // GROUP), 1) + gl.expand_dims(g, 0)
        async_copy.async_copy_global_to_shared(
            target, gl.max_contiguous(gl.multiple_of(source, [1, BYTES]), [1, GROUPS])
        )
    else:
        n = high.to(gl.int64) + gl.arange(0, STEP, layout=gl.BlockedLayout([1], [32], [1], [0]))
        pairs = scales.to(gl.pointer_type(gl.int32), bitcast=True)
        async_copy.async_copy_global_to_shared(target, pairs + n * (K // GROUP // 2) + column // GROUP // 2)
