# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""The product of FP8 with FP8 on Hopper: codes[rows, in] and weight[out, in], a scale for each group of 128 columns.

A program computes tiles of 128 rows of x by 128 outputs, two side by side or one, in steps of one group of columns:

    producer      one warp keeps STAGES steps of both operands coming, into rings in shared memory
    consumers     two groups of four warps, 64 rows of the tile each, and 128 outputs at a time: the tensor core sums
                  a step from nothing, then the sum times both scales is added to the tile, in float32 registers

Two tiles side by side read x once for both; what is left after whole rounds of them goes tile by tile where that ends
sooner (`plan`).

While one consumer adds up, the other's products keep the tensor core busy; they share nothing but the rings, so the
one need not wait for the other. They do not take turns, though, and what both do between two sums leaves it idle: for
pairs that is the adding alone, the wait for the next step's bytes lies under a sum. Rings have two barriers a place:
`full` (its bytes are there) and `empty` (nobody reads it any more).

A sum runs over the groups from left to right, whatever the tile and the number of rows: the bits of a row of y depend
on that row and on W alone.

Written in Gluon, Triton's lower floor, which has no interpreter; the reference stands for it on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..formats import PackedWeight
from ..formats.fp8 import scale_key
from .launching import aligned, barrier, multiprocessors, next_place
from .quantize_activations import GROUP, quantize_activations, quantizes_activations

__all__ = ["product_w8a8", "quantize_activations", "quantizes_activations", "takes_w8a8"]

BLOCK = 128  # rows of a tile
HALF = 64  # of them for one consumer
TILE = 128  # outputs of a tile, which share a scale
_TOGETHER = 16  # rows of tiles whose outputs are made one after the other, so that x stays in the L2 cache
_ROOM = 232_000  # bytes of shared memory


