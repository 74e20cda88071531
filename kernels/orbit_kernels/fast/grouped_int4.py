"""The grouped product of `grouped.py` for INT4 on Hopper: `int4_product` over the tiles of all experts.

Same unpacking, same order of the sum as the general kernel, so the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.stack import PackedStack
from .int4_product import Cut, multiply
from .schedule import schedule

_FEW = 112  # rows per expert, on average: bench/results/grouped.json


def supports(experts: PackedStack) -> bool:
    """Whether the copy engine and the tiles take this stack (some rows given)."""
    (out, width), spec = experts.shape, experts.spec
    if spec.name != "int4" or experts.tensors["weight_scale"].dtype != torch.bfloat16:
        return False
    paired = spec.group_size < 128 or width % 256 == 0
    return out % 128 == 0 and width % 128 == 0 and spec.group_size in (32, 64, 128) and paired


def cut_for(rows: int, experts: int, made: int) -> Cut:
    """From the mean number of rows (the counts themselves are the device's) and the outputs."""
    few = rows <= _FEW * experts
    return Cut(256 if made % 256 == 0 else 128, 128, 64 if few else 128)


def grouped_int4(x: Tensor, counts: Tensor, experts: PackedStack, turned: bool, cut: Cut | None = None,
                 everything: bool = False) -> Tensor:  # fmt: skip
    """As `grouped.grouped_product`, for stacks that `supports` accepts."""
    out, width = experts.shape
    cut = cut or cut_for(x.shape[0], experts.count, width if turned else out)
    table = schedule(counts, x.shape[0], cut.block)
    words, scales = (experts.tensors[key].contiguous() for key in ("weight_packed", "weight_scale"))
    group = experts.spec.group_size
    programs = 1 << 30 if everything else None
    return multiply(x.contiguous(), words, scales, (out, width), group, turned, cut, table=table, programs=programs)
