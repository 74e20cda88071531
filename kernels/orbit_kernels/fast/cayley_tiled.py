# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Cayley-Neumann v -> R for blocks of 256, which no multiprocessor holds: a launch for each product.

    Q from v;  P = Q Q, S = 2Q + P;  R = P S + S + P + I

A program makes one tile of a product; what is elementwise happens while a tile is stored. Without a gradient many
blocks go in turns through a scratch that the L2 cache holds; with one, Q and P of all stay, as they do in the
reference, whose three products make the gradient: kernels like these took 1.2 times as long for it. Products are
float32 (three tf32 products each took 1.2 times as long here; they need operands rearranged that are small as it is).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cayley_wide import _entries

BLOCK_SIZES = (256,)
_TILE = 64
_STEP = 32  # of a sum
_SCRATCH = 32 << 20  # bytes


@triton.jit
def _corner(B: tl.constexpr, TILE: tl.constexpr):
    """Block, and first row and column of this program's tile."""
    tile = tl.program_id(1)
    return tl.program_id(0).to(tl.int64), (tile // (B // TILE)) * TILE, (tile % (B // TILE)) * TILE


@triton.jit
def _cells(row, col, ROWS: tl.constexpr, COLS: tl.constexpr, B: tl.constexpr):
    return (row + tl.arange(0, ROWS)[:, None]) * B + col + tl.arange(0, COLS)[None, :]


@triton.jit
def _load(matrix, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, B: tl.constexpr):
    return tl.load(matrix + _cells(row, col, ROWS, COLS, B)).to(tl.float32)


@triton.jit
def _add_product(left, right, total):
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _expand(v, Q, B: tl.constexpr, TILE: tl.constexpr):
    """The tiles above the diagonal, and with each its mirror image."""
    block, row, col = _corner(B, TILE)
    if row <= col:
        i, j = row + tl.arange(0, TILE)[:, None], col + tl.arange(0, TILE)[None, :]
        at, _ = _entries(i, j, B)
        upper = tl.load(v + block * (B * (B - 1) // 2) + at, mask=i < j, other=0.0).to(tl.float32)
        Q += block * (B * B)
        if row == col:
            upper -= tl.trans(upper)
        else:
            tl.store(Q + _cells(col, row, TILE, TILE, B), -tl.trans(upper))
        tl.store(Q + _cells(row, col, TILE, TILE, B), upper)


@triton.jit
def _square(Q, P, S, B: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    block, row, col = _corner(B, TILE)
    Q += block * (B * B)
    total = tl.zeros([TILE, TILE], tl.float32)
    for k in range(0, B, STEP):
        total = _add_product(_load(Q, row, k, TILE, STEP, B), _load(Q, k, col, STEP, TILE, B), total)
    cells = block * (B * B) + _cells(row, col, TILE, TILE, B)
    tl.store(P + cells, total)
    tl.store(S + cells, total + 2.0 * _load(Q, row, col, TILE, TILE, B))


@triton.jit
def _rotation(P, S, R, B: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    block, row, col = _corner(B, TILE)
    P += block * (B * B)
    S += block * (B * B)
    total = tl.zeros([TILE, TILE], tl.float32)
    for k in range(0, B, STEP):
        total = _add_product(_load(P, row, k, TILE, STEP, B), _load(S, k, col, STEP, TILE, B), total)
    total += _load(S, row, col, TILE, TILE, B) + _load(P, row, col, TILE, TILE, B)
    total += tl.where(row + tl.arange(0, TILE)[:, None] == col + tl.arange(0, TILE)[None, :], 1.0, 0.0)
    tl.store(R + block * (B * B) + _cells(row, col, TILE, TILE, B), total.to(R.dtype.element_ty))


def forward(v: Tensor, R: Tensor) -> None:
    """v[n, b(b-1)/2] -> R[n, b, b], contiguous both."""
    b = R.shape[-1]
    step = min(len(v), _SCRATCH // (12 * b * b))
    Q, P, S = torch.empty(3, step, b, b, dtype=torch.float32, device=v.device)
    for first in range(0, len(v), step):
        _make(v[first : first + step], Q, P, S, R[first : first + step])


def forward_kept(v: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """The same bits; Q and P of all blocks, float32, are returned."""
    Q, P, S = torch.empty(3, *R.shape, dtype=torch.float32, device=v.device)
    if len(v):
        _make(v, Q, P, S, R)
    return Q, P


def _make(v: Tensor, Q: Tensor, P: Tensor, S: Tensor, R: Tensor) -> None:
    b = R.shape[-1]
    grid = (len(v), (b // _TILE) ** 2)
    _expand[grid](v, Q, b, _TILE, num_warps=4)
    _square[grid](Q, P, S, b, _TILE, _STEP, num_warps=4)
    _rotation[grid](P, S, R, b, _TILE, _STEP, num_warps=4)
