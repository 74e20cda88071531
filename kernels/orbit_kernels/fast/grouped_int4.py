# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""The grouped product of `grouped.py` for INT4 on Hopper, with every copy, register and wait placed by hand.

Same tiles, same unpacking, same order of the sum, so the same result; what differs is when things happen:

    copy engine   brings tiles of x and of packed words STAGES - 1 steps ahead
    tensor core   multiplies step k, W from registers, x from shared memory
    threads       meanwhile unpack step k + 1 into the registers that step k + 1 will be read from

A thread finds the codes for its registers by itself: in `bases` below is which elements of W the tensor core wants in
which thread (two neighbours along the sum in one 32-bit register), and words and scales are loaded in the same places.
Written in Gluon, Triton's lower floor, which has no interpreter: on a CPU `grouped.py` stands for it in tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..formats.stack import PackedStack
from .schedule import schedule

ROWS = 128  # outputs per program
STEP = 64  # of the sum per step
DEEP = 16  # of the sum per instruction of the tensor core
_WARPS = 8
_FEW = 112  # rows per expert, on average: bench/results/grouped.json
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name changed between releases of Triton

# Two codes of INT4, each in a word, times their scale: 0x4300 over a code is the bfloat16 number 128 + code.
PAIRS = gl.constexpr(
    """{
    .reg .b32 a, b;
    shr.b32 a, $1, $3;
    shr.b32 b, $2, $4;
    prmt.b32 a, a, b, 0x5410;
    lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
    mov.b32 b, 0x43084308;
    sub.rn.bf16x2 a, a, b;
    mul.rn.bf16x2 $0, a, $5;
    }"""
)


