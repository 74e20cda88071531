# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Cayley-Neumann v -> R and dR -> dv for blocks of 256, which no multiprocessor holds: a launch for each product.

A program makes one tile of a product. What the products need passes through a scratch that the L2 cache holds, so many
blocks go in turns; what is elementwise happens while a tile is loaded or stored. With S = 2Q + P, so S^T = P - 2Q:

    forward    Q from v;  P = Q Q, S;  R = P S + S + P + I
    backward   Q, P, S again;  dS = G + P G, H = G + G S^T + dS;  dv = upper(2 (dS - dS^T) - (W Q + Q W)),  W = H + H^T

which are the formulas of `oft`, the last one with D^T written out. Products are three tf32 products each.
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
_SCRATCH = 48 << 20  # bytes


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
    return tl.dot(left, right, total, input_precision="tf32x3")


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


@triton.jit
def _between(P, S, G, dS, H, B: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    block, row, col = _corner(B, TILE)
    P += block * (B * B)
    S += block * (B * B)
    G += block * (B * B)
    of_dS = _load(G, row, col, TILE, TILE, B)
    of_H = of_dS
    for k in range(0, B, STEP):
        of_dS = _add_product(_load(P, row, k, TILE, STEP, B), _load(G, k, col, STEP, TILE, B), of_dS)
        turned = tl.trans(_load(S, col, k, TILE, STEP, B))
        of_H = _add_product(_load(G, row, k, TILE, STEP, B), turned, of_H)
    cells = block * (B * B) + _cells(row, col, TILE, TILE, B)
    tl.store(dS + cells, of_dS)
    tl.store(H + cells, of_H + of_dS)


@triton.jit
def _to_v(Q, dS, H, dv, B: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    block, row, col = _corner(B, TILE)
    if row <= col:
        Q += block * (B * B)
        dS += block * (B * B)
        H += block * (B * B)
        total = tl.zeros([TILE, TILE], tl.float32)
        for k in range(0, B, STEP):
            W = _load(H, row, k, TILE, STEP, B) + tl.trans(_load(H, k, row, STEP, TILE, B))
            total = _add_product(W, _load(Q, k, col, STEP, TILE, B), total)
            W = _load(H, k, col, STEP, TILE, B) + tl.trans(_load(H, col, k, TILE, STEP, B))
            total = _add_product(_load(Q, row, k, TILE, STEP, B), W, total)
        skew = _load(dS, row, col, TILE, TILE, B) - tl.trans(_load(dS, col, row, TILE, TILE, B))
        i, j = row + tl.arange(0, TILE)[:, None], col + tl.arange(0, TILE)[None, :]
        at, _ = _entries(i, j, B)
        value = (2.0 * skew - total).to(dv.dtype.element_ty)
        tl.store(dv + block * (B * (B - 1) // 2) + at, value, mask=i < j)


def forward(v: Tensor, R: Tensor) -> None:
    """v[n, b(b-1)/2] -> R[n, b, b], contiguous both."""
    b = R.shape[-1]
    for part, Q, P, S in _in_turns(v, b, 3):
        grid = _squared(v[part], Q, P, S, b)
        _rotation[grid](P, S, R[part], b, _TILE, _STEP, num_warps=4, num_stages=3)


def backward(v: Tensor, dR: Tensor, dv: Tensor) -> None:
    """dR[n, b, b] at v -> dv[n, b(b-1)/2], contiguous all."""
    b = dR.shape[-1]
    for part, Q, P, S, dS, H in _in_turns(v, b, 5):
        grid = _squared(v[part], Q, P, S, b)
        _between[grid](P, S, dR[part], dS, H, b, _TILE, _STEP, num_warps=4, num_stages=3)
        _to_v[grid](Q, dS, H, dv[part], b, _TILE, _STEP, num_warps=4, num_stages=2)


def _squared(v: Tensor, Q: Tensor, P: Tensor, S: Tensor, b: int) -> tuple[int, int]:
    grid = (len(v), (b // _TILE) ** 2)
    _expand[grid](v, Q, b, _TILE, num_warps=4)
    _square[grid](Q, P, S, b, _TILE, _STEP, num_warps=4, num_stages=3)
    return grid


def _in_turns(v: Tensor, b: int, matrices: int):
    """(which blocks, a scratch for each matrix) as many blocks at a time as the scratch takes."""
    step = min(len(v), _SCRATCH // (4 * matrices * b * b))
    scratch = torch.empty(matrices, step, b, b, dtype=torch.float32, device=v.device)
    for first in range(0, len(v), step):
        yield slice(first, first + step), *scratch
