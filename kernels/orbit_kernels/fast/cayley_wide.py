# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Cayley-Neumann v -> R and dR -> dv for blocks of 64 and 128, of which a multiprocessor does not hold three.

Columns of a product are independent of each other where only its right factor changes. With Horner's scheme every
product is Q times what is there already, so a program keeps Q and takes a few columns through all of it:

    R  = I + 2Q + Q (2Q + Q (2Q + Q Q))

Backward, only the skew part of dQ is wanted, and with N = Q^T = -Q it is a sum of N^i (G -+ G^T) N^j over the terms of
the series: E = G - G^T where i + j is even, F = G + G^T where it is odd. Horner's scheme from the right, then the left:

    A1 = F, A2 = 2E + A1 N, A3 = 2F + A2 N, A4 = 2E + A3 N        (rows by themselves: done transposed, in columns)
    D  = A4 + N (A3 + N (A2 + N A1)),   dv = upper(D)             (columns by themselves)

A2 to A4 pass through a scratch between the two. Products are three tf32 products each: float32 accuracy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZES = (64, 128)
_COLS = 32  # per program
_SCRATCH = 32 << 20  # bytes


@triton.jit
def _entries(i, j, B: tl.constexpr):
    """Where the entries of v for Q[i, j] lie, and their signs."""
    low, high = tl.minimum(i, j), tl.maximum(i, j)
    sign = tl.where(i < j, 1.0, tl.where(i > j, -1.0, 0.0))
    return low * B - low * (low + 1) // 2 + high - low - 1, sign


@triton.jit
def _skew(v, i, j, B: tl.constexpr):
    at, sign = _entries(i, j, B)
    return tl.load(v + at, mask=sign != 0.0, other=0.0).to(tl.float32) * sign


@triton.jit
def _times(Q, columns):
    return tl.dot(Q, columns, input_precision="tf32x3")


@triton.jit
def _forward(v, R, B: tl.constexpr, COLS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)[:, None]
    j = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    v += block * (B * (B - 1) // 2)
    Q, part = _skew(v, i, tl.arange(0, B)[None, :], B), _skew(v, i, j, B)
    twice = 2.0 * part
    part = twice + _times(Q, part)
    part = twice + _times(Q, part)
    part = twice + _times(Q, part) + tl.where(i == j, 1.0, 0.0)
    tl.store(R + block * (B * B) + i * B + j, part.to(R.dtype.element_ty))


@triton.jit
def _sums(dR, i, j, B: tl.constexpr):
    """-2 E and F at [i, j]."""
    G = tl.load(dR + i * B + j).to(tl.float32)
    turned = tl.load(dR + j * B + i).to(tl.float32)
    return 2.0 * (turned - G), turned + G


@triton.jit
def _from_right(v, dR, scratch, B: tl.constexpr, COLS: tl.constexpr):
    """A2, A3, A4, transposed, to the block's three matrices in the scratch."""
    SIZE: tl.constexpr = B * B
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)[:, None]
    j = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    Q = _skew(v + block * (B * (B - 1) // 2), i, tl.arange(0, B)[None, :], B)
    minus_2E, part = _sums(dR + block * SIZE, i, j, B)
    twice = 2.0 * part
    X = scratch + block * (3 * SIZE) + i * B + j
    part = minus_2E + _times(Q, part)
    tl.store(X, part)
    part = twice + _times(Q, part)
    tl.store(X + SIZE, part)
    tl.store(X + 2 * SIZE, minus_2E + _times(Q, part))


@triton.jit
def _from_left(v, dR, scratch, dv, B: tl.constexpr, COLS: tl.constexpr):
    SIZE: tl.constexpr = B * B
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)[:, None]
    j = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    Q = _skew(v + block * (B * (B - 1) // 2), i, tl.arange(0, B)[None, :], B)
    _, part = _sums(dR + block * SIZE, i, j, B)
    X = scratch + block * (3 * SIZE) + j * B + i
    part = tl.load(X) - _times(Q, part)
    part = tl.load(X + SIZE) - _times(Q, part)
    part = tl.load(X + 2 * SIZE) - _times(Q, part)
    at, sign = _entries(i, j, B)
    tl.store(dv + block * (B * (B - 1) // 2) + at, part.to(dv.dtype.element_ty), mask=sign > 0.0)


def forward(v: Tensor, R: Tensor) -> None:
    """v[n, b(b-1)/2] -> R[n, b, b], contiguous both."""
    b = R.shape[-1]
    _forward[(len(v), b // _COLS)](v, R, b, _COLS, num_warps=b // 16)


def backward(v: Tensor, dR: Tensor, dv: Tensor) -> None:
    """dR[n, b, b] at v -> dv[n, b(b-1)/2], contiguous all."""
    b = dR.shape[-1]
    step = _SCRATCH // (12 * b * b)
    scratch = torch.empty(min(len(v), step) * 3 * b * b, dtype=torch.float32, device=v.device)
    for first in range(0, len(v), step):
        part, d = v[first : first + step], dR[first : first + step]
        grid = (len(part), b // _COLS)
        _from_right[grid](part, d, scratch, b, _COLS, num_warps=b // 16)
        _from_left[grid](part, d, scratch, dv[first : first + step], b, _COLS, num_warps=b // 16)
