# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Grouped products with packed experts: one launch for all experts, each tile of a weight unpacked as it is multiplied.

A program computes y^T = W x^T for BLOCK rows of one expert (see `schedule`) and ROWS outputs. W stands on the left
because there the tensor core takes its operand from registers, where the codes are unpacked: no dense tile is ever
written, and unpacking one tile overlaps with multiplying the tile before. The gradient dX = dY W is the same product
with the tile of W turned: its outputs are columns of W and the sum runs over rows.

`_pairs` makes the bits of `dequantize`: OR-ing 0x4300 over a code gives the bfloat16 number 128 + code, and the
difference to 136, times the scale, is rounded once. Other formats go through the arithmetic of `dequantize` itself.
Sums are float32 in one fixed order along the weight: each row's result depends on that row and on its expert alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.stack import PackedStack
from . import grouped_bf16, grouped_packed
from .dequantize import number, operands, wide_scale
from .schedule import schedule
from .unpack import spread

ROWS = 128  # outputs per program
_STEP = 64  # of the sum per step


@triton.jit
def _pairs(word, shift, scale):
    """(code - 8) * scale in bfloat16, two at a time: 0x4300 over a code is the number 128 + code."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b;
        shr.b32 a, $1, $3;
        shr.b32 b, $2, $4;
        prmt.b32 a, a, b, 0x5410;
        lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
        mov.b32 b, 0x43084308;
        sub.rn.bf16x2 a, a, b;
        mul.rn.bf16x2 $0, a, $5;
        }""",
        "=r,r,r,r,r,r",
        [word, shift, scale],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _weight(word, bits, scale, dtype: tl.constexpr, scale_dtype: tl.constexpr, FORMAT: tl.constexpr):
    if scale.dtype == tl.bfloat16:
        return _pairs(word, bits, scale)
    product = number(word, bits, FORMAT) * scale
    if FORMAT == "int4" or FORMAT == "fp8":
        product = product.to(scale_dtype)  # rounded in the dtype of the scale, as `dequantize` does
    return product.to(dtype)


@triton.jit
def _grouped(
    x, words, scales, whole, y, table,
    N: tl.constexpr, K: tl.constexpr,  # W[N, K]
    SCALE_ROWS: tl.constexpr, SCALE_COLS: tl.constexpr, FORMAT: tl.constexpr, TURNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 4 if FORMAT == "fp8" else 8
    LENGTH: tl.constexpr = N if TURNED else K  # of the sum
    OUT: tl.constexpr = K if TURNED else N
    GRID: tl.constexpr = (K + SCALE_COLS - 1) // SCALE_COLS  # scales per row of scales
    HIGH: tl.constexpr = STEP if TURNED else ROWS  # of a tile of W
    WIDE: tl.constexpr = ROWS if TURNED else STEP
    GROUPS: tl.constexpr = (WIDE + SCALE_COLS - 1) // SCALE_COLS  # scales along a row of a tile
    entry = table + tl.program_id(1) * 3
    expert = tl.load(entry).to(tl.int64)
    if expert < 0:
        return
    out0 = tl.program_id(0) * ROWS
    m = tl.load(entry + 1) + tl.arange(0, BLOCK)
    inside = m[:, None] < tl.load(entry + 2)
    x_at = x + m[:, None].to(tl.int64) * LENGTH + tl.arange(0, STEP)[None, :]
    words += expert * (N * (K // PER))
    scales += expert * ((N + SCALE_ROWS - 1) // SCALE_ROWS * GRID)
    high, bits = tl.arange(0, HIGH), (tl.arange(0, WIDE) % PER * (32 // PER))[None, :]
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in tl.range(0, LENGTH, STEP, num_stages=STAGES):
        n = (step if TURNED else out0) + high
        k = out0 if TURNED else step
        part = tl.load(x_at + step, mask=inside, other=0.0)
        word = tl.load(words + n[:, None] * (K // PER) + (k // PER + tl.arange(0, WIDE // PER))[None, :])
        scale = tl.load(scales + (n // SCALE_ROWS)[:, None] * GRID + (k // SCALE_COLS + tl.arange(0, GROUPS))[None, :])
        wide = scale
        if FORMAT != "int4" or part.dtype != tl.bfloat16 or scale.dtype != tl.bfloat16:
            wide = wide_scale(scale, whole + expert, FORMAT)
        word, wide = spread(word, HIGH, WIDE), spread(wide, HIGH, WIDE)
        if TURNED:
            weight = _weight(tl.trans(word), tl.trans(bits), tl.trans(wide), part.dtype, scale.dtype, FORMAT)
        else:
            weight = _weight(word, bits, wide, part.dtype, scale.dtype, FORMAT)
        acc = tl.dot(weight, tl.trans(part), acc, input_precision="ieee")
    target = y + m[:, None].to(tl.int64) * OUT + (out0 + tl.arange(0, ROWS))[None, :]
    tl.store(target, tl.trans(acc).to(y.dtype.element_ty), mask=inside)


def takes_grouped(x: Tensor, experts: PackedStack) -> bool:
    """Whether the grouped product of x (or of a gradient in its dtype) has a fast path."""
    here = x.device == experts.device and x.device.index == torch.cuda.current_device()
    return here and x.dtype == torch.bfloat16 and (supports(experts) or grouped_bf16.supports(experts))


def supports(experts: PackedStack) -> bool:
    """Whether tiles of W and rectangles of scales fit each other."""
    (out, width), (rows, cols) = experts.shape, experts.block
    if experts.spec.name == "bf16" or out % ROWS or width % ROWS:
        return False
    return (rows == 1 or rows % ROWS == 0) and (cols % ROWS == 0 or _STEP % cols == 0)


def grouped_product(x: Tensor, counts: Tensor, experts: PackedStack, turned: bool, block: int | None = None) -> Tensor:
    """x[tokens, in] sorted by expert -> x W^T [tokens, out]; turned: dy[tokens, out] -> dy W [tokens, in].

    For what `takes_grouped` accepts. BF16 goes to torch, the rest to `grouped_packed` where that takes it, unless rows
    per tile of the general kernel are asked for: same bits.
    """
    out, width = experts.shape
    x = x.contiguous()
    if not x.shape[0]:
        return x.new_empty(0, width if turned else out)
    if experts.spec.name == "bf16":
        return grouped_bf16.grouped_bf16(x, counts, experts, turned)
    if block is None and grouped_packed.supports(experts):
        return grouped_packed.grouped_packed(x, counts, experts, turned)
    y = torch.empty(x.shape[0], width if turned else out, dtype=x.dtype, device=x.device)
    block = block or 128
    table = schedule(counts, x.shape[0], block)
    codes, scales, whole, kind = operands(experts.spec, experts.tensors)
    _grouped[(y.shape[1] // ROWS, table.shape[0])](
        x, codes.contiguous().view(torch.int32), scales.contiguous(), whole.contiguous(), y, table,
        out, width, *experts.block, kind, turned, ROWS, block, _STEP, 3, num_warps=8,
    )  # fmt: skip
    return y
