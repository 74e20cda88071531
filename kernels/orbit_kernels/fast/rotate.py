# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""OFT block rotation y = x blockdiag(R), its dX = dY blockdiag(R^T) and dR = X^T dY per block: one pass each way.

A rotation reads and writes the activation and does little else: b / 2 operations per byte, far below what the tensor
core needs to be busy for b up to 128. So a program takes 64 or 128 columns whatever b is: the blocks that lie there
form one square matrix with zeros outside, loaded once, and tokens stream past it in full-width rows. (At b = 256 a
program takes half the columns of a block, so that x is read twice, once from the L2 cache.)

Which rotation a row gets: R[n, b, b] one for all; R[slots, n, b, b] the one that a number on the device names; R[E, n,
b, b] and counts, rows sorted by expert as in `grouped_linear`; R[S, n, b, b] all of them, x read once (`slices`).

The backward pass reads x and dY once for both gradients; dX of slices is summed before it is written. dR is a sum over
tokens: each program sums a fixed share of them in float32 and the shares are added in order, so it is the same in every
run. The result of a row of x depends on that row alone. (Zeros outside a block do not shield from
infinities: a row with one spoils its 128 columns.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from .beside import few, overlapping, turn_few

BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_SLICES = 3
_MULTIPROCESSORS = 132  # of a Hopper GPU; a constant, so that cuts do not depend on the card


class Cut(NamedTuple):
    """How a kernel is cut; measured (MEASURED.md)."""

    columns: int  # per program
    tokens: int  # per step
    stages: int
    warps: int
    programs: int  # on one multiprocessor at a time


def _forward_cut(b: int) -> Cut:
    return Cut(128, 64, 3, 4, 2) if b <= 128 else Cut(128, 64, 2, 4, 1)


def _backward_cut(b: int, width: int, slices: int) -> Cut:
    """Stages of 128 columns are as many as fit the shared memory."""
    if b <= 64 and (width <= 4096 or slices > 1):
        return Cut(64, 64, 3, 4, 3)
    return Cut(128, 64, {1: 4, 2: 3, 3: 2}[slices], 8, 1)


class Choice(NamedTuple):
    """Which of several rotations applies: at most one of the two is set."""

    slot: Tensor | None = None  # int32, one number: the same rotation for all rows
    counts: Tensor | None = None  # int32 or int64 [E]: rows sorted by expert


ALL_ROWS = Choice()


@triton.jit
def _blocks(R, first_in, first_out, WIDTH, B: tl.constexpr, IN: tl.constexpr, COLS: tl.constexpr):
    """blockdiag(R)[first_in : + IN, first_out : + COLS], and where its elements lie in R."""
    i = first_in + tl.arange(0, IN)[:, None]
    j = first_out + tl.arange(0, COLS)[None, :]
    inside = (i // B == j // B) & (i < WIDTH)
    at = i * B + j % B  # block i // B, row i % B
    return tl.load(R + at, mask=inside, other=0.0), at, inside


@triton.jit
def _which(slot, SLOT: tl.constexpr):
    """The number of this program's rotation."""
    which = tl.program_id(2).to(tl.int64)
    if SLOT:
        which += tl.load(slot).to(tl.int64) * tl.num_programs(2)
    return which


@triton.jit
def _rows(counts, tokens, groups, GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """(first, end) of the rows of this program: its share of all, or of those of its group where GROUPS > 0."""
    begin, count = 0, tokens
    if GROUPS > 0:
        g = tl.arange(0, GROUPS)
        sizes = tl.load(counts + g, mask=g < groups, other=0).to(tl.int32)
        begin = tl.sum(tl.where(g < tl.program_id(2), sizes, 0))
        count = tl.sum(tl.where(g == tl.program_id(2), sizes, 0))
    share = tl.cdiv(tl.cdiv(count, TOKENS), tl.num_programs(1)) * TOKENS
    first = begin + tl.program_id(1) * share
    return first, min(first + share, begin + count)


@triton.jit(do_not_specialize=["tokens", "groups"])
def _rotate(
    x, R, y, slot, counts, tokens, groups,
    WIDTH: tl.constexpr, B: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    COLS: tl.constexpr, SLOT: tl.constexpr, GROUPS: tl.constexpr, SLICED: tl.constexpr,
):  # fmt: skip
    IN: tl.constexpr = max(COLS, B)
    first_out = tl.program_id(0) * COLS
    first_in = first_out // IN * IN
    R += _which(slot, SLOT) * (WIDTH * B)
    turn, _, _ = _blocks(R, first_in, first_out, WIDTH, B, IN, COLS)
    if SLICED:
        y += tl.program_id(2).to(tl.int64) * tokens * WIDTH
    c_in = first_in + tl.arange(0, IN)[None, :]
    c_out = first_out + tl.arange(0, COLS)[None, :]
    first, end = _rows(counts, tokens, groups, GROUPS, TOKENS)
    for t in tl.range(first, end, TOKENS, num_stages=STAGES):
        row = t + tl.arange(0, TOKENS)[:, None]
        at = row.to(tl.int64) * WIDTH
        part = tl.load(x + at + c_in, mask=(row < end) & (c_in < WIDTH), other=0.0)
        turned = tl.dot(part, turn, input_precision="ieee")
        tl.store(y + at + c_out, turned.to(y.dtype.element_ty), mask=(row < end) & (c_out < WIDTH))


@triton.jit(do_not_specialize=["tokens", "groups"])
def _rotate_backward(
    x, R, dy0, dy1, dy2, dx, dR, slot, counts, tokens, groups,
    WIDTH: tl.constexpr, B: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
    SLICES: tl.constexpr, NEED_DX: tl.constexpr, NEED_DR: tl.constexpr,
    SLOT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = WIDTH * B
    HALVES: tl.constexpr = (B + COLS - 1) // COLS  # of a block: 1, but for b = 256, where only dR is asked for
    first_out = tl.program_id(0) // HALVES * COLS
    first_in = first_out // (COLS * HALVES) * (COLS * HALVES) + tl.program_id(0) % HALVES * COLS
    which = _which(slot, SLOT)
    of_slices = which * SLICES * SIZE
    turn0, at_R, of_R = _blocks(R + of_slices, first_in, first_out, WIDTH, B, COLS, COLS)
    if SLICES > 1:
        turn1, _, _ = _blocks(R + of_slices + SIZE, first_in, first_out, WIDTH, B, COLS, COLS)
    if SLICES > 2:
        turn2, _, _ = _blocks(R + of_slices + 2 * SIZE, first_in, first_out, WIDTH, B, COLS, COLS)
    c_in = first_in + tl.arange(0, COLS)[None, :]
    c_out = first_out + tl.arange(0, COLS)[None, :]
    acc0 = tl.zeros([COLS, COLS], tl.float32)
    acc1 = tl.zeros([COLS, COLS], tl.float32)
    acc2 = tl.zeros([COLS, COLS], tl.float32)
    first, end = _rows(counts, tokens, groups, GROUPS, TOKENS)
    for t in tl.range(first, end, TOKENS, num_stages=STAGES):
        row = t + tl.arange(0, TOKENS)[:, None]
        at = row.to(tl.int64) * WIDTH
        inside = (row < end) & (c_out < WIDTH)
        grad0 = tl.load(dy0 + at + c_out, mask=inside, other=0.0)
        if SLICES > 1:
            grad1 = tl.load(dy1 + at + c_out, mask=inside, other=0.0)
        if SLICES > 2:
            grad2 = tl.load(dy2 + at + c_out, mask=inside, other=0.0)
        if NEED_DR:
            part = tl.trans(tl.load(x + at + c_in, mask=(row < end) & (c_in < WIDTH), other=0.0))
            acc0 = tl.dot(part, grad0, acc0, input_precision="ieee")
            if SLICES > 1:
                acc1 = tl.dot(part, grad1, acc1, input_precision="ieee")
            if SLICES > 2:
                acc2 = tl.dot(part, grad2, acc2, input_precision="ieee")
        if NEED_DX:
            back = tl.dot(grad0, tl.trans(turn0), input_precision="ieee")
            if SLICES > 1:
                back = tl.dot(grad1, tl.trans(turn1), back, input_precision="ieee")
            if SLICES > 2:
                back = tl.dot(grad2, tl.trans(turn2), back, input_precision="ieee")
            tl.store(dx + at + c_out, back.to(dx.dtype.element_ty), mask=inside)
    if NEED_DR:
        layer = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)  # dR[shares, layers, slices, ..]
        dR += layer * SLICES * SIZE + at_R
        tl.store(dR, acc0.to(dR.dtype.element_ty), mask=of_R)
        if SLICES > 1:
            tl.store(dR + SIZE, acc1.to(dR.dtype.element_ty), mask=of_R)
        if SLICES > 2:
            tl.store(dR + 2 * SIZE, acc2.to(dR.dtype.element_ty), mask=of_R)


@triton.jit
def _sum_shares(parts, dR, size, SHARES: tl.constexpr, GPU: tl.constexpr, BLOCK: tl.constexpr):
    if GPU:
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(parts + share * size + at, mask=at < size, other=0.0)
    tl.store(dR + at, total.to(dR.dtype.element_ty), mask=at < size)


def turn(x: Tensor, R: Tensor, choice: Choice = ALL_ROWS, sliced: bool = False, cut: Cut | None = None) -> Tensor:
    """x[..., width] blockdiag(R), no gradient; sliced: [S, ..., width], a result for each R[s]."""
    x, b, width = x.contiguous(), R.shape[-1], x.shape[-1]
    if choice.counts is None and few(x, width):
        y = turn_few(x.view(-1, width), R, choice.slot)
        return y.view(*y.shape[:-2], *x.shape)
    layers = R.shape[-4] if sliced or choice.counts is not None else 1
    y = torch.empty(layers, *x.shape, dtype=x.dtype, device=x.device) if sliced else torch.empty_like(x)
    tokens, cut = x.numel() // width, cut or _forward_cut(b)
    if tokens:
        columns = triton.cdiv(width, cut.columns)
        share = min(triton.cdiv(tokens, cut.tokens), cut.programs * _MULTIPROCESSORS // (columns * layers))
        _rotate[(columns, max(1, share), layers)](
            x, R.contiguous(), y, *_chosen(x, choice), tokens, _groups(choice), width, b, cut.tokens, cut.stages,
            cut.columns, choice.slot is not None, _padded(choice), sliced, num_warps=cut.warps,
        )  # fmt: skip
    return y


def turn_backward(
    x: Tensor, R: Tensor, dys: list[Tensor], choice: Choice = ALL_ROWS, need_dx: bool = True, need_dR: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dX, the sum over slices (dys has one gradient or, for R[S, n, b, b], S), and dR[like R], for R without slots."""
    b, several = R.shape[-1], len(dys) > 1
    if b == 256:
        dx = turn(dys[0], R.transpose(-1, -2), choice) if need_dx else None
        return dx, (_backward(x, R, dys, choice, False, True)[1] if need_dR else None)
    if several and need_dR and 128 * len(dys) > 256 and b == 128:  # that many sums do not fit the registers
        dx, _ = _backward(x, R, dys, choice, need_dx, False)
        dR = [_backward(x, one, [dy], choice, False, True)[1] for one, dy in zip(R, dys, strict=True)]
        return dx, torch.stack(dR)  # type: ignore[arg-type]
    return _backward(x, R, dys, choice, need_dx, need_dR)


def _backward(
    x: Tensor, R: Tensor, dys: list[Tensor], choice: Choice, need_dx: bool, need_dR: bool, cut: Cut | None = None
) -> tuple[Tensor | None, Tensor | None]:
    x, dys = x.contiguous(), [dy.contiguous() for dy in dys]
    width, b, slices = x.shape[-1], R.shape[-1], len(dys)
    layers = R.shape[-4] if choice.counts is not None else 1
    tokens, cut = x.numel() // width, cut or _backward_cut(b, width, slices)
    dx = torch.empty_like(x) if need_dx else None
    dR = torch.empty_like(R, memory_format=torch.contiguous_format) if need_dR else None
    if not tokens:
        return dx, None if dR is None else dR.zero_()
    columns = triton.cdiv(width, cut.columns) * max(1, b // cut.columns)
    size = width * b * slices * layers
    shares = _shares(tokens * width * (2 * slices + 4), size, columns * layers / cut.programs, tokens // cut.tokens)
    parts = dR
    if dR is not None and shares > 1:
        parts = torch.empty(shares * size, dtype=torch.float32, device=x.device)
    _rotate_backward[(columns, shares, layers)](
        x, R.contiguous(), dys[0], dys[1 if slices > 1 else 0], dys[-1], x if dx is None else dx,
        x if parts is None else parts, *_chosen(x, choice), tokens, _groups(choice), width, b, cut.tokens, cut.columns,
        cut.stages, slices, need_dx, need_dR, choice.slot is not None, _padded(choice), num_warps=cut.warps,
    )  # fmt: skip
    if dR is not None and parts is not dR:
        _sum_shares[(triton.cdiv(size, 1024),)](
            parts, dR, size, shares, x.is_cuda, 1024, num_warps=4, **overlapping(x)
        )  # fmt: skip
    return dx, dR


def _chosen(x: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    return (
        x if choice.slot is None else choice.slot,
        x if choice.counts is None else choice.counts.contiguous(),
    )


def _groups(choice: Choice) -> int:
    return 0 if choice.counts is None else choice.counts.shape[0]


def _padded(choice: Choice) -> int:
    return 0 if choice.counts is None else triton.next_power_of_2(choice.counts.shape[0])


def _shares(streamed: int, of_R: int, rows: float, steps: int) -> int:
    """Into how many shares the backward pass cuts the tokens: fewest bytes moved (`streamed` and the shares' own sums
    of dR, written and read), counting multiprocessors left idle in the last wave of `rows` * shares."""

    def cost(shares: int) -> float:
        waves = rows * shares / _MULTIPROCESSORS
        return streamed * math.ceil(waves) / waves + 8.0 * shares * of_R

    return min(range(1, 1 + max(1, min(16, steps))), key=cost)
