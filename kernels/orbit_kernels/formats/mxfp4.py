"""MXFP4: E2M1 codes and a power-of-two scale per 32 (OCP Microscaling Formats v1.0).

    w[o, k] = e2m1(weight_packed nibble k) * 2^(weight_scale[o, k // 32] - 127)

The scale byte is E8M0: 0..254 are the exponents -127..127, and 255 is NaN by the standard (compressed-tensors reads it
as infinity; no valid checkpoint has it, `validate` refuses it).

Arithmetic of `dequantize`, equal to compressed-tensors: code and scale are both exact in bfloat16, the product is
rounded there (only where it under- or overflows), then cast.

Quantisation, as compressed-tensors' `generate_mx_scales`: the exponent of amax, after its mantissa was rounded up to
the next power of two from 1.75 on, less 2 (6.0 = 1.5 * 2^2 is the largest E2M1 number). The standard rounds down
always; rounding up from 1.75 on keeps the top from saturating by more than half a step. Read off the bits, so exact.
From 1.75 * 2^127 on, where compressed-tensors' scale overflows to NaN, the scale stays finite and the top saturates.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .base import (
    Format,
    FormatError,
    FormatSpec,
    PackedWeight,
    TensorRule,
    in_pieces,
    require,
    require_divisible,
)
from .nibbles import decode_e2m1, encode_groups

E8M0_NAN = 255
_E2M1_MAX_EXPONENT = 2
_QUARTER_OF_MANTISSA = 1 << 21  # carries into the exponent from mantissa 1.75 on
_LARGEST_FINITE = 252  # 6 * 2^(252 - 127) is the largest number of the format that a float holds


class Mxfp4(Format):
    name = "mxfp4"

    def claims(self, names: set[str]) -> bool:
        return names == {"weight_packed", "weight_scale"}

    def rules(self, packed: PackedWeight) -> dict[str, TensorRule]:
        out, width = packed.shape
        require_divisible("mxfp4", width, packed.spec.group_size)
        return {
            "weight_packed": TensorRule((torch.uint8,), (out, width // 2)),
            "weight_scale": TensorRule((torch.uint8, torch.float8_e8m0fnu), (out, width // packed.spec.group_size)),
        }

    def read(self, tensors: Mapping[str, Tensor], quant_config: Mapping[str, Any] | None) -> PackedWeight:
        packed = tensors["weight_packed"]
        require(packed.dim() == 2, "mxfp4 weight_packed", "two dimensions", tuple(packed.shape))
        return PackedWeight(FormatSpec("mxfp4"), (packed.shape[0], packed.shape[1] * 2), dict(tensors))

    def quantize(self, weight: Tensor, spec: FormatSpec) -> PackedWeight:
        out, width = weight.shape
        require_divisible("mxfp4", width, spec.group_size)
        groups = weight.unflatten(1, (-1, spec.group_size))
        amax = torch.cat([groups[rows].abs().amax(dim=2) for rows in in_pieces(weight)])
        exponent = (amax.view(torch.int32) + _QUARTER_OF_MANTISSA) >> 23
        scale = (exponent - _E2M1_MAX_EXPONENT).clamp_(0, _LARGEST_FINITE).to(torch.uint8)
        octets = encode_groups(groups, power_of_two(scale, torch.float32))
        return PackedWeight(spec, (out, width), {"weight_packed": octets, "weight_scale": scale})

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        scale = power_of_two(packed.tensors["weight_scale"], torch.bfloat16)
        values = decode_e2m1(packed.tensors["weight_packed"], torch.bfloat16)
        return values.unflatten(1, (-1, packed.spec.group_size)).mul_(scale.unsqueeze(2)).flatten(1).to(dtype)

    def check_values(self, packed: PackedWeight) -> None:
        nans = packed.tensors["weight_scale"].view(torch.uint8) == E8M0_NAN
        if bool(nans.any()):
            where = tuple(nans.nonzero()[0].tolist())
            raise FormatError(f"mxfp4 weight_scale: expected exponents 0..254; found 255 (NaN in E8M0) at {where}")


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """E8M0 bytes -> 2^(e - 127), exact in bfloat16 and float32 (e = 0 is subnormal there); 255 -> NaN."""
    return _powers(dtype, exponent.device)[exponent.view(torch.uint8).to(torch.int32)]


@cache
def _powers(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached inference tensor could not be used under autograd later
        values = [2.0 ** (exponent - 127) for exponent in range(E8M0_NAN)] + [float("nan")]
        return torch.tensor(values, dtype=torch.float64, device="cpu").to(dtype).to(device)
