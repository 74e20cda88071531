"""Four-bit weights, sixteen-bit activations: who enters `peers.py`.

    int4, mxfp4    `orbit_kernels.linear`, as a caller gets it (INT4 in groups of 128)
    .._fast        the same where rows need not keep their bits (`set_batch_invariant(False)`)
    .._scratch     our dequantisation and cuBLAS: what a frozen packed base costs without a fused product
    tinygemm       torch's `_weight_int4pack_mm`
    marlin         the kernel that SGLang and vLLM serve GPTQ weights with; where `sglang` is installed
    ogs            `matmul_ogs` of triton_kernels on the same MXFP4 bytes, laid out as it likes them; where installed

tinygemm and Marlin get random codes of the right shape in their own layout: they are timed, not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from orbit_kernels import FORMATS, FormatSpec, PackedWeight, dequantize, linear, set_batch_invariant
from orbit_kernels.fast import dense
from race import Contest, Entrant, Product, cublas, packs
from torch import Tensor

GROUP = 128
INT4, MXFP4 = FormatSpec("int4", GROUP), FORMATS["mxfp4"]


def ours(product: Callable[..., Tensor], spec: FormatSpec, out: int, width: int, count: int) -> list[Product]:
    """product(x, packed)."""
    return [partial(partial, product, packed=packed) for packed in packs(spec, out, width, count)]


def fast(x: Tensor, packed: PackedWeight) -> Tensor:
    set_batch_invariant(False)
    try:
        return linear(x, packed)
    finally:
        set_batch_invariant(True)


scratch = partial(dense.forward, bias=None, resident=None)


def tinygemm(out: int, width: int, count: int) -> list[Product]:
    found: list[Product] = []
    for _ in range(count):
        codes = torch.randint(0, 256, (out, width // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        grid = torch.randn(width // GROUP, out, 2, device="cuda").bfloat16()
        found.append(partial(partial, _tinygemm, packed=packed, grid=grid))
    return found


def _tinygemm(x: Tensor, packed: Tensor, grid: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, grid)


def marlin(out: int, width: int, count: int) -> list[Product]:
    from sgl_kernel.scalar_type import scalar_types
    from sglang.jit_kernel.gptq_marlin import gptq_marlin_gemm

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    workspace = torch.zeros(processors, dtype=torch.int, device="cuda")
    none = torch.empty(0, dtype=torch.int, device="cuda")

    def product(x: Tensor, words: Tensor, grid: Tensor) -> object:
        return gptq_marlin_gemm(
            x, None, words, grid, None, None, none, none, workspace, scalar_types.uint4b8, len(x), out, width,
            True, False, True, False,
        )  # fmt: skip

    found: list[Product] = []
    for _ in range(count):
        words = torch.randint(-(2**31), 2**31 - 1, (width // 16, out * 2), device="cuda", dtype=torch.int32)
        grid = torch.rand(width // GROUP, out, device="cuda").bfloat16()
        found.append(partial(partial, product, words=words, grid=grid))
    return found


def ogs(out: int, width: int, count: int) -> list[Product]:
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig, matmul_ogs
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    values, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=0)
    scales, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=0, num_warps=8)
    found: list[Product] = []
    for packed in packs(MXFP4, out, width, count):
        codes, exponents = (packed.tensors[key].t() for key in ("weight_packed", "weight_scale"))
        weight = convert_layout(wrap_torch_tensor(codes, dtype=FP4), values, **value_options)
        scale = convert_layout(wrap_torch_tensor(exponents), scales, **scale_options)
        precision = PrecisionConfig(weight_scale=scale, flex_ctx=FlexCtx())
        found.append(partial(partial, matmul_ogs, w=weight, bias=None, precision_config=precision))
    return found


def exact(x: Tensor, packed: PackedWeight) -> Tensor:
    return x.double() @ dequantize(packed).double().t()


W4A16 = Contest(
    name="w4a16",
    entrants={
        "cublas": Entrant(cublas),
        "int4": Entrant(partial(ours, linear, INT4), of=INT4),
        "int4_fast": Entrant(partial(ours, fast, INT4), of=INT4, most=16),
        "int4_scratch": Entrant(partial(ours, scratch, INT4), of=INT4),
        "tinygemm": Entrant(tinygemm, most=256),
        "marlin": Entrant(marlin),
        "mxfp4": Entrant(partial(ours, linear, MXFP4), of=MXFP4),
        "mxfp4_fast": Entrant(partial(ours, fast, MXFP4), of=MXFP4, most=16),
        "mxfp4_scratch": Entrant(partial(ours, scratch, MXFP4), of=MXFP4),
        "ogs": Entrant(ogs, of=MXFP4),
    },
    tokens=(1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    weight_bytes=0.52,
    exact=exact,
    reads=(INT4, MXFP4),
)
