# mypy: disable-error-code="no-untyped-def, assignment"
# (the parameters of a Triton kernel are pointers and constants, its tuples change their length)
"""Weights of four bits for few tokens in one wave: y[M, N] = x[M, K] W^T for M of 1 to 64, INT4, MXFP4 and NVFP4, every
program an even share of W's bytes.

W is cut into units of 128 rows and 128 columns, counted along the rows of tiles, and each program takes as many as the
others, or one more, wherever tiles end. So no multiprocessor waits for another with more to do, whatever the shape. x
comes first, into shared memory; then each warp is alone with its 16 rows: no barrier stands in the loop. There is a
program a multiprocessor, small enough that the next launch's programs wait beside, with their first weights loaded.

A thread loads the 16 bytes that hold 32 neighbouring columns of a row, three units ahead, and they are unpacked where
the tensor core's operand wants them, by the arithmetic that `unpack` explains (the bits of `dequantize`, as W * 2^-32).
In which order a product adds its columns is free, so the operand's columns are named by who holds them: thread t of a
quad has columns 32 t to 32 t + 31, and a word of eight is half of the left operand of two products of 16 columns, in
pairs (0, 4), (1, 5), (2, 6), (3, 7). x is paired alike when it is put into shared memory, in the order in which threads
read it.

A tile's sums come from the programs that had a part of it, each float32 in the order of its columns; the one that had
the tile's end takes them from those before and adds them in order. They are handed over without a flag: a cell holds
all ones until its sum is written, and again as soon as it is read (`workspace.handed_over`). A program begins with
those columns whose sum it hands over, so that nobody who waits keeps others waiting. Cuts and order depend on N and K
alone, so a row has the same bits for every M and in every run.

A program starts early, and asks for its part of W to come to the L2 cache. Where W is known to be at rest (`at_rest`)
it also loads the first of it before the kernel ahead has ended; otherwise it reads nothing before.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..formats import PackedWeight
from .beside import overlapping
from .decode_ptx import eight, factors, multiply, paired, prefetch, receive
from .launching import aligned, as_read, barrier, of_four_bits
from .unpack import GROWN, pairs_of
from .workspace import handed_over

ROWS = 128  # of a unit
COLUMNS = 128
WARPS = 8
WAVE = 132  # programs, one a multiprocessor; a constant, so that bits do not depend on the card
MOST = 12  # units of a program


@gluon.constexpr_function
def _line(layout, at):
    """The layout of a vector along one axis of `layout`."""
    for other in reversed(range(layout.rank)):
        layout = layout if other == at else gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _axis(size: gl.constexpr, at: gl.constexpr, layout: gl.constexpr):
    """0 .. size - 1 along one axis of `layout`, all others of size 1."""
    RANK: gl.constexpr = layout.rank
    values = gl.arange(0, size, layout=_line(layout, at))
    for other in gl.static_range(RANK):
        if other != at:
            values = gl.expand_dims(values, other)
    return values


@gluon.jit
def _four(words, threads: gl.constexpr):
    """[warp, lane, 4] -> its four registers."""
    even, odd = gl.split(gl.reshape(words, [8, 32, 2, 2]))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return (
        gl.convert_layout(a, threads, assert_trivial=True),
        gl.convert_layout(b, threads, assert_trivial=True),
        gl.convert_layout(c, threads, assert_trivial=True),
        gl.convert_layout(d, threads, assert_trivial=True),
    )


@gluon.jit
def _operand(a, b, c, d, sums: gl.constexpr):
    """Four registers -> [warp, lane, 1, 4] in that order."""
    both = gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), [8, 32, 4])
    return gl.expand_dims(gl.convert_layout(both, gl.SliceLayout(2, sums), assert_trivial=True), 2)


@gluon.jit
def _sums(a, b, c, d, sums: gl.constexpr):
    """Four registers, each [warp, lane, tile] -> float32 [warp, lane, tile, 4]."""
    TILES: gl.constexpr = a.shape[2]
    both = gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), [8, 32, TILES, 4])
    return gl.convert_layout(both, sums, assert_trivial=True).to(gl.float32, bitcast=True)


@gluon.jit
def _load_x(x, unit, last, M, K: gl.constexpr, TOGETHER: gl.constexpr, TILES: gl.constexpr, copied: gl.constexpr):
    """x of TOGETHER units, as int32 of two columns: [unit, token, quarter of the columns, eight of it, two of them]."""
    token = _axis(8 * TILES, 1, copied)
    columns = _axis(4, 2, copied) * 16 + _axis(4, 3, copied) * 4 + _axis(4, 4, copied)
    unit += _axis(TOGETHER, 0, copied)
    at = x.to(gl.pointer_type(gl.int32), bitcast=True) + (token * (K // 2) + columns) + unit % (K // 128) * 64
    return gl.load(at, mask=(token < M) & (unit < last), other=0)


@gluon.jit
def _load_first_x(
    x, first, last, M, K: gl.constexpr, TOGETHER: gl.constexpr, AT_ONCE: gl.constexpr, TILES: gl.constexpr,
    copied: gl.constexpr,
):  # fmt: skip
    """AT_ONCE rounds of it, all on their way before one is waited for."""
    parts = ()
    for turn in gl.static_range(AT_ONCE):
        part = _load_x(x, first + turn * TOGETHER, last, M, K, TOGETHER, TILES, copied)
        parts = parts + (part,)  # noqa: RUF005 (Gluon knows no star)
    return parts


@gluon.jit
def _keep_x(x, place):
    """The same to shared memory, in the order in which threads read it: [unit, that, lane, tile, pair]."""
    TOGETHER: gl.constexpr = place.shape[0]
    TILES: gl.constexpr = place.shape[2]
    x = gl.reshape(paired(x), [TOGETHER, TILES, 8, 4, 4, 4]).permute([0, 4, 2, 3, 1, 5])
    place.store(gl.reshape(x, [TOGETHER, 128, TILES, 4]))


@gluon.jit
def _load_scales(scales, first, last, K: gl.constexpr, IN_ROW: gl.constexpr, SHARE: gl.constexpr):
    """What threads need of each unit's scales, as stored: their row's in the low half of a word, that of the row eight
    below in the high half. IN_ROW of them are a row of W."""
    STEPS: gl.constexpr = K // 128
    apart: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 1, 32], [1, 8, 1], [2, 1, 0])
    unit, lane = first + _axis(SHARE, 0, apart), _axis(32, 2, apart)
    row = unit // STEPS * 128 + _axis(8, 1, apart) * 16 + lane // 4
    at = scales + (row * IN_ROW + unit % STEPS * (IN_ROW // STEPS) + lane % 4 * (IN_ROW // STEPS) // 4)
    mask = (unit < last) & (row >= 0)
    below = gl.load(at + 8 * IN_ROW, mask=mask, other=0).to(gl.int32) << 16
    return gl.load(at, mask=mask, other=0).to(gl.int32) & 0xFFFF | below


@gluon.jit
def _load_words(word_at, unit, there, K: gl.constexpr):
    """What a thread needs of a unit, for its row and for that eight below, from where it would be in the first unit."""
    STEPS: gl.constexpr = K // 128
    words = word_at + (unit // STEPS * (16 * K) + unit % STEPS * 16)
    return gl.load(words, mask=there), gl.load(words + K, mask=there)


@gluon.jit
def _add_unit(acc, other, x_of_unit, words, words_below, bits, pairs, FORMAT: gl.constexpr, sums: gl.constexpr):
    """Two sums + the product of one unit, every second 16 columns to the one and to the other."""
    threads: gl.constexpr = bits.type.layout
    row, below = _four(words, threads), _four(words_below, threads)
    for half in gl.static_range(2):
        by = factors(bits & 0xFFFF, pairs, half, FORMAT)
        by_below = factors((bits >> 16) & 0xFFFF, pairs, half, FORMAT)
        for i in gl.static_range(half * 2, half * 2 + 2):
            a0, a1, a2, a3 = eight(row[i], by, FORMAT)
            b0, b1, b2, b3 = eight(below[i], by_below, FORMAT)
            x = x_of_unit.slice(i * 32, 32, dim=0).load(gl.SliceLayout(0, sums))
            acc, other = multiply(
                _operand(a0, b0, a1, b1, sums).broadcast_to(acc.shape),
                _operand(a2, b2, a3, b3, sums).broadcast_to(acc.shape),
                gl.expand_dims(x, 0).broadcast_to(acc.shape),
                acc,
                other,
            )
    return acc, other


@gluon.jit
def _begin(program, UNITS: gl.constexpr, PROGRAMS: gl.constexpr):
    """The first unit of a program."""
    return program * (UNITS // PROGRAMS) + gl.minimum(program, UNITS % PROGRAMS)


@gluon.jit
def _program_of(unit, UNITS: gl.constexpr, PROGRAMS: gl.constexpr):
    LEAST: gl.constexpr = UNITS // PROGRAMS
    MORE: gl.constexpr = UNITS % PROGRAMS
    return gl.maximum(unit // (LEAST + 1), (unit - MORE) // LEAST)


@gluon.jit
def _nth(i, first, last, ahead):
    """The units of a share in the order of work: its last `ahead` come first."""
    return gl.where(i < ahead, last - ahead + i, first + i - ahead)


@gluon.jit
def _cells(partial, part, like, sums: gl.constexpr):
    """Where the sums of a part of a tile are kept, in the order in which threads hold them."""
    TILES: gl.constexpr = like.shape[2]
    run = _axis(8, 0, sums) * TILES + _axis(TILES, 2, sums)
    return partial + part * (128 * 8 * TILES) + (run * 128 + _axis(32, 1, sums) * 4 + _axis(4, 3, sums))


@gluon.jit
def _finish(own, partial, first_part, parts, bias, y, tile, M, N: gl.constexpr, BIAS: gl.constexpr, sums: gl.constexpr):
    """Adds `parts` sums of programs before, in order, and this one's, and writes the tile."""
    TILES: gl.constexpr = own.shape[2]
    PART: gl.constexpr = 128 * 8 * TILES
    token = _axis(TILES, 2, sums) * 8 + _axis(32, 1, sums) % 4 * 2  # and the next
    cells: gl.constexpr = gl.SliceLayout(3, sums)
    cell = (_axis(8, 0, cells) * TILES + _axis(TILES, 2, cells)) * 128 + _axis(32, 1, cells) * 4
    when = (_axis(TILES, 2, cells) * 8 + _axis(32, 1, cells) % 4 * 2 < M).to(gl.int32) + cell * 0
    total = gl.full_like(own, 0.0)
    words = partial.to(gl.pointer_type(gl.int32), bitcast=True)
    for part in range(0, parts, 4):
        at = partial + (first_part + part) * PART + cell
        r = receive(at, at + PART, at + 2 * PART, at + 3 * PART, parts - part + cell * 0, when)
        total += _sums(r[0], r[1], r[2], r[3], sums)
        total += _sums(r[4], r[5], r[6], r[7], sums)
        total += _sums(r[8], r[9], r[10], r[11], sums)
        total += _sums(r[12], r[13], r[14], r[15], sums)
        for i in gl.static_range(4):
            taken = gl.full_like(own, 0).to(gl.int32) - 1
            gl.store(_cells(words, first_part + part + i, own, sums), taken, mask=(token < M) & (part + i < parts))
    total = (total + own) * GROWN
    e = _axis(4, 3, sums)
    out = tile * 128 + _axis(8, 0, sums) * 16 + (_axis(32, 1, sums) // 4 + e // 2 * 8)
    if BIAS:
        total += gl.load(bias + out).to(gl.float32)
    gl.store(y + ((token + e % 2) * N + out), total.to(y.dtype.element_ty), mask=token + e % 2 < M)


@gluon.jit
def _work(
    acc, other, words, s_ring, x_ring, partial, bias, y, unit, there, first, last, M, pairs,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, BIAS: gl.constexpr, UNITS: gl.constexpr,
    PROGRAMS: gl.constexpr, SLOTS: gl.constexpr, threads: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """One unit. Where a tile ends, it is finished; where the share ends, its sum is handed over."""
    STEPS: gl.constexpr = K // 128
    if there:
        row, below = words
        place = unit - first
        bits = s_ring.index(place).load(threads)
        acc, other = _add_unit(acc, other, x_ring.index(place), row, below, bits, pairs, FORMAT, sums)
        tile = unit // STEPS
        mine = gl.program_id(0) - _program_of(tile * STEPS, UNITS, PROGRAMS)  # which part of the tile
        if (unit + 1) % STEPS == 0:
            _finish(acc + other, partial, tile * SLOTS, mine, bias, y, tile, M, N, BIAS, sums)
            acc, other = gl.full_like(acc, 0.0), gl.full_like(acc, 0.0)
        elif unit + 1 == last:
            token = _axis(acc.shape[2], 2, sums) * 8 + _axis(32, 1, sums) % 4 * 2
            at = _cells(partial, tile * SLOTS + mine, acc, sums)
            gl.store(at, acc + other, mask=token < M, cache_modifier=".cg")
            acc, other = gl.full_like(acc, 0.0), gl.full_like(acc, 0.0)
    return acc, other


@gluon.jit(do_not_specialize=["M"])
def decode_wave_kernel(
    x, words, scales, whole, bias, y, partial, M,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    AT_REST: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr, SLOTS: gl.constexpr,
    TOGETHER: gl.constexpr, AT_ONCE: gl.constexpr,
    held: gl.constexpr, sums: gl.constexpr, copied: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = K // 128
    UNITS: gl.constexpr = N // 128 * STEPS
    SHARE: gl.constexpr = (UNITS + PROGRAMS - 1) // PROGRAMS
    ROUNDS: gl.constexpr = (SHARE + TOGETHER - 1) // TOGETHER
    RING: gl.constexpr = 3  # units of words on their way
    ROOM: gl.constexpr = 16 if SHARE > 8 else (8 if SHARE > 4 else 4)  # SHARE as a power of two
    IN_ROW: gl.constexpr = K // GROUP if FORMAT == "int4" else K // 32  # scales, of NVFP4 two at a time
    threads: gl.constexpr = gl.SliceLayout(2, held)
    program = gl.program_id(0)
    first, last = _begin(program, UNITS, PROGRAMS), _begin(program + 1, UNITS, PROGRAMS)
    ahead = gl.where(last // STEPS > first // STEPS, last % STEPS, 0)  # units of a tile that another program ends
    size = last - first
    warp, lane = _axis(8, 0, threads), _axis(32, 1, threads)

    # a tile's rows for the tile in which the share begins, and as many for the next
    ends = gl.minimum(last, (first // STEPS + 1) * STEPS)
    one = warp % 4 * 32 + lane
    begin = gl.where(warp < 4, first, ends)
    units = gl.where(warp < 4, ends - first, gl.minimum(last - ends, STEPS)) + one * 0
    prefetch(words + ((begin // STEPS * 128 + one) * (K // 8) + begin % STEPS * 16), units * 64)
    gdc_launch_dependents()
    if not AT_REST:
        gdc_wait()

    row, quarter = warp * 16 + lane // 4, lane % 4
    word_at = gl.expand_dims(words + (row * (K // 8) + quarter * 4), 2) + _axis(4, 2, held)
    s_ring = gl.allocate_shared_memory(gl.int32, [ROOM, 8, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    s_whole = s_ring._reinterpret(gl.int32, [ROOM, 8, 32], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    x_ring = gl.allocate_shared_memory(
        gl.int32, [ROUNDS * TOGETHER, 128, TILES, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 0, 1])
    )
    rounds = x_ring._reinterpret(
        gl.int32, [ROUNDS, TOGETHER, 128, TILES, 4], gl.SwizzledSharedLayout(1, 1, 1, [3, 1, 2, 0])
    )
    if not AT_REST:
        parts = _load_first_x(x, first, last, M, K, TOGETHER, AT_ONCE, TILES, copied)
    bits = _load_scales(scales, first, last, K, IN_ROW, ROOM)
    ring = (
        _load_words(word_at, _nth(0, first, last, ahead), size > 0, K),
        _load_words(word_at, _nth(1, first, last, ahead), size > 1, K),
        _load_words(word_at, _nth(2, first, last, ahead), size > 2, K),
    )
    pairs = row * 0
    if FORMAT != "int4" and FORMAT != "mxfp4":
        pairs += pairs_of(whole, FORMAT)
    s_whole.store(bits)
    if AT_REST:
        gdc_wait()
        parts = _load_first_x(x, first, last, M, K, TOGETHER, AT_ONCE, TILES, copied)
    for turn in gl.static_range(AT_ONCE):
        _keep_x(parts[turn], rounds.index(turn))
    for turn in gl.static_range(AT_ONCE, ROUNDS):
        part = _load_x(x, first + turn * TOGETHER, last, M, K, TOGETHER, TILES, copied)
        _keep_x(part, rounds.index(turn))
    barrier()

    acc = gl.zeros([8, 32, TILES, 4], gl.float32, sums)
    other = gl.zeros([8, 32, TILES, 4], gl.float32, sums)
    for i in range(0, size, RING):
        coming = ()
        for j in gl.static_range(RING):
            acc, other = _work(
                acc, other, ring[j], s_ring, x_ring, partial, bias, y, _nth(i + j, first, last, ahead), i + j < size,
                first, last, M, pairs, N, K, FORMAT, BIAS, UNITS, PROGRAMS, SLOTS, threads, sums,
            )  # fmt: skip
            words_of_unit = _load_words(word_at, _nth(i + RING + j, first, last, ahead), i + RING + j < size, K)
            coming = coming + (words_of_unit,)  # noqa: RUF005
        ring = coming


def cut(out: int, width: int) -> tuple[int, int]:
    """How many programs share the weight, and how many at most have a part of one tile."""
    steps = width // COLUMNS
    units = out // ROWS * steps
    programs = min(units, WAVE * triton.cdiv(units, WAVE * MOST))
    return programs, -(-steps // (units // programs)) + 1


@cache
def constants(out: int, width: int, tiles: int) -> dict[str, Any]:
    """How a product is cut, and which thread has what."""
    programs, slots = cut(out, width)
    share = triton.cdiv(out // ROWS * (width // COLUMNS), programs)
    fitting = [units for units in (16, 8, 4, 2, 1) if units * tiles <= 16 and -(-share // units) * units <= share + 1]
    return {
        "TILES": tiles,
        "PROGRAMS": programs,
        "SLOTS": slots,
        "TOGETHER": fitting[0],
        "AT_ONCE": max(1, min(-(-share // fitting[0]), 24 // (tiles * fitting[0]))),  # registers: 48 a thread
        "held": gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0]),
        "sums": gl.BlockedLayout([1, 1, tiles, 4], [1, 32, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0]),
        "copied": gl.BlockedLayout([1, 1, 1, 1, 4], [1, 2, 4, 4, 1], [1, WARPS, 1, 1, 1], [4, 2, 1, 3, 0]),
    }


def registers(tiles: int) -> int:
    """Of a thread. Up to 16 tokens so few that two programs lie on a multiprocessor, this launch's and the next's."""
    return 128 if tiles <= 2 else 255


def supports(packed: PackedWeight) -> bool:
    """Whether it is `of_four_bits` and units cover it."""
    out, width = packed.shape
    return of_four_bits(packed) and out % ROWS == 0 and width % 256 == 0


def decode_wave(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x[M, K] bf16 -> x W^T + bias [M, N] for M of 1 to 64 and what `supports` takes; x and bias contiguous."""
    tokens, (out, width) = x.shape[0], packed.shape
    words, scales, whole, kind, still = as_read(packed)
    tiles = max(1, triton.next_power_of_2(tokens) // 8)
    chosen = constants(out, width, tiles)
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    decode_wave_kernel[(chosen["PROGRAMS"],)](
        aligned(x), words, scales, whole, y if bias is None else bias, y,
        handed_over(out * chosen["SLOTS"] * tiles * 8, x.device), tokens,
        out, width, kind, packed.block[1], bias is not None, still, **chosen,
        num_warps=WARPS, maxnreg=registers(tiles), **overlapping(x),
    )  # fmt: skip
    return y
