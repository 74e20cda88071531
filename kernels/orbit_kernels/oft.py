"""OFT: rotate the input of a frozen linear, block by block, y = (x R) W^T.

    v [n, b(b-1)/2]   the parameter: per block the strict upper triangle of U, row by row
    Q = U - U^T       skew
    R = I + 2Q + 2Q^2 + 2Q^3 + Q^4 = (I + Q^2)(I + 2Q + Q^2)

R is the Cayley transform (I + Q)(I - Q)^-1 with its Neumann series cut after five terms (OFTv2, arXiv 2506.19847; the
interchange convention of PEFT's `oft_R` with use_cayley_neumann). The dense equivalent is W' = W blockdiag(R^T).

Cutting costs orthogonality. With C the exact transform R = C (I - Q^4), so R R^T = (I - Q^4)^2 and, for s = ||Q||_2 up
to 1, ||R R^T - I||_2 = 2 s^4 - s^8: 2e-4 at s = 0.1, 1.6e-2 at s = 0.3, 1 at s = 1. s is worth watching.

Two batched products forward and three backward. With P = Q^2, S = 2Q + P and G = dL/dR:
    dS = G + P G;   H = G + G (P - 2Q) + dS;   dv = upper(D) - lower(D),   D = 2 dS - (H + H^T) Q
which uses Q^T = -Q, P^T = P and that only the skew part of dL/dQ reaches v.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .counts import require_counts


def skew(v: Tensor, b: int) -> Tensor:
    """v[..., b(b-1)/2] -> Q[..., b, b] with Q^T = -Q; differentiable.

    Raises ValueError when v's last size is not b(b-1)/2.
    """
    _require_triangle(v, b)
    return _Skew.apply(v, b)


def cayley_neumann(v: Tensor, b: int, dtype: torch.dtype | None = None) -> Tensor:
    """v[n, b(b-1)/2] -> R[n, b, b] in `dtype` (default: that of v); differentiable.

    16-bit parameters are computed in float32 and rounded once, at the end. On a GPU b = 16, 32, 64, 128, 256 go to
    `fast.cayley` (float64 does not): same result within float32 rounding, differentiable once.
    Raises ValueError when v is not [n, b(b-1)/2].
    """
    _require_triangle(v, b)
    if v.dim() != 2:
        raise ValueError(f"cayley_neumann: expected v[n, b(b-1)/2]; found {tuple(v.shape)}")
    dtype = dtype or v.dtype
    if v.is_cuda:
        from . import fast

        if fast.cayley_supports(v, b):
            return fast.cayley_neumann(v, b, dtype)
    return _CayleyNeumann.apply(v, b, dtype)


def rotate(x: Tensor, R: Tensor, slot: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """x[..., n*b] -> each block of x times its R, [..., n*b] in the dtype of x; differentiable in x and R.

    R[n, b, b]          one rotation for all rows
    R[slots, n, b, b]   with slot, int32 or int64 of one element on the device of x: all rows by R[slot], which the host
                        never looks at (out of range: the caller's error); R must not ask for a gradient
    R[E, n, b, b]       with counts[E], rows of x[tokens, n*b] sorted by expert as in `grouped_linear`: each by its own

    Computed in the wider of the two dtypes (PEFT casts alike); pass R in the dtype of x for speed. 16-bit tensors on a
    GPU go to `fast.rotate` for b = 16, 32, 64, 128, 256: same result up to rounding, differentiable once.
    Raises ValueError when shapes do not fit, FormatError when counts do not.
    """
    n, b = require_rotations(x, R, 3 if slot is None and counts is None else 4)
    if slot is not None and (counts is not None or slot.numel() != 1 or R.requires_grad):
        raise ValueError("rotate: expected a slot of one element, no counts beside it and rotations without gradient")
    if counts is not None:
        if x.dim() != 2:
            raise ValueError(f"rotate: expected x[tokens, {n * b}] with counts; found {tuple(x.shape)}")
        require_counts(counts, R.shape[0], x)
    if x.is_cuda:
        from . import fast  # imported with the first CUDA tensor, so that Triton is never loaded without a GPU

        if fast.rotate_supports(x, R):
            return fast.rotate(x, R, slot, counts)
    if slot is not None:
        return _turn(x, R.index_select(0, slot.reshape(1).long())[0])
    if counts is not None:
        return torch.cat([_turn(part, R[e]) for e, part in enumerate(x.split(counts.tolist()))])
    return _turn(x, R)


def rotate_slices(x: Tensor, R: Tensor) -> tuple[Tensor, ...]:
    """x[..., n*b], R[S, n, b, b] -> S results, x by each R[s]: what q, k and v, or gate and up, read.

    On a GPU up to three are made in one pass over x, and their gradients in one (b up to 128): dX is summed in float32
    and written once. Raises ValueError when R is not [S, n, b, b] or n * b is not the width of x.
    """
    require_rotations(x, R, 4)
    if x.is_cuda:
        from . import fast

        if fast.slices_support(x, R):
            return fast.slices(x, R)
    return tuple(rotate(x, one) for one in R.unbind(0))


def require_rotations(x: Tensor, R: Tensor, dims: int) -> tuple[int, int]:
    """(n, b) of rotations R[..., n, b, b] that fit x."""
    if R.dim() != dims or R.shape[-1] != R.shape[-2]:
        raise ValueError(f"rotate R: expected [{'n, b, b' if dims == 3 else '.., n, b, b'}]; found {tuple(R.shape)}")
    n, b = R.shape[-3], R.shape[-1]
    if x.shape[-1] != n * b:
        raise ValueError(f"rotate: {n} blocks of block size b = {b} cover {n * b}; input width is {x.shape[-1]}")
    return n, b


def _turn(x: Tensor, R: Tensor) -> Tensor:
    n, b, _ = R.shape
    dtype = torch.promote_types(x.dtype, R.dtype)
    blocks = x.to(dtype).reshape(-1, n, b).transpose(0, 1)  # [n, tokens, b], a view: bmm reads it strided
    return torch.bmm(blocks, R.to(dtype)).transpose(0, 1).reshape(x.shape).to(x.dtype)


def block_count(width: int, b: int) -> int:
    """How many blocks of size b cover `width`. Raises ValueError, naming both, unless b divides it."""
    if b < 2 or width % b:
        raise ValueError(f"OFT block size b = {b} must be at least 2 and divide the input width {width}")
    return width // b


@torch.no_grad()
def orthogonality_error(v: Tensor, b: int) -> Tensor:
    """v[n, b(b-1)/2] -> max over blocks of ||R R^T - I||_2, measured on R in float64; a 0-dim tensor."""
    R = cayley_neumann(v.detach().double(), b)
    gram = R @ R.transpose(-1, -2)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return torch.linalg.eigvalsh(gram).abs().amax()


@torch.no_grad()
def skew_norm(v: Tensor, b: int) -> Tensor:
    """v[..., b(b-1)/2] -> s, the max over blocks of ||Q||_2, in float64; a 0-dim tensor."""
    Q = skew(v.detach().double(), b)
    largest_square = torch.linalg.eigvalsh(Q.transpose(-1, -2) @ Q)[..., -1]  # eigenvalues of -Q^2, ascending
    return largest_square.clamp(min=0.0).sqrt().amax()


def error_law(s: Tensor | float) -> Tensor | float:
    """2 s^4 - s^8, the orthogonality error that s = ||Q||_2 <= 1 implies."""
    return 2 * s**4 - s**8


@cache
def _triangles(b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat positions of the strict upper triangle, row by row, and of its mirror image."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used under autograd later
        rows, cols = torch.triu_indices(b, b, 1, device=device)
        return rows * b + cols, cols * b + rows


def _fill_skew(v: Tensor, b: int) -> Tensor:
    upper, lower = _triangles(b, v.device)
    flat = v.new_zeros(*v.shape[:-1], b * b)
    flat.index_copy_(-1, upper, v)
    flat.index_copy_(-1, lower, v.neg())
    return flat.unflatten(-1, (b, b))


def _gather_skew(grad: Tensor) -> Tensor:
    """Gradient of Q[..., b, b] -> gradient of v."""
    upper, lower = _triangles(grad.shape[-1], grad.device)
    flat = grad.flatten(-2)
    return flat.index_select(-1, upper) - flat.index_select(-1, lower)


class _Skew(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, b: int) -> Tensor:
        return _fill_skew(v, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather_skew(grads[0]), None


class _CayleyNeumann(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, b: int, dtype: torch.dtype) -> Tensor:
        Q = _fill_skew(v if v.element_size() >= 4 else v.float(), b)
        P = torch.bmm(Q, Q)
        S = torch.add(P, Q, alpha=2.0)
        R = torch.baddbmm(S, P, S).add_(P)
        R.diagonal(dim1=-2, dim2=-1).add_(1.0)
        ctx.save_for_backward(Q, P)
        ctx.dtype = v.dtype
        return R.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        Q, P = ctx.saved_tensors
        return cayley_gradient(Q, P, grads[0].to(Q.dtype)).to(ctx.dtype), None, None


def cayley_gradient(Q: Tensor, P: Tensor, G: Tensor) -> Tensor:
    """dv from Q, P = Q^2 and G = dL/dR, [n, b, b] and of one dtype all."""
    dS = torch.baddbmm(G, P, G)
    H = torch.baddbmm(G, G, torch.sub(P, Q, alpha=2.0)).add_(dS)
    D = torch.baddbmm(dS, H + H.transpose(-1, -2), Q, beta=2.0, alpha=-1.0)
    return _gather_skew(D)


def _require_triangle(v: Tensor, b: int) -> None:
    size = b * (b - 1) // 2
    if b < 2 or v.dim() < 1 or v.shape[-1] != size:
        raise ValueError(f"OFT block size b = {b}: expected vectors of length {size}; found {tuple(v.shape)}")
