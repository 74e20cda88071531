# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""The product with packed weights on Hopper, dense and grouped, with every copy, register and wait placed by hand.

A program computes tiles of y^T = W x^T: OUTS outputs for BLOCK rows of x. W stands on the left because there the tensor
core takes its operand from registers, where the codes are unpacked. Three things happen at a time:

    producer      one warp keeps steps of x and of packed words coming, into rings of STAGES places in shared memory
                  (`packed_copies`)
    tensor core   multiplies 32 columns, W from registers, x from shared memory
    consumers     meanwhile unpack the next 32, into the registers that they will be read from (`packed_pieces`)

Rings have two barriers a place: `full` (its bytes are there) and `empty` (nobody reads it any more). A place holds a
step, IN_PLACE times 64 columns. A program goes on to its next tile without a pause: the producer is already there, and
the copy engine writes a large tile meanwhile. EARLY, a program begins before the kernel ahead of it has ended: barriers
and rings are ready by then, and each warp waits for that end before it reads.

For few rows of x two teams of such consumers take turns at the steps, so that one unpacks where the other waits.
`packed_sums` says which steps a program has and how sums come together. A sum is float32, in steps of 16 from left to
right within what a team has of it: the bits of a row of y depend on that row, on W and on the cut alone.

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import packed_scales
from .launching import barrier, next_place
from .nvfp4_lookup import fill, own, undoing
from .packed_copies import produce
from .packed_pieces import PIECES, piece_of, turned_piece_of, words_of_piece, words_of_step
from .packed_sums import add_up, add_up_together, corner, hand_in, item_of, join, write


@gluon.jit
def _multiply(
    scales, lookup, x_ring, word_ring, scale_ring, full, empty, done, high, column, first, last, K,
    BLOCK: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr,
    TEAMS: gl.constexpr, WHICH: gl.constexpr, product: gl.constexpr, left: gl.constexpr,
    loaded: gl.constexpr, eights: gl.constexpr, scales3: gl.constexpr, stored: gl.constexpr,
    fetched: gl.constexpr,
):  # fmt: skip
    """Steps first..last of one tile, or those of them that this team takes: float32[OUTS, BLOCK]. `done` places of the
    rings were used up before."""
    STAGES: gl.constexpr = full.shape[0]
    IN_PLACE: gl.constexpr = x_ring.shape[0] // STAGES
    STEP: gl.constexpr = x_ring.shape[2]
    DEEP: gl.constexpr = STEP // PIECES
    PER: gl.constexpr = 4 if FORMAT == "fp8" else 8  # elements in a word
    OUTS: gl.constexpr = word_ring.shape[2] * PER if TURNED else word_ring.shape[1]
    AHEAD: gl.constexpr = not TURNED or FORMAT == "fp8"  # scales come through registers, not through a ring
    # where there are registers for it, words are loaded while the tensor core works on the step before
    ASKED: gl.constexpr = OUTS == 128 and (TEAMS == 1 or FORMAT == "int4" or FORMAT == "mxfp4")
    if AHEAD:
        scale_at = packed_scales.ahead_of(scales, high, column, K, OUTS, FORMAT, GROUP, TURNED, left, scales3, fetched)
        bits = packed_scales.of_place(scale_at, min(first + WHICH, last - 1), K, IN_PLACE, STEP, FORMAT, GROUP, TURNED)
    acc = gl.zeros([OUTS, BLOCK], gl.float32, product)
    place, phase = (done + WHICH) % STAGES, (done + WHICH) // STAGES & 1
    before = (done + STAGES - 1) % STAGES  # of its own, or the compiler takes it for `place` and a constant
    if ASKED:
        if first + WHICH < last:
            mbarrier.wait(full.index(place), phase)
        words = words_of_step(word_ring.index(place * IN_PLACE), TURNED, loaded)
    for step in range(first + WHICH, last, TEAMS):
        next_at, next_phase = place, phase
        if step + TEAMS < last:
            for _ in gl.static_range(TEAMS):
                next_at, next_phase = next_place(next_at, next_phase, STAGES)
        if AHEAD:
            bits_now = bits
            after = min(step + TEAMS, last - 1)
            bits = packed_scales.of_place(scale_at, after, K, IN_PLACE, STEP, FORMAT, GROUP, TURNED)  # there by then
        if not ASKED:
            mbarrier.wait(full.index(place), phase)
        for part in gl.static_range(IN_PLACE):
            if AHEAD:
                early, late = packed_scales.halves(bits_now[part], lookup, STEP, FORMAT, GROUP, fetched)
            if ASKED:
                words_now = words
            at = place * IN_PLACE + part
            x_now = x_ring.index(at).slice(0, BLOCK, dim=0)
            for i in gl.static_range(PIECES):
                words_i = words_now[i] if ASKED else words_of_piece(word_ring.index(at), i, TURNED, loaded)
                if TURNED:
                    piece = turned_piece_of(
                        words_i, early if AHEAD else scale_ring.index(at).slice(i * DEEP, DEEP, dim=0),
                        lookup, column // GROUP % 2, FORMAT, left, eights, scales3, stored, fetched,
                    )  # fmt: skip
                else:
                    piece = piece_of(words_i, early if i == 0 else late, FORMAT, left, eights, scales3)
                x_piece = x_now.slice(i * DEEP, DEEP, dim=1).permute([1, 0])
                # the piece before is done with its registers, which the next one takes
                acc = warpgroup_mma_wait(1, deps=[warpgroup_mma(piece, x_piece, acc, is_async=True)])
                if i == 0:
                    if TEAMS == 1 and part == 0 and step > first:  # the step before is
                        async_copy.mbarrier_arrive(empty.index(before), increment_count=False)
                    if ASKED and part + 1 < IN_PLACE:
                        words = words_of_step(word_ring.index(at + 1), TURNED, loaded)
                    elif ASKED:
                        mbarrier.wait(full.index(next_at), next_phase)
                        words = words_of_step(word_ring.index(next_at * IN_PLACE), TURNED, loaded)
        if TEAMS == 2:  # the other team has work for the tensor core meanwhile
            acc = warpgroup_mma_wait(0, deps=[acc])
            async_copy.mbarrier_arrive(empty.index(place), increment_count=False)
        before = place
        place, phase = next_at, next_phase
    if TEAMS == 1:
        acc = warpgroup_mma_wait(0, deps=[acc])
        async_copy.mbarrier_arrive(empty.index(before), increment_count=False)
    if FORMAT == "nvfp4-divide" or FORMAT == "nvfp4-multiply":
        acc *= undoing(lookup)
    return acc


