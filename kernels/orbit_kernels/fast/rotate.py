# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""OFT block rotation y = x blockdiag(R), its dX = dY blockdiag(R^T) and dR = X^T dY per block: one pass each way.

A rotation reads and writes the activation and does little else: b / 2 operations per byte, far below what the tensor
core needs to be busy for b up to 128. So a program takes 128 columns whatever b is: the blocks that lie there form one
128 x 128 matrix with zeros outside, loaded once, and tokens stream past it in full-width rows.

The backward pass reads x and dY once for both gradients. dR is a sum over tokens: each program sums a fixed share of
them in float32 and the shares are added in order, so it is the same in every run. The result of a row of x depends on
that row alone. (Zeros outside a block do not shield from infinities: a row with one spoils its 128 columns.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZES = (16, 32, 64, 128)
_TOKENS = 64  # per step
_MULTIPROCESSORS = 132  # of a Hopper GPU; a constant, so that cuts do not depend on the card
_PROGRAMS = 4 * _MULTIPROCESSORS


@triton.jit
def _blocks(R, WIDTH, B: tl.constexpr, COLS: tl.constexpr):
    """blockdiag(R) at the 128 columns of this program, and where its elements lie in R."""
    i = tl.arange(0, COLS)[:, None]
    j = tl.arange(0, COLS)[None, :]
    first = tl.program_id(0) * COLS
    inside = (i // B == j // B) & (first + i < WIDTH)
    at = (first + i) * B + j % B  # block (first + i) // B, row i % B
    return tl.load(R + at, mask=inside, other=0.0), at, inside


@triton.jit(do_not_specialize=["tokens", "per_program"])
def _rotate(
    x, R, y, tokens, per_program, WIDTH: tl.constexpr, B: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr
):
    COLS: tl.constexpr = 128
    turn, _, _ = _blocks(R, WIDTH, B, COLS)
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    begin = tl.program_id(1) * per_program
    for t in tl.range(begin, min(begin + per_program, tokens), TOKENS, num_stages=STAGES):
        row = t + tl.arange(0, TOKENS)[:, None]
        inside = (row < tokens) & (c < WIDTH)
        at = row.to(tl.int64) * WIDTH + c
        part = tl.load(x + at, mask=inside, other=0.0)
        turned = tl.dot(part, turn, input_precision="ieee")
        tl.store(y + at, turned.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "per_program"])
def _rotate_backward(
    x, R, dy, dx, parts, tokens, per_program,
    WIDTH: tl.constexpr, B: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, NEED_DX: tl.constexpr,
):  # fmt: skip
    COLS: tl.constexpr = 128
    turn, at_R, of_R = _blocks(R, WIDTH, B, COLS)
    back = tl.trans(turn)
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    begin = tl.program_id(1) * per_program
    acc = tl.zeros([COLS, COLS], tl.float32)
    for t in tl.range(begin, min(begin + per_program, tokens), TOKENS, num_stages=STAGES):
        row = t + tl.arange(0, TOKENS)[:, None]
        inside = (row < tokens) & (c < WIDTH)
        at = row.to(tl.int64) * WIDTH + c
        grad = tl.load(dy + at, mask=inside, other=0.0)
        part = tl.load(x + at, mask=inside, other=0.0)
        acc = tl.dot(tl.trans(part), grad, acc, input_precision="ieee")
        if NEED_DX:
            turned = tl.dot(grad, back, input_precision="ieee")
            tl.store(dx + at, turned.to(dx.dtype.element_ty), mask=inside)
    share = tl.program_id(1).to(tl.int64) * (WIDTH * B)
    tl.store(parts + share + at_R, acc, mask=of_R)


def supports(x: Tensor, R: Tensor) -> bool:
    here = x.device == R.device and x.device.index == torch.cuda.current_device()
    return here and x.dtype == R.dtype and x.dtype in (torch.bfloat16, torch.float16) and R.shape[1] in BLOCK_SIZES


def rotate(x: Tensor, R: Tensor) -> Tensor:
    """`oft.rotate` for 16-bit x and R on a GPU: x[..., n*b], R[n, b, b] -> [..., n*b]; differentiable once in both."""
    return _Rotate.apply(x, R)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(x, R)
        return turn(x, R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, R = ctx.saved_tensors
        need_dx, need_dR = ctx.needs_input_grad
        if need_dR:
            return turn_backward(x, R, grads[0], need_dx)
        return (turn(grads[0], R.transpose(1, 2)) if need_dx else None), None


def turn(x: Tensor, R: Tensor) -> Tensor:
    """x blockdiag(R), no gradient."""
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width, b = x.shape[-1], R.shape[1]
    tokens = x.numel() // width
    if tokens:
        groups, share, per_program = _cut(tokens, width, _PROGRAMS // triton.cdiv(width, 128))
        _rotate[(groups, share)](x, R.contiguous(), y, tokens, per_program, width, b, _TOKENS, 3, num_warps=4)
    return y


def turn_backward(x: Tensor, R: Tensor, dy: Tensor, need_dx: bool = True) -> tuple[Tensor | None, Tensor]:
    """dX and dR, the latter summed over all tokens in float32 and rounded once."""
    x, dy = x.contiguous(), dy.contiguous()
    width, b = x.shape[-1], R.shape[1]
    tokens = x.numel() // width
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    if not tokens:
        return dx, torch.zeros_like(R)
    groups, share, per_program = _cut(tokens, width, _shares(tokens, width, b))
    parts = torch.empty(share, *R.shape, dtype=torch.float32, device=x.device)
    _rotate_backward[(groups, share)](
        x, R.contiguous(), dy, x if dx is None else dx, parts, tokens, per_program,
        width, b, _TOKENS, 3, need_dx, num_warps=8,
    )  # fmt: skip
    return dx, parts.sum(0).to(R.dtype)


def _cut(tokens: int, width: int, shares: int) -> tuple[int, int, int]:
    """Programs along columns, programs along tokens, tokens per program (whole steps)."""
    steps = triton.cdiv(tokens, _TOKENS)
    per_program = triton.cdiv(steps, max(1, min(steps, shares)))
    return triton.cdiv(width, 128), triton.cdiv(steps, per_program), per_program * _TOKENS


def _shares(tokens: int, width: int, b: int) -> int:
    """Into how many shares the backward pass cuts the tokens: fewest bytes moved, counting the shares' own sums of dR
    (written and read) and multiprocessors left idle in the last wave. One program fills a multiprocessor."""

    def cost(shares: int) -> float:
        waves = triton.cdiv(width, 128) * shares / _MULTIPROCESSORS
        return 6.0 * tokens * width * math.ceil(waves) / waves + 8.0 * shares * width * b

    return min(range(1, 17), key=cost)
