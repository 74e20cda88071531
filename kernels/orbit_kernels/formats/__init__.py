"""Number formats: one file each, one set of doors for all.

`read` takes a module's tensors from a checkpoint, `quantize` makes them from floats, `dequantize` says what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .base import REGISTRY, Format, FormatError, FormatSpec, PackedWeight, implementation, is_finite, require
from .bf16 import Bf16
from .fp8 import Fp8
from .int4 import Int4
from .mxfp4 import Mxfp4
from .nvfp4 import Nvfp4

__all__ = [
    "FORMATS",
    "FormatError",
    "FormatSpec",
    "PackedWeight",
    "dequantize",
    "detect",
    "is_finite",
    "quantize",
    "read",
]

_ALL: tuple[Format, ...] = (Int4(), Fp8(), Nvfp4(), Mxfp4(), Bf16())
REGISTRY.update({each.name: each for each in _ALL})

FORMATS: Mapping[str, FormatSpec] = MappingProxyType({each.name: FormatSpec(each.name) for each in _ALL})
"""Name -> the format with its own group size."""

_NOT_OF_THE_WEIGHT = {"bias"}
_REFUSED = {
    "weight_zero_point": "asymmetric quantisation is not supported; use a checkpoint with symmetric weights",
    "weight_g_idx": "activation-ordered groups (act-order) are not supported; use a checkpoint without g_idx",
}


@torch.no_grad()
def quantize(weight: Tensor, spec: FormatSpec) -> PackedWeight:
    """Round a float weight to the nearest number of a format; deterministic, equal on every device.

    weight  [out, in], any float dtype; computed in float32. Each format's file states its rule for the scales.
    Raises FormatError for a weight that is not two-dimensional, not float, not finite, or whose width does not divide
    into groups.
    """
    require(weight.dim() == 2, "weight to quantize", "two dimensions (out, in)", tuple(weight.shape))
    require(weight.is_floating_point(), "weight to quantize", "a float dtype", weight.dtype)
    if weight.is_cuda:
        from .. import fast  # imported with the first CUDA tensor, so that Triton is never loaded without a GPU

        if fast.quantize_supports(weight, spec):
            return fast.quantize(weight, spec)
    wide = weight.detach().to(torch.float32, copy=True)
    narrow = weight if weight.itemsize < wide.itemsize else wide  # half the bytes to look at
    require(is_finite(narrow), "weight to quantize", "finite numbers in float32", "NaN or infinity")
    return implementation(spec).quantize(wide, spec)


@torch.no_grad()
def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The dense weight [out, in] that the stored bytes stand for, bit for bit what compressed-tensors computes.

    The arithmetic has a fixed precision of its own, stated at the top of each format's file; `dtype` is only what the
    result is cast to. So int4, mxfp4 and fp8 with bfloat16 scales give the same values in bfloat16 and float32, while
    nvfp4 and fp8 with float32 scales are rounded when cast to bfloat16. Engines compare and compute with the bfloat16
    values (`linear` does). No copy is made of a bf16 weight.
    """
    require(dtype.is_floating_point and dtype.itemsize > 1, "dequantize dtype", "a float of 16 bits or more", dtype)
    return implementation(packed.spec).dequantize(packed, dtype)


def detect(names: Iterable[str]) -> str | None:
    """The format whose layout has exactly these suffixes (a bias aside), or None when it is no weight that we know.

    names  what a checkpoint stores after "<module>.", e.g. {"weight_packed", "weight_scale", "weight_shape"}
    Raises FormatError for layouts that look like ours and mean something else (zero points, act-order).
    """
    stored = set(names) - _NOT_OF_THE_WEIGHT
    for refused, reason in _REFUSED.items():
        if refused in stored:
            raise FormatError(f"{refused}: {reason}")
    return next((each.name for each in _ALL if each.claims(stored)), None)


def read(module_tensors: Mapping[str, Tensor], quant_config: Mapping[str, Any] | None = None) -> PackedWeight:
    """The packed weight of one module, bytes untouched and checked (structure and values).

    module_tensors  suffix -> tensor, everything stored under "<module>."; a bias is left out of the result
    quant_config    the checkpoint's `quantization_config`, where it adds what tensors cannot tell: FP8 blocks other
                    than 128x128; a declared group size or asymmetry that contradicts the tensors is an error
    Raises FormatError when no known layout has these tensors, or when they do not fit it.
    """
    name = detect(module_tensors)
    require(name is not None, "module tensors", "the suffixes of a known format", sorted(module_tensors))
    weight_tensors = {key: tensor for key, tensor in module_tensors.items() if key not in _NOT_OF_THE_WEIGHT}
    return REGISTRY[str(name)].read(weight_tensors, quant_config).validate()
