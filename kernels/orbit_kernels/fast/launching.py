"""What launches on Hopper share: operands where the copy engine takes them, how many programs fit, a barrier."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name changed between releases of Triton


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and from a multiple of 16 bytes on: itself, or a copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@cache
def multiprocessors(index: int) -> int:
    """Of the CUDA device with this index."""
    return torch.cuda.get_device_properties(index).multi_processor_count
