# mypy: disable-error-code="no-untyped-def, assignment, misc"
# (the parameters of a Triton kernel are pointers and constants, its tuples change their length)
"""Packed weights for few tokens, whole rows a program: y[M, N] = x[M, K] W^T for M of 1 to 16, INT4, MXFP4, NVFP4 and
FP8 of blocks of 128 x 128.

A program owns some groups of 16 rows, and its eight warps an eighth of the columns each: no sum crosses programs, and
warps meet once, at the end, to add up their eighths in shared memory, in the order of the columns. Until then each is
alone with its registers. Weights and x come straight from global memory: a thread loads 16 bytes of two neighbouring
rows at a time (the 32 columns of a chunk of 128 that are its own; 8 bytes where 64 columns are left), and x of the same
columns of the token that the tensor core wants from it. Weights are unpacked and columns named by who holds them as in
`decode_wave`, whose helpers these are. Of FP8 the 16 bytes are 16 columns of a chunk of 64, already in the pairs in
which they are unpacked; a warp's rows and columns lie in one block, so both rows have one scale.

All is written out without a loop, in pairs of a chunk and a group (`Order`): words and scales of the next pairs are on
their way, the products of two groups alternate, addresses are one base plus constants.

Each sum runs over a warp's columns in order, then over the warps: bits depend on N and K alone, so a row has the same
for every M and in every run. Where programs do not divide the groups, neighbours have some in common: both write the
same bits.

A program starts early. Where W is known to be at rest (`at_rest`) it loads its first pairs before the kernel ahead has
ended and asks for the rest to come to the L2 cache; otherwise it reads nothing before. How many programs there are
decides who lies together on a multiprocessor (`share`), which costs up to a third if it is left to chance.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from .decode_order import Order, begins, last, least, place_of, room, side_by_side
from .decode_ptx import eight, factors, multiply, multiply_in_turn, paired, prefetch
from .decode_wave import WARPS, WAVE, _axis, _four, _operand
from .launching import aligned, as_read, barrier, of_four_bits
from .unpack import GROWN, pairs_of

MOST = 8  # groups of a program


@gluon.jit
def _registers(words, threads: gl.constexpr, FORMAT: gl.constexpr):
    """[warp, lane, 4 or 2] -> its registers, each or (FP8) two of them eight codes."""
    if FORMAT == "fp8":
        a, b, c, d = _four(words, threads)
        return (a, b), (c, d)
    elif words.shape[2] == 4:
        return _four(words, threads)
    else:
        a, b = gl.split(words)
        return gl.convert_layout(a, threads, assert_trivial=True), gl.convert_layout(b, threads, assert_trivial=True)


@gluon.jit
def _load_pair(
    at, first, pair: gl.constexpr, ORDER: gl.constexpr, K: gl.constexpr, IN_ROW: gl.constexpr, SHORT: gl.constexpr,
    FORMAT: gl.constexpr,
):  # fmt: skip
    """Words and scales of a thread's two rows. Of whole chunks a row has IN_ROW scales, of the rest SHORT (of NVFP4
    two at a time, or each). Of FP8 both rows have one scale, and chunks two by two."""
    long_at, long_scale, short_at, short_scale = at
    CHUNK: gl.constexpr = place_of(pair, ORDER).chunk
    GROUP: gl.constexpr = place_of(pair, ORDER).group
    words: gl.constexpr = GROUP * 2 * K + CHUNK * 16
    if FORMAT == "fp8":
        in_block = (long_scale if CHUNK % 2 == 0 else short_scale) + ((first + GROUP) // 8 * IN_ROW + CHUNK // 2)
        by = gl.load(in_block).to(gl.float32)
        row = long_at + (GROUP * 4 * K + CHUNK * 16)
        return gl.load(row), gl.load(row + K // 4), by, by
    elif CHUNK < K // 1024:
        scale: gl.constexpr = GROUP * 16 * IN_ROW + CHUNK * 128 * IN_ROW // K
        return (
            gl.load(long_at + words), gl.load(long_at + (words + K // 8)),
            gl.load(long_scale + scale).to(gl.int32), gl.load(long_scale + (scale + IN_ROW)).to(gl.int32),
        )  # fmt: skip
    else:
        scale_of_short: gl.constexpr = GROUP * 16 * SHORT
        return (
            gl.load(short_at + words), gl.load(short_at + (words + K // 8)),
            gl.load(short_scale + scale_of_short).to(gl.int32),
            gl.load(short_scale + (scale_of_short + SHORT)).to(gl.int32),
        )  # fmt: skip


@gluon.jit
def _load_x(at, present, chunk: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr):
    """x of a thread's columns of a chunk, eight columns at a time."""
    LONG: gl.constexpr = chunk < K // 1024 and FORMAT != "fp8"
    begin: gl.constexpr = chunk * (32 if FORMAT == "fp8" else 64)
    x = ()
    for word in gl.static_range(4 if LONG else 2):
        columns = gl.load(at[0 if LONG else 1] + (begin + word * 4), mask=present, other=0)
        x = x + (columns,)  # noqa: RUF005 (Gluon knows no star)
    return x


