# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Activations to FP8 in one pass: x is read once, codes and scales are written, the reference's bits.

A correctly rounded division for each element would cost more than the bytes do. With r = 1 / scale, rounded, q = x r
and one correction by its remainder, q + r (x - q scale), is the rounded quotient (Markstein), as long as nothing
underflows; where a remainder does, the quotient is far below half of the smallest code and either way 0. Programs that
meet a scale so small or large that 1 / scale does not hold divide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 128  # columns of a scale
_ROWS = 32
_FUSED = not triton.knobs.runtime.interpret  # the interpreter rounds between product and sum


@triton.jit
def _quantize(
    x, codes, scales, rows, width, ROWS: tl.constexpr, GROUP: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
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
    spread = tl.broadcast_to(scale[:, None], (ROWS, GROUP))
    usual = tl.min(((scale > 2.0**-60) & (scale < 2.0**60)).to(tl.int32), 0) > 0
    if FUSED and usual:
        inverse = tl.broadcast_to(tl.div_rn(1.0, scale)[:, None], (ROWS, GROUP))
        quotients = values * inverse
        quotients = tl.fma(tl.fma(-quotients, spread, values), inverse, quotients)
    else:
        quotients = tl.div_rn(values, spread)
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
        _quantize[grid](x.contiguous(), codes, scales, rows, width, _ROWS, GROUP, _FUSED, num_warps=4)
    return codes, scales.t()