def stages(span: int) -> int:
    """Steps in flight, with room for `span` tiles side by side."""
    return min(6, (_ROOM - BLOCK * TILE * 2) // ((BLOCK + span * TILE) * GROUP + 16))


@gluon.jit
def _item(item, high, across, TOGETHER: gl.constexpr):
    """Which rows (in tiles), which of `across` beside each other."""
    slab = item // (TOGETHER * across)
    inside = item % (TOGETHER * across)
    height = min(TOGETHER, high - slab * TOGETHER)
    return slab * TOGETHER + inside % height, inside // height


@gluon.jit
def _fetch(
    code_tiles, weight_tiles, x_ring, w_ring, full, empty, row, tile, steps, place, phase,
    SPAN: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Every step of WIDE tiles side by side, as places in the rings fall empty."""
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK: gl.constexpr = x_ring.shape[1]
    TILE: gl.constexpr = w_ring.shape[1]
    GROUP: gl.constexpr = x_ring.shape[2]
    for step in range(steps):
        here = full.index(place)
        mbarrier.wait(empty.index(place), phase ^ 1)
        mbarrier.expect(here, code_tiles.block_type.nbytes + WIDE * weight_tiles.block_type.nbytes)
        tma.async_copy_global_to_shared(code_tiles, [row * BLOCK, step * GROUP], here, x_ring.index(place))
        for side in gl.static_range(WIDE):
            w_place = w_ring.index(place * SPAN + side)
            tma.async_copy_global_to_shared(weight_tiles, [(tile + side) * TILE, step * GROUP], here, w_place)
        place, phase = next_place(place, phase, STAGES)
    return place, phase


@gluon.jit
def _produce(
    code_tiles, weight_tiles, x_ring, w_ring, full, empty, high, tiles, steps, pairs, singles,
    SPAN: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    place, phase = 0, 0
    if SPAN == 2:
        for item in range(gl.program_id(0), pairs, gl.num_programs(0)):
            row, pair = _item(item, high, tiles // 2, TOGETHER)
            place, phase = _fetch(
                code_tiles, weight_tiles, x_ring, w_ring, full, empty, row, pair * 2, steps, place, phase, SPAN, 2
            )  # fmt: skip
    for item in range(gl.program_id(0), singles, gl.num_programs(0)):
        row, pair = _item(pairs + item // SPAN, high, tiles // SPAN, TOGETHER)
        tile = pair * SPAN + item % SPAN
        place, phase = _fetch(
            code_tiles, weight_tiles, x_ring, w_ring, full, empty, row, tile, steps, place, phase, SPAN, 1
        )  # fmt: skip


@gluon.jit
def _begin_sum(x_now, w_now, acc, never):
    """64 rows by 128 outputs of one step, into the registers of acc. What is in them is not added, and that is said by
    a flag which only the host knows: told at compile time, the compiler takes other registers and runs out of them."""
    return warpgroup_mma(x_now, w_now.permute([1, 0]), acc, use_acc=never, is_async=True)


@gluon.jit
def _write(total, bias, y_tiles, turning, row, out0, BIAS: gl.constexpr, product: gl.constexpr):
    """64 rows by 128 outputs of y; the copy engine leaves out rows past the last."""
    if BIAS:
        WIDE: gl.constexpr = total.shape[1]
        o = out0 + gl.arange(0, WIDE, layout=gl.SliceLayout(0, product))
        total += gl.expand_dims(gl.load(bias + o).to(gl.float32), 0)
    tma.store_wait(0)
    barrier()  # what was written before has been read
    turning.store(total.to(gl.bfloat16))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(y_tiles, [row, out0], turning)


@gluon.jit
def _start(
    x_scales, w_scales, row, tile, rows, steps, HALF: gl.constexpr, WHICH: gl.constexpr, product: gl.constexpr
):  # fmt: skip
    """A consumer's first row of a tile, all of them, where their scales and the tile's begin, and the first of both."""
    first = row * (2 * HALF) + WHICH * HALF
    m = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, product))
    x_at, w_at = x_scales + m, w_scales + tile * steps
    return first, m, x_at, w_at, gl.load(x_at, mask=m < rows, other=0.0), gl.load(w_at)


@gluon.jit
def _left_sum(
    a, b, c, x_ring, w_ring, acc, left, place, rows, x_at, w_at, m, steps,
    WHICH: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """The left tile's sum of a step, scaled and added, and the right tile's begun. Meanwhile the next step's scales are
    fetched. Returns these and their pointers, the sums, and by what the right tile's is to be scaled."""
    HALF: gl.constexpr = x_ring.shape[1] // 2
    x_now = x_ring.index(place).slice(WHICH * HALF, HALF, dim=0)
    acc = _begin_sum(x_now, w_ring.index(place * 2), acc, rows < 0)
    by_left = gl.expand_dims(a * b, 1)
    by_right = gl.expand_dims(a * c, 1)
    if not LAST:
        x_at += rows
        w_at += 1
        c = gl.load(w_at + steps)
        a = gl.load(x_at, mask=m < rows, other=0.0)
        b = gl.load(w_at)
    acc = warpgroup_mma_wait(0, deps=[acc])
    left = warpgroup_mma_wait(0, deps=[left + acc * by_left])  # before acc's registers are wanted again
    acc = _begin_sum(x_now, w_ring.index(place * 2 + 1), acc, rows < 0)
    return a, b, c, x_at, w_at, acc, left, by_right


@gluon.jit
def _right_sum(empty, acc, right, by_right, place):
    """The right tile's sum of a step, scaled and added. Nobody reads the step's place any more."""
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(place), count=1)
    right = warpgroup_mma_wait(0, deps=[right + acc * by_right])
    return acc, right


@gluon.jit
def _multiply_pair(
    x_scales, w_scales, bias, y_tiles, x_ring, w_ring, turning, full, empty, acc, place, phase, row, tile, rows, steps,
    WHICH: gl.constexpr, BIAS: gl.constexpr, product: gl.constexpr,
):  # fmt: skip
    """64 rows of two tiles side by side. While the tensor core sums the right tile, the next step's bytes are waited
    for, and in the last step the left tile is written."""
    STAGES: gl.constexpr = x_ring.shape[0]
    TILE: gl.constexpr = w_ring.shape[1]
    HALF: gl.constexpr = x_ring.shape[1] // 2
    first, m, x_at, w_at, a, b = _start(x_scales, w_scales, row, tile, rows, steps, HALF, WHICH, product)
    c = gl.load(w_at + steps)
    left = gl.zeros([HALF, TILE], gl.float32, product)
    right = gl.zeros([HALF, TILE], gl.float32, product)
    mbarrier.wait(full.index(place), phase)
    for _ in range(steps - 1):
        a, b, c, x_at, w_at, acc, left, by_right = _left_sum(
            a, b, c, x_ring, w_ring, acc, left, place, rows, x_at, w_at, m, steps, WHICH, False
        )  # fmt: skip
        following, phase = next_place(place, phase, STAGES)
        mbarrier.wait(full.index(following), phase)
        acc, right = _right_sum(empty, acc, right, by_right, place)
        place = following
    a, b, c, x_at, w_at, acc, left, by_right = _left_sum(
        a, b, c, x_ring, w_ring, acc, left, place, rows, x_at, w_at, m, steps, WHICH, True
    )  # fmt: skip
    _write(left, bias, y_tiles, turning, first, tile * TILE, BIAS, product)
    acc, right = _right_sum(empty, acc, right, by_right, place)
    place, phase = next_place(place, phase, STAGES)
    _write(right, bias, y_tiles, turning, first, (tile + 1) * TILE, BIAS, product)
    return acc, place, phase


@gluon.jit
def _multiply(
    x_scales, w_scales, bias, y_tiles, x_ring, w_ring, turning, full, empty, acc, place, phase, row, tile, rows, steps,
    WHICH: gl.constexpr, SPAN: gl.constexpr, BIAS: gl.constexpr, product: gl.constexpr,
):  # fmt: skip
    """64 rows of one tile. While the tensor core sums, scales of the next step are fetched."""
    STAGES: gl.constexpr = x_ring.shape[0]
    TILE: gl.constexpr = w_ring.shape[1]
    HALF: gl.constexpr = x_ring.shape[1] // 2
    first, m, x_at, w_at, a, b = _start(x_scales, w_scales, row, tile, rows, steps, HALF, WHICH, product)
    total = gl.zeros([HALF, TILE], gl.float32, product)
    for step in range(steps):
        mbarrier.wait(full.index(place), phase)
        x_now = x_ring.index(place).slice(WHICH * HALF, HALF, dim=0)
        acc = _begin_sum(x_now, w_ring.index(place * SPAN), acc, rows < 0)
        more = step + 1 < steps
        by = gl.expand_dims(a * b, 1)
        x_at += rows
        w_at += 1
        a = gl.load(x_at, mask=(m < rows) & more, other=0.0)
        b = gl.load(w_at, mask=more, other=0.0)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(place), count=1)
        total += acc * by
        place, phase = next_place(place, phase, STAGES)
    _write(total, bias, y_tiles, turning, first, tile * TILE, BIAS, product)
    return acc, place, phase


