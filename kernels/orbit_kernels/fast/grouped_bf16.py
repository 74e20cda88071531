"""The grouped product of BF16 experts: torch's own, which reads on the device where each expert's rows end.

It loads rows of W and of x by the copy engine, 16 bytes at a time, so widths must be multiples of 8.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..formats.stack import PackedStack
from .launching import aligned


def supports(experts: PackedStack) -> bool:
    """Whether rows of W and of its transpose are whole pieces of 16 bytes."""
    return experts.spec.name == "bf16" and all(size % 8 == 0 for size in experts.shape)


def grouped_bf16(x: Tensor, counts: Tensor, experts: PackedStack, turned: bool) -> Tensor:
    """As `grouped.grouped_product`, for stacks that `supports` accepts."""
    x, weights = (aligned(each) for each in (x, experts.tensors["weight"]))
    ends = counts.cumsum(0).int()
    return F.grouped_mm(x, weights if turned else weights.transpose(1, 2), offs=ends)
