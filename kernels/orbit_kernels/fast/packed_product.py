# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""The product with packed weights on Hopper, dense and grouped, with every copy, register and wait placed by hand.

A program computes tiles of y^T = W x^T: OUTS outputs for BLOCK rows of x. W stands on the left because there the tensor
core takes its operand from registers, where the codes are unpacked. Three things happen at a time:

    producer      one warp keeps STAGES steps of x and of packed words coming, into rings in shared memory
    tensor core   multiplies step k, W from registers, x from shared memory
    consumers     meanwhile unpack half a step ahead, into the registers that it will be read from (`packed_pieces`)

Rings have two barriers a place: `full` (its bytes are there) and `empty` (nobody reads it any more). A program goes on
to its next tile without a pause: the producer is already there.

The sum over a row of W is float32, in steps of 16 from left to right. Where there are fewer tiles than multiprocessors
the steps are cut into parts, each summed by another program; whichever is last adds them in order. So the bits of a row
of y depend on that row, on W and on the number of parts alone.

Written in Gluon, Triton's lower floor, which has no interpreter: on a CPU `grouped.py` stands for it in tests.
"""

from __future__ import annotations

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

from . import packed_scales
from .launching import barrier
from .nvfp4_lookup import fill, own, undoing
from .packed_pieces import piece_of, turned_piece_of


@gluon.jit
def _find(item, table, rows, tiles, steps, parts, BLOCK: gl.constexpr, GROUPED: gl.constexpr):
    """An item: expert (-1: nothing to do), its first row and end of rows, tile of outputs, first and last step."""
    if GROUPED:
        entry = table + item // tiles * 3
        expert, row, end = gl.load(entry), gl.load(entry + 1), gl.load(entry + 2)
        return expert, row, end, item % tiles, 0, steps
    else:
        tile, part = item // parts, item % parts
        return 0, tile // tiles * BLOCK, rows, tile % tiles, part * steps // parts, (part + 1) * steps // parts


@gluon.jit
def _corner(expert, tile, N, OUTS: gl.constexpr, TURNED: gl.constexpr):
    """Where the tile begins in the matrix of all experts' rows: row, column."""
    if TURNED:
        return expert * N, tile * OUTS
    else:
        return expert * N + tile * OUTS, 0


