"""How many rows belong to each expert, where rows are sorted by expert: numbers that live on the device of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import FormatError


def require_counts(counts: Tensor, groups: int, x: Tensor) -> None:
    """Raises FormatError unless counts[groups] are integers on the device of x that (looked at on a CPU only) add up
    to its rows."""
    integers = counts.dtype in (torch.int32, torch.int64)
    if tuple(counts.shape) != (groups,) or not integers or counts.device != x.device:
        found = f"{counts.dtype} {tuple(counts.shape)} on {counts.device}"
        raise FormatError(f"counts: expected int32 or int64 ({groups},) on {x.device}; found {found}")
    if not counts.is_cuda and (int(counts.sum()) != x.shape[0] or bool((counts < 0).any())):
        raise FormatError(f"counts: expected numbers of rows that add up to {x.shape[0]}; found {counts.tolist()}")
