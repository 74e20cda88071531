# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""INT4 weight-only product for few tokens (M 1..64): y[M, N] = x[M, K] W^T with W read once, as stored.

What makes it fast is that nothing is rearranged. Sixteen bits of `weight_packed` hold the codes of four neighbouring
columns, so a tile of int16 gives, by a shift and a mask each, four tiles: columns 0, 4, 8.. of the weight, 1, 5, 9..,
and so on. A product may sum its columns in any order, so x is split the same way and there are four dots per tile, with
the codes unpacked in the very registers from which the tensor core reads them.

What makes it right: OR-ing 0x4300 under a code makes the bfloat16 number 128 + code, so that two instructions on pairs
of bfloat16 give (code - 8) * scale with one rounding: the bits of `dequantize`, not an approximation of them. The sum
is float32.

What makes it deterministic and batch-invariant: which partial sums there are (steps of 256 columns, in PARTS of K) and
the order in which they are added depend on N and K alone. For few tokens each part has its own program and whichever
arrives last adds them in order; for more tokens one program folds them as it goes. Either way a row of x has the same
result, bit for bit, for every M in 1..64 and in every run; the only atomics count arrivals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .workspace import arrival_counters

STEP = 256  # columns of W per step of the loop over K
MAX_TOKENS = 64


@dataclass(frozen=True)
class Plan:
    """How one (N, K, tokens) is cut. `parts` must not depend on the number of tokens: it decides the bits."""

    parts: int  # of K
    fold: bool  # one program computes all parts of its rows; else one program per part
    stages: int  # tiles in flight
    arranged: bool = False  # x is brought into the order of the product's columns by a kernel of its own, before
    rows: int = 64  # of W per program
    warps: int = 4