@gluon.jit
def _consume(
    x_scales, w_scales, bias, y_tiles, x_ring, w_ring, turnings, full, empty, rows, high, tiles, steps, pairs, singles,
    WHICH: gl.constexpr, SPAN: gl.constexpr, TOGETHER: gl.constexpr, BIAS: gl.constexpr, product: gl.constexpr,
):  # fmt: skip
    """One of the two groups of warps that multiply."""
    HALF: gl.constexpr = x_ring.shape[1] // 2
    TILE: gl.constexpr = w_ring.shape[1]
    turning = turnings.index(WHICH)
    acc = gl.zeros([HALF, TILE], gl.float32, product)
    place, phase = 0, 0
    if SPAN == 2:
        for item in range(gl.program_id(0), pairs, gl.num_programs(0)):
            row, pair = _item(item, high, tiles // 2, TOGETHER)
            acc, place, phase = _multiply_pair(
                x_scales, w_scales, bias, y_tiles, x_ring, w_ring, turning, full, empty, acc, place, phase,
                row, pair * 2, rows, steps, WHICH, BIAS, product,
            )  # fmt: skip
    for item in range(gl.program_id(0), singles, gl.num_programs(0)):
        row, pair = _item(pairs + item // SPAN, high, tiles // SPAN, TOGETHER)
        acc, place, phase = _multiply(
            x_scales, w_scales, bias, y_tiles, x_ring, w_ring, turning, full, empty, acc, place, phase,
            row, pair * SPAN + item % SPAN, rows, steps, WHICH, SPAN, BIAS, product,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "high", "tiles", "steps", "pairs", "singles"])
def fp8_product(
    code_tiles, weight_tiles, x_scales, w_scales, bias, y_tiles, rows, high, tiles, steps, pairs, singles,
    STAGES: gl.constexpr, SPAN: gl.constexpr, TOGETHER: gl.constexpr, BIAS: gl.constexpr, product: gl.constexpr,
):  # fmt: skip
    """`tiles` beside and `high` below each other: `pairs` of them, then `singles`, each spread over the programs."""
    BLOCK: gl.constexpr = code_tiles.block_shape[0]
    GROUP: gl.constexpr = code_tiles.block_shape[1]
    TILE: gl.constexpr = weight_tiles.block_shape[0]
    x_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK, GROUP], code_tiles.layout)
    w_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * SPAN, TILE, GROUP], weight_tiles.layout)
    turnings = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK // 2, TILE], y_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(STAGES):
        mbarrier.init(full.index(each), count=1)
        mbarrier.init(empty.index(each), count=2)  # groups that multiply
    fence_async_shared()
    barrier()
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    x_scales, w_scales, bias, y_tiles, x_ring, w_ring, turnings, full, empty,
                    rows, high, tiles, steps, pairs, singles, FIRST, SPAN, TOGETHER, BIAS, product,
                ),
            ),
            (
                _consume,
                (
                    x_scales, w_scales, bias, y_tiles, x_ring, w_ring, turnings, full, empty,
                    rows, high, tiles, steps, pairs, singles, SECOND, SPAN, TOGETHER, BIAS, product,
                ),
            ),
            (
                _produce,
                (
                    code_tiles, weight_tiles, x_ring, w_ring, full, empty,
                    high, tiles, steps, pairs, singles, SPAN, TOGETHER,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def takes_w8a8(x: Tensor, packed: PackedWeight) -> bool:
    """Whether x[.., in] times this weight (fp8 in blocks of 128 x 128) has a fast path."""
    here = x.device == packed.device and x.device.index == torch.cuda.current_device()
    whole = packed.shape[0] % GROUP == 0 and packed.shape[1] % GROUP == 0
    hopper = torch.cuda.get_device_capability(x.device) == (9, 0)
    return here and hopper and whole and x.dtype == torch.bfloat16 and x.numel() > 0


def product_w8a8(
    codes: Tensor, scales: Tensor, packed: PackedWeight, bias: Tensor | None = None, pairs: int | None = None
) -> Tensor:
    """codes[rows, in], scales[rows, in / 128] of `quantize_activations` -> bfloat16 y[rows, out].

    pairs   how many pairs of tiles are computed at once, by itself as `plan` says. No bit depends on it.
    """
    (out, width), rows = packed.shape, codes.shape[0]
    weight = packed.tensors["weight"]
    codes, weight = aligned(codes), aligned(weight)
    w_scales = packed.tensors[scale_key(packed.tensors)].to(torch.float32).contiguous()
    x_scales = scales.t().contiguous().view(-1)
    y = torch.empty(rows, out, dtype=torch.bfloat16, device=codes.device)
    high, tiles, processors = -(-rows // BLOCK), out // TILE, multiprocessors(codes.device.index)
    pairs = plan(high * tiles, tiles % 2 == 0, processors) if pairs is None else pairs
    span, singles = 2 if pairs else 1, high * tiles - 2 * pairs
    by_step, by_result = gl.NVMMASharedLayout(128, 8, 2), gl.NVMMASharedLayout(128, 16, 2)
    fp8_product[(min(max(pairs, singles), processors),)](
        TensorDescriptor.from_tensor(codes, [BLOCK, GROUP], by_step),
        TensorDescriptor.from_tensor(weight, [TILE, GROUP], by_step),
        x_scales, w_scales, y if bias is None else bias.contiguous(),
        TensorDescriptor.from_tensor(y, [HALF, TILE], by_result),
        rows, high, tiles, width // GROUP, pairs, singles,
        stages(span), span, _TOGETHER, bias is not None, layout(), num_warps=4,
    )  # fmt: skip
    return y


def layout() -> gl.NVMMADistributedLayout:
    """How the tensor core leaves 64 rows by 128 outputs in the registers of four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])


def plan(items: int, even: bool, processors: int) -> int:
    """How many pairs of tiles to take, of so many tiles: all, unless what is left after whole rounds of pairs fits in
    one round of single tiles. A pair takes about 1.7 times as long as a tile."""
    if not even:
        return 0
    pairs = items // 2
    left = pairs % processors
    return pairs - left if 2 * left <= processors else pairs