@gluon.jit
def _tile(
    tensors, rings, sizes, item, expert, row, end, tile, first, last, done, joined,
    BLOCK: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr,
    SPLIT: gl.constexpr, TOGETHER: gl.constexpr, BIAS: gl.constexpr, TEAMS: gl.constexpr, WHICH: gl.constexpr,
    product: gl.constexpr, left: gl.constexpr,
    loaded: gl.constexpr, eights: gl.constexpr, scales3: gl.constexpr, stored: gl.constexpr,
    fetched: gl.constexpr,
):  # fmt: skip
    """Rows row..end of y, BLOCK at most, and OUTS of their outputs, or what steps first..last have in their sums."""
    scales, lookup, bias, y, y_tiles, partial, arrivals = tensors
    x_ring, word_ring, scale_ring, turning, sums, full, empty, given, taken = rings
    _, _, bands, tiles, steps, uncut, pieces, N, K = sizes
    PER: gl.constexpr = 4 if FORMAT == "fp8" else 8  # elements in a word
    OUTS: gl.constexpr = word_ring.shape[2] * PER if TURNED else word_ring.shape[1]
    high, column = corner(expert, tile, N, OUTS, TURNED)
    acc = _multiply(
        scales, lookup, x_ring, word_ring, scale_ring, full, empty, done, high, column, first, last, K,
        BLOCK, FORMAT, GROUP, TURNED, TEAMS, WHICH, product, left, loaded, eights, scales3, stored, fetched,
    )  # fmt: skip
    if TEAMS == 2:
        acc = join(acc, sums, given, taken, joined, WHICH, product)
    OUT, out0 = K if TURNED else N, tile * OUTS
    if WHICH == 0:
        if SPLIT:
            if last - first < steps and TOGETHER:
                hand_in(acc, partial, item, bands, row, tile, tiles, uncut, pieces, x_ring.shape[1], product)
            elif last - first < steps:
                add_up(
                    acc, bias, y, y_tiles, partial, arrivals, turning, item, bands, row, end, tile, tiles, steps,
                    uncut, pieces, out0, OUT, x_ring.shape[0] // full.shape[0], BIAS, TEAMS, product,
                )  # fmt: skip
            else:
                write(acc, bias, y, y_tiles, turning, row, end, out0, OUT, BIAS, product)
        else:
            write(acc, bias, y, y_tiles, turning, row, end, out0, OUT, BIAS, product)


