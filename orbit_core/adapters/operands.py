"""What a frozen linear does with an adapter: an operand is called with the input and the frozen product.

    rotation   y = project(x R)                            OFT
    low rank   y = project(x) + (alpha / r) (x A^T) B^T    LoRA

Operands are derived from an adapter's values once per version or update, never per forward. A trainer cuts the graph
there: `on` puts an operand on detached copies, micro-batches add their gradients to those, and one backward pass
carries the sum on to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from orbit_kernels import lora_delta, rotate
from torch import Tensor

Project = Callable[[Tensor], Tensor]  # x[..., in] -> x W^T + bias [..., out]


class Operand(Protocol):
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the forward pass reads."""

    def on(self, tensors: tuple[Tensor, ...]) -> Operand:
        """The same operand reading `tensors`."""

    def __call__(self, x: Tensor, project: Project) -> Tensor:
        """x[..., in] -> y[..., out] in the dtype of x."""


@dataclass(frozen=True)
class Rotation:
    R: Tensor  # [in/b, b, b], in the compute dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.R,)

    def on(self, tensors: tuple[Tensor, ...]) -> Rotation:
        return Rotation(*tensors)

    def __call__(self, x: Tensor, project: Project) -> Tensor:
        return project(rotate(x, self.R))


@dataclass(frozen=True)
class LowRank:
    A: Tensor  # [r, in], in the compute dtype
    B: Tensor  # [out, r]
    scaling: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.A, self.B

    def on(self, tensors: tuple[Tensor, ...]) -> LowRank:
        A, B = tensors
        return LowRank(A, B, self.scaling)

    def __call__(self, x: Tensor, project: Project) -> Tensor:
        return project(x) + lora_delta(x, self.A, self.B, self.scaling)
