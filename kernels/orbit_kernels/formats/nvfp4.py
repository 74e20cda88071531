"""NVFP4: E2M1 codes, an E4M3 scale per 16, and one float32 scale per tensor, in two published spellings.

    compressed-tensors   weight_packed u8, weight_scale e4m3, weight_global_scale g    w = e2m1 * (scale / g)
    ModelOpt             weight        u8, weight_scale e4m3, weight_scale_2      s2   w = e2m1 * (scale * s2)

`g` is the reciprocal of `s2`; neither is converted into the other, because 1 / g is rounded. An activation scale
(`input_global_scale`, `input_scale`) belongs to engines that also quantise activations: it is carried along unread.

Arithmetic of `dequantize`, equal to compressed-tensors: scale / g (or scale * s2) in float32, times the code in
float32, then one cast to the dtype asked for.

Quantisation, as compressed-tensors' `generate_gparam` and `calculate_qparams`, in float32:
    g = (1 / amax(W)) * (448 * 6)             so that the largest group's scale is the largest E4M3 number
    scale = e4m3(g * (amax(group) / 6))       0 becomes 0.125
    code = nearest E2M1 of w / (scale / g)    ties to even
Equal to theirs for a float32 weight; for a bfloat16 weight they round amax / 6 and g to bfloat16 on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import (
    Format,
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
from .nibbles import E2M1_MAX, decode_e2m1, encode_groups, unpack_nibbles

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
_ZERO_GROUP_SCALE = 0.125
_COMPRESSED_TENSORS = {"weight_packed", "weight_scale", "weight_global_scale"}
_MODELOPT = {"weight", "weight_scale", "weight_scale_2"}


class Nvfp4(Format):
    name = "nvfp4"

    def claims(self, names: set[str]) -> bool:
        return names - {"input_global_scale"} == _COMPRESSED_TENSORS or names - {"input_scale"} == _MODELOPT

    def rules(self, packed: PackedWeight) -> dict[str, TensorRule]:
        out, width = packed.shape
        require_divisible("nvfp4", width, packed.spec.group_size)
        codes, whole, activation = _keys(packed.tensors)
        return {
            codes: TensorRule((torch.uint8,), (out, width // 2)),
            "weight_scale": TensorRule((E4M3,), (out, width // packed.spec.group_size)),
            whole: TensorRule((torch.float32,), (1,)),
            activation: TensorRule((torch.float32,), (1,), required=False),
        }

    def read(self, tensors: Mapping[str, Tensor], quant_config: Mapping[str, Any] | None) -> PackedWeight:
        packed = tensors[_keys(tensors)[0]]
        require(packed.dim() == 2, "nvfp4 weight", "two dimensions", tuple(packed.shape))
        return PackedWeight(FormatSpec("nvfp4"), (packed.shape[0], packed.shape[1] * 2), dict(tensors))

    def quantize(self, weight: Tensor, spec: FormatSpec) -> PackedWeight:
        out, width = weight.shape
        require_divisible("nvfp4", width, spec.group_size)
        groups = weight.unflatten(1, (-1, spec.group_size))
        amax = torch.cat([groups[rows].abs().amax(dim=2) for rows in in_pieces(weight)])
        largest = amax.max().clamp(min=torch.finfo(torch.float32).tiny)
        whole = (largest.reciprocal() * (E4M3_MAX * E2M1_MAX)).nan_to_num(posinf=1.0).reshape(1)
        scale = (whole * divide(amax, E2M1_MAX)).clamp_(max=E4M3_MAX).to(E4M3)
        scale = torch.where(scale.float() == 0, _ZERO_GROUP_SCALE, scale.float()).to(E4M3)
        octets = encode_groups(groups, scale.float() / whole)
        tensors = {"weight_packed": octets, "weight_scale": scale, "weight_global_scale": whole}
        return PackedWeight(spec, (out, width), tensors)

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        codes, whole, _ = _keys(packed.tensors)
        local, tensor_wide = packed.tensors["weight_scale"].float(), packed.tensors[whole]
        scale = local * tensor_wide if whole == "weight_scale_2" else local / tensor_wide
        values = decode_e2m1(packed.tensors[codes], torch.float32).unflatten(1, (-1, packed.spec.group_size))
        return values.mul_(scale.unsqueeze(2)).flatten(1).to(dtype)

    def check_values(self, packed: PackedWeight) -> None:
        codes, whole, _ = _keys(packed.tensors)
        scale, tensor_wide = packed.tensors["weight_scale"], packed.tensors[whole]
        require_finite(f"nvfp4 {whole}", tensor_wide.reshape(1))
        require(float(tensor_wide) > 0, f"nvfp4 {whole}", "a positive number", float(tensor_wide))
        require_finite("nvfp4 weight_scale", scale.float())
        require_codes_under_zero_scales(
            "nvfp4 weight_scale", scale, lambda: unpack_nibbles(packed.tensors[codes]) & 0x7, packed.block
        )


def _keys(tensors: Mapping[str, Tensor]) -> tuple[str, str, str]:
    """The suffixes of the codes, the per-tensor scale and the activation scale in this weight's spelling."""
    if "weight_scale_2" in tensors:
        return "weight", "weight_scale_2", "input_scale"
    return "weight_packed", "weight_global_scale", "input_global_scale"