@gluon.jit
def _high_or_short(
    tensors, rings, sizes, item, expert, row, end, tile, first, last, done, joined,
    BLOCK: gl.constexpr, SHORT: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr,
    SPLIT: gl.constexpr, TOGETHER: gl.constexpr, BIAS: gl.constexpr, TEAMS: gl.constexpr, WHICH: gl.constexpr,
    product: gl.constexpr, left: gl.constexpr, short_product: gl.constexpr, short_left: gl.constexpr,
    loaded: gl.constexpr, eights: gl.constexpr, scales3: gl.constexpr, stored: gl.constexpr,
    fetched: gl.constexpr,
):  # fmt: skip
    """A tile, of BLOCK rows or, where that is enough, of SHORT."""
    if SHORT < BLOCK and end - row <= SHORT:
        _tile(
            tensors, rings, sizes, item, expert, row, end, tile, first, last, done, joined,
            SHORT, FORMAT, GROUP, TURNED, SPLIT, TOGETHER, BIAS, TEAMS, WHICH, short_product, short_left,
            loaded, eights, scales3, stored, fetched,
        )  # fmt: skip
    else:
        _tile(
            tensors, rings, sizes, item, expert, row, end, tile, first, last, done, joined,
            BLOCK, FORMAT, GROUP, TURNED, SPLIT, TOGETHER, BIAS, TEAMS, WHICH, product, left,
            loaded, eights, scales3, stored, fetched,
        )  # fmt: skip


@gluon.jit
def _consume(
    given_to_all, FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr, GROUPED: gl.constexpr,
    SPLIT: gl.constexpr, TOGETHER: gl.constexpr, BIAS: gl.constexpr, TEAMS: gl.constexpr, EARLY: gl.constexpr,
    WHICH: gl.constexpr, product: gl.constexpr, left: gl.constexpr, short_product: gl.constexpr,
    short_left: gl.constexpr, loaded: gl.constexpr, eights: gl.constexpr, scales3: gl.constexpr,
    stored: gl.constexpr, fetched: gl.constexpr,
):  # fmt: skip
    """The warps that unpack and multiply, or one of two teams of them."""
    x_tiles, x_short_tiles, tensors, rings, sizes = given_to_all
    scales, whole, lookup, bias, y, y_tiles, partial, arrivals, table = tensors
    x_ring, _, _, turning, _, full, _, _, _ = rings
    rows, items, bands, tiles, steps, uncut, pieces, N, K = sizes
    NVFP4: gl.constexpr = FORMAT == "nvfp4-divide" or FORMAT == "nvfp4-multiply"
    BLOCK: gl.constexpr = x_tiles.block_shape[0]
    SHORT: gl.constexpr = x_short_tiles.block_shape[0]
    IN_PLACE: gl.constexpr = x_ring.shape[0] // full.shape[0]
    LATE: gl.constexpr = BLOCK == 256  # parts are added up after the loop, for registers' sake
    done, known, joined = 0, -1, 0
    if NVFP4:
        lookup = own(lookup, TEAMS, WHICH)
    if EARLY:
        gdc_wait()
    tensors = (scales, lookup, bias, y, y_tiles, partial, arrivals)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        expert, row, end, tile, after, begin, until = item_of(
            item, table, rows, bands, tiles, steps, uncut, pieces, BLOCK, IN_PLACE, GROUPED, SPLIT
        )
        if expert >= 0:
            if NVFP4 and expert != known:
                fill(lookup, whole + expert, FORMAT)
                barrier()
                known = expert
            if SPLIT:
                for each in range(tile, after):
                    first, last = max(begin - each * steps, 0), min(until - each * steps, steps)
                    _high_or_short(
                        tensors, rings, sizes, item, expert, row, end, each, first, last, done, joined,
                        BLOCK, SHORT, FORMAT, GROUP, TURNED, SPLIT, TOGETHER, BIAS, TEAMS, WHICH,
                        product, left, short_product, short_left, loaded, eights, scales3, stored, fetched,
                    )  # fmt: skip
                    done += last - first
                    joined += 1
                if TOGETHER and WHICH == 0 and not LATE and item >= bands * uncut:
                    add_up_together(
                        bias, y, partial, arrivals, item, bands, row, end, begin, until, tiles, steps, uncut, pieces,
                        K if TURNED else N, turning.shape[1], BLOCK, IN_PLACE, BIAS,
                    )  # fmt: skip
            else:
                _high_or_short(
                    tensors, rings, sizes, item, expert, row, end, tile, begin, until, done, joined,
                    BLOCK, SHORT, FORMAT, GROUP, TURNED, SPLIT, TOGETHER, BIAS, TEAMS, WHICH,
                    product, left, short_product, short_left, loaded, eights, scales3, stored, fetched,
                )  # fmt: skip
                done += steps
                joined += 1
    if TOGETHER and WHICH == 0 and LATE:
        for item in range(gl.program_id(0), items, gl.num_programs(0)):
            if item >= bands * uncut:
                expert, row, end, tile, after, begin, until = item_of(
                    item, table, rows, bands, tiles, steps, uncut, pieces, BLOCK, IN_PLACE, GROUPED, SPLIT
                )
                add_up_together(
                    bias, y, partial, arrivals, item, bands, row, end, begin, until, tiles, steps, uncut, pieces,
                    K if TURNED else N, turning.shape[1], BLOCK, IN_PLACE, BIAS,
                )  # fmt: skip
    if WHICH == 0:
        tma.store_wait(0)  # what shared memory holds has been read


