"""The adapters of all experts of a layer in one operand: rows are sorted by expert, each gets that of its own.

    rotation   y = project(x R[expert])                                          R [experts, in/b, b, b]
    low rank   y = project(x) + (alpha / r) (x A[expert]^T) B[expert]^T          A [experts, r, in], B [experts, out, r]
    shared     every expert has the same one: an operand like any other
    none       y = project(x)

What the experts' own operands hold is stacked, so a gradient finds its way back to each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from orbit_kernels import lora_delta, rotate
from torch import Tensor

from orbit_core.adapters.operands import LowRank, Operand, Project, Rotation


class GroupedOperand(Protocol):
    def __call__(self, x: Tensor, counts: Tensor, project: Project) -> Tensor:
        """x[rows, in] sorted by expert, counts[experts] on its device -> y[rows, out] in the dtype of x."""


@dataclass(frozen=True)
class Alike:
    """One operand, or none, for all experts."""

    operand: Operand | None

    def __call__(self, x: Tensor, counts: Tensor, project: Project) -> Tensor:
        return project(x) if self.operand is None else self.operand(x, project)


@dataclass(frozen=True)
class Rotations:
    R: Tensor  # [experts, in/b, b, b]

    def __call__(self, x: Tensor, counts: Tensor, project: Project) -> Tensor:
        return project(rotate(x, self.R, counts=counts))


@dataclass(frozen=True)
class LowRanks:
    A: Tensor  # [experts, r, in]
    B: Tensor  # [experts, out, r]
    scaling: float

    def __call__(self, x: Tensor, counts: Tensor, project: Project) -> Tensor:
        return project(x) + lora_delta(x, self.A, self.B, self.scaling, counts)


def join(operands: Sequence[Operand | None]) -> GroupedOperand | None:
    """The operands of all experts, in order, as one; None where some have an adapter and others none."""
    first = operands[0]
    if all(operand is first for operand in operands):
        return Alike(first)
    rotations = [operand for operand in operands if isinstance(operand, Rotation)]
    if len(rotations) == len(operands):
        return Rotations(torch.stack([operand.R for operand in rotations]))
    low_ranks = [operand for operand in operands if isinstance(operand, LowRank)]
    if len(low_ranks) == len(operands):
        A, B = (torch.stack([getattr(operand, name) for operand in low_ranks]) for name in ("A", "B"))
        return LowRanks(A, B, low_ranks[0].scaling)
    return None
