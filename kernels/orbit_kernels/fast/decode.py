# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""Weight-only product for few tokens (M 1..64): y[M, N] = x[M, K] W^T, every packed format, W read once as stored.

What makes it fast is that nothing is rearranged. Sixteen bits of a row hold the codes of 4 (or, of eight bits, 2)
neighbouring columns, so a tile of int16 gives, by a shift and a mask each, four tiles: columns 0, 4, 8.. of the weight,
1, 5, 9.., and so on (`unpack`). A product may sum its columns in any order, so x is split the same way, with the codes
unpacked in the very registers from which the tensor core reads them.

What makes it start early (where `plan` says so): weights do not depend on the kernel before. A program asks for all its
bytes of W to come to the L2 cache, and only then waits for that kernel's end, which it may overlap (programmatic
dependent launch). Nothing is read or written before the wait, so a weight that the kernel before has written is right.

What makes it right: the bits of `dequantize` for each weight, not an approximation of them. The sum is float32.

What makes it deterministic and batch-invariant: which partial sums there are (steps of 256 columns, in PARTS of K) and
the order in which they are added depend on N and K alone. For few tokens each part has its own program and whichever
arrives last adds them in order; for more tokens one program folds them as it goes. Either way a row of x has the same
result, bit for bit, for every M in 1..64 and in every run; the only atomics count arrivals.

`decode_wave` does the same without LoRA for NVFP4, which is faster there. Where rows need not keep their bits beside
more others (`modes`), it and `decode_rows` take weights of four bits, `decode_rows` FP8 too: faster for few tokens,
slower for many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..formats import PackedWeight
from ..modes import is_batch_invariant
from .beside import MAX_RANK, arrive, fetch, finish, helping, keep, low_rank, overlapping, turn_few
from .decode_rows import decode_rows, pays
from .decode_rows import supports as rows_supports
from .decode_wave import decode_wave
from .decode_wave import supports as wave_supports
from .dequantize import operands
from .launching import aligned
from .rotate import BLOCK_SIZES
from .unpack import GROWN, weight_tile
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
    early: bool = False  # starts before the kernel ahead of it ends; for long rows that costs more than it gains


@triton.jit
def _scale_pair(pair):
    """int32[rows, 1] -> the two bfloat16 scales in it, [rows, 2]. Four bytes at a time go through the async copies."""
    both = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
    return tl.reshape(both, [pair.shape[0], 2]).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["M"])
