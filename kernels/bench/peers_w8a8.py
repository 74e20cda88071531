"""FP8 weights in blocks of 128x128 and FP8 activations: who enters `peers.py`.

ours       the product of `linear_w8a8`, activations quantised beforehand
whole      `linear_w8a8`, their quantisation included; "quantise" is that alone
deepgemm   DeepGEMM's `fp8_gemm_nt` on the same codes and scales; where `deep_gemm` is installed
rowwise    torch's `_scaled_mm` with one scale a row and one a column: nothing to add up between steps, so a ceiling
           and other numbers
"""

from __future__ import annotations

from functools import partial

import torch
from orbit_kernels import FORMATS, PackedWeight, linear_w8a8, quantize_activations
from orbit_kernels.fast.w8a8 import product_w8a8
from orbit_kernels.w8a8 import GROUP
from race import Contest, Entrant, Product, Thunk, cublas, packs
from torch import Tensor

FP8 = FORMATS["fp8"]


def ours(out: int, width: int, count: int) -> list[Product]:
    def product(x: Tensor, packed: PackedWeight) -> Thunk:
        return partial(product_w8a8, *quantize_activations(x), packed)

    return [partial(product, packed=packed) for packed in packs(FP8, out, width, count)]


def whole(out: int, width: int, count: int) -> list[Product]:
    return [partial(partial, linear_w8a8, packed=packed) for packed in packs(FP8, out, width, count)]


def quantise(out: int, width: int, count: int) -> list[Product]:
    return [lambda x: partial(quantize_activations, x.clone())] * count


def deepgemm(out: int, width: int, count: int) -> list[Product]:
    from deep_gemm import fp8_gemm_nt

    def multiply(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor]) -> Tensor:
        y = torch.empty(len(x[0]), out, dtype=torch.bfloat16, device="cuda")
        fp8_gemm_nt(x, weight, y)
        return y

    def product(x: Tensor, packed: PackedWeight) -> Thunk:
        weight = packed.tensors["weight"], packed.tensors["weight_scale_inv"]
        return partial(multiply, quantize_activations(x), weight)

    return [partial(product, packed=packed) for packed in packs(FP8, out, width, count)]


def rowwise(out: int, width: int, count: int) -> list[Product]:
    by_column = torch.rand(1, out, device="cuda")

    def product(x: Tensor, packed: PackedWeight) -> Thunk:
        codes, by_row = quantize_activations(x)[0], torch.rand(len(x), 1, device="cuda")
        return partial(torch._scaled_mm, codes, packed.tensors["weight"].t(), by_row, by_column, out_dtype=x.dtype)

    return [partial(product, packed=packed) for packed in packs(FP8, out, width, count)]


def exact(x: Tensor, packed: PackedWeight) -> Tensor:
    codes, scales = quantize_activations(x)
    by_block = packed.tensors["weight_scale_inv"].double()
    weight = packed.tensors["weight"].double() * by_block.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    return (codes.double() * scales.double().repeat_interleave(GROUP, 1)) @ weight.t()


W8A8 = Contest(
    name="w8a8",
    entrants={
        "cublas": Entrant(cublas),
        "ours": Entrant(ours, of=FP8),
        "whole": Entrant(whole, of=FP8),
        "quantise": Entrant(quantise),
        "deepgemm": Entrant(deepgemm, of=FP8),
        "rowwise": Entrant(rowwise),
    },
    tokens=(1024, 2048, 4096, 8192, 16384),
    weight_bytes=1.0,
    exact=exact,
)
