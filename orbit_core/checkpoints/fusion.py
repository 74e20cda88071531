"""How Megatron fuses what Hugging Face keeps apart, as pure permutations of rows; and back.

    linear_qkv   per query group: its query heads, its key head, its value head   = interleave((q, k, v), groups)
    linear_fc1   gate rows, then up rows                                         = interleave((gate, up), 1)

Codes, row scales and biases move with their rows. Values that belong to a whole tensor (global scales, shapes) are
stacked: [3, ...] for q, k, v and [2, ...] for gate, up. FP8 block scales cover 128 rows, which a head need not be: when
the rows that stay together are no multiple of 128, every scale is repeated until the grid divides them (`refine`), and
`collapse` undoes it after checking that the repeats are still equal. Nothing is ever recomputed, so
`split(fuse(parts)) == parts` byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orbit_core.errors import InputError

Kind = Literal["copy", "rows", "blocks", "stack"]


@dataclass(frozen=True)
class Fusion:
    """How one Megatron tensor is made of its parts.

    kind    copy: one part, as it is; rows: parts interleaved; blocks: block scales, refined, then interleaved;
            stack: a leading axis, one entry per part
    groups  how many runs each part's rows are cut into (query groups, or 1)
    rows    weight rows of each part (what a block scale's grid refers to)
    block   rows that one scale covers in the parts (0 unless kind is blocks)
    grid    rows that one scale covers in the fused tensor
    """

    kind: Kind
    groups: int = 1
    rows: tuple[int, ...] = ()
    block: int = 0
    grid: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("copy", "rows", "blocks", "stack"):
            raise ValueError(f"fusion {self.kind!r}")
        runs = [count // self.groups for count in self.rows]
        if self.groups < 1 or any(count % self.groups for count in self.rows) or min(self.rows, default=1) < 1:
            raise ValueError(f"{self.rows} rows in {self.groups} groups")
        fine = self.grid > 0 and self.block % self.grid == 0 and not any(run % self.grid for run in runs)
        if self.kind == "blocks" and not fine:
            raise ValueError(f"grid {self.grid} for runs {runs} and blocks of {self.block} rows")

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts -> the fused tensor, same dtype."""
        if self.kind == "copy":
            return parts[0]
        if self.kind == "stack":
            return torch.stack(list(parts))
        if self.kind == "blocks":
            parts = [refine(part, rows, self.block, self.grid) for part, rows in zip(parts, self.rows, strict=True)]
        return interleave(parts, self.groups)

    def order(self, shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
        """(part, its first row, its last row) as they follow each other in a fused tensor of `shape`, for the kinds
        whose rows move and nothing else: copy and rows."""
        runs = [count // self.groups for count in self.rows] if self.kind == "rows" else [shape[0]]
        for group in range(self.groups):
            yield from ((position, group * run, (group + 1) * run) for position, run in enumerate(runs))

    def part(self, position: int, rows: Callable[[int, int], Tensor]) -> Tensor:
        """One part of a fused tensor that can hand out its rows; no other row is asked for. Not for kind copy.

        Raises InputError when a refined grid cannot be collapsed.
        """
        if self.kind == "stack":
            return rows(position, position + 1)[0]
        runs = [count // (self.grid or 1) // self.groups for count in self.rows]
        total, before, length = sum(runs), sum(runs[:position]), runs[position]
        starts = [group * total + before for group in range(self.groups)]
        pieces = [rows(start, start + length) for start in starts]
        part = torch.cat([_as_integers(piece) for piece in pieces]).view(pieces[0].dtype)
        return collapse(part, self.rows[position], self.block, self.grid) if self.kind == "blocks" else part

    def split(self, fused: Tensor, count: int) -> list[Tensor]:
        """All `count` parts of a fused tensor."""
        if self.kind == "copy":
            return [fused]
        return [self.part(position, lambda start, stop: fused[start:stop]) for position in range(count)]

    def fused_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of `fuse` for parts of these shapes."""
        if self.kind == "copy":
            return shapes[0]
        if self.kind == "stack":
            return (len(shapes), *shapes[0])
        heads = [rows // self.grid for rows in self.rows] if self.kind == "blocks" else [shape[0] for shape in shapes]
        return (sum(heads), *shapes[0][1:])

    def part_shapes(self, fused: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
        """Shapes of `split` for a fused tensor of this shape."""
        if self.kind == "copy":
            return [fused]
        if self.kind == "stack":
            return [fused[1:]] * count
        heads = [-(-rows // self.block) for rows in self.rows] if self.kind == "blocks" else self.rows
        return [(rows, *fused[1:]) for rows in heads]


def interleave(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Parts [rows_i, ...] -> [sum(rows_i), ...]: group by group, the group's rows of each part in turn.

    Raises ValueError when `groups` does not divide a part's rows.
    """
    for part in parts:
        if part.shape[0] % groups:
            raise ValueError(f"{part.shape[0]} rows in {groups} groups")
    runs = [_as_integers(part).reshape(groups, part.shape[0] // groups, *part.shape[1:]) for part in parts]
    total = sum(part.shape[0] for part in parts)
    return torch.cat(runs, dim=1).reshape(total, *parts[0].shape[1:]).view(parts[0].dtype)


def grid_of(rows: Sequence[int], groups: int, block: int) -> int:
    """The coarsest grid of scales that divides both a block and every run of rows that stays together.

    `block` itself where nothing has to be refined.
    """
    return math.gcd(block, *(count // groups for count in rows))


def refine(scale: Tensor, rows: int, block: int, grid: int) -> Tensor:
    """[ceil(rows / block), ...] -> [rows / grid, ...]: each scale repeated over the finer rows that it covers."""
    fine = _as_integers(scale).repeat_interleave(block // grid, dim=0)[: rows // grid]
    return fine.contiguous().view(scale.dtype)


def collapse(fine: Tensor, rows: int, block: int, grid: int) -> Tensor:
    """The inverse of `refine`. Raises InputError when rows of one block carry different scales."""
    scale = fine[:: block // grid].clone()
    if not torch.equal(_as_integers(refine(scale, rows, block, grid)), _as_integers(fine)):
        raise InputError(
            "FP8 scales", f"equal scales within each block of {block} rows", "different ones", "convert again"
        )
    return scale


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_integers(tensor: Tensor) -> Tensor:
    """The same bits in an integer dtype: moving and comparing them then knows no NaN and works for every FP8 type."""
    return tensor.view(_INTEGERS[tensor.dtype.itemsize])
