"""What launches on Hopper share: operands where the copy engine takes them, which of them may be read early, how many
programs fit, a barrier, the places of a ring."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..formats import PackedWeight
from .dequantize import operands

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name changed between releases of Triton


@gluon.jit
def next_place(place, phase, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]  # of a kernel
    """The next place in the rings, and whether they went round once more, which barriers want to know."""
    place += 1
    if place == STAGES:
        place = 0
        phase ^= 1
    return place, phase


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and from a multiple of 16 bytes on: itself, or a copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@cache
def multiprocessors(index: int) -> int:
    """Of the CUDA device with this index."""
    return torch.cuda.get_device_properties(index).multi_processor_count


_READ = WeakTensorKeyDictionary()  # tensor -> its address and how often it had been written when it was read


def at_rest(*tensors: Tensor) -> bool:
    """Whether a launch that waited for all before it has read these bytes since they were last written; if not, this
    call's launch must. Then later kernels may read them before the one ahead of them ends. torch counts what is
    written, except through `.data` and by kernels that are given a pointer: those must be followed by something that
    waits for them, as any kernel does that starts no earlier than the one ahead has ended.
    """
    still = True
    for tensor in tensors:
        now = None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)
        still = still and now is not None and _READ.get(tensor) == now
        _READ[tensor] = now
    return still


def of_four_bits(packed: PackedWeight) -> bool:
    """Whether it has four bits and groups of 16 to 128 with scales as threads want them."""
    if packed.spec.name == "int4" and packed.tensors["weight_scale"].dtype != torch.bfloat16:
        return False
    return packed.spec.name in ("int4", "mxfp4", "nvfp4") and packed.block[1] in (16, 32, 64, 128)


def as_read(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor, str, bool]:
    """A weight of four bits or FP8 as kernels are given it: words int32, scales int16 (MXFP4: bytes; FP8: numbers),
    NVFP4's scale of all, the kind, and whether it is at rest."""
    codes, scales, whole, kind = operands(packed.spec, packed.tensors)
    words, bits = aligned(codes), aligned(scales)
    still = words is codes and bits is scales and at_rest(*packed.tensors.values())
    return words.view(torch.int32), bits if kind in ("mxfp4", "fp8") else bits.view(torch.int16), whole, kind, still