@gluon.jit
def _produce(
    x_tiles, x_short_tiles, word_tiles, scales, table, x_ring, word_ring, scale_ring, full, empty,
    rows, items, tiles, steps, parts, N, K,
    FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """The copying warp: every step of every item of this program, as places in the rings fall empty."""
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK: gl.constexpr = x_tiles.block_shape[0]
    SHORT: gl.constexpr = x_short_tiles.block_shape[0]
    STEP: gl.constexpr = x_tiles.block_shape[1]
    PER: gl.constexpr = 4 if FORMAT == "fp8" else 8  # elements in a word
    OUTS: gl.constexpr = word_tiles.block_shape[1] * PER if TURNED else word_tiles.block_shape[0]
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        expert, row, end, tile, first, last = _find(item, table, rows, tiles, steps, parts, BLOCK, GROUPED)
        if expert < 0:
            last = first
        high, column = _corner(expert, tile, N, OUTS, TURNED)
        for step in range(first, last):
            place = done % STAGES
            here = full.index(place)
            mbarrier.wait(empty.index(place), done // STAGES & 1 ^ 1)
            if SHORT < BLOCK and end - row <= SHORT:
                mbarrier.expect(here, x_short_tiles.block_type.nbytes + word_tiles.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    x_short_tiles, [row, step * STEP], here, x_ring.index(place).slice(0, SHORT, dim=0)
                )
            else:
                mbarrier.expect(here, x_tiles.block_type.nbytes + word_tiles.block_type.nbytes)
                tma.async_copy_global_to_shared(x_tiles, [row, step * STEP], here, x_ring.index(place))
            if TURNED:
                tma.async_copy_global_to_shared(
                    word_tiles, [high + step * STEP, column // PER], here, word_ring.index(place)
                )
                if FORMAT != "fp8":
                    packed_scales.copy(scales, scale_ring.index(place), high + step * STEP, column, K, GROUP)
                    async_copy.mbarrier_arrive(here, increment_count=False)
            else:
                tma.async_copy_global_to_shared(word_tiles, [high, step * (STEP // PER)], here, word_ring.index(place))
            done += 1


@gluon.jit
def _multiply(
    scales, lookup, x_ring, word_ring, scale_ring, full, empty, done, high, column, first, last, K,
    BLOCK: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr,
    product: gl.constexpr, left: gl.constexpr,
    loaded: gl.constexpr, eights: gl.constexpr, scales3: gl.constexpr, stored: gl.constexpr,
    fetched: gl.constexpr,
):  # fmt: skip
    """Steps first..last of one tile: float32[OUTS, BLOCK], and how many places of the rings are used up by now."""
    STAGES: gl.constexpr = x_ring.shape[0]
    STEP: gl.constexpr = x_ring.shape[2]
    PER: gl.constexpr = 4 if FORMAT == "fp8" else 8  # elements in a word
    OUTS: gl.constexpr = word_ring.shape[2] * PER if TURNED else word_ring.shape[1]
    # Unpacked together. Two pieces a step, because two sets of registers take turns: with one, the next piece would be
    # written over the one that the tensor core still reads, and the assembler does not notice.
    DEEP: gl.constexpr = 32
    AHEAD: gl.constexpr = not TURNED or FORMAT == "fp8"  # scales come through registers, not through a ring
    if AHEAD:
        scale_at = packed_scales.ahead_of(scales, high, column, K, OUTS, FORMAT, GROUP, TURNED, left, scales3, fetched)
        bits = packed_scales.of_step(scale_at, first, K, STEP, FORMAT, GROUP, TURNED)
    acc = gl.zeros([OUTS, BLOCK], gl.float32, product)
    for step in range(first, last):
        place = done % STAGES
        if AHEAD:
            early, late = packed_scales.halves(bits, lookup, STEP, FORMAT, GROUP, fetched)
            after = min(step + 1, last - 1)
            bits = packed_scales.of_step(scale_at, after, K, STEP, FORMAT, GROUP, TURNED)  # there when that begins
        mbarrier.wait(full.index(place), done // STAGES & 1)
        x_now, words_now = x_ring.index(place).slice(0, BLOCK, dim=0), word_ring.index(place)
        for i in gl.static_range(STEP // DEEP):
            if TURNED:
                piece = turned_piece_of(
                    words_now.slice(i * DEEP, DEEP, dim=0),
                    early if AHEAD else scale_ring.index(place).slice(i * DEEP, DEEP, dim=0),
                    lookup, column // GROUP % 2, FORMAT, left, loaded, eights, scales3, stored, fetched,
                )  # fmt: skip
            else:
                words_piece = words_now.slice(i * (DEEP // PER), DEEP // PER, dim=1)
                piece = piece_of(words_piece, early if i == 0 else late, FORMAT, left, loaded, eights, scales3)
            x_piece = x_now.slice(i * DEEP, DEEP, dim=1).permute([1, 0])
            # the piece before is done with its registers, which the next one takes
            acc = warpgroup_mma_wait(1, deps=[warpgroup_mma(piece, x_piece, acc, is_async=True)])
            if i == 0 and step > first:  # the step before is
                async_copy.mbarrier_arrive(empty.index((done + STAGES - 1) % STAGES), increment_count=False)
        done += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.mbarrier_arrive(empty.index((done + STAGES - 1) % STAGES), increment_count=False)
    if FORMAT == "nvfp4-divide" or FORMAT == "nvfp4-multiply":
        acc *= undoing(lookup)
    return acc, done


@gluon.jit
def _write(
    total, bias, y, turning, row, end, out0, OUT, BIAS: gl.constexpr, product: gl.constexpr,
):  # fmt: skip
    """Rows row..end of y from total[OUTS, BLOCK], turned on the way through shared memory."""
    BLOCK: gl.constexpr = total.shape[1]
    OUTS: gl.constexpr = total.shape[0]
    store: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    if BIAS:
        n = out0 + gl.arange(0, OUTS, layout=gl.SliceLayout(1, product))
        total += gl.expand_dims(gl.load(bias + n).to(gl.float32), 1)
    barrier()  # the tile before has been read
    turning.slice(0, BLOCK, dim=0).store(total.to(gl.bfloat16).permute([1, 0]))
    barrier()
    turned = turning.slice(0, BLOCK, dim=0).load(store)
    m = row + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, store))
    o = out0 + gl.arange(0, OUTS, layout=gl.SliceLayout(0, store))
    target = y + gl.expand_dims(m.to(gl.int64) * OUT, 1) + gl.expand_dims(o, 0)
    gl.store(gl.max_contiguous(gl.multiple_of(target, [1, 16]), [1, 8]), turned, mask=gl.expand_dims(m < end, 1))


@gluon.jit
def _tile(
    scales, lookup, bias, y, partial, arrivals, x_ring, word_ring, scale_ring, turning, full, empty, done,
    item, parts, expert, row, end, tile, first, last, N, K,
    BLOCK: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr,
    SPLIT: gl.constexpr, BIAS: gl.constexpr,
    product: gl.constexpr, left: gl.constexpr,
    loaded: gl.constexpr, eights: gl.constexpr, scales3: gl.constexpr, stored: gl.constexpr,
    fetched: gl.constexpr,
):  # fmt: skip
    """One item: rows row..end of y, BLOCK at most, and OUTS of their outputs, or a part of their sums."""
    PER: gl.constexpr = 4 if FORMAT == "fp8" else 8  # elements in a word
    OUTS: gl.constexpr = word_ring.shape[2] * PER if TURNED else word_ring.shape[1]
    high, column = _corner(expert, tile, N, OUTS, TURNED)
    acc, done = _multiply(
        scales, lookup, x_ring, word_ring, scale_ring, full, empty, done, high, column, first, last, K,
        BLOCK, FORMAT, GROUP, TURNED, product, left, loaded, eights, scales3, stored, fetched,
    )  # fmt: skip
    OUT = K if TURNED else N
    out0 = tile * OUTS
    if SPLIT:
        o = gl.expand_dims(gl.arange(0, OUTS, layout=gl.SliceLayout(1, product)), 1)
        m = gl.expand_dims(gl.arange(0, BLOCK, layout=gl.SliceLayout(0, product)), 0)
        CELLS: gl.constexpr = OUTS * x_ring.shape[1]
        split = item // parts
        cells = partial + split * (parts * CELLS) + o * BLOCK + m
        gl.store(cells + item % parts * CELLS, acc, cache_modifier=".cg")
        barrier()  # every thread's part is written before one thread announces it
        if gl.atomic_add(arrivals + split, 1, sem="acq_rel", scope="gpu") == parts - 1:
            total = gl.load(cells, cache_modifier=".cg")
            if OUTS * BLOCK <= 128 * 64:  # registers for a part read ahead
                ahead = gl.load(cells + CELLS, cache_modifier=".cg")
                for each in range(2, parts):
                    now = ahead
                    ahead = gl.load(cells + each * CELLS, cache_modifier=".cg")
                    total += now
                total += ahead
            else:
                for each in range(1, parts):
                    total += gl.load(cells + each * CELLS, cache_modifier=".cg")
            _write(total, bias, y, turning, row, end, out0, OUT, BIAS, product)
            gl.store(arrivals + split, 0)  # ready for the next launch
    else:
        _write(acc, bias, y, turning, row, end, out0, OUT, BIAS, product)
    return done


@gluon.jit
def _consume(
    x_tiles, x_short_tiles, scales, whole, lookup, bias, y, partial, arrivals, table,
    x_ring, word_ring, scale_ring, turning, full, empty, rows, items, tiles, steps, parts, N, K,
    FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr, GROUPED: gl.constexpr,
    SPLIT: gl.constexpr, BIAS: gl.constexpr,
    product: gl.constexpr, left: gl.constexpr, short_product: gl.constexpr, short_left: gl.constexpr,
    loaded: gl.constexpr, eights: gl.constexpr, scales3: gl.constexpr, stored: gl.constexpr,
    fetched: gl.constexpr,
):  # fmt: skip
    """The warps that unpack and multiply."""
    NVFP4: gl.constexpr = FORMAT == "nvfp4-divide" or FORMAT == "nvfp4-multiply"
    BLOCK: gl.constexpr = x_tiles.block_shape[0]
    SHORT: gl.constexpr = x_short_tiles.block_shape[0]
    done, known = 0, -1
    if NVFP4:
        lookup = own(lookup)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        expert, row, end, tile, first, last = _find(item, table, rows, tiles, steps, parts, BLOCK, GROUPED)
        if expert >= 0:
            if NVFP4 and expert != known:
                fill(lookup, whole + expert, FORMAT)
                barrier()
                known = expert
            if SHORT < BLOCK and end - row <= SHORT:
                done = _tile(
                    scales, lookup, bias, y, partial, arrivals, x_ring, word_ring, scale_ring, turning, full, empty,
                    done, item, parts, expert, row, end, tile, first, last, N, K,
                    SHORT, FORMAT, GROUP, TURNED, SPLIT, BIAS, short_product, short_left,
                    loaded, eights, scales3, stored, fetched,
                )  # fmt: skip
            else:
                done = _tile(
                    scales, lookup, bias, y, partial, arrivals, x_ring, word_ring, scale_ring, turning, full, empty,
                    done, item, parts, expert, row, end, tile, first, last, N, K,
                    BLOCK, FORMAT, GROUP, TURNED, SPLIT, BIAS, product, left,
                    loaded, eights, scales3, stored, fetched,
                )  # fmt: skip


@gluon.jit(
    do_not_specialize=["rows", "items", "tiles", "steps", "parts"],
    do_not_specialize_on_alignment=["whole"],  # of one expert anywhere in its stack
)
def packed_product(
    x_tiles, x_short_tiles, word_tiles, scales, whole, lookup, bias, y, partial, arrivals, table,
    rows, items, tiles, steps, parts, N, K,
    FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr, GROUPED: gl.constexpr,
    SPLIT: gl.constexpr, BIAS: gl.constexpr,
    STAGES: gl.constexpr,
    product: gl.constexpr, left: gl.constexpr, short_product: gl.constexpr, short_left: gl.constexpr,
    loaded: gl.constexpr, eights: gl.constexpr, scales3: gl.constexpr, stored: gl.constexpr,
    fetched: gl.constexpr,
):  # fmt: skip
    """`items` tiles (or parts of their sums) of y, spread over the programs; the launchers say what is what."""
    BLOCK: gl.constexpr = x_tiles.block_shape[0]
    STEP: gl.constexpr = x_tiles.block_shape[1]
    HIGH: gl.constexpr = word_tiles.block_shape[0]
    WIDE: gl.constexpr = word_tiles.block_shape[1]
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, STEP], x_tiles.layout)
    word_ring = gl.allocate_shared_memory(gl.int32, [STAGES, HIGH, WIDE], word_tiles.layout)
    PER: gl.constexpr = 4 if FORMAT == "fp8" else 8  # elements in a word
    if TURNED and FORMAT != "fp8":
        if WIDE * 8 > GROUP:  # scales of all groups of the tile
            scale_ring = gl.allocate_shared_memory(
                scales.dtype.element_ty, [STAGES, STEP, WIDE * 8 // GROUP], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
            )
        else:
            scale_ring = gl.allocate_shared_memory(gl.int32, [STAGES, STEP], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    else:
        scale_ring = word_ring
    turning = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, WIDE * PER if TURNED else HIGH], x_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(STAGES):
        # each of 32 threads copies scales, too
        mbarrier.init(full.index(each), count=33 if TURNED and FORMAT != "fp8" else 1)
        mbarrier.init(empty.index(each), count=256)  # threads that multiply
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    x_tiles, x_short_tiles, scales, whole, lookup, bias, y, partial, arrivals, table,
                    x_ring, word_ring, scale_ring, turning, full, empty, rows, items, tiles, steps, parts, N, K,
                    FORMAT, GROUP, TURNED, GROUPED, SPLIT, BIAS,
                    product, left, short_product, short_left, loaded, eights, scales3, stored, fetched,
                ),
            ),
            (
                _produce,
                (
                    x_tiles, x_short_tiles, word_tiles, scales, table, x_ring, word_ring, scale_ring, full, empty,
                    rows, items, tiles, steps, parts, N, K, FORMAT, GROUP, TURNED, GROUPED,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
