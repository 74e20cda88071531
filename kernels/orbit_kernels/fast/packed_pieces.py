# mypy: disable-error-code="no-untyped-def, assignment"
# (the parameters of a Triton kernel are pointers and constants, its tuples change their length)
"""Packed codes -> bfloat16 in the very registers from which Hopper's tensor core reads W, straight or turned.

Codes come in eights: of 4 bits one word, of 8 bits two. A thread has two neighbouring elements of each.
Turned, outputs are columns of W. A thread unpacks the same two neighbours, and `movmatrix` hands each eight by eight
weights, transposed, to the threads where the tensor core wants them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .packed_pairs import unpack
from .packed_scales import of_ring

STEP = 64  # of the sum at a time
WARPS = 8  # that unpack and multiply
DEEP = 32  # of the sum that is unpacked together
# of a step, because two sets of registers take turns: with one, the next piece would be written over the one that the
# tensor core still reads, and the assembler does not notice
PIECES = gl.constexpr(STEP // DEEP)


@gluon.jit
def _there(values, layout: gl.constexpr):
    """The same elements in the same registers, under another name of the layout."""
    return gl.convert_layout(values, layout, assert_trivial=True)


@gluon.jit
def _repeated(values, times: gl.constexpr, layout: gl.constexpr):
    """values[rows, columns] -> [rows, columns * times], each column repeated."""
    ROWS: gl.constexpr = values.shape[0]
    COLUMNS: gl.constexpr = values.shape[1]
    wide = gl.expand_dims(values, 2).broadcast_to([ROWS, COLUMNS, times])
    return _there(gl.reshape(wide, [ROWS, COLUMNS * times]), layout)


@gluon.jit
def _words_of(words, FORMAT: gl.constexpr, eights: gl.constexpr, layout: gl.constexpr):
    """words[rows, words of a row] -> for each element its word, or its two words."""
    if FORMAT == "fp8":
        ROWS: gl.constexpr = words.shape[0]
        EIGHTS: gl.constexpr = words.shape[1] // 2
        first, second = gl.split(gl.reshape(words, [ROWS, EIGHTS, 2]))
        return _repeated(_there(first, eights), 8, layout), _repeated(_there(second, eights), 8, layout)
    else:
        return _repeated(words, 8, layout)


@gluon.jit
def words_of_piece(words, i, TURNED: gl.constexpr, loaded: gl.constexpr):
    """What a thread unpacks of a piece of a step's words in shared memory."""
    ALONG: gl.constexpr = 0 if TURNED else 1
    DEEP: gl.constexpr = words.shape[ALONG] // PIECES
    return words.slice(i * DEEP, DEEP, dim=ALONG).load(loaded)


@gluon.jit
def words_of_step(words, TURNED: gl.constexpr, loaded: gl.constexpr):
    """The same of all its pieces."""
    pieces = ()
    for i in gl.static_range(PIECES):
        pieces = pieces + (words_of_piece(words, i, TURNED, loaded),)  # noqa: RUF005 (Gluon knows no star)
    return pieces


@gluon.jit
def _among_eight(WIDE: gl.constexpr, layout: gl.constexpr):
    return gl.expand_dims(gl.arange(0, WIDE, layout=gl.SliceLayout(0, layout)) % 8, 0)


