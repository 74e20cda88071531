"""INT4, symmetric, group-wise: compressed-tensors "pack-quantized".

    w[o, k] = q[o, k] * scale[o, k // group],   q in -8..7 stored as q + 8 in nibble k % 8 of an int32 word

Arithmetic of `dequantize`, equal bit for bit to compressed-tensors: q is cast to the dtype of the scale (bfloat16 in
the checkpoints that we write), multiplied there with one rounding, and only the product is cast to the dtype asked for.

Quantisation, as compressed-tensors' `calculate_qparams`: scale = amax / 7.5, so the largest positive value of a group
sits at 7.5 and is clamped to 7, and -8 occurs. (A scale of amax / 7 would never emit -8; checkpoints do contain it.)
The scale is rounded to bfloat16 before the codes are computed, in float32. compressed-tensors does the same on a GPU;
its CPU path divides in the dtype of the weight, so it rounds the quotient of a bfloat16 weight twice.
A group of zeros gets the scale 2^-23, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import (
    Format,
    FormatError,
    FormatSpec,
    PackedWeight,
    TensorRule,
    divide,
    in_pieces,
    require,
    require_codes_under_zero_scales,
    require_divisible,
    require_finite,
)
from .config import weight_schemes
from .nibbles import pack_nibbles, unpack_nibbles

WRITTEN_GROUP_SIZES = (32, 128)
_HALF_RANGE = 7.5
_ZERO_GROUP_SCALE = torch.finfo(torch.float32).eps


class Int4(Format):
    name = "int4"

    def claims(self, names: set[str]) -> bool:
        return names == {"weight_packed", "weight_scale", "weight_shape"}

    def rules(self, packed: PackedWeight) -> dict[str, TensorRule]:
        out, width = packed.shape
        require_divisible("int4", width, packed.spec.group_size)
        return {
            "weight_packed": TensorRule((torch.int32,), (out, -(-width // 8))),
            "weight_scale": TensorRule(
                (torch.bfloat16, torch.float16, torch.float32), (out, width // packed.spec.group_size)
            ),
            "weight_shape": TensorRule((torch.int64, torch.int32), (2,)),
        }

    def read(self, tensors: Mapping[str, Tensor], quant_config: Mapping[str, Any] | None) -> PackedWeight:
        stored_shape = tensors["weight_shape"]
        require(stored_shape.numel() == 2, "int4 weight_shape", "two sizes (out, in)", stored_shape.tolist())
        out, width = (int(size) for size in stored_shape.flatten().tolist())
        scale = tensors["weight_scale"]
        require(scale.dim() == 2 and scale.shape[1] > 0, "int4 weight_scale", "two dimensions", tuple(scale.shape))
        groups = scale.shape[1]
        require(width % groups == 0, "int4 weight_scale groups", f"a divisor of in_features {width}", groups)
        group_size = width // groups
        schemes = weight_schemes(quant_config, num_bits=4, kind="int")
        if not all(scheme.get("symmetric", True) for scheme in schemes):
            raise FormatError("int4 quantization_config: expected symmetric weights; found symmetric=false")
        # a group size of -1, or none, declares one scale per row
        declared = {size if (size := scheme.get("group_size") or -1) > 0 else width for scheme in schemes}
        require(
            not declared or group_size in declared,
            f"int4 group size that quantization_config declares for weight ({out}, {width})",
            sorted(declared),
            f"{group_size} (weight_scale {tuple(scale.shape)})",
        )
        return PackedWeight(FormatSpec("int4", group_size), (out, width), dict(tensors))

    def quantize(self, weight: Tensor, spec: FormatSpec) -> PackedWeight:
        require(
            spec.group_size in WRITTEN_GROUP_SIZES, "int4 group_size to write", WRITTEN_GROUP_SIZES, spec.group_size
        )
        out, width = weight.shape
        require_divisible("int4", width, spec.group_size)
        groups = weight.unflatten(1, (-1, spec.group_size))
        amax = torch.cat([groups[rows].abs().amax(dim=2) for rows in in_pieces(weight)])
        scale = divide(amax, _HALF_RANGE).to(torch.bfloat16)
        scale = scale.masked_fill(scale == 0, _ZERO_GROUP_SCALE)
        octets = torch.empty(out, width // 2, dtype=torch.uint8, device=weight.device)
        for rows in in_pieces(weight):
            codes = groups[rows].div_(scale[rows].float().unsqueeze(2)).clamp_(-8, 7).round_().add_(8).flatten(1)
            octets[rows] = pack_nibbles(codes.to(torch.uint8))
        tensors = {
            "weight_packed": octets.view(torch.int32),
            "weight_scale": scale,
            "weight_shape": torch.tensor([out, width], dtype=torch.int64, device=weight.device),
        }
        return PackedWeight(spec, (out, width), tensors)

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        scale = packed.tensors["weight_scale"]
        codes = self.codes(packed).to(scale.dtype)
        grouped = codes.unflatten(1, (-1, packed.spec.group_size))
        return grouped.mul_(scale.unsqueeze(2)).flatten(1).to(dtype)

    def codes(self, packed: PackedWeight) -> Tensor:
        """int8 [out, in], each in -8..7."""
        return unpack_nibbles(packed.tensors["weight_packed"])[:, : packed.shape[1]].view(torch.int8) - 8

    def check_values(self, packed: PackedWeight) -> None:
        scale = packed.tensors["weight_scale"]
        stored = tuple(int(size) for size in packed.tensors["weight_shape"].tolist())
        require(stored == packed.shape, "int4 weight_shape", packed.shape, stored)
        require_finite("int4 weight_scale", scale)
        require_codes_under_zero_scales("int4 weight_scale", scale, lambda: self.codes(packed), packed.block)
