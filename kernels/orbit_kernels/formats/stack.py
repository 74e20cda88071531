"""Many packed weights of one format and shape in one allocation, such as the experts of a layer.

Stacking copies bytes once and changes none: `stack[i]` is a PackedWeight whose tensors are views of the stack, so a
model can keep these instead of what was stacked and hold every byte once. `empty` and `put` fill a stack as weights
come from a checkpoint, so that not even two copies of one layer exist at a time.
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
        stack = PackedStack.empty(first, len(weights), first.device)
        for index, each in enumerate(weights):
            require(each.device == first.device, f"weight {index} of a stack", first.device, each.device)
            stack.put(index, each)
        return stack

    @staticmethod
    def empty(like: PackedWeight, count: int, device: torch.device) -> PackedStack:
        """Room on `device` for `count` weights as `like` is; its bytes are undefined until they are `put`."""
        tensors = {
            key: torch.empty((count, *each.shape), dtype=each.dtype, device=device)
            for key, each in like.tensors.items()
        }
        return PackedStack(like.spec, like.shape, tensors, like.block, count)

    def takes(self, weight: PackedWeight) -> bool:
        """Whether the weight is of this stack's format, shape, block and layout, on whatever device."""
        return _kind(weight) == _kind(self)

    def put(self, index: int, weight: PackedWeight) -> PackedWeight:
        """Copy the weight's bytes to `index`, also from another device; returns `self[index]`.

        Raises FormatError unless the stack `takes` it.
        """
        require(self.takes(weight), f"weight {index} of a stack", _kind(self), _kind(weight))
        place = self[index]
        for key, tensor in weight.tensors.items():
            place.tensors[key].copy_(tensor)
        return place

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


def _kind(packed: PackedWeight | PackedStack) -> tuple[object, ...]:
    """What all weights of a stack have in common."""
    stacked = isinstance(packed, PackedStack)
    layout = {
        key: (each.dtype, tuple(each.shape[1:] if stacked else each.shape)) for key, each in packed.tensors.items()
    }
    return packed.spec, packed.shape, packed.block, layout