@gluon.jit
def _all_paired(x, FORMAT: gl.constexpr):
    """Columns as `eight` pairs them."""
    if FORMAT == "fp8":
        return x
    else:
        in_pairs = ()
        for word in gl.static_range(len(x)):
            in_pairs = in_pairs + (paired(x[word]),)  # noqa: RUF005
        return in_pairs


@gluon.jit
def _add_word(acc, x, word, below, by, by_below, FORMAT: gl.constexpr, TWO: gl.constexpr, sums: gl.constexpr):
    """A group's sum, or two where it is alone, + the products of a word of each row."""
    a0, a1, a2, a3 = eight(word, by, FORMAT)
    b0, b1, b2, b3 = eight(below, by_below, FORMAT)
    first = _operand(a0, b0, a1, b1, sums).broadcast_to(acc[0].shape)
    second = _operand(a2, b2, a3, b3, sums).broadcast_to(acc[0].shape)
    if TWO:
        return multiply(first, second, x, acc[0], acc[1])
    else:
        return multiply_in_turn(first, second, x, acc[0]), acc[1]


@gluon.jit
def _add_pairs(pair, other, x, x_of_other, acc, acc_of_other, pairs, FORMAT: gl.constexpr, TWO: gl.constexpr,
               sums: gl.constexpr):  # fmt: skip
    """The sums of two groups + the products of a pair of each, word by word in turn; `other` may be ()."""
    threads: gl.constexpr = pairs.type.layout
    row, below = _registers(pair[0], threads, FORMAT), _registers(pair[1], threads, FORMAT)
    other_row, other_below = (), ()
    if len(other) > 0:
        other_row, other_below = _registers(other[0], threads, FORMAT), _registers(other[1], threads, FORMAT)
    for i in gl.static_range(4):
        if i < len(row):
            if i % 2 == 0:
                by, by_below = factors(pair[2], pairs, i // 2, FORMAT), factors(pair[3], pairs, i // 2, FORMAT)
            acc = _add_word(acc, x[i], row[i], below[i], by, by_below, FORMAT, TWO, sums)
        if i < len(other_row):
            if i % 2 == 0:
                its, its_below = factors(other[2], pairs, i // 2, FORMAT), factors(other[3], pairs, i // 2, FORMAT)
            acc_of_other = _add_word(
                acc_of_other, x_of_other[i], other_row[i], other_below[i], its, its_below, FORMAT, TWO, sums
            )
    return acc, acc_of_other


@gluon.jit
def _sum_of(accs, pair: gl.constexpr, nothing):
    """A group's sum up to a pair, nothing before its first."""
    if pair < 0:
        return nothing, nothing
    else:
        return accs[pair]


@gluon.jit
def _together(accs, ROOM: gl.constexpr, ORDER: gl.constexpr, TWO: gl.constexpr, TILES: gl.constexpr):
    """The sums of all groups, as one tensor [warp, lane, tile, 4, ROOM]."""
    parts = ()
    for group in gl.static_range(ROOM):
        acc = accs[last(min(group, ORDER.groups - 1), ORDER)]
        parts = parts + ((acc[0] + acc[1]) if TWO else acc[0],)  # noqa: RUF005
    for level in gl.static_range(3):
        if ROOM >> level > 1:
            joined = ()
            for i in gl.static_range(ROOM >> level + 1):
                joined = joined + (gl.join(parts[i], parts[i + (ROOM >> level + 1)]),)  # noqa: RUF005
            parts = joined
    return gl.reshape(parts[0], [8, 32, TILES, 4, ROOM])


@gluon.jit(do_not_specialize=["M"])
def decode_rows_kernel(
    x, words, scales, whole, bias, y, M,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    AT_REST: gl.constexpr, TILES: gl.constexpr, ORDER: gl.constexpr, PROGRAMS: gl.constexpr,
    long: gl.constexpr, short: gl.constexpr, sums: gl.constexpr, added: gl.constexpr, place: gl.constexpr,
):  # fmt: skip
    SHARE: gl.constexpr = K // 8  # columns of a warp
    CHUNKS: gl.constexpr = ORDER.chunks
    PAIRS: gl.constexpr = ORDER.pairs
    AHEAD: gl.constexpr = ORDER.ahead
    PER: gl.constexpr = 4 if FORMAT == "fp8" else 8  # codes of a word
    IN_ROW: gl.constexpr = K // GROUP if FORMAT == "int4" or FORMAT == "fp8" else K // 32  # scales, of NVFP4 in twos
    NVFP4: gl.constexpr = FORMAT != "int4" and FORMAT != "mxfp4" and FORMAT != "fp8"
    TWO: gl.constexpr = N // 16 <= 132 or (N // 16 < 240 and FORMAT == "fp8")  # a group is alone, and has two sums
    threads: gl.constexpr = gl.SliceLayout(2, long)
    first = gl.program_id(0) * (N // 16 - ORDER.groups) // max(PROGRAMS - 1, 1)  # group
    warp, lane = _axis(8, 0, threads), _axis(32, 1, threads)
    gdc_launch_dependents()
    if not AT_REST:
        gdc_wait()

    row, t = first * 16 + lane // 4 * 2, lane % 4
    word = row * (K // PER) + warp * (SHARE // PER)
    long_at = gl.expand_dims(words + (word + t * 4), 2) + _axis(4, 2, long)
    long_scale = scales + (row * IN_ROW + (warp * SHARE + t * 32) // (K // IN_ROW))
    in_short: gl.constexpr = gl.SliceLayout(2, short)
    row_of_short = first * 16 + _axis(32, 1, in_short) // 4 * 2
    short_word = row_of_short * (K // 8) + _axis(8, 0, in_short) * (SHARE // 8) + _axis(32, 1, in_short) % 4 * 2
    short_at = gl.expand_dims(words + short_word, 2) + _axis(2, 2, short)
    rest: gl.constexpr = SHARE // 128 * 128
    short_scale = scales
    if NVFP4:
        short_scale = scales.to(gl.pointer_type(gl.uint8), bitcast=True)
    short_scale += row * (K // GROUP) + (warp * SHARE + rest + t * 16) // GROUP
    if FORMAT == "fp8":  # of the chunks 0, 2, 4.. and 1, 3, 5..
        long_scale = scales + (warp * SHARE + lane * 0) // GROUP
        short_scale = scales + (warp * SHARE + 64 + lane * 0) // GROUP
    at = (long_at, long_scale, short_at, short_scale)
    queue = ()
    for pair in gl.static_range(AHEAD):
        queue = queue + (_load_pair(at, first, pair, ORDER, K, IN_ROW, K // GROUP, FORMAT),)  # noqa: RUF005
    if AHEAD < PAIRS:  # what is not on its way yet; the rows of a program lie together
        EACH: gl.constexpr = (ORDER.groups - least(ORDER)) * 16 * K // PER // 8  # words of a warp's part
        begin = (first + least(ORDER)) * (16 * K // PER) + warp * EACH
        prefetch(words + (begin + lane * 0), gl.where(lane == 0, EACH * 4, 0))
    pairs = row * 0
    if NVFP4:
        pairs += pairs_of(whole, FORMAT)
    if AT_REST:
        gdc_wait()
    token, quarter = _axis(TILES, 2, sums) * 8 + _axis(32, 1, sums) // 4, _axis(32, 1, sums) % 4
    x_at = x.to(gl.pointer_type(gl.int32), bitcast=True) + (token * (K // 2) + _axis(8, 0, sums) * (SHARE // 2))
    x_at += _axis(4, 3, sums)
    x_at = (x_at + quarter * 16, x_at + quarter * 8)
    present = token + _axis(8, 0, sums) * 0 + _axis(4, 3, sums) * 0 < M
    loaded, ready, accs = (_load_x(x_at, present, 0, K, FORMAT),), (), ()

    nothing = gl.zeros([8, 32, TILES, 4], gl.float32, sums)
    for pair in gl.static_range(0, PAIRS, 2):
        for each in gl.static_range(pair, pair + 2):
            if each + AHEAD < PAIRS:
                coming = _load_pair(at, first, each + AHEAD, ORDER, K, IN_ROW, K // GROUP, FORMAT)
                queue = queue + (coming,)  # noqa: RUF005
            if begins(each, ORDER):
                ready = ready + (_all_paired(loaded[place_of(each, ORDER).chunk], FORMAT),)  # noqa: RUF005
                if len(loaded) < CHUNKS:
                    following = _load_x(x_at, present, place_of(each, ORDER).chunk + 1, K, FORMAT)
                    loaded = loaded + (following,)  # noqa: RUF005
        acc = _sum_of(accs, place_of(pair, ORDER).before, nothing)
        if side_by_side(pair, ORDER):
            acc, other = _add_pairs(
                queue[pair], queue[pair + 1],
                ready[place_of(pair, ORDER).chunk], ready[place_of(pair + 1, ORDER).chunk],
                acc, _sum_of(accs, place_of(pair + 1, ORDER).before, nothing), pairs, FORMAT, TWO, sums,
            )  # fmt: skip
            accs = accs + (acc, other)  # noqa: RUF005
        else:
            for each in gl.static_range(pair, min(pair + 2, PAIRS)):
                acc = _sum_of(accs, place_of(each, ORDER).before, nothing)
                acc, _ = _add_pairs(
                    queue[each], (), ready[place_of(each, ORDER).chunk], (), acc, acc, pairs, FORMAT, TWO, sums
                )
                accs = accs + (acc,)  # noqa: RUF005

    ROOM: gl.constexpr = room(ORDER)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    kept = gl.allocate_shared_memory(gl.float32, [ROOM, 8, 128 * TILES], flat)
    by_warp: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0, 4])
    kept._reinterpret(gl.float32, [8, 32, TILES, 4, ROOM], by_warp).store(_together(accs, ROOM, ORDER, TWO, TILES))
    barrier()
    total = gl.sum(kept.load(added), axis=1) * (1.0 if FORMAT == "fp8" else GROWN)
    total = gl.reshape(total, [ROOM, 8, 4, TILES, 2, 2]).permute([0, 1, 2, 3, 5, 4])  # its rows side by side
    total = gl.convert_layout(total, place, assert_trivial=True)
    group = _axis(ROOM, 0, place)
    out = (first + group) * 16 + _axis(8, 1, place) * 2 + _axis(2, 5, place)
    token = _axis(TILES, 3, place) * 8 + _axis(4, 2, place) * 2 + _axis(2, 4, place)
    if BIAS:
        total += gl.load(bias + out, mask=group < ORDER.groups, other=0).to(gl.float32)
    gl.store(y + (token * N + out), total.to(y.dtype.element_ty), mask=(token < M) & (group < ORDER.groups))


@dataclass(frozen=True)
class Share:
    """How rows are shared out."""

    groups: int  # of a program
    programs: int
    registers: int  # of a thread; more than 128: a program has a multiprocessor to itself
    ahead: int  # pairs of a chunk and a group whose words are on their way


def share(out: int, tokens: int, kind: str) -> Share:
    """Chosen from what was measured (kernels/bench/tune_rows.py): as many programs as multiprocessors, with the next
    launch's beside; or one with a multiprocessor to itself; or about two each. Fewer that leave room for others may
    come to lie two on one, while others are idle."""
    groups = out // 16
    if kind == "fp8":
        return _share_of_bytes(groups, tokens)
    each = triton.cdiv(groups, WAVE)
    if tokens > 8 and kind != "int4":
        return Share(each, WAVE if each <= 2 else triton.cdiv(groups, each), 255, 6)
    if each <= 2 and not WAVE < groups < 240:
        return Share(each, WAVE, 128, 3)
    if kind == "int4" and (each in (3, 4) or (each <= 2 and tokens > 4)):
        return Share(each, triton.cdiv(groups, each), 255, 4 if each > 2 else 10)
    each = triton.cdiv(groups, 2 * WAVE)
    return Share(each, triton.cdiv(groups, each), 128, 3 if each == 1 or tokens > 8 else 4)


def _share_of_bytes(groups: int, tokens: int) -> Share:
    """Of FP8: a group is twice the bytes, so two programs share a multiprocessor, this launch's or the next's, and as
    much is on its way as registers hold without spilling."""
    if groups <= WAVE or 240 <= groups <= 2 * WAVE:
        each, programs = triton.cdiv(groups, WAVE), WAVE
    else:
        each = triton.cdiv(groups, 2 * WAVE)
        programs = triton.cdiv(groups, each)
    if tokens <= 8:
        return Share(each, programs, 128, 8 if each == 1 else 4)
    return Share(each, programs, 128, 4 if each <= 2 else 2)


def pays(out: int, width: int, tokens: int, name: str) -> bool:
    """Whether it is faster than `decode_wave` (FP8: than `decode`), within what was measured: where all multiprocessors
    have rows, and x is not much beside them."""
    little = width <= 7168 if name == "fp8" else width <= 2560 and out > (30 if name == "int4" else 32) * WAVE
    most = 16 if little else 8
    return 1984 <= out <= 10560 and 2048 <= width <= 10240 and tokens <= most


@cache
def constants(tiles: int, width: int, chosen: Share, kind: str) -> dict[str, Any]:
    """The order of work, and which thread has what."""
    groups, chunks = chosen.groups, triton.cdiv(width // 8, 64 if kind == "fp8" else 128)
    # sums that a thread adds up at the end: four are two tokens of two rows
    some = max(1, min(4, triton.next_power_of_2(groups) * tiles // 2))
    pair, rows = min(some, 2), max(some // 2, 1)
    lanes = [1, some * 2 // tiles, 4, tiles, 2 // pair, 2 // rows]
    warps = 4 * tiles // some  # that have different rows of a group
    return {
        "TILES": tiles,
        "ORDER": Order(groups, chunks, min(chosen.ahead, groups * chunks)),
        "PROGRAMS": chosen.programs,
        "long": gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0]),
        "short": gl.BlockedLayout([1, 1, 2], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0]),
        "sums": gl.BlockedLayout([1, 1, tiles, 4], [1, 32, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0]),
        "added": gl.BlockedLayout([1, 8, some], [1, 1, 32], [WARPS // warps, 1, warps], [2, 1, 0]),
        "place": gl.BlockedLayout(
            [1, 1, 1, 1, pair, rows],
            lanes,
            [WARPS // warps, warps, 1, 1, 1, 1],
            [5, 4, 3, 2, 1, 0] if some == 4 else [4, 5, 3, 2, 1, 0],
        ),
    }


def supports(packed: PackedWeight) -> bool:
    """Whether it is `of_four_bits` with groups of at least 32 (NVFP4: 16), or FP8 of whole blocks, and warps share its
    columns evenly."""
    (out, width), (_, group) = packed.shape, packed.block
    if packed.spec.name == "int4" and group < 32:
        return False
    taken = packed.block == (128, 128) if packed.spec.name == "fp8" else of_four_bits(packed)
    return taken and out % 16 == 0 and out <= 16 * WAVE * MOST and width % 512 == 0


def decode_rows(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, chosen: Share | None = None) -> Tensor:
    """x[M, K] bf16 -> x W^T + bias [M, N] for M of 1 to 16 and what `supports` takes; x and bias contiguous."""
    tokens, (out, width) = x.shape[0], packed.shape
    words, scales, whole, kind, still = as_read(packed)
    chosen = chosen or share(out, tokens, kind)
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    decode_rows_kernel[(chosen.programs,)](
        aligned(x), words, scales, whole, y if bias is None else bias, y, tokens,
        out, width, kind, packed.block[1], bias is not None, still,
        **constants(1 if tokens <= 8 else 2, width, chosen, kind),
        num_warps=WARPS, maxnreg=chosen.registers, **overlapping(x),
    )  # fmt: skip
    return y
