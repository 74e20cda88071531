"""BF16: the weight itself, so that a model without quantisation goes through the same doors as the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Format, FormatError, FormatSpec, PackedWeight, TensorRule, is_finite, require


class Bf16(Format):
    name = "bf16"

    def claims(self, names: set[str]) -> bool:
        return names == {"weight"}

    def rules(self, packed: PackedWeight) -> dict[str, TensorRule]:
        return {"weight": TensorRule((torch.bfloat16,), packed.shape)}

    def read(self, tensors: Mapping[str, Tensor], quant_config: Mapping[str, Any] | None) -> PackedWeight:
        weight = tensors["weight"]
        require(weight.dim() == 2, "bf16 weight", "two dimensions", tuple(weight.shape))
        return PackedWeight(FormatSpec("bf16"), (weight.shape[0], weight.shape[1]), dict(tensors))

    def quantize(self, weight: Tensor, spec: FormatSpec) -> PackedWeight:
        return PackedWeight(spec, (weight.shape[0], weight.shape[1]), {"weight": weight.to(torch.bfloat16)})

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        """The stored tensor itself when `dtype` is bfloat16: no copy."""
        return packed.tensors["weight"].to(dtype)

    def check_values(self, packed: PackedWeight) -> None:
        if not is_finite(packed.tensors["weight"]):
            bad = ~torch.isfinite(packed.tensors["weight"])
            raise FormatError(f"bf16 weight: expected finite numbers; found {int(bad.sum())} that are not")
