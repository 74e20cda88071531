# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Which steps of which tiles a program of `packed_product` sums, and how sums of one tile come together in y.

The tiles of a band (the outputs for BLOCK rows of x) follow each other, and so do the steps of their sums. An item is a
run of these steps: the first `uncut` tiles are an item each, the steps of the others are cut evenly in `pieces`,
wherever tiles end. Items of all bands come first tiles first, so that pieces fill the last round of multiprocessors.
Where pieces meet inside a tile, each leaves its sum in `partial`, and whoever arrives last adds them in order; where
there are two or more pieces a tile, each adds up some of its rows.

So every band is cut alike, and the bits of a row of y depend on that row, on W and on the cut alone.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .launching import barrier

MOST_IN_PLACE = gl.constexpr(2)  # cuts come at steps of so many times 64 columns, so that all tiles are cut alike


@gluon.jit
def item_of(
    item, table, rows, bands, tiles, steps, uncut, pieces,
    BLOCK: gl.constexpr, IN_PLACE: gl.constexpr, GROUPED: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """An item: expert (-1: nothing to do), first row and end of rows, its first tile and the one after its last, the
    steps where it begins and ends, counted from the first tile of the band or, not SPLIT, of its only tile."""
    if GROUPED:
        entry = table + item // tiles * 3
        expert, row, end = gl.load(entry), gl.load(entry + 1), gl.load(entry + 2)
        return expert, row, end, item % tiles, item % tiles + 1, 0, steps
    elif SPLIT:
        cut = item - bands * uncut
        if cut < 0:
            band = item // uncut
            first = item % uncut * steps
            last = first + steps
        else:
            band = cut // pieces
            UNIT: gl.constexpr = MOST_IN_PLACE // IN_PLACE
            units = (tiles - uncut) * (steps // UNIT)
            first = uncut * steps + cut % pieces * units // pieces * UNIT
            last = uncut * steps + (cut % pieces + 1) * units // pieces * UNIT
        return 0, band * BLOCK, rows, first // steps, (last + steps - 1) // steps, first, last
    else:
        return 0, item // tiles * BLOCK, rows, item % tiles, item % tiles + 1, 0, steps


@gluon.jit
def corner(expert, tile, N, OUTS: gl.constexpr, TURNED: gl.constexpr):
    """Where the tile begins in the matrix of all experts' rows: row, column."""
    if TURNED:
        return expert * N, tile * OUTS
    else:
        return expert * N + tile * OUTS, 0


@gluon.jit
def write(
    total, bias, y, y_tiles, turning, row, end, out0, OUT, BIAS: gl.constexpr, product: gl.constexpr,
):  # fmt: skip
    """Rows row..end of y from total[OUTS, BLOCK], turned on the way through shared memory; large tiles by the copy
    engine, while the next one's sum begins."""
    BLOCK: gl.constexpr = total.shape[1]
    OUTS: gl.constexpr = total.shape[0]
    COPIED: gl.constexpr = turning.shape[0] == BLOCK and BLOCK * OUTS > 128 * 128
    if BIAS:
        n = out0 + gl.arange(0, OUTS, layout=gl.SliceLayout(1, product))
        total += gl.expand_dims(gl.load(bias + n).to(gl.float32), 1)
    if COPIED:
        tma.store_wait(0)
    barrier()  # the tile before has been read
    turning.slice(0, BLOCK, dim=0).store(total.to(gl.bfloat16).permute([1, 0]))
    if COPIED and end - row >= BLOCK:
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(y_tiles, [row, out0], turning)
    else:
        barrier()
        store: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
        turned = turning.slice(0, BLOCK, dim=0).load(store)
        m = row + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, store))
        o = out0 + gl.arange(0, OUTS, layout=gl.SliceLayout(0, store))
        target = y + gl.expand_dims(m.to(gl.int64) * OUT, 1) + gl.expand_dims(o, 0)
        gl.store(gl.max_contiguous(gl.multiple_of(target, [1, 16]), [1, 8]), turned, mask=gl.expand_dims(m < end, 1))


@gluon.jit
def join(acc, sums, given, taken, joined, WHICH: gl.constexpr, product: gl.constexpr):
    """The sums of both teams, which team 0 has afterwards."""
    if WHICH == 0:
        mbarrier.wait(given, joined & 1)
        acc += sums.load(product)
        barrier()
        mbarrier.arrive(taken, count=1)
    else:
        mbarrier.wait(taken, joined & 1 ^ 1)
        sums.store(acc)
        barrier()
        mbarrier.arrive(given, count=1)
    return acc


