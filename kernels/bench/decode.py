"""Decode products of every packed format beside their ceilings, in one run.

    PYTHONPATH=kernels python kernels/bench/decode.py [OUT.json]

Weights are random codes under random scales. Every product is checked against float64 before it is timed: its error
must not exceed that of dequantise + cuBLAS. "read" is a kernel that only reads the packed bytes; see harness.py.
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import card, ceilings, compact, copies, random_int4, reader, seconds
from orbit_kernels import FormatSpec, PackedWeight, linear
from orbit_kernels import dequantize as reference_dequantize
from orbit_kernels.fast import dequantize

SHAPES = [(9728, 2560), (2560, 9728), (4096, 2560), (7168, 2048), (2048, 7168)]
SPECS = [FormatSpec("int4", 128), FormatSpec("int4", 32), *(FormatSpec(name) for name in ("mxfp4", "nvfp4", "fp8"))]
TOKENS = [1, 4, 16, 32, 64]
BUDGET = 240.0  # seconds, after which no further weight is begun
COMPILERS = 14  # processes that compile the kernels beforehand


def random_packed(spec: FormatSpec, out: int, width: int) -> PackedWeight:
    def random_bytes(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, shape, device="cuda", dtype=torch.uint8)

    if spec.name == "int4":
        words, scales = random_int4(out, width, spec.group_size)
        tensors = {"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor([out, width])}
    elif spec.name == "mxfp4":
        scales = random_bytes(out, width // 32, low=118, high=124)
        tensors = {"weight_packed": random_bytes(out, width // 2), "weight_scale": scales}
    elif spec.name == "nvfp4":
        scales = random_bytes(out, width // 16, low=40, high=120).view(torch.float8_e4m3fn)
        whole = torch.rand(1, device="cuda") * 100 + 1000
        tensors = {"weight_packed": random_bytes(out, width // 2), "weight_scale": scales, "weight_global_scale": whole}
    else:
        codes = random_bytes(out, width)
        codes[codes & 0x7F == 0x7F] = 0  # NaN
        scales = torch.rand(-(-out // 128), -(-width // 128), device="cuda") * 1e-3 + 1e-4
        tensors = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scales}
    return PackedWeight(spec, (out, width), tensors)


def stored(packed: PackedWeight) -> torch.Tensor:
    parts = [t for key, t in packed.tensors.items() if key not in ("weight_shape", "weight_global_scale")]
    return torch.cat([part.flatten().view(torch.uint8) for part in parts]).view(torch.int32)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def through_scratch(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    return F.linear(x, dequantize(packed))


def rows_of(spec: FormatSpec, out: int, width: int) -> list[dict[str, Any]]:
    few = [random_packed(spec, out, width)]
    few += [random_packed(spec, out, width) for _ in range(copies(few[0].nbytes) - 1)]
    dense = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(copies(out * width * 2))]
    read = seconds([reader(words) for words in [stored(packed) for packed in few]])
    reference = reference_dequantize(few[0])
    rows = []
    for m in TOKENS:
        x = torch.randn(m, width, device="cuda").bfloat16()
        exact = x.double() @ reference.double().T
        errors = error(linear(x, few[0]), exact), error(F.linear(x, reference), exact)
        assert errors[0] <= 1.02 * errors[1], (spec, out, width, m, errors)
        ours = seconds([partial(linear, x, packed) for packed in few])
        cublas = seconds([partial(F.linear, x, weight) for weight in dense])
        scratch = seconds([partial(through_scratch, x, packed) for packed in few[:8]])
        rows.append({
            "op": "decode", "format": f"{spec.name}-{spec.group_size}", "out": out, "in": width, "M": m,
            "us": ours * 1e6, "read_us": read * 1e6, "cublas_bf16_us": cublas * 1e6,
            "dequantise_cublas_us": scratch * 1e6, "over_read": ours / read, "against_cublas": cublas / ours,
            "against_dequantise": scratch / ours, "error": errors[0], "error_cublas": errors[1],
        })  # fmt: skip
    return rows


def compile_share(index: int) -> None:
    for spec, (out, width) in [(spec, shape) for spec in SPECS for shape in SHAPES][index::COMPILERS]:
        packed = random_packed(spec, out, width)
        for m in (16, 32, 64):
            linear(torch.randn(m, width, device="cuda").bfloat16(), packed)
    torch.cuda.synchronize()


def main(path: str) -> None:
    workers = [subprocess.Popen([sys.executable, __file__, "--compile", str(i)]) for i in range(COMPILERS)]
    assert not any(worker.wait() for worker in workers)
    begin = time.monotonic()
    result: dict[str, Any] = {**card(), "command": "python kernels/bench/decode.py", "ceilings": ceilings(), "rows": []}
    for spec in SPECS:
        for out, width in SHAPES:
            if time.monotonic() - begin > BUDGET:
                break
            result["rows"] += rows_of(spec, out, width)
            Path(path).write_text(compact(result))
        mine = [row for row in result["rows"] if row["format"] == f"{spec.name}-{spec.group_size}"]
        for m in TOKENS:
            print(f"{spec.name}-{spec.group_size} M {m}".ljust(18), *(
                f"{key} {min(r[key] for r in mine if r['M'] == m):.2f} to {max(r[key] for r in mine if r['M'] == m):.2f};"
                for key in ("over_read", "against_cublas", "against_dequantise")
            ), *(f"{r['us']:.1f}/{r['read_us']:.1f}" for r in mine if r["M"] == m), flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_share(int(sys.argv[2]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "results" / "decode.json"))
