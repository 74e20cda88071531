"""Many packed weights of one format and shape in one allocation, such as the experts of a layer.

Stacking copies bytes once and changes none: `stack[i]` is a PackedWeight whose tensors are views of the stack, so a
model can keep these instead of what was stacked and hold every byte once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import FormatSpec, PackedWeight, require


@dataclass(frozen=True, eq=False)
class PackedStack:
    """`count` weights W[out, in]; tensors as PackedWeight stores them, with a first axis more."""

    spec: FormatSpec
    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    block: tuple[int, int]
    count: int

    @staticmethod
    def of(weights: Sequence[PackedWeight]) -> PackedStack:
        """Raises FormatError unless all are of one format, shape, block, layout and device."""
        require(len(weights) > 0, "weights to stack", "at least one", 0)
        first = weights[0]
        for index, each in enumerate(weights):
            alike = (each.spec, each.shape, each.block, each.device, _layout(each))
            expected = (first.spec, first.shape, first.block, first.device, _layout(first))
            require(alike == expected, f"weight {index} of a stack", expected, alike)
        tensors = {key: torch.stack([each.tensors[key] for each in weights]) for key in first.tensors}
        return PackedStack(first.spec, first.shape, tensors, first.block, len(weights))

    def __getitem__(self, index: int) -> PackedWeight:
        """The weight at `index`: the same bytes, no copy."""
        if not 0 <= index < self.count:
            raise IndexError(f"stack of {self.count} weights: found index {index}")
        views = {key: tensor[index] for key, tensor in self.tensors.items()}
        return PackedWeight(self.spec, self.shape, views, self.block)

    def __len__(self) -> int:
        return self.count

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _layout(weight: PackedWeight) -> dict[str, torch.dtype]:
    return {key: tensor.dtype for key, tensor in weight.tensors.items()}