@gluon.jit
def _unpack(word, bits, scale):
    """(code - 8) * scale in bfloat16, two at a time: 0x4300 over a code is the number 128 + code."""
    return gl.inline_asm_elementwise(
        PAIRS,
        "=r,r,r,r,r,r",
        [word, bits, scale],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _copy_step(x_tiles, word_tiles, x_ring, word_ring, full, step, row, column, high, TURNED: gl.constexpr):
    """Start copying step `step` into its place in the rings; `full` of that place says when it is there."""
    STAGES: gl.constexpr = x_ring.shape[0]
    place = step % STAGES
    here = full.index(place)
    mbarrier.expect(here, x_tiles.block_type.nbytes + word_tiles.block_type.nbytes)
    along = step * word_tiles.block_shape[0 if TURNED else 1]
    corner = [high + along, column] if TURNED else [high, column + along]
    tma.async_copy_global_to_shared(word_tiles, corner, here, word_ring.index(place))
    tma.async_copy_global_to_shared(x_tiles, [row, step * x_tiles.block_shape[1]], here, x_ring.index(place))


@gluon.jit
def _copy_scales(scale_at, scale_ring, step, STEPS: gl.constexpr, STRIDE: gl.constexpr):
    STAGES: gl.constexpr = scale_ring.shape[0]
    if step < STEPS:
        async_copy.async_copy_global_to_shared(scale_ring.index(step % STAGES), scale_at + step * STRIDE)
    async_copy.commit_group()


@gluon.jit
def _piece(words, scale, left: gl.constexpr, words3: gl.constexpr):
    """words[ROWS, DEEP / 8] in shared memory, scale[ROWS] in registers -> W[ROWS, DEEP]."""
    ROWS: gl.constexpr = words.shape[0]
    DEEP: gl.constexpr = words.shape[1] * 8
    word = gl.expand_dims(words.load(gl.SliceLayout(2, words3)), 2)
    word = gl.reshape(word.broadcast_to([ROWS, DEEP // 8, 8]), [ROWS, DEEP])
    wide = gl.expand_dims(scale, 1).broadcast_to([ROWS, DEEP])
    bits = gl.expand_dims(gl.arange(0, DEEP, layout=gl.SliceLayout(0, left)) % 8 * 4, 0)
    return _unpack(_there(word, left), bits.broadcast_to([ROWS, DEEP]), wide)


@gluon.jit
def _turned_piece(words, scales, odd, left: gl.constexpr, words3: gl.constexpr, scales3: gl.constexpr):
    """words[DEEP, ROWS / 8] and scales[DEEP, groups] in shared memory (or pairs of scales[DEEP]) -> W^T[ROWS, DEEP]."""
    DEEP: gl.constexpr = words.shape[0]
    ROWS: gl.constexpr = words.shape[1] * 8
    word = gl.expand_dims(words.permute([1, 0]).load(gl.SliceLayout(1, words3)), 1)
    word = gl.reshape(word.broadcast_to([ROWS // 8, 8, DEEP]), [ROWS, DEEP])
    if len(scales.shape) > 1:
        GROUPS: gl.constexpr = scales.shape[1]
        scale = gl.expand_dims(scales.permute([1, 0]).load(gl.SliceLayout(1, scales3)), 1)
        wide = _there(gl.reshape(scale.broadcast_to([GROUPS, ROWS // GROUPS, DEEP]), [ROWS, DEEP]), left)
    else:
        half = (scales.load(gl.SliceLayout(0, left)) >> (odd * 16)).to(gl.int16)
        wide = gl.expand_dims(half.to(gl.bfloat16, bitcast=True), 0).broadcast_to([ROWS, DEEP])
    bits = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, left)) % 8 * 4, 1)
    return _unpack(_there(word, left), bits.broadcast_to([ROWS, DEEP]), wide)


@gluon.jit
def _there(values, left: gl.constexpr):
    """The same elements in the same registers, under the name of the layout that the tensor core asks for."""
    return gl.convert_layout(values, left, assert_trivial=True)


@gluon.jit
def _grouped_int4(
    x_tiles, x_short_tiles, word_tiles, scales, y, table,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr,
    STAGES: gl.constexpr,
    product: gl.constexpr, left: gl.constexpr, short_product: gl.constexpr, short_left: gl.constexpr,
    words3: gl.constexpr, scales3: gl.constexpr,
):  # fmt: skip
    SHORT: gl.constexpr = x_short_tiles.block_shape[0]
    entry = table + gl.program_id(1) * 3
    expert = gl.load(entry)
    if expert < 0:
        return
    row, end = gl.load(entry + 1), gl.load(entry + 2)
    if x_tiles.block_shape[0] > SHORT and end - row <= SHORT:
        _product(
            x_short_tiles, word_tiles, scales, y, expert, row, end,
            N, K, GROUP, TURNED, STAGES, short_product, short_left, words3, scales3,
        )  # fmt: skip
    else:
        _product(
            x_tiles, word_tiles, scales, y, expert, row, end,
            N, K, GROUP, TURNED, STAGES, product, left, words3, scales3,
        )  # fmt: skip


@gluon.jit
def _product(
    x_tiles, word_tiles, scales, y, expert, row, end,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr,
    STAGES: gl.constexpr,
    product: gl.constexpr, left: gl.constexpr, words3: gl.constexpr, scales3: gl.constexpr,
):  # fmt: skip
    """Rows row..end of y, as many as x_tiles is high, and ROWS of their outputs."""
    BLOCK: gl.constexpr = x_tiles.block_shape[0]
    ROWS: gl.constexpr = 128
    STEP: gl.constexpr = 64
    DEEP: gl.constexpr = 16  # of the sum per instruction of the tensor core
    PIECES: gl.constexpr = STEP // DEEP
    FIRST: gl.constexpr = STAGES - 1  # steps copied ahead; one more may be in the tensor core
    LENGTH: gl.constexpr = N if TURNED else K
    OUT: gl.constexpr = K if TURNED else N
    STEPS: gl.constexpr = LENGTH // STEP
    out0 = gl.program_id(0) * ROWS
    high = expert * N if TURNED else expert * N + out0  # first row of W, all experts in one matrix
    column = out0 // 8 if TURNED else 0

    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, STEP], x_tiles.layout)
    word_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES, word_tiles.block_shape[0], word_tiles.block_shape[1]], word_tiles.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(STAGES):
        mbarrier.init(full.index(each), count=1)
    fence_async_shared()
    barrier()
    for early in gl.static_range(FIRST):
        _copy_step(x_tiles, word_tiles, x_ring, word_ring, full, early, row, column, high, TURNED)

    if TURNED:
        GROUPS: gl.constexpr = (ROWS + GROUP - 1) // GROUP
        GRID: gl.constexpr = K // GROUP
        if GROUPS > 1:  # bfloat16 scales of all groups of the tile
            ring_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
            scale_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, STEP, GROUPS], ring_layout)
            copy_layout: gl.constexpr = gl.BlockedLayout([1, GROUPS], [32, 1], [8, 1], [1, 0])
            n = gl.arange(0, STEP, layout=gl.SliceLayout(1, copy_layout))
            g = gl.arange(0, GROUPS, layout=gl.SliceLayout(0, copy_layout))
            scale_at = scales + high.to(gl.int64) * GRID + out0 // GROUP
            scale_at = scale_at + gl.expand_dims(n, 1) * GRID + gl.expand_dims(g, 0)
        else:  # one group: its scale comes with a neighbour, because four bytes are the least that is copied
            flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
            scale_ring = gl.allocate_shared_memory(gl.int32, [STAGES, STEP], flat)
            n = gl.arange(0, STEP, layout=gl.BlockedLayout([1], [32], [8], [0]))
            pairs = scales.to(gl.pointer_type(gl.int32), bitcast=True)
            scale_at = pairs + high.to(gl.int64) * (GRID // 2) + out0 // GROUP // 2 + n * (GRID // 2)
        odd = out0 // GROUP % 2
        STRIDE: gl.constexpr = STEP * (GRID if GROUPS > 1 else GRID // 2)
        for early in gl.static_range(FIRST):
            _copy_scales(scale_at, scale_ring, early, STEPS, STRIDE)
    else:
        n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, left))
        scale_at = scales + high.to(gl.int64) * (K // GROUP) + n * (K // GROUP)
        early_scale = gl.load(scale_at)
        late_scale = gl.load(scale_at + 1) if GROUP < STEP else early_scale

    acc = gl.zeros([ROWS, BLOCK], gl.float32, product)
    for now in range(STEPS):
        place = now % STAGES
        mbarrier.wait(full.index(place), now // STAGES & 1)
        x_now, words_now = x_ring.index(place), word_ring.index(place)
        if TURNED:
            async_copy.wait_group(FIRST - 1)
            scales_now = scale_ring.index(place)
        for i in gl.static_range(PIECES):
            if TURNED:
                piece = _turned_piece(
                    words_now.slice(i * DEEP, DEEP, dim=0), scales_now.slice(i * DEEP, DEEP, dim=0), odd,
                    left, words3, scales3,
                )  # fmt: skip
            else:
                words_piece = words_now.slice(i * (DEEP // 8), DEEP // 8, dim=1)
                piece = _piece(words_piece, early_scale if i * DEEP < GROUP else late_scale, left, words3)
            x_piece = x_now.slice(i * DEEP, DEEP, dim=1).permute([1, 0])
            # as many in flight as there are sets of registers for pieces: piece i of the last step is done with its own
            acc = warpgroup_mma_wait(PIECES - 1, deps=[warpgroup_mma(piece, x_piece, acc, is_async=True)])
        barrier()  # no warp still needs the place of step now + FIRST
        if now + FIRST < STEPS:
            _copy_step(x_tiles, word_tiles, x_ring, word_ring, full, now + FIRST, row, column, high, TURNED)
        if TURNED:
            _copy_scales(scale_at, scale_ring, now + FIRST, STEPS, STRIDE)
        else:  # scales of the next step
            ahead = min(now + 1, STEPS - 1) * STEP // GROUP
            early_scale = gl.load(scale_at + ahead)
            late_scale = gl.load(scale_at + ahead + 1) if GROUP < STEP else early_scale
    acc = warpgroup_mma_wait(0, deps=[acc])

    store: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    turned = gl.convert_layout(acc.to(gl.bfloat16).permute([1, 0]), store)
    m = row + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, store))
    o = out0 + gl.arange(0, ROWS, layout=gl.SliceLayout(0, store))
    target = y + gl.expand_dims(m.to(gl.int64) * OUT, 1) + gl.expand_dims(o, 0)
    gl.store(target, turned, mask=gl.expand_dims(m < end, 1))


@cache
def layouts(block: int, short: int, group: int, turned: bool) -> dict[str, Any]:
    """Where the tensor core wants W[ROWS, DEEP] (or its transpose), and the same places in words and in scales."""
    product, short_product = (gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, rows, 16]) for rows in (block, short))
    registers = [(0, 1), (8, 0), (0, 8)]  # bit by bit: (output, place in the sum)
    lanes = [(0, 2), (0, 4), (1, 0), (2, 0), (4, 0)]
    warps = [(16, 0), (32, 0), (64, 0)]

    def apart(size: int) -> Any:
        """The axis along which a row of W runs, cut into runs of `size`."""

        def cut(o: int, s: int) -> list[int]:
            return [o // size, o % size, s] if turned else [o, s // size, s % size]

        shape = [ROWS // size, size, DEEP] if turned else [ROWS, DEEP // size, size]
        bases = [[cut(*each) for each in level] for level in (registers, lanes, warps)]
        return gl.DistributedLinearLayout(*bases, [], shape)

    left, short_left = (gl.DotOperandLayout(0, each, 2) for each in (product, short_product))
    return {
        "product": product, "left": left, "short_product": short_product, "short_left": short_left,
        "words3": apart(8), "scales3": apart(min(group, ROWS)) if turned else left,
    }  # fmt: skip


def supports(experts: PackedStack) -> bool:
    """Whether the copy engine and the tiles take this stack (some rows given)."""
    (out, width), spec = experts.shape, experts.spec
    if spec.name != "int4" or experts.tensors["weight_scale"].dtype != torch.bfloat16:
        return False
    paired = spec.group_size < 128 or width % 256 == 0
    return out % ROWS == 0 and width % ROWS == 0 and spec.group_size in (32, 64, 128) and paired


def grouped_int4(
    x: Tensor, counts: Tensor, experts: PackedStack, turned: bool,
    block: int | None = None, short: int | None = None, stages: int = 4,
) -> Tensor:  # fmt: skip
    """As `grouped.grouped_product`, for stacks that `supports` accepts.

    block  rows per tile; an expert's last tile is `short` high when that is enough. Left out: from the mean number of
           rows (the counts themselves are the device's); 128 lets two programs share a multiprocessor
    """
    out, width = experts.shape
    few = x.shape[0] <= _FEW * experts.count
    block, short = block or (128 if few else 256), short or (64 if few else 128)
    x = x.contiguous()
    y = torch.empty(x.shape[0], width if turned else out, dtype=x.dtype, device=x.device)
    table = schedule(counts, x.shape[0], block)
    words = experts.tensors["weight_packed"].contiguous().view(-1, width // 8)
    tile = [STEP, ROWS // 8] if turned else [ROWS, STEP // 8]
    x_tiles, x_short_tiles = (
        TensorDescriptor.from_tensor(x, [rows, STEP], gl.NVMMASharedLayout(128, 16, 2)) for rows in (block, short)
    )
    word_tiles = TensorDescriptor.from_tensor(words, tile, gl.NVMMASharedLayout(tile[1] * 4, 32, 2))
    group = experts.spec.group_size
    _grouped_int4[(y.shape[1] // ROWS, table.shape[0])](
        x_tiles, x_short_tiles, word_tiles, experts.tensors["weight_scale"].contiguous(), y, table,
        out, width, group, turned, stages, **layouts(block, short, group, turned), num_warps=_WARPS,
    )  # fmt: skip
    return y
