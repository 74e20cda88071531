# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""What stands beside a decode product for an adapter: x rotated in a launch of its own, or x A^T B^T in the same one.

OFT: every program of the product needs the rotated x, and R is too big to be read by each (b / 32 times its share of
the weight, at 64 rows). So a kernel before rotates, 64 columns a program; the product starts with it, asks for its
weights meanwhile, and waits for its end.

LoRA: t = x A^T is independent of the product, so helpers, the first programs of the grid, compute it beside: shares of
K each, announced by a count; when all are there each multiplies by B for one tile of y and hands in one more sum for
it.
Whichever program is the last to hand in a sum of a tile adds them in order and writes it. t is rounded to the dtype of
x, as between two torch products. The helpers that are waited for are the first to run, and wait for nothing before.

Counts go back to zero: each helper that has seen the full count adds one more, and the last of them clears it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

UNIT = 64  # columns that one program rotates
MAX_RANK = 64


@triton.jit
def fetch(at, BYTES):
    """Asks for BYTES (a multiple of 16) from each address of at[...] to come to the L2 cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [at.to(tl.int64), BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def of_slot(a, slot, SIZE, SLOT: tl.constexpr):
    """The tensor of SIZE elements of the slot that is active, or the only one there is."""
    if SLOT:
        a += tl.load(slot, volatile=True).to(tl.int64) * SIZE
    return a


@triton.jit
def await_count(flag, expected, ASM: tl.constexpr):
    """Returns when `expected` programs have announced themselves; what they wrote before may be read."""
    if ASM:
        tl.inline_asm_elementwise(
            """{
            .reg .pred early;
            .reg .u32 seen;
            again:
            ld.acquire.gpu.global.u32 seen, [$1];
            setp.lt.u32 early, seen, $2;
            @early bra again;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,~{memory}",
            [flag.to(tl.int64), expected],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        while tl.atomic_add(flag, 0, sem="acquire") < expected:
            pass


@triton.jit
def leave(flag, ASM: tl.constexpr):
    """Counts this program as one that waits no more; the count before, in one thread, which has not to wait for it."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred one;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 one, thread, 0;
            mov.b32 $0, 0;
            @one atom.global.add.u32 $0, [$1], 1;
            }""",
            "=r,l",
            [flag.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        return tl.atomic_add(flag, 1)


@triton.jit
def clear(flag, before, last, ASM: tl.constexpr):
    """Sets the count to zero where `before` says that nobody will look at it again in this launch."""
    if ASM:
        tl.inline_asm_elementwise(
            "{ .reg .pred mine; setp.eq.u32 mine, $2, $3; @mine st.global.u32 [$1], 0; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [flag.to(tl.int64), before, last],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        if before == last:
            tl.store(flag, 0)


@triton.jit
def fetch_unit(R, column, B: tl.constexpr):
    """Asks for 64 rows of R, seen as [WIDTH, B]: all units together for all of it, in few large pieces (many small ones
    keep the copy engine longer than the reading takes)."""
    fetch(R + (column + tl.arange(0, 4) * 16) * B, tl.full([4], 32 * B, tl.int32))


@triton.jit
def turn_unit(
    x, R, y, column, M, WIDTH: tl.constexpr, B: tl.constexpr, TOKENS: tl.constexpr, PER: tl.constexpr
):  # fmt: skip
    """64 columns of x blockdiag(R) for M tokens. PER > 1: columns in the order of `decode.arrange`.

    The rotation is the left factor, so that any number of tokens takes the same instruction and gives the same bits.
    """
    UNIT: tl.constexpr = 64
    IN: tl.constexpr = max(UNIT, B)
    PIECES: tl.constexpr = 256 // PER
    first = column // IN * IN
    i = first + tl.arange(0, IN)
    j = column + tl.arange(0, UNIT)
    m = tl.arange(0, TOKENS)
    turn = tl.load(R + i[:, None] * B + (j % B)[None, :], mask=i[:, None] // B == j[None, :] // B, other=0.0)
    part = tl.load(x + m[:, None] * WIDTH + i[None, :], mask=m[:, None] < M, other=0.0)
    turned = tl.dot(tl.trans(turn), tl.trans(part), input_precision="ieee")
    if PER > 1:
        j = j // 256 * 256 + j % PER * PIECES + j % 256 // PER
    tl.store(y + m[None, :] * WIDTH + j[:, None], turned.to(y.dtype.element_ty), mask=m[None, :] < M)


@triton.jit
def finish(total, bias, y, n, m, M, N: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        total += tl.load(bias + n).to(tl.float32)[:, None]
    tl.store(y + m[None, :] * N + n[:, None], total.to(y.dtype.element_ty), mask=m[None, :] < M)


@triton.jit
def keep(partial, value, tile, slot, SLOTS: tl.constexpr):
    """Writes one of the sums that make a tile of y, turned: value[ROWS, TOKENS]."""
    ROWS: tl.constexpr = value.shape[0]
    TOKENS: tl.constexpr = value.shape[1]
    cell = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    tl.store(partial + (tile * SLOTS + slot) * (ROWS * TOKENS) + cell, value, cache_modifier=".cg")


@triton.jit
def arrive(
    partial, arrivals, bias, y, tile, M,
    N: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Says that a sum of the tile is there; the last to say so adds them in order and writes the tile of y."""
    if tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == SLOTS - 1:
        m = tl.arange(0, TOKENS)
        cell = tl.arange(0, ROWS)[:, None] * TOKENS + m[None, :]
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        for slot in tl.static_range(SLOTS):
            total += tl.load(partial + (tile * SLOTS + slot) * (ROWS * TOKENS) + cell, cache_modifier=".cg")
        finish(total, bias, y, tile * ROWS + tl.arange(0, ROWS), m, M, N, BIAS)
        tl.store(arrivals + tile, 0)  # ready for the next launch


@triton.jit
def low_rank(
    x, A, B, narrowed, flag, slot, scaling, partial, arrivals, bias, y, helper, M,
    N: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, SLOT: tl.constexpr, NARROW: tl.constexpr,
    HELPERS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    BIAS: tl.constexpr, ASM: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """What one helper does. PER > 1: x lies in the order of `decode.arrange`; its columns are still added in their own
    order, so that a row has the same bits whether it was arranged, as beside many others, or not."""
    PIECES: tl.constexpr = 256 // PER
    SHARE: tl.constexpr = (K // 256 + NARROW - 1) // NARROW  # steps of a helper's share of K
    PADDED: tl.constexpr = 16 if RANK <= 16 else (32 if RANK <= 32 else 64)
    m, r, place = tl.arange(0, TOKENS), tl.arange(0, 64), tl.arange(0, 256)
    first, last = helper * SHARE, min(helper * SHARE + SHARE, K // 256)
    if ASM:
        # hints: if the slot changes meanwhile, other bytes come than are needed
        if helper < NARROW:
            row = of_slot(A, slot, K * RANK, SLOT) + tl.minimum(tl.arange(0, PADDED), RANK - 1) * K
            fetch(row + first * 256, tl.broadcast_to((last - first) * 512, [PADDED]))
        if helper < N // ROWS:
            of_tile = of_slot(B, slot, N * RANK, SLOT) + helper * (ROWS * RANK) + tl.arange(0, 1)
            fetch(of_tile, tl.full([1], ROWS * RANK * 2, tl.int32))
        gdc_launch_dependents()
        gdc_wait()
    A = of_slot(A, slot, K * RANK, SLOT)
    lies = place % PER * PIECES + place // PER if PER > 1 else place  # where x has its columns
    acc = tl.zeros([64, TOKENS], tl.float32)
    # All helpers multiply, those without a share zeros: of a product in a branch ptxas keeps what addresses operands,
    # and gives it to the product below where the branch was not taken.
    for ahead in tl.static_range(SHARE):
        step = first + ahead
        there = (m[:, None] < M) & (step < last)
        columns = tl.load(x + m[:, None] * K + step * 256 + lies[None, :], mask=there, other=0.0)
        there = (r[:, None] < RANK) & (step < last)
        a = tl.load(A + r[:, None] * K + step * 256 + place[None, :], mask=there, other=0.0)
        acc = tl.dot(a, tl.trans(columns), acc, input_precision="ieee")
    if helper < NARROW:
        keep(narrowed, acc, helper, 0, 1)
        tl.debug_barrier()  # every thread has written before one announces it
        tl.atomic_add(flag, 1, sem="release", scope="gpu")
    await_count(flag, NARROW, ASM)
    left = leave(flag, ASM)
    B = of_slot(B, slot, N * RANK, SLOT)
    r = tl.arange(0, PADDED)
    t = tl.zeros([PADDED, TOKENS], tl.float32)
    for share in tl.static_range(NARROW):
        t += tl.load(narrowed + share * (64 * TOKENS) + r[:, None] * TOKENS + m[None, :], cache_modifier=".cg")
    t = t.to(x.dtype.element_ty)
    if helper < N // ROWS:
        n = helper * ROWS + tl.arange(0, ROWS)
        b = tl.load(B + n[:, None] * RANK + r[None, :], mask=r[None, :] < RANK, other=0.0)
        keep(partial, tl.dot(b, t, input_precision="ieee") * scaling, helper, SLOTS - 1, SLOTS)
        tl.debug_barrier()
        arrive(partial, arrivals, bias, y, helper, M, N, ROWS, TOKENS, SLOTS, BIAS)
    clear(flag, left, NARROW + HELPERS - 1, ASM)


def helping(tiles: int, width: int) -> tuple[int, int]:
    """How many programs share K among them in LoRA's first product (that decides bits), and how many help in all."""
    steps = width // 256
    narrow = triton.cdiv(steps, triton.cdiv(steps, 20))
    return narrow, max(narrow, tiles)


@triton.jit(do_not_specialize=["M"])
def _turn_few(
    x, R, y, slot, M,
    WIDTH: tl.constexpr, B: tl.constexpr, TOKENS: tl.constexpr, PER: tl.constexpr, SLOT: tl.constexpr,
    GPU: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = 64
    SIZE: tl.constexpr = WIDTH * B
    SOON: tl.constexpr = WIDTH <= 4096  # else the programs that come next would take room from those that work
    layer, layers = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    if GPU:
        # a hint: if the slot changes meanwhile, other bytes come than are needed
        fetch_unit(of_slot(R + layer * SIZE, slot, SIZE * layers, SLOT), tl.program_id(0) * UNIT, B)
        if SOON:
            gdc_launch_dependents()
        gdc_wait()
        if not SOON:
            gdc_launch_dependents()
    R = of_slot(R + layer * SIZE, slot, SIZE * layers, SLOT)
    turn_unit(x, R, y + layer * M * WIDTH, tl.program_id(0) * UNIT, M, WIDTH, B, TOKENS, PER)


def turn_few(x: Tensor, R: Tensor, slot: Tensor | None = None, per: int = 1) -> Tensor:
    """x[M, width] by R[n, b, b] or R[slot] -> [M, width]; by R[S, n, b, b] or R[slot] of [slots, S, n, b, b] -> [S, M,
    width]. M up to 64, width a multiple of 64 (of 256 where per > 1: see `decode.arrange`), x contiguous."""
    sliced = R.dim() == (4 if slot is None else 5)
    tokens, width = x.shape
    y = x.new_empty(*([R.shape[-4]] if sliced else []), tokens, width)
    grid = (width // UNIT, R.shape[-4] if sliced else 1)
    padded = max(16, triton.next_power_of_2(tokens))
    _turn_few[grid](
        x, R.contiguous(), y, x if slot is None else slot, tokens, width, R.shape[-1], padded, per, slot is not None,
        x.is_cuda, num_warps=4, **overlapping(x),
    )  # fmt: skip
    return y


def overlapping(x: Tensor) -> dict[str, bool]:
    """The launch option by which a kernel may start before the one ahead of it ends (the interpreter has none)."""
    return {"launch_pdl": True} if x.is_cuda else {}


def few(x: Tensor, width: int) -> bool:
    return 0 < x.numel() // width <= 64 and width % UNIT == 0