@gluon.jit(
    do_not_specialize=["rows", "items", "bands", "tiles", "steps", "uncut", "pieces"],
    do_not_specialize_on_alignment=["whole"],  # of one expert anywhere in its stack
)
def packed_product(
    x_tiles, x_short_tiles, word_tiles, scales, whole, lookup, bias, y, y_tiles, partial, arrivals, table,
    rows, items, bands, tiles, steps, uncut, pieces, N, K,
    FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr, GROUPED: gl.constexpr,
    SPLIT: gl.constexpr, TOGETHER: gl.constexpr, BIAS: gl.constexpr, TEAMS: gl.constexpr, EARLY: gl.constexpr,
    STAGES: gl.constexpr, IN_PLACE: gl.constexpr,
    product: gl.constexpr, left: gl.constexpr, short_product: gl.constexpr, short_left: gl.constexpr,
    loaded: gl.constexpr, eights: gl.constexpr, scales3: gl.constexpr, stored: gl.constexpr,
    fetched: gl.constexpr,
):  # fmt: skip
    """`items` of `bands`, spread over the programs; the launchers say what is what."""
    BLOCK: gl.constexpr = x_tiles.block_shape[0]
    STEP: gl.constexpr = x_tiles.block_shape[1]
    HIGH: gl.constexpr = word_tiles.block_shape[0]
    WIDE: gl.constexpr = word_tiles.block_shape[1]
    PER: gl.constexpr = 4 if FORMAT == "fp8" else 8  # elements in a word
    OUTS: gl.constexpr = WIDE * PER if TURNED else HIGH
    if EARLY:
        gdc_launch_dependents()
    RUNS: gl.constexpr = STAGES * IN_PLACE  # of 64 columns
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [RUNS, BLOCK, STEP], x_tiles.layout)
    word_ring = gl.allocate_shared_memory(gl.int32, [RUNS, HIGH, WIDE], word_tiles.layout)
    if TURNED and FORMAT != "fp8":
        if WIDE * 8 > GROUP:  # scales of all groups of the tile
            across: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
            scale_ring = gl.allocate_shared_memory(scales.dtype.element_ty, [RUNS, STEP, WIDE * 8 // GROUP], across)
        else:
            along: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
            scale_ring = gl.allocate_shared_memory(gl.int32, [RUNS, STEP], along)
    else:
        scale_ring = word_ring
    turning = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, OUTS], x_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(STAGES):
        # each of 32 threads copies scales, too
        mbarrier.init(full.index(each), count=33 if TURNED and FORMAT != "fp8" else 1)
        mbarrier.init(empty.index(each), count=256)  # threads that multiply
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    if TEAMS == 2:
        sums = gl.allocate_shared_memory(
            gl.float32, [OUTS, BLOCK], gl.PaddedSharedLayout.with_identity_for([[BLOCK, 8]], [OUTS, BLOCK], [1, 0])
        )
        given = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(given, count=1)
        mbarrier.init(taken, count=1)
    else:
        sums, given, taken = turning, full, empty
    fence_async_shared()
    barrier()
    sizes = (rows, items, bands, tiles, steps, uncut, pieces, N, K)
    rings = (x_ring, word_ring, scale_ring, turning, sums, full, empty, given, taken)
    tensors = (scales, whole, lookup, bias, y, y_tiles, partial, arrivals, table)
    given_to_all = (x_tiles, x_short_tiles, tensors, rings, sizes)
    copied = (x_tiles, x_short_tiles, word_tiles, scales, table, x_ring, word_ring, scale_ring, full, empty, sizes)
    if TEAMS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        given_to_all, FORMAT, GROUP, TURNED, GROUPED, SPLIT, TOGETHER, BIAS, TEAMS, EARLY, FIRST,
                        product, left, short_product, short_left, loaded, eights, scales3, stored, fetched,
                    ),
                ),
                (
                    _consume,
                    (
                        given_to_all, FORMAT, GROUP, TURNED, GROUPED, SPLIT, TOGETHER, BIAS, TEAMS, EARLY, SECOND,
                        product, left, short_product, short_left, loaded, eights, scales3, stored, fetched,
                    ),
                ),
                (produce, (copied, FORMAT, GROUP, TURNED, GROUPED, SPLIT, EARLY)),
            ],
            [8, 1],
            [104, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        given_to_all, FORMAT, GROUP, TURNED, GROUPED, SPLIT, TOGETHER, BIAS, TEAMS, EARLY, FIRST,
                        product, left, short_product, short_left, loaded, eights, scales3, stored, fetched,
                    ),
                ),
                (produce, (copied, FORMAT, GROUP, TURNED, GROUPED, SPLIT, EARLY)),
            ],
            [1],
            [40],
        )  # fmt: skip