@gluon.jit
def _sharing(tile, tiles, steps, uncut, pieces, IN_PLACE: gl.constexpr):
    """The first and the last of the pieces that have a part of this tile's sum."""
    cut = tiles - uncut
    units = steps // (MOST_IN_PLACE // IN_PLACE)
    begin = (tile - uncut) * units
    return ((begin + 1) * pieces - 1) // (cut * units), ((begin + units) * pieces - 1) // (cut * units)


@gluon.jit
def _cells(partial, band, tile, tiles, uncut, pieces, piece, CELLS: gl.constexpr):
    """Where a piece's part of a tile's sum is kept: [rows of x, OUTS]. Those of the next piece come after it."""
    return partial + (band * (tiles - uncut + pieces) + tile - uncut + piece).to(gl.int64) * CELLS


@gluon.jit
def add_up(
    acc, bias, y, y_tiles, partial, arrivals, turning, item, bands, row, end, tile, tiles, steps, uncut, pieces,
    out0, OUT, IN_PLACE: gl.constexpr, BIAS: gl.constexpr, TEAMS: gl.constexpr, product: gl.constexpr,
):  # fmt: skip
    """A share of a tile's sum from acc[OUTS, BLOCK]; by whoever is last, the tile."""
    OUTS: gl.constexpr = acc.shape[0]
    BLOCK: gl.constexpr = acc.shape[1]
    MOST: gl.constexpr = turning.shape[0]
    CELLS: gl.constexpr = OUTS * MOST
    cut, band = tiles - uncut, row // MOST
    front, back = _sharing(tile, tiles, steps, uncut, pieces, IN_PLACE)
    mine = (item - bands * uncut) % pieces
    arrived = arrivals + band * cut + tile - uncut
    o = gl.expand_dims(gl.arange(0, OUTS, layout=gl.SliceLayout(1, product)), 1)
    m = gl.expand_dims(gl.arange(0, BLOCK, layout=gl.SliceLayout(0, product)), 0)
    cells = _cells(partial, band, tile, tiles, uncut, pieces, 0, CELLS) + o * BLOCK + m
    count = 0
    if mine == front and pieces % cut != 0:  # it ends with this tile, with which the others began: mostly the last
        count = gl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
    if count < back - front:
        gl.store(cells + mine * CELLS, acc, cache_modifier=".cg")
        barrier()  # every thread's part is written before one thread announces it
        count = gl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    if count == back - front:
        if mine == front:  # noqa: SIM108 (a branch of the program, not a value)
            total = acc
        else:
            total = gl.load(cells + front * CELLS, cache_modifier=".cg")
        if TEAMS == 1 and OUTS * BLOCK <= 128 * 64:  # registers for a part read ahead
            ahead = gl.load(cells + (front + 1) * CELLS, cache_modifier=".cg")
            for each in range(front + 2, back + 1):
                now = ahead
                ahead = gl.load(cells + each * CELLS, cache_modifier=".cg")
                total += now
            total += ahead
        else:
            for each in range(front + 1, back + 1):
                total += gl.load(cells + each * CELLS, cache_modifier=".cg")
        write(total, bias, y, y_tiles, turning, row, end, out0, OUT, BIAS, product)
        gl.store(arrived, 0)  # ready for the next launch


