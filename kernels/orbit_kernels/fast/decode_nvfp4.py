# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""NVFP4 for few tokens in one wave: y[M, N] = x[M, K] W^T for M of 1 to 64, every program an even share of W's bytes.

W is cut into units of 128 rows and 128 columns, counted along the rows of tiles, and each program takes as many as the
others, or one more, wherever tiles end. So no multiprocessor waits for another with more to do, whatever the shape. x
comes first, into shared memory; then each warp is alone with its 16 rows: no barrier stands in the loop.

A thread loads the 16 bytes that hold 32 neighbouring columns of a row, three units ahead, with their two scales, and
they are unpacked where the tensor core's operand wants them, by the arithmetic that `unpack` explains (the bits of
`dequantize`, as W * 2^-32). In which order a product adds its columns is free, so the operand's columns are named by
who holds them: thread t of a quad has columns 32 t to 32 t + 31, and a word of eight is half of the left operand of two
products of 16 columns, in pairs (0, 4), (1, 5), (2, 6), (3, 7). x is paired alike when it is put into shared memory, in
the order in which threads read it.

A tile's sums come from the programs that had a part of it, each float32 in the order of its columns; the one that had
the tile's end waits for those before (which began before it) and adds them in order. Cuts and order depend on N and K
alone, so a row has the same bits for every M and in every run.

As in `decode`, a program starts early, asks for its part of W to come to the L2 cache, and reads nothing before the
kernel ahead has ended.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..formats import PackedWeight
from .beside import await_count, overlapping
from .decode_ptx import eight, factors, multiply, paired, prefetch
from .dequantize import operands
from .launching import aligned, barrier
from .unpack import GROWN, pairs_of
from .workspace import arrival_counters

