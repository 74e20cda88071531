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

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import SHAPES, card, ceilings, compact, copies, error, random_packed, reader, seconds, stored
from orbit_kernels import FormatSpec, PackedWeight, linear
from orbit_kernels import dequantize as reference_dequantize
from orbit_kernels.fast import dequantize

SPECS = [FormatSpec("int4", 128), FormatSpec("int4", 32), *(FormatSpec(name) for name in ("mxfp4", "nvfp4", "fp8"))]
TOKENS = [1, 4, 16, 32, 64]
BUDGET = 240.0  # seconds, after which no further weight is begun
COMPILERS = 14  # processes that compile the kernels beforehand


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
        for m in (1, 16, 32, 64):
            linear(torch.randn(m, width, device="cuda").bfloat16(), packed)
    torch.cuda.synchronize()


def show(what: str, rows: list[dict[str, Any]]) -> None:
    ranges = [
        f"{key} {min(row[key] for row in rows):.2f} to {max(row[key] for row in rows):.2f}"
        for key in ("over_read", "against_cublas", "against_dequantise")
    ]
    print(what.ljust(16), "; ".join(ranges), *(f"{row['us']:.1f}/{row['read_us']:.1f}" for row in rows), flush=True)


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
            show(f"{spec.name}-{spec.group_size} M {m}", [row for row in mine if row["M"] == m])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_share(int(sys.argv[2]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "results" / "decode.json"))
