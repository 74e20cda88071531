"""W4A16 linears of others (group 128) and ours in one run, as ratios to cuBLAS BF16 and to a read of the packed bytes.

    PYTHONPATH=kernels python kernels/bench/peers.py [OUT.json] [--seconds 100]

    tinygemm  torch's `_weight_int4pack_mm`
    marlin    the kernel that SGLang and vLLM serve GPTQ weights with; where `sglang` is installed
    scratch   our dequantisation and cuBLAS: what a frozen packed base costs without a fused product
    ours      `orbit_kernels.linear`, as a caller gets it

A peer that cannot be imported or fails is named with its reason. Peers get random codes of the right shape in their own
layout: they are timed, not checked (ours is, in tune_dense.py, decode.py and the tests).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import SHAPES, card, ceilings, compact, copies, random_packed, reader, seconds, stored
from orbit_kernels import FormatSpec, linear
from orbit_kernels.fast import dense

GROUP = 128
TOKENS = [1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
Product = Callable[[Tensor], object]


def cublas(out: int, width: int, count: int) -> list[Product]:
    weights = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(copies(out * width * 2))]
    return [partial(F.linear, weight=weight) for weight in weights]


def ours(out: int, width: int, count: int) -> list[Product]:
    return [partial(linear, packed=random_packed(FormatSpec("int4", GROUP), out, width)) for _ in range(count)]


def scratch(out: int, width: int, count: int) -> list[Product]:
    few = [random_packed(FormatSpec("int4", GROUP), out, width) for _ in range(count)]
    return [partial(dense.forward, packed=packed, bias=None, resident=None) for packed in few]


def tinygemm(out: int, width: int, count: int) -> list[Product]:
    found: list[Product] = []
    for _ in range(count):
        codes = torch.randint(0, 256, (out, width // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        grid = torch.randn(width // GROUP, out, 2, device="cuda").bfloat16()
        found.append(partial(_tinygemm, packed=packed, grid=grid))
    return found


def _tinygemm(x: Tensor, packed: Tensor, grid: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, grid)


def marlin(out: int, width: int, count: int) -> list[Product]:
    from sgl_kernel.scalar_type import scalar_types
    from sglang.jit_kernel.gptq_marlin import gptq_marlin_gemm

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    workspace = torch.zeros(processors, dtype=torch.int, device="cuda")
    none = torch.empty(0, dtype=torch.int, device="cuda")
    found: list[Product] = []
    for _ in range(count):
        words = torch.randint(-(2**31), 2**31 - 1, (width // 16, out * 2), device="cuda", dtype=torch.int32)
        grid = torch.rand(width // GROUP, out, device="cuda").bfloat16()

        def product(x: Tensor, words: Tensor = words, grid: Tensor = grid) -> object:
            kind = scalar_types.uint4b8
            return gptq_marlin_gemm(
                x, None, words, grid, None, None, none, none, workspace, kind, len(x), out, width,
                True, False, True, False,
            )  # fmt: skip

        found.append(product)
    return found


PEERS = {"cublas": cublas, "ours": ours, "scratch": scratch, "tinygemm": tinygemm, "marlin": marlin}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", nargs="?", default=str(Path(__file__).parent / "results" / "peers.json"))
    parser.add_argument("--seconds", type=float, default=100.0)
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    rows: dict[tuple[int, int, int], dict[str, Any]] = {}
    failed: dict[str, str] = {}
    result: dict[str, Any] = {**card(), "command": "python kernels/bench/peers.py", "format": "int4-128"}
    result["ceilings"] = ceilings()
    for name, peer in PEERS.items():
        for out, width in SHAPES:
            count = copies(out * width * 0.52)
            try:
                products = peer(out, width, count)
                for m in TOKENS:
                    if time.monotonic() > until or (name == "tinygemm" and m > 256):
                        continue
                    x = torch.randn(m, width, device="cuda").bfloat16()
                    some = products if m <= 256 else products[:4]
                    row = rows.setdefault((out, width, m), {"out": out, "in": width, "M": m})
                    row[f"{name}_us"] = seconds([partial(product, x) for product in some], 11) * 1e6
                if name == "ours":
                    words = [stored(random_packed(FormatSpec("int4", GROUP), out, width)) for _ in range(count)]
                    read = seconds([reader(each) for each in words]) * 1e6
                    for m in TOKENS:
                        rows[out, width, m]["read_us"] = read
            except Exception as problem:
                failed[f"{name} {out}x{width}"] = repr(problem)[:300]
                print(name, out, width, repr(problem)[:300], flush=True)
            torch.cuda.empty_cache()
            Path(options.path).write_text(compact({**result, "failed": failed, "rows": list(rows.values())}))
    for m in TOKENS:
        mine = [row for key, row in rows.items() if key[2] == m and "cublas_us" in row]
        for name in PEERS:
            ratios = [row["cublas_us"] / row[f"{name}_us"] for row in mine if f"{name}_us" in row]
            reads = [row[f"{name}_us"] / row["read_us"] for row in mine if f"{name}_us" in row and "read_us" in row]
            if ratios and reads:
                print(f"M {m:5} {name:9} / cuBLAS {min(ratios):.2f} to {max(ratios):.2f}; "
                      f"time / read {min(reads):.2f} to {max(reads):.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
