"""`packed_product` launched: which weights it takes, how a product is cut, what the kernel is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..formats import PackedWeight
from ..formats.stack import PackedStack
from .beside import overlapping
from .dequantize import operands
from .launching import aligned, multiprocessors
from .nvfp4_lookup import ENTRIES
from .packed_pieces import STEP, WARPS, layouts
from .packed_product import packed_product
from .packed_sums import SHARING
from .workspace import arrival_counters

_ROOM = 226_000  # bytes of shared memory
ROUND = 132  # programs at a time, one a multiprocessor of an H100 or H200; a constant: bits do not depend on the card


@dataclass(frozen=True)
class Cut:
    """How a product is cut. All fields after `short` decide its bits, and with `pieces` outs does."""

    outs: int  # outputs of a tile: 128, 256
    block: int  # rows of x of a tile: 64, 128, 256; outs * block at most 32768
    short: int  # height of a group's last tile where that is enough
    parts: int = 1  # of every sum
    teams: int = 1  # of warps, which take turns at the steps of a tile; of two, short is block
    tail: int = 0  # instead of parts: of the tiles that are a row of tiles of y these last ones
    pieces: int = 0  # have their steps cut evenly in so many pieces, wherever tiles end

    def shares(self, tiles: int) -> tuple[int, int]:
        """Of so many tiles beside each other: how many are not cut; in how many pieces the others are."""
        if self.pieces:
            return tiles - self.tail, self.pieces
        return (tiles, 0) if self.parts == 1 else (0, tiles * self.parts)

    def together(self, tiles: int, bands: int) -> bool:
        """Whether all pieces of a tile add up: where they are two or more, and all run at a time."""
        uncut, pieces = self.shares(tiles)
        return 0 < 2 * (tiles - uncut) <= pieces <= (SHARING - 1) * (tiles - uncut) and bands * pieces <= ROUND

    @property
    def in_place(self) -> int:
        """How many times STEP columns of the sum are a step: small tiles wait for two at a time."""
        return 2 if self.outs == 128 and self.block <= 128 else 1

    def stages(self, kind: str, group: int, turned: bool) -> int:
        """Steps in flight."""
        words = self.outs * STEP // (1 if kind == "fp8" else 2)
        scales = STEP * max(4, self.outs // group * (2 if kind == "int4" else 1)) if by_ring(kind, turned) else 0
        stage = self.block * STEP * 2 + words + scales + 16
        result = self.block * self.outs * (2 if self.teams == 1 else 6) + self.outs * 32 * (self.teams - 1)
        return min(8 // self.in_place, (_ROOM - result) // (stage * self.in_place))


def by_ring(kind: str, turned: bool) -> bool:
    """Whether the copying warp brings scales beside the codes."""
    return turned and kind != "fp8"


def supports(weights: PackedWeight | PackedStack) -> bool:
    """Whether the copy engine and the tiles take this weight or stack (some rows given)."""
    (out, width), spec = weights.shape, weights.spec
    if spec.name == "bf16" or out % 128 or width % 128:
        return False
    if spec.name == "fp8":
        return weights.block == (128, 128)
    if spec.name == "int4":
        paired = spec.group_size < 128 or width % 256 == 0
        return weights.tensors["weight_scale"].dtype == torch.bfloat16 and spec.group_size in (32, 64, 128) and paired
    return True


def multiply(
    x: Tensor, weights: PackedWeight | PackedStack, turned: bool, cut: Cut,
    bias: Tensor | None = None, table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """bf16 x[rows, in] -> x W^T + bias [rows, out]; turned: dy[rows, out] -> dy W [rows, in].

    weights   what `supports` accepts; what comes out is a multiple of cut.outs
    table     of `schedule` for cut.block, when rows belong to the experts of a stack (one part)
    """
    (out, width), group = weights.shape, weights.block[1]
    codes, scales, per_tensor, kind = operands(weights.spec, weights.tensors)
    x, codes, scales = aligned(x), aligned(codes), aligned(scales)
    words = codes.view(torch.int32).view(-1, width // (4 if kind == "fp8" else 8))
    made, length = (width, out) if turned else (out, width)
    y = torch.empty(x.shape[0], made, dtype=x.dtype, device=x.device)
    tiles = made // cut.outs
    bands = -(-x.shape[0] // cut.block) if table is None else table.shape[0]
    uncut, pieces = cut.shares(tiles)
    items = bands * (uncut + pieces)
    programs = min(items, multiprocessors(x.device.index))
    early = table is None  # starts before the kernel ahead of it ends
    whole, lookup = scales, words
    if kind.startswith("nvfp4"):
        whole = per_tensor.contiguous()
        lookup = torch.empty(programs * cut.teams, ENTRIES, dtype=torch.int64, device=x.device)
    partial, arrivals = y, y
    if pieces:
        sums = bands * (tiles - uncut + pieces)
        partial = torch.empty(sums * cut.outs * cut.block, dtype=torch.float32, device=x.device)
        arrivals = arrival_counters(bands * (tiles - uncut), x.device)
    per = width // words.shape[1]
    tile = [STEP, cut.outs // per] if turned else [cut.outs, STEP // per]
    x_tiles, x_short_tiles = (
        TensorDescriptor.from_tensor(x, [rows, STEP], gl.NVMMASharedLayout(128, 16, 2))
        for rows in (cut.block, cut.short)
    )
    y_tiles = TensorDescriptor.from_tensor(y, [cut.block, cut.outs], gl.NVMMASharedLayout(128, 16, 2))
    word_tiles = TensorDescriptor.from_tensor(words, tile, gl.NVMMASharedLayout(min(128, tile[1] * 4), 32, 2))
    packed_product[(programs,)](
        x_tiles, x_short_tiles, word_tiles, scales, whole, lookup, y if bias is None else bias, y, y_tiles,
        partial, arrivals, y if table is None else table,
        x.shape[0], items, bands, tiles, length // (STEP * cut.in_place), uncut, pieces, out, width,
        kind, group, turned, table is not None, pieces > 0, cut.together(tiles, bands), bias is not None,
        cut.teams, early, cut.stages(kind, group, turned), cut.in_place,
        **layouts(cut.block, cut.short, cut.outs, kind, group, turned),
        num_warps=WARPS, **(overlapping(x) if early else {}),
    )  # fmt: skip
    return y
