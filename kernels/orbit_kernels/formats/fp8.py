"""FP8: E4M3 codes with one scale per block of 128 x 128.

    w[o, k] = e4m3(weight[o, k]) * scale[o // rows, k // cols]

Two spellings of the same thing: `weight_scale_inv`, float32 (fine-grained FP8, as DeepSeek-V3 and Qwen publish it), and
`weight_scale`, bfloat16 or float32 (compressed-tensors with the block strategy). Edges may be ragged: a scale covers
what is left. A weight whose rows were interleaved may carry a finer grid; its `block` says so.

Arithmetic of `dequantize`, equal to compressed-tensors: the code is cast to the dtype of the scale, multiplied there
with one rounding, and the product is cast. With float32 scales this is also what transformers computes when it
dequantises at load time.

Quantisation: scale = amax / 448 in float32, codes = nearest E4M3 of w / scale, clamped to +-448. A block of zeros gets
the scale 1 (compressed-tensors writes 2^-23 there; transformers writes 1). Otherwise equal to compressed-tensors for a
float32 weight; from a bfloat16 weight it derives bfloat16 scales.
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
    require,
    require_codes_under_zero_scales,
    require_finite,
    spread_blocks,
)
from .config import fp8_blocks

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


class Fp8(Format):
    name = "fp8"

    def claims(self, names: set[str]) -> bool:
        return names in ({"weight", "weight_scale_inv"}, {"weight", "weight_scale"})

    def rules(self, packed: PackedWeight) -> dict[str, TensorRule]:
        (out, width), (rows, cols) = packed.shape, packed.block
        key = scale_key(packed.tensors)
        dtypes = (torch.float32,) if key == "weight_scale_inv" else (torch.bfloat16, torch.float32)
        return {
            "weight": TensorRule((E4M3,), (out, width)),
            key: TensorRule(dtypes, (-(-out // rows), -(-width // cols))),
        }

    def read(self, tensors: Mapping[str, Tensor], quant_config: Mapping[str, Any] | None) -> PackedWeight:
        weight, scale = tensors["weight"], tensors[scale_key(tensors)]
        require(weight.dim() == 2, "fp8 weight", "two dimensions", tuple(weight.shape))
        spec = FormatSpec("fp8")
        blocks = fp8_blocks(quant_config) or {spec.block}
        fitting = [b for b in sorted(blocks) if tuple(scale.shape) == _grid(tuple(weight.shape), b)]
        require(
            bool(fitting),
            f"fp8 {scale_key(tensors)} shape for weight {tuple(weight.shape)}",
            " or ".join(f"{_grid(tuple(weight.shape), b)} (blocks {b})" for b in sorted(blocks)),
            tuple(scale.shape),
            "Per-tensor and per-channel FP8 are not supported; other blocks must be named by weight_block_size",
        )
        if len(fitting) > 1:
            raise FormatError(f"fp8 weight {tuple(weight.shape)}: blocks {fitting} all fit; cannot tell which is meant")
        return PackedWeight(spec, (weight.shape[0], weight.shape[1]), dict(tensors), fitting[0])

    def quantize(self, weight: Tensor, spec: FormatSpec) -> PackedWeight:
        (out, width), (rows, cols) = weight.shape, spec.block
        grid = _grid((out, width), spec.block)
        below, beside = grid[0] * rows - out, grid[1] * cols - width
        padded = torch.nn.functional.pad(weight, (0, beside, 0, below)) if below or beside else weight
        blocks = padded.reshape(grid[0], rows, grid[1], cols)
        amax = blocks.abs().amax(dim=3).amax(dim=1)
        scale = divide(amax, E4M3_MAX)
        scale = scale.masked_fill(scale == 0, 1.0)
        values = blocks.div_(scale[:, None, :, None])
        if bool((scale < torch.finfo(torch.float32).tiny).any()):  # else no quotient is more than a rounding above 448
            values.clamp_(-E4M3_MAX, E4M3_MAX)
        codes = values.to(E4M3)
        codes = codes.view(grid[0] * rows, grid[1] * cols)[:out, :width].contiguous()
        tensors = {"weight": codes, "weight_scale_inv": scale}
        return PackedWeight(spec, (out, width), tensors)

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        scale = packed.tensors[scale_key(packed.tensors)]
        codes = packed.tensors["weight"].to(scale.dtype)
        return codes.mul_(spread_blocks(scale, *packed.block, packed.shape)).to(dtype)

    def check_values(self, packed: PackedWeight) -> None:
        key = scale_key(packed.tensors)
        magnitude = packed.tensors["weight"].view(torch.uint8) & 0x7F
        nans = magnitude == 0x7F
        if bool(nans.any()):
            raise FormatError(f"fp8 weight: expected numbers; found NaN at {tuple(nans.nonzero()[0].tolist())}")
        require_finite(f"fp8 {key}", packed.tensors[key])
        require_codes_under_zero_scales(f"fp8 {key}", packed.tensors[key], lambda: magnitude, packed.block)


def scale_key(tensors: Mapping[str, Tensor]) -> str:
    return "weight_scale" if "weight_scale" in tensors else "weight_scale_inv"


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