@gluon.jit
def hand_in(
    acc, partial, item, bands, row, tile, tiles, uncut, pieces, MOST: gl.constexpr, product: gl.constexpr,
):  # fmt: skip
    """A share of a tile's sum, acc[OUTS, BLOCK], left for `add_up_together`."""
    OUTS: gl.constexpr = acc.shape[0]
    BLOCK: gl.constexpr = acc.shape[1]
    o = gl.expand_dims(gl.arange(0, OUTS, layout=gl.SliceLayout(1, product)), 1)
    m = gl.expand_dims(gl.arange(0, BLOCK, layout=gl.SliceLayout(0, product)), 0)
    mine = (item - bands * uncut) % pieces
    cells = _cells(partial, row // MOST, tile, tiles, uncut, pieces, mine, OUTS * MOST)
    gl.store(cells + m * OUTS + o, acc, cache_modifier=".cg")


# What the pieces of a tile know of each other: a word that counts who has left its sum (from 1 on) and who has nothing
# more to do with the tile (from GONE on), and has a bit for each who would not wait (from ABSENT on).
GONE = gl.constexpr(1 << 5)
ABSENT = gl.constexpr(1 << 10)
SHARING = 16  # pieces of a tile at most: bits of the word
PATIENCE = gl.constexpr(40)  # looks at the word, each some 0.5 us


@gluon.jit
def _add_up_slices(
    partial, bias, y, band, row, end, tile, tiles, uncut, pieces, front, back, mine, absent, OUT,
    OUTS: gl.constexpr, MOST: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Of the rows of a tile of y those that are this piece's to add up, and those of the `absent`."""
    HIGH: gl.constexpr = MOST // 4
    CELLS: gl.constexpr = OUTS * MOST
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [8, 1], [1, 0])
    o = gl.expand_dims(gl.arange(0, OUTS, layout=gl.SliceLayout(0, layout)), 0)
    for run in range(4):
        owner = run % (back - front + 1)
        if (owner == mine - front or (absent >> owner) & 1 == 1) and row + run * HIGH < end:
            m = gl.expand_dims(run * HIGH + gl.arange(0, HIGH, layout=gl.SliceLayout(1, layout)), 1)
            cells = _cells(partial, band, tile, tiles, uncut, pieces, 0, CELLS) + m * OUTS + o
            there = (row + m < end) & (o >= 0)
            total = gl.load(cells + front * CELLS, mask=there, other=0.0, cache_modifier=".cg")
            for each in range(front + 1, back + 1, 3):
                a = gl.load(cells + each * CELLS, mask=there, other=0.0, cache_modifier=".cg")
                b = gl.load(cells + (each + 1) * CELLS, mask=there & (each < back), other=0.0, cache_modifier=".cg")
                c = gl.load(cells + (each + 2) * CELLS, mask=there & (each + 1 < back), other=0.0, cache_modifier=".cg")
                total = total + a + b + c
            if BIAS:
                total += gl.load(bias + tile * OUTS + o).to(gl.float32)
            target = y + (row + m).to(gl.int64) * OUT + tile * OUTS + o
            gl.store(target, total.to(gl.bfloat16), mask=there)


@gluon.jit
def add_up_together(
    bias, y, partial, arrivals, item, bands, row, end, begin, until, tiles, steps, uncut, pieces, OUT,
    OUTS: gl.constexpr, MOST: gl.constexpr, IN_PLACE: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Of the one or two tiles of which this piece has left a share, its rows. Nobody has to wait for a program that may
    not be running: who has waited for long goes, and the last to leave a share adds up for those who went."""
    cut, band = tiles - uncut, row // MOST
    mine = (item - bands * uncut) % pieces
    words = arrivals + band * cut - uncut
    tile, after = begin // steps, (until - 1) // steps
    shares = begin != tile * steps or until < (tile + 1) * steps
    shares_after = after != tile and until < (after + 1) * steps
    barrier()  # every thread's part is written before one thread announces it
    before, before_after = 0, 0
    if shares:
        before = gl.atomic_add(words + tile, 1, sem="acq_rel", scope="gpu")
    if shares_after:
        before_after = gl.atomic_add(words + after, 1, sem="acq_rel", scope="gpu")
    for which in range(2):
        if (which == 0 and shares) or (which == 1 and shares_after):
            each = tile if which == 0 else after
            word = before if which == 0 else before_after
            front, back = _sharing(each, tiles, steps, uncut, pieces, IN_PLACE)
            others = back - front
            complete = word % GONE == others
            absent = gl.where(complete, word // ABSENT, 0)
            looks = 0
            while not complete and looks < PATIENCE:
                complete = gl.atomic_add(words + each, 0, sem="acquire", scope="gpu") % GONE == others + 1
                looks += 1
            if complete:
                _add_up_slices(
                    partial, bias, y, band, row, end, each, tiles, uncut, pieces, front, back, mine, absent, OUT,
                    OUTS, MOST, BIAS,
                )  # fmt: skip
                word = gl.atomic_add(words + each, GONE, sem="relaxed", scope="gpu")
            else:
                word = gl.atomic_add(words + each, GONE + (ABSENT << mine - front), sem="acq_rel", scope="gpu")
                if word % GONE == others + 1:  # meanwhile
                    _add_up_slices(
                        partial, bias, y, band, row, end, each, tiles, uncut, pieces, front, back, mine, 0, OUT,
                        OUTS, MOST, BIAS,
                    )  # fmt: skip
            if word // GONE % GONE == others:
                gl.store(words + each, 0)  # ready for the next launch
