# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Packed INT4 -> bfloat16 in the very registers from which Hopper's tensor core reads W, straight or turned.

Unpacking two codes takes four instructions. Their byte goes to the low end of both halves of a register, and a mask
leaves one code in each: the bfloat16 numbers low * 2^-133 and high * 2^-129 (subnormals are numbers too). A fused
product with 2^127 makes them (low - 8) / 64 and (high - 8) / 4, exactly, and the scale, times 64 and 4, gives the
weight with its one rounding: the bits of `dequantize` (for scales below 2^121; larger ones overflow).

Turned, outputs are columns of W. A thread unpacks the same two neighbours, and `movmatrix` hands each eight by eight
weights, transposed, to the threads where the tensor core wants them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

STEP = 64  # of the sum at a time
WARPS = 8  # that unpack and multiply
DEEP = 32  # of the sum that is unpacked together

_NUMBERS = """{
    .reg .b32 a, lift, less;
    mov.b32 lift, 0x7F007F00;
    mov.b32 less, 0xC000BE00;
    prmt.b32 a, $1, 0, $3;
    and.b32 a, a, 0x00F0000F;
    fma.rn.bf16x2 a, a, lift, less;
    """
_UNPACK = gl.constexpr(
    f"""{_NUMBERS}mul.rn.bf16x2 $0, a, $5;
    }}"""
)
_UNPACK_TURNED = gl.constexpr(
    f"""{_NUMBERS}mul.rn.bf16x2 a, a, $5;
    movmatrix.sync.aligned.m8n8.trans.b16 $0, a;
    }}"""
)


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
def _unpack(word, place, pair, TURNED: gl.constexpr):
    """Two neighbouring elements at a time: their word, twice, and `place`, the places (0..7) of their codes in it."""
    return gl.inline_asm_elementwise(
        _UNPACK_TURNED if TURNED else _UNPACK,
        "=r,r,r,r,r,r,r",
        [word, place // 2 * 0x0101 + 0x4040, pair],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _there(values, layout: gl.constexpr):
    """The same elements in the same registers, under another name of the layout."""
    return gl.convert_layout(values, layout, assert_trivial=True)


@gluon.jit
def piece_of(words, pair, left: gl.constexpr, words3: gl.constexpr):
    """words[OUTS, DEEP / 8] in shared memory, scales[OUTS] in registers -> W[OUTS, DEEP]."""
    OUTS: gl.constexpr = words.shape[0]
    DEEP: gl.constexpr = words.shape[1] * 8
    word = gl.expand_dims(words.load(gl.SliceLayout(2, words3)), 2)
    word = _there(gl.reshape(word.broadcast_to([OUTS, DEEP // 8, 8]), [OUTS, DEEP]), left)
    place = gl.expand_dims(gl.arange(0, DEEP, layout=gl.SliceLayout(0, left)) % 8, 0).broadcast_to([OUTS, DEEP])
    return _unpack(word, place, gl.expand_dims(pair, 1).broadcast_to([OUTS, DEEP]), False)


@gluon.jit
def turned_piece_of(
    words, scales, odd, left: gl.constexpr, words3: gl.constexpr, scales3: gl.constexpr, stored: gl.constexpr
):
    """words[DEEP, OUTS / 8] and scales[DEEP, groups] in shared memory (or pairs of scales[DEEP]) -> W^T[OUTS, DEEP]."""
    DEEP: gl.constexpr = words.shape[0]
    OUTS: gl.constexpr = words.shape[1] * 8
    word = gl.expand_dims(words.load(gl.SliceLayout(2, words3)), 2)
    word = _there(gl.reshape(word.broadcast_to([DEEP, OUTS // 8, 8]), [DEEP, OUTS]), stored)
    if len(scales.shape) > 1:
        GROUPS: gl.constexpr = scales.shape[1]
        bits = scales.load(gl.SliceLayout(2, scales3)).to(gl.int16, bitcast=True).to(gl.int32)
        pair = gl.expand_dims(scale_pair(bits), 2).broadcast_to([DEEP, GROUPS, OUTS // GROUPS])
        pair = _there(gl.reshape(pair, [DEEP, OUTS]), stored)
    else:
        pair = scale_pair(scales.load(gl.SliceLayout(1, stored)) >> (odd * 16))
        pair = gl.expand_dims(pair, 1).broadcast_to([DEEP, OUTS])
    place = gl.expand_dims(gl.arange(0, OUTS, layout=gl.SliceLayout(0, stored)) % 8, 0).broadcast_to([DEEP, OUTS])
    weight = _unpack(word, place, pair, True)  # in each eight by eight, rows and columns have changed places
    weight = gl.reshape(weight, [DEEP // 8, 8, OUTS // 8, 8]).permute([2, 1, 0, 3])
    return _there(gl.reshape(weight, [OUTS, DEEP]), left)


@gluon.jit
def copy_scales(scales, target, high, column, K, GROUP: gl.constexpr):
    """The scales of STEP rows of W, of each group of the tile's columns; of one group alone with its neighbour's,
    because four bytes are the least that is copied."""
    STEP: gl.constexpr = target.shape[0]
    if len(target.shape) > 1:
        GROUPS: gl.constexpr = target.shape[1]
        layout: gl.constexpr = gl.BlockedLayout([1, GROUPS], [32, 1], [1, 1], [1, 0])
        n = high.to(gl.int64) + gl.arange(0, STEP, layout=gl.SliceLayout(1, layout))
        g = column // GROUP + gl.arange(0, GROUPS, layout=gl.SliceLayout(0, layout))
        source = scales + gl.expand_dims(n * (K // GROUP), 1) + gl.expand_dims(g, 0)
        async_copy.async_copy_global_to_shared(
            target, gl.max_contiguous(gl.multiple_of(source, [1, GROUPS * 2]), [1, GROUPS])
        )
    else:
        n = high.to(gl.int64) + gl.arange(0, STEP, layout=gl.BlockedLayout([1], [32], [1], [0]))
        pairs = scales.to(gl.pointer_type(gl.int32), bitcast=True)
        async_copy.async_copy_global_to_shared(target, pairs + n * (K // GROUP // 2) + column // GROUP // 2)


@gluon.jit
def scales_of(scale_at, step, STEP: gl.constexpr, GROUP: gl.constexpr):
    """For each output the scale of a step, or its two scales, in one word."""
    if GROUP < STEP:
        return gl.load(scale_at.to(gl.pointer_type(gl.int32), bitcast=True) + step)
    else:
        return gl.load(scale_at + step * STEP // GROUP).to(gl.int16, bitcast=True).to(gl.int32)


@cache
def layouts(block: int, short: int, outs: int, group: int, turned: bool) -> dict[str, Any]:
    """Where the tensor core wants W[outs, DEEP], and where its threads find words and scales for that."""
    product, short_product = (gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, rows, 16]) for rows in (block, short))
    left, short_left = (gl.DotOperandLayout(0, each, 2) for each in (product, short_product))
    # bit by bit, in W as stored [row, column]; turned, `movmatrix` then exchanges the low three bits of both
    registers = [(0, 1), (0, 8), (8, 0), (16, 0)] if turned else [(0, 1), (8, 0), (0, 8), (0, 16)]
    lanes = [(0, 2), (0, 4), (1, 0), (2, 0), (4, 0)]
    warps = [(0, 16), (0, 32), (0, 64)] if turned else [(16, 0), (32, 0), (64, 0)]
    if outs == 256:
        registers = [*registers, (0, 128) if turned else (128, 0)]
    high, wide = (DEEP, outs) if turned else (outs, DEEP)

    def apart(size: int) -> Any:
        """Rows of W cut into runs of `size`."""
        bases = [[[row, column // size, column % size] for row, column in level] for level in (registers, lanes, warps)]
        return gl.DistributedLinearLayout(*bases, [], [high, wide // size, size])

    stored = [[list(each) for each in level] for level in (registers, lanes, warps)]
    return {
        "product": product, "left": left, "short_product": short_product, "short_left": short_left,
        "words3": apart(8), "scales3": apart(min(group, outs)) if turned else left,
        "stored": gl.DistributedLinearLayout(*stored, [], [high, wide]),
    }  # fmt: skip
