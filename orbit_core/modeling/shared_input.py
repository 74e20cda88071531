"""Linears that read one tensor, each through a rotation of its own: q, k and v; gate and up.

    q(x), k(x), v(x)  ->  x R_q, x R_k, x R_v in one pass over x, made when the first of them is called

The others find theirs waiting. What waits is of the tensor that came last and goes with whoever takes it, so nothing
outlives the layer; until then the turned inputs of all exist at once. Gradients run through one pass likewise.

Bits are those of a rotation each, but a gradient of x is summed in float32 and rounded once. For a GPU, where a pass
over x and a launch cost; rotations are held twice there, once stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from orbit_kernels import rotate_slices
from torch import Tensor, nn

from orbit_core.adapters.operands import Rotation
from orbit_core.modeling.layers import Expert, PackedLinear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharedInput:
    def __init__(self, linears: Sequence[PackedLinear]) -> None:
        self.linears = tuple(linears)
        self._turned: tuple[PackedLinear, ...] = ()  # those with a rotation
        self._R: Tensor  # [turned, in/b, b, b]
        self._x: Tensor | None = None
        self._waiting: dict[PackedLinear, Tensor] = {}

    def adapt(self) -> None:
        """Take over the operands of the linears; once per adapter, not per forward pass."""
        rotations = {each: each.operand.R for each in self.linears if isinstance(each.operand, Rotation)}
        self._turned = tuple(rotations) if len(rotations) > 1 else ()
        if self._turned:
            self._R = torch.stack(list(rotations.values()))
        self._x, self._waiting = None, {}
        for each in self.linears:
            each.shared = self if each in self._turned else None

    def turned(self, x: Tensor, linear: PackedLinear) -> Tensor:
        """x by the rotation of `linear`, one of those that have one."""
        if x is not self._x or linear not in self._waiting:
            self._x, self._waiting = x, dict(zip(self._turned, rotate_slices(x, self._R), strict=True))
        mine = self._waiting.pop(linear)
        if not self._waiting:
            self._x = None
        return mine


def shared_inputs(model: nn.Module) -> Iterator[SharedInput]:
    """All sets of linears of the model that its layers call with one tensor; experts, which are many, left out."""
    for module in model.modules():
        for names in () if isinstance(module, Expert) else SIBLINGS:
            linears = [getattr(module, name, None) for name in names]
            if all(isinstance(each, PackedLinear) for each in linears):
                yield SharedInput(linears)  # type: ignore[arg-type]