@triton.jit
def _unpack_asm(quads, scale):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 u, bias;
        mov.b32 bias, 0x43084308;
        lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
        shr.b32 u, $4, 4;
        lop3.b32 $1, u, 0x000F000F, 0x43004300, 0xEA;
        shr.b32 u, $4, 8;
        lop3.b32 $2, u, 0x000F000F, 0x43004300, 0xEA;
        shr.b32 u, $4, 12;
        lop3.b32 $3, u, 0x000F000F, 0x43004300, 0xEA;
        sub.rn.bf16x2 $0, $0, bias;
        sub.rn.bf16x2 $1, $1, bias;
        sub.rn.bf16x2 $2, $2, bias;
        sub.rn.bf16x2 $3, $3, bias;
        mul.rn.bf16x2 $0, $0, $5;
        mul.rn.bf16x2 $1, $1, $5;
        mul.rn.bf16x2 $2, $2, $5;
        mul.rn.bf16x2 $3, $3, $5;
        }""",
        "=&r,=&r,=&r,=&r,r,r",
        [quads, scale],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _unpack_plain(quads, scale, dtype: tl.constexpr):
    """The same in portable arithmetic, for scales and inputs that are not bfloat16 (the interpreter's tests)."""
    wide = scale.to(tl.float32)
    a0 = (((quads >> 0) & 15) - 8).to(tl.float32) * wide
    a1 = (((quads >> 4) & 15) - 8).to(tl.float32) * wide
    a2 = (((quads >> 8) & 15) - 8).to(tl.float32) * wide
    a3 = (((quads >> 12) & 15) - 8).to(tl.float32) * wide
    return a0.to(dtype), a1.to(dtype), a2.to(dtype), a3.to(dtype)


@triton.jit
def _scale_pair(pair):
    """int32[rows, 1] -> the two bfloat16 scales in it, [rows, 2]. Four bytes at a time go through the async copies."""
    both = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
    return tl.reshape(both, [pair.shape[0], 2]).to(tl.bfloat16, bitcast=True)


@triton.jit
def _finish(total, bias, y, n, m, M, N: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        total += tl.load(bias + n).to(tl.float32)[:, None]
    tl.store(y + m[None, :] * N + n[:, None], total.to(y.dtype.element_ty), mask=m[None, :] < M)


@triton.jit(do_not_specialize=["M"])
def _decode(
    x,
    quads,
    scales,
    bias,
    y,
    partial,
    arrivals,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    FOLD: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
    ARRANGED: tl.constexpr,
):
    STEP: tl.constexpr = 256
    QUADS: tl.constexpr = STEP // 4
    GROUPS: tl.constexpr = STEP // GROUP
    STEPS: tl.constexpr = K // STEP
    PER_PART: tl.constexpr = (STEPS + PARTS - 1) // PARTS
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, TOKENS)
    quad_at = quads + n[:, None] * (K // 4) + tl.arange(0, QUADS)[None, :]
    PAIRS: tl.constexpr = ASM and GROUPS == 2
    if PAIRS:
        scale_at = scales.to(tl.pointer_type(tl.int32)) + n[:, None] * (K // GROUP // 2) + tl.arange(0, 1)[None, :]
    else:
        scale_at = scales + n[:, None] * (K // GROUP) + tl.arange(0, GROUPS)[None, :]
    x_at = x + m[:, None] * K + tl.arange(0, STEP)[None, :]
    present = m[:, None] < M
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    first = 0 if FOLD else part * PER_PART
    last = STEPS if FOLD else min(first + PER_PART, STEPS)
    for step in tl.range(first, last, num_stages=STAGES):
        packed = tl.load(quad_at + step * QUADS)
        if PAIRS:  # noqa: SIM108 (a branch of the compiler, not a value)
            scale = _scale_pair(tl.load(scale_at + step))
        else:
            scale = tl.load(scale_at + step * GROUPS)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [ROWS, GROUPS, GROUP // 4]), [ROWS, QUADS])
        if ASM:
            a0, a1, a2, a3 = _unpack_asm(packed, scale)
        else:
            a0, a1, a2, a3 = _unpack_plain(packed, scale, x.dtype.element_ty)
        columns = tl.load(x_at + step * STEP, mask=present, other=0.0)
        if not ARRANGED:
            columns = tl.reshape(tl.permute(tl.reshape(columns, [TOKENS, QUADS, 4]), [0, 2, 1]), [TOKENS, STEP])
        weight = tl.join(tl.join(a0, a2), tl.join(a1, a3))  # [row, quad, high bit, low bit] of the place in a quad
        weight = tl.reshape(tl.permute(weight, [0, 2, 3, 1]), [ROWS, STEP])
        acc = tl.dot(weight, tl.trans(columns), acc, input_precision="ieee")
        if FOLD and PARTS > 1:
            ends = ((step + 1) % PER_PART == 0) | (step + 1 == STEPS)
            total = tl.where(ends, total + acc, total)
            acc = tl.where(ends, 0.0, acc)
    if PARTS == 1:
        _finish(total + acc, bias, y, n, m, M, N, BIAS)
    elif FOLD:
        _finish(total, bias, y, n, m, M, N, BIAS)
    else:
        cell = tl.arange(0, ROWS)[:, None] * TOKENS + m[None, :]
        parts = partial + tile * (PARTS * ROWS * TOKENS) + cell
        tl.store(parts + part * (ROWS * TOKENS), acc, cache_modifier=".cg")
        tl.debug_barrier()  # every thread's part is written before one thread announces it
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
            for each in tl.static_range(PARTS):
                total += tl.load(parts + each * (ROWS * TOKENS), cache_modifier=".cg")
            _finish(total, bias, y, n, m, M, N, BIAS)
            tl.store(arrivals + tile, 0)  # ready for the next launch


@triton.jit
def _arrange(x, arranged, total, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step, place = at // 256, at % 256
    value = tl.load(x + step * 256 + place % 64 * 4 + place // 64, mask=at < total)
    tl.store(arranged + at, value, mask=at < total)


def arrange(x: Tensor) -> Tensor:
    """x[M, K] with the 256 columns of each step in the order 0, 4, 8.. 1, 5, 9.. 2.. 3..; contiguous."""
    arranged = torch.empty_like(x)
    _arrange[(triton.cdiv(x.numel(), 1024),)](x, arranged, x.numel(), 1024, num_warps=4)
    return arranged


def padded_tokens(tokens: int) -> int:
    return max(16, triton.next_power_of_2(tokens))


def plan(out: int, width: int, tokens: int, group: int) -> Plan:
    """Chosen from bench/results/tune_int4.json: about 280 programs, no part shorter than four steps.

    (A part of one step must not be folded: the compiler would add it inside the tensor core and change the bits.)
    """
    tiles, steps = out // 64, width // STEP
    choices = [p for p in range(1, 9) if (p - 1) * -(-steps // p) < steps and (p == 1 or -(-steps // p) >= 4)]
    parts = min(choices, key=lambda p: (abs(p * tiles - 280), p))
    fold = tokens > 32 and tiles >= 100
    return Plan(parts, fold, 2 if fold and group < 128 else 3, arranged=fold)


def decode(
    x: Tensor, words: Tensor, scales: Tensor, group: int, bias: Tensor | None = None, chosen: Plan | None = None
) -> Tensor:
    """x[M, K] bf16, words int32[N, K/8], scales bf16[N, K/group] -> y[M, N] in the dtype of x; M <= 64.

    Shapes must pass `supports`; the doors are in `linear`.
    """
    tokens, width = x.shape
    out = words.shape[0]
    chosen = chosen or plan(out, width, tokens, group)
    padded = padded_tokens(tokens)
    if chosen.arranged:
        x = arrange(x)
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    tiles, parts = out // chosen.rows, chosen.parts
    programs = 1 if chosen.fold else parts
    if programs == 1:
        partial, arrivals = y, y
    else:
        partial = torch.empty(parts * out * padded, dtype=torch.float32, device=x.device)
        arrivals = arrival_counters(tiles, x.device)
    _decode[(tiles, programs)](
        x,
        words.view(torch.int16),
        scales,
        y if bias is None else bias,
        y,
        partial,
        arrivals,
        tokens,
        out,
        width,
        group,
        padded,
        chosen.rows,
        parts,
        chosen.fold,
        chosen.stages,
        bias is not None,
        x.dtype == torch.bfloat16 and scales.dtype == torch.bfloat16,
        chosen.arranged,
        num_warps=chosen.warps,
    )
    return y


def supports(out: int, width: int, group: int) -> bool:
    return out % 64 == 0 and width % STEP == 0 and group in (32, 64, 128)