def _decode(
    x,
    pieces,
    scales,
    whole,
    bias,
    y,
    partial,
    arrivals,
    a,
    b,
    made,
    flags,
    slot,
    scaling,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    FOLD: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
    ARRANGED: tl.constexpr,
    EARLY: tl.constexpr,
    RANK: tl.constexpr,
    SLOT: tl.constexpr,
    NARROW: tl.constexpr,
    HELPERS: tl.constexpr,
):
    STEP: tl.constexpr = 256
    PER: tl.constexpr = 2 if FORMAT == "fp8" else 4  # codes in a piece
    PIECES: tl.constexpr = STEP // PER
    GROUPS: tl.constexpr = STEP // GROUP
    STEPS: tl.constexpr = K // STEP
    PER_PART: tl.constexpr = (STEPS + PARTS - 1) // PARTS
    SLOTS: tl.constexpr = (1 if FOLD else PARTS) + (1 if RANK > 0 else 0)  # sums that make a tile of y
    tile, part = tl.program_id(0), tl.program_id(1)
    if RANK > 0:  # the first programs of the grid are helpers
        at = tl.program_id(0) - HELPERS
        if at < 0:
            low_rank(
                x, a, b, made, flags, slot, scaling, partial, arrivals, bias, y, at + HELPERS, M,
                N, K, RANK, SLOT, NARROW, HELPERS, TOKENS, ROWS, SLOTS, BIAS, ASM, PER if ARRANGED else 1,
            )  # fmt: skip
            return
        tile, part = at % (N // ROWS), at // (N // ROWS)
    first = 0 if FOLD else part * PER_PART
    last = STEPS if FOLD else min(first + PER_PART, STEPS)
    if ASM:
        if EARLY:
            half = tl.arange(0, ROWS * 2)
            long = (last - first) * PIECES // 2
            row = (tile * ROWS + half // 2) * (K // PER) + first * PIECES + half % 2 * long
            fetch(pieces + row, tl.broadcast_to(long * 2, [ROWS * 2]))
        gdc_launch_dependents()
        gdc_wait()
    n = tile * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, TOKENS)
    piece_at = pieces + n[:, None] * (K // PER) + tl.arange(0, PIECES)[None, :]
    PAIRS: tl.constexpr = ASM and GROUPS == 2 and FORMAT == "int4"
    if PAIRS:
        scale_at = scales.to(tl.pointer_type(tl.int32)) + n[:, None] * (K // GROUP // 2) + tl.arange(0, 1)[None, :]
    else:
        scale_at = scales + (n // BLOCK_ROWS)[:, None] * (K // GROUP) + tl.arange(0, GROUPS)[None, :]
    x_at = x + m[:, None] * K + tl.arange(0, STEP)[None, :]
    present = m[:, None] < M
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        packed = tl.load(piece_at + step * PIECES)
        if PAIRS:  # noqa: SIM108 (a branch of the compiler, not a value)
            scale = _scale_pair(tl.load(scale_at + step))
        else:
            scale = tl.load(scale_at + step * GROUPS)
        weight = weight_tile(packed, scale, whole, x.dtype.element_ty, FORMAT, ASM)
        columns = tl.load(x_at + step * STEP, mask=present, other=0.0)
        if not ARRANGED:
            columns = tl.reshape(tl.permute(tl.reshape(columns, [TOKENS, PIECES, PER]), [0, 2, 1]), [TOKENS, STEP])
        acc = tl.dot(weight, tl.trans(columns), acc, input_precision="ieee")
        if FOLD and PARTS > 1:
            ends = ((step + 1) % PER_PART == 0) | (step + 1 == STEPS)
            total = tl.where(ends, total + acc, total)
            acc = tl.where(ends, 0.0, acc)
    if not FOLD or PARTS == 1:
        total += acc
    if ASM and FORMAT != "fp8":
        total *= GROWN
    if SLOTS == 1:
        finish(total, bias, y, n, m, M, N, BIAS)
    else:
        keep(partial, total, tile, part, SLOTS)
        tl.debug_barrier()  # every thread's sums are written before one thread announces them
        arrive(partial, arrivals, bias, y, tile, M, N, ROWS, TOKENS, SLOTS, BIAS)


@triton.jit
def _arrange(x, arranged, total, PER: tl.constexpr, GPU: tl.constexpr, BLOCK: tl.constexpr):
    if GPU:
        gdc_launch_dependents()
        gdc_wait()
    PIECES: tl.constexpr = 256 // PER
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step, place = at // 256, at % 256
    value = tl.load(x + step * 256 + place % PIECES * PER + place // PIECES, mask=at < total)
    tl.store(arranged + at, value, mask=at < total)


def arrange(x: Tensor, per: int) -> Tensor:
    """x[M, K] with the 256 columns of each step in the order 0, per, 2 per.. 1, per + 1.. and so on; contiguous."""
    arranged = torch.empty_like(x)
    _arrange[(triton.cdiv(x.numel(), 1024),)](
        x, arranged, x.numel(), per, x.is_cuda, 1024, num_warps=4, **overlapping(x)
    )
    return arranged


def padded_tokens(tokens: int) -> int:
    return max(16, triton.next_power_of_2(tokens))


def plan(out: int, width: int, tokens: int, group: int) -> Plan:
    """Chosen from what was measured: 224 to 460 programs of equally many steps, at least two; else about 300.

    (A part of one step must not be folded: the compiler would add it inside the tensor core and change the bits.)
    """
    tiles, steps = out // 64, width // STEP
    choices = [p for p in range(1, 8) if (p - 1) * -(-steps // p) < steps and (p == 1 or -(-steps // p) >= 2)]
    even = [p for p in choices if steps % p == 0 and 224 <= p * tiles <= 460]
    parts = min(even or choices, key=lambda p: (abs(p * tiles - (340 if even else 300)), p))
    many = tokens > 32
    fold = tiles >= 100 and (many or (tokens > 16 and parts >= 4))
    early = steps <= 16 and not fold
    return Plan(parts, fold, 2 if fold and many and group < 128 else 3, arranged=fold and many, early=early)


class Adapter(NamedTuple):
    """What is computed beside or before the product: x blockdiag(R) for OFT, + scaling (x A^T) B^T for LoRA."""

    a: Tensor  # R[n, b, b] or A[r, in]; with a slot, one axis more in front
    b: Tensor | None = None  # B[out, r]
    scaling: float = 1.0
    slot: Tensor | None = None  # int32 of one element


def decode(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    chosen: Plan | None = None,
    adapter: Adapter | None = None,
) -> Tensor:
    """x[M, K] bf16 -> y[M, N] in the dtype of x; M <= 64, x and bias contiguous, an adapter's tensors of x's dtype.

    What comes must pass `supports` (and `supports_adapter`); the doors are in `linear` and `adapted`.
    """
    tokens, (out, width) = x.shape[0], packed.shape
    if x.is_cuda and chosen is None and (adapter is None or adapter.b is None):
        whole_rows = in_whole_rows(packed, tokens)
        if whole_rows or in_one_wave(packed, tokens):
            turned = x if adapter is None else turn_few(x, adapter.a, adapter.slot)
            return (decode_rows if whole_rows else decode_wave)(turned, packed, bias)
    codes, scales, whole, kind = operands(packed.spec, packed.tensors)
    block_rows, group = packed.block
    chosen = chosen or plan(out, width, tokens, group)
    padded, per = padded_tokens(tokens), 2 if kind == "fp8" else 4
    overlaps = chosen.early
    if adapter is not None and adapter.b is None:
        b = adapter.a.shape[-1]
        x, adapter = turn_few(x, adapter.a, adapter.slot, per if chosen.arranged else 1), None
        overlaps = chosen.early or chosen.fold or width <= 8192 or b > 64  # measured
    elif chosen.arranged:
        x = arrange(x, per)
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    tiles, parts = out // chosen.rows, chosen.parts
    programs = 1 if chosen.fold else parts
    slots = programs + (adapter is not None)
    partial, arrivals, made = y, y, y
    if slots > 1:
        partial = torch.empty(slots * out * padded, dtype=torch.float32, device=x.device)
        arrivals = arrival_counters(tiles + 1, x.device)
    grid: tuple[int, ...] = (tiles, programs)
    rank, narrow, helpers, slotted = 0, 0, 0, False
    if adapter is not None:
        rank, slotted = adapter.a.shape[-2], adapter.slot is not None
        narrow, helpers = helping(tiles, width) if x.is_cuda else (1, 1)  # the interpreter runs no two at once
        grid = (helpers + tiles * programs,)
        made = torch.empty(narrow * 64 * padded, dtype=torch.float32, device=x.device)
    _decode[grid](
        x,
        aligned(codes).view(torch.int16),
        scales.contiguous(),
        whole,
        y if bias is None else bias,
        y,
        partial,
        arrivals,
        x if adapter is None else adapter.a.contiguous(),
        x if adapter is None or adapter.b is None else adapter.b.contiguous(),
        made,
        arrivals[tiles:] if adapter is not None else y,
        x if adapter is None or adapter.slot is None else adapter.slot,
        1.0 if adapter is None else adapter.scaling,
        tokens,
        out,
        width,
        block_rows,
        group,
        kind,
        padded,
        chosen.rows,
        parts,
        chosen.fold,
        chosen.stages,
        bias is not None,
        x.is_cuda,
        chosen.arranged,
        chosen.early,
        rank,
        slotted,
        narrow,
        helpers,
        num_warps=chosen.warps,
        **({"maxnreg": 128} if rank and padded == 16 else {}),  # so that four programs lie on a multiprocessor
        **(overlapping(x) if overlaps else {}),
    )
    return y


def in_whole_rows(packed: PackedWeight, tokens: int) -> bool:
    """Whether `decode_rows` takes this product, which gives those tokens other bits than they have beside more."""
    return not is_batch_invariant() and rows_supports(packed) and pays(*packed.shape, tokens, packed.spec.name)


def in_one_wave(packed: PackedWeight, tokens: int) -> bool:
    """Whether `decode_wave` takes this product: NVFP4 for every number of tokens, so its rows keep their bits; INT4 and
    MXFP4 up to 16 (8 where rows are long), which gives those tokens other bits than they have beside more, so only
    where rows may change them."""
    if not wave_supports(packed):
        return False
    few = tokens <= (16 if packed.shape[1] <= 4096 else 8)
    return packed.spec.name == "nvfp4" or (few and not is_batch_invariant())


def supports_adapter(x: Tensor, adapter: Adapter) -> bool:
    """Whether `decode` takes this adapter: its dtype and device that of x, b up to 256 or rank up to 64."""
    tensors = [adapter.a] if adapter.b is None else [adapter.a, adapter.b]
    size = adapter.a.shape[-1] in BLOCK_SIZES if adapter.b is None else adapter.a.shape[-2] <= MAX_RANK
    return size and all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in tensors)


def supports(packed: PackedWeight) -> bool:
    """Whether whole tiles of 64 rows and steps of 256 columns cover the weight, and scales the tiles."""
    (out, width), (_, group) = packed.shape, packed.block
    if out % 64 or width % STEP or group not in (16, 32, 64, 128):
        return False
    return packed.spec.name != "int4" or packed.tensors["weight_scale"].dtype == torch.bfloat16