ROWS = 128  # of a unit
COLUMNS = 128
WARPS = 8
WAVE = 264  # programs: two a multiprocessor; a constant, so that bits do not depend on the card
MOST = 6  # units of a program


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
def _bring(x, x_ring, first, last, M, K: gl.constexpr, TOGETHER: gl.constexpr, copied: gl.constexpr):
    """x of units first..last to shared memory, TOGETHER units at a time, in the order in which threads read it."""
    STEPS: gl.constexpr = K // 128
    TILES: gl.constexpr = x_ring.shape[2]
    ROUNDS: gl.constexpr = x_ring.shape[0] // TOGETHER
    token = _axis(8 * TILES, 1, copied)
    columns = _axis(4, 2, copied) * 16 + _axis(4, 3, copied) * 4 + _axis(4, 4, copied)  # two each
    at = x.to(gl.pointer_type(gl.int32), bitcast=True) + (token * (K // 2) + columns)
    rounds = x_ring._reinterpret(
        gl.int32, [ROUNDS, TOGETHER, 128, TILES, 4], gl.SwizzledSharedLayout(1, 1, 1, [3, 1, 2, 0])
    )
    for i in gl.static_range(ROUNDS):
        unit = first + i * TOGETHER + _axis(TOGETHER, 0, copied)
        part = paired(gl.load(at + unit % STEPS * 64, mask=(token < M) & (unit < last), other=0))
        # [unit, eight tokens, of them, quarter of the columns, eight of the quarter, pair] -> [.., that, lane, ..]
        part = gl.reshape(part, [TOGETHER, TILES, 8, 4, 4, 4]).permute([0, 4, 2, 3, 1, 5])
        rounds.index(i).store(gl.reshape(part, [TOGETHER, 128, TILES, 4]))
    barrier()


@gluon.jit
def _load(word_at, scale_at, unit, last, K: gl.constexpr):
    """What a thread needs of a unit, for its row and for that eight below: words, words, two scales, two scales.

    It starts from where they would be in the first unit."""
    STEPS: gl.constexpr = K // 128
    there = unit < last
    tile, step = unit // STEPS, unit % STEPS
    words = word_at + (tile * (16 * K) + step * 16)
    scales = scale_at + (tile * (4 * K) + step * 4)
    return (
        gl.load(words, mask=there),
        gl.load(words + K, mask=there),
        gl.load(scales, mask=there),
        gl.load(scales + K // 4, mask=there),
    )


@gluon.jit
def _add_unit(
    acc, x_of_unit, words, words_below, scales, scales_below, pairs, threads: gl.constexpr, sums: gl.constexpr
):
    """acc + the product of one unit."""
    row, below = _four(words, threads), _four(words_below, threads)
    both, both_below = scales.to(gl.int32), scales_below.to(gl.int32)
    for half in gl.static_range(2):
        high, low = factors((both >> half * 8) & 0xFF, pairs)
        high_below, low_below = factors((both_below >> half * 8) & 0xFF, pairs)
        for i in gl.static_range(2):
            a0, a1, a2, a3 = eight(row[half * 2 + i], high, low)
            b0, b1, b2, b3 = eight(below[half * 2 + i], high_below, low_below)
            x = x_of_unit.slice((half * 2 + i) * 32, 32, dim=0).load(gl.SliceLayout(0, sums))
            acc = multiply(
                _operand(a0, b0, a1, b1, sums).broadcast_to(acc.shape),
                _operand(a2, b2, a3, b3, sums).broadcast_to(acc.shape),
                gl.expand_dims(x, 0).broadcast_to(acc.shape),
                acc,
            )
    return acc


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
def _cells(partial, part, like, sums: gl.constexpr):
    """Where the sums of a part of a tile are kept, in the order in which threads hold them."""
    TILES: gl.constexpr = like.shape[2]
    run = _axis(8, 0, sums) * TILES + _axis(TILES, 2, sums)
    return partial + part * (128 * 8 * TILES) + (run * 128 + _axis(32, 1, sums) * 4 + _axis(4, 3, sums))


@gluon.jit
def _work(
    acc, ring, x_ring, partial, word_at, scale_at, unit, first, last, pairs, kept,
    K: gl.constexpr, UNITS: gl.constexpr, PROGRAMS: gl.constexpr, SLOTS: gl.constexpr,
    threads: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """One unit, and its place taken by the third after it. Where a tile or the share ends, the sum is kept."""
    STEPS: gl.constexpr = K // 128
    if unit < last:
        words, words_below, scales, scales_below = ring
        acc = _add_unit(acc, x_ring.index(unit - first), words, words_below, scales, scales_below, pairs, threads, sums)
        if unit + 1 == last or (unit + 1) % STEPS == 0:
            tile = unit // STEPS
            part = tile * SLOTS + gl.program_id(0) - _program_of(tile * STEPS, UNITS, PROGRAMS)
            gl.store(_cells(partial, part, acc, sums), acc, mask=kept, cache_modifier=".cg")
            acc = gl.full_like(acc, 0.0)
    return acc, _load(word_at, scale_at, unit + 3, last, K)


@gluon.jit
def _finish(
    partial, first_part, parts, like, bias, y, tile, token, M, N: gl.constexpr, BIAS: gl.constexpr, sums: gl.constexpr
):
    """Adds the parts of a tile in order and writes it."""
    TILES: gl.constexpr = like.shape[2]
    AHEAD: gl.constexpr = 16 // TILES
    total = gl.full_like(like, 0.0)
    for part in range(0, parts, AHEAD):
        for i in gl.static_range(AHEAD):
            at = _cells(partial, first_part + part + i, like, sums)
            total += gl.load(at, mask=(token < M) & (part + i < parts), other=0.0, cache_modifier=".cg")
    total = total * GROWN
    e = _axis(4, 3, sums)
    out = tile * 128 + _axis(8, 0, sums) * 16 + (_axis(32, 1, sums) // 4 + e // 2 * 8)
    if BIAS:
        total += gl.load(bias + out).to(gl.float32)
    gl.store(y + ((token + e % 2) * N + out), total.to(y.dtype.element_ty), mask=token + e % 2 < M)


@gluon.jit(do_not_specialize=["M"])
def decode_nvfp4_kernel(
    x, words, scales, whole, bias, y, partial, arrivals, M,
    N: gl.constexpr, K: gl.constexpr, KIND: gl.constexpr, BIAS: gl.constexpr,
    TILES: gl.constexpr, PROGRAMS: gl.constexpr, SLOTS: gl.constexpr, TOGETHER: gl.constexpr,
    held: gl.constexpr, sums: gl.constexpr, copied: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = K // 128
    UNITS: gl.constexpr = N // 128 * STEPS
    SHARE: gl.constexpr = (UNITS + PROGRAMS - 1) // PROGRAMS
    threads: gl.constexpr = gl.SliceLayout(2, held)
    program = gl.program_id(0)
    first, last = _begin(program, UNITS, PROGRAMS), _begin(program + 1, UNITS, PROGRAMS)
    warp, lane = _axis(8, 0, threads), _axis(32, 1, threads)

    # a tile's rows for the tile in which the share begins, and as many for the next
    ends = gl.minimum(last, (first // STEPS + 1) * STEPS)
    one = warp % 4 * 32 + lane
    begin = gl.where(warp < 4, first, ends)
    size = gl.where(warp < 4, ends - first, gl.minimum(last - ends, STEPS)) + one * 0
    prefetch(words + ((begin // STEPS * 128 + one) * (K // 8) + begin % STEPS * 16), size * 64)
    gdc_launch_dependents()
    gdc_wait()

    row, quarter = warp * 16 + lane // 4, lane % 4
    word_at = gl.expand_dims(words + (row * (K // 8) + quarter * 4), 2) + _axis(4, 2, held)
    scale_at = scales + (row * (K // 32) + quarter)
    ring0 = _load(word_at, scale_at, first, last, K)
    ring1 = _load(word_at, scale_at, first + 1, last, K)
    ring2 = _load(word_at, scale_at, first + 2, last, K)
    pairs = gl.full_like(row, 0) + pairs_of(whole, KIND)
    x_ring = gl.allocate_shared_memory(
        gl.int32,
        [(SHARE + TOGETHER - 1) // TOGETHER * TOGETHER, 128, TILES, 4],
        gl.SwizzledSharedLayout(1, 1, 1, [2, 0, 1]),
    )
    _bring(x, x_ring, first, last, M, K, TOGETHER, copied)

    token = _axis(TILES, 2, sums) * 8 + _axis(32, 1, sums) % 4 * 2  # and the next
    kept = token < M
    acc = gl.zeros([8, 32, TILES, 4], gl.float32, sums)
    for unit in range(first, last, 3):
        acc, ring0 = _work(
            acc, ring0, x_ring, partial, word_at, scale_at, unit, first, last, pairs, kept,
            K, UNITS, PROGRAMS, SLOTS, threads, sums,
        )  # fmt: skip
        acc, ring1 = _work(
            acc, ring1, x_ring, partial, word_at, scale_at, unit + 1, first, last, pairs, kept,
            K, UNITS, PROGRAMS, SLOTS, threads, sums,
        )  # fmt: skip
        acc, ring2 = _work(
            acc, ring2, x_ring, partial, word_at, scale_at, unit + 2, first, last, pairs, kept,
            K, UNITS, PROGRAMS, SLOTS, threads, sums,
        )  # fmt: skip

    barrier()  # every thread's sums are written before one thread announces them
    if last % STEPS != 0:
        gl.atomic_add(arrivals + last // STEPS, 1, sem="release", scope="gpu")
    for tile in range(first // STEPS, last // STEPS):
        before = program - _program_of(tile * STEPS, UNITS, PROGRAMS)
        await_count(arrivals + tile, before, True)
        _finish(partial, tile * SLOTS, before + 1, acc, bias, y, tile, token, M, N, BIAS, sums)
        barrier()  # nobody waits any more
        gl.store(arrivals + tile, 0)  # ready for the next launch


def cut(out: int, width: int) -> tuple[int, int]:
    """How many programs share the weight, and how many at most have a part of one tile."""
    steps = width // COLUMNS
    units = out // ROWS * steps
    programs = min(units, WAVE * triton.cdiv(units, WAVE * MOST))
    return programs, -(-steps // (units // programs)) + 1


def constants(out: int, width: int, tiles: int) -> dict[str, Any]:
    """How a product is cut, and which thread has what."""
    programs, slots = cut(out, width)
    share = triton.cdiv(out // ROWS * (width // COLUMNS), programs)
    return {
        "TILES": tiles,
        "PROGRAMS": programs,
        "SLOTS": slots,
        "TOGETHER": min(triton.next_power_of_2(share), 16 // tiles),
        "held": gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0]),
        "sums": gl.BlockedLayout([1, 1, tiles, 4], [1, 32, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0]),
        "copied": gl.BlockedLayout([1, 1, 1, 1, 4], [1, 2, 4, 4, 1], [1, WARPS, 1, 1, 1], [4, 2, 1, 3, 0]),
    }


def supports(packed: PackedWeight) -> bool:
    """Whether it is NVFP4, and units cover it."""
    out, width = packed.shape
    return packed.spec.name == "nvfp4" and out % ROWS == 0 and width % 256 == 0


def decode_nvfp4(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x[M, K] bf16 -> x W^T + bias [M, N] for M of 1 to 64 and what `supports` takes; x and bias contiguous."""
    tokens, (out, width) = x.shape[0], packed.shape
    codes, scales, whole, kind = operands(packed.spec, packed.tensors)
    tiles = max(1, triton.next_power_of_2(tokens) // 8)
    chosen = constants(out, width, tiles)
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    partial = torch.empty(out * chosen["SLOTS"] * tiles * 8, dtype=torch.float32, device=x.device)
    decode_nvfp4_kernel[(chosen["PROGRAMS"],)](
        aligned(x), aligned(codes).view(torch.int32), aligned(scales).view(torch.int16), whole,
        y if bias is None else bias, y, partial, arrival_counters(out // ROWS, x.device), tokens,
        out, width, kind, bias is not None, **chosen, num_warps=WARPS, maxnreg=128, **overlapping(x),
    )  # fmt: skip
    return y