@gluon.jit
def piece_of(
    words, scale, FORMAT: gl.constexpr, left: gl.constexpr, eights: gl.constexpr, scales3: gl.constexpr,
):  # fmt: skip
    """words[OUTS, ..] of DEEP elements a row, scales of `halves` -> W[OUTS, DEEP]."""
    OUTS: gl.constexpr = words.shape[0]
    DEEP: gl.constexpr = words.shape[1] * (4 if FORMAT == "fp8" else 8)
    word = _words_of(words, FORMAT, eights, left)
    place = _among_eight(DEEP, left).broadcast_to([OUTS, DEEP])
    if len(scale.shape) > 1:
        wide = _repeated(gl.convert_layout(scale, gl.SliceLayout(2, scales3)), DEEP // scale.shape[1], left)
    else:
        wide = gl.expand_dims(scale, 1).broadcast_to([OUTS, DEEP])
    return unpack(word, place, wide, FORMAT, False)


@gluon.jit
def turned_piece_of(
    words, scales, lookup, odd, FORMAT: gl.constexpr, left: gl.constexpr, eights: gl.constexpr, scales3: gl.constexpr,
    stored: gl.constexpr, fetched: gl.constexpr,
):  # fmt: skip
    """words[DEEP, ..] of OUTS elements a row and scales[DEEP, ..] in shared memory (FP8: scales[OUTS / 128] in
    registers) -> W^T[OUTS, DEEP]."""
    DEEP: gl.constexpr = words.shape[0]
    OUTS: gl.constexpr = words.shape[1] * (4 if FORMAT == "fp8" else 8)
    word = _words_of(words, FORMAT, eights, stored)
    if FORMAT == "fp8":
        scale = gl.expand_dims(scales, 0).broadcast_to([DEEP, scales.shape[0]])
        wide = _repeated(scale, OUTS // scales.shape[0], stored)
    else:
        scale = of_ring(scales, lookup, odd, FORMAT, stored, scales3, fetched)
        if len(scale.shape) > 1:
            wide = _repeated(scale, OUTS // scale.shape[1], stored)
        else:
            wide = gl.expand_dims(scale, 1).broadcast_to([DEEP, OUTS])
    place = _among_eight(OUTS, stored).broadcast_to([DEEP, OUTS])
    weight = unpack(word, place, wide, FORMAT, True)  # in each eight by eight, rows and columns have changed places
    weight = gl.reshape(weight, [DEEP // 8, 8, OUTS // 8, 8]).permute([2, 1, 0, 3])
    return _there(gl.reshape(weight, [OUTS, DEEP]), left)


@cache
def layouts(block: int, short: int, outs: int, kind: str, group: int, turned: bool) -> dict[str, Any]:
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

    eights = gl.SliceLayout(2, apart(8))
    stored = [[list(each) for each in level] for level in (registers, lanes, warps)]
    return {
        "product": product, "left": left, "short_product": short_product, "short_left": short_left,
        "loaded": _two_words([registers, lanes, warps], [high, wide // 4]) if kind == "fp8" else eights,
        "eights": eights, "scales3": apart(min(group, outs if turned else DEEP)),
        "stored": gl.DistributedLinearLayout(*stored, [], [high, wide]),
        "fetched": _fetched(outs, turned) if kind.startswith("nvfp4") else eights,
    }  # fmt: skip


def _two_words(levels: list[list[tuple[int, int]]], shape: list[int]) -> Any:
    """FP8's words, two for each eight columns, of which a thread has both; from the levels of a layout of elements."""
    registers, lanes, warps = ([[row, column // 8 * 2] for row, column in level] for level in levels)
    return gl.DistributedLinearLayout([[0, 1], *filter(any, registers)], lanes, warps, [], shape)


def _fetched(outs: int, turned: bool) -> Any:
    """NVFP4's scales of a piece when each of four threads has a quarter of what they share: two rows, two groups;
    turned, four rows."""
    lanes = [[1, 0], [2, 0], [4, 0]]
    if turned:
        registers, warps = [[0, 8]] * (outs == 256), [[0, 1], [0, 2], [0, 4]]
        return gl.DistributedLinearLayout(registers, [[8, 0], [16, 0], *lanes], warps, [], [DEEP, outs // 16])
    registers, warps = [[128, 0]] * (outs == 256), [[16, 0], [32, 0], [64, 0]]
    return gl.DistributedLinearLayout(registers, [[0, 1], [8, 0], *lanes], warps, [], [outs, DEEP // 16])
