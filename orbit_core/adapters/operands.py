"""What a frozen linear does with an adapter: an operand is called with the input and the frozen product.

    rotation   y = project(x R)                            OFT
    low rank   y = project(x) + (alpha / r) (x A^T) B^T    LoRA

Where the product is that of one packed weight, `linear` computes the same with it in one operation of the kernels,
which on a GPU takes fewer launches.

Operands are derived from an adapter's values once per version or update, never per forward. A trainer cuts the graph
there: `on` puts an operand on detached copies, micro-batches add their gradients to those, and one backward pass
carries the sum on to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from orbit_kernels import PackedWeight, lora_delta, lora_linear, oft_linear, rotate
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

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        """The same with the frozen product of `orbit_kernels.linear`."""


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

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        return oft_linear(x, packed, self.R, bias, weight)


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

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        return lora_linear(x, packed, self.A, self.B, self.scaling, bias, weight)
