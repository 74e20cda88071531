# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Activations to FP8 in one pass: x is read once, codes and scales are written, the reference's bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 128  # columns of a scale
_ROWS = 32


@triton.jit
def _quantize(x, codes, scales, rows, width, ROWS: tl.constexpr, GROUP: tl.constexpr):
    group = tl.program_id(0)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = group * GROUP + tl.arange(0, GROUP)
    at = m.to(tl.int64)[:, None] * width + k[None, :]
    there = (m < rows)[:, None]
    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    magnitudes = tl.abs(values)
    amax = tl.max(magnitudes, 1)
    amax = tl.where(tl.max((magnitudes != magnitudes).to(tl.int32), 1) > 0, float("nan"), amax)  # max passes NaN by
    scale = tl.div_rn(amax, 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    quotients = tl.div_rn(values, tl.broadcast_to(scale[:, None], (ROWS, GROUP)))
    quotients = tl.clamp(quotients, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(codes + at, quotients.to(tl.float8e4nv), mask=there)
    tl.store(scales + group.to(tl.int64) * rows + m, scale, mask=m < rows)


def quantizes_activations(x: Tensor) -> bool:
    """Whether x[rows, in] has a fast path: 16 or 32 bits, whole groups, on the current device."""
    here = x.device.index == torch.cuda.current_device()
    return here and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.shape[1] % GROUP == 0


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[rows, in] -> e4m3[rows, in], float32[rows, in / 128] with rows side by side."""
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(width // GROUP, rows, dtype=torch.float32, device=x.device)
    if rows:
        grid = (width // GROUP, triton.cdiv(rows, _ROWS))
        _quantize[grid](x.contiguous(), codes, scales, rows, width, _ROWS, GROUP, num_warps=4)
    return codes, scales.t()
