"""Decode products of every packed format beside their ceilings, in one run.

    python kernels/bench/decode.py [OUT.json]

Weights are random codes under random scales. Rows of mode "fast" are without batch invariance, where that is another
kernel. Every product is checked against float64 before it is timed: its error must not exceed that of dequantise +
cuBLAS. "read" is a kernel that only reads the packed bytes; see harness.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from harness import (
    SHAPES,
    Report,
    Row,
    arguments,
    compile_beforehand,
    copies,
    error,
    random_packed,
    reader,
    rotating,
    seconds,
    share,
    stored,
)
from orbit_kernels import FormatSpec, PackedWeight, linear, set_batch_invariant
from orbit_kernels import dequantize as reference_dequantize
from orbit_kernels.fast import dequantize
from orbit_kernels.fast.decode import in_one_wave, in_whole_rows
from orbit_kernels.fast.dispatch import named
from torch.nn import functional as F

SPECS = [FormatSpec("int4", 128), FormatSpec("int4", 32), *(FormatSpec(name) for name in ("mxfp4", "nvfp4", "fp8"))]
TOKENS = [1, 4, 8, 16, 32, 64]


def through_scratch(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    return F.linear(x, dequantize(packed))


def rows_of(spec: FormatSpec, out: int, width: int) -> list[Row]:
    few = rotating(spec, out, width)
    dense = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(copies(out * width * 2))]
    read = seconds([reader(words) for words in [stored(packed) for packed in few]])
    reference = reference_dequantize(few[0])
    rows = []
    for m in TOKENS:
        x = torch.randn(m, width, device="cuda").bfloat16()
        exact = x.double() @ reference.double().T
        allowed = error(F.linear(x, reference), exact)
        cublas = seconds([partial(F.linear, x, weight) for weight in dense])
        scratch = seconds([partial(through_scratch, x, packed) for packed in few[:8]])
        for mode in modes(few[0], m):
            found = error(linear(x, few[0]), exact)
            assert found <= 1.02 * allowed, (spec, out, width, m, mode, found, allowed)
            ours = seconds([partial(linear, x, packed) for packed in few])
            rows.append({
                "op": "decode", "format": named(spec), "mode": mode, "out": out, "in": width,
                "M": m, "us": ours * 1e6, "read_us": read * 1e6, "cublas_bf16_us": cublas * 1e6,
                "dequantise_cublas_us": scratch * 1e6, "over_read": ours / read, "against_cublas": cublas / ours,
                "against_dequantise": scratch / ours, "error": found, "error_cublas": allowed,
            })  # fmt: skip
    return rows


def modes(packed: PackedWeight, tokens: int) -> Iterator[str]:
    """The modes that differ, each in force until the next is asked for."""

    def way() -> tuple[bool, bool]:
        return in_whole_rows(packed, tokens), in_one_wave(packed, tokens)

    yield "invariant"
    invariant = way()
    set_batch_invariant(False)
    if way() != invariant:
        yield "fast"
    set_batch_invariant(True)


def warm(worker: str) -> None:
    for spec, (out, width) in share(list(itertools.product(SPECS, SHAPES)), worker):
        packed = random_packed(spec, out, width)
        for m in (1, 8, 16, 32, 64):
            for _ in modes(packed, m):
                for _ in range(2):  # weights written just before, and at rest
                    linear(torch.randn(m, width, device="cuda").bfloat16(), packed)
    torch.cuda.synchronize()


def show(rows: list[Row]) -> None:
    """Ranges over the shapes."""
    for what in dict.fromkeys((row["format"], row["mode"], row["M"]) for row in rows):
        mine = [row for row in rows if (row["format"], row["mode"], row["M"]) == what]
        for key in ("over_read", "against_cublas", "against_dequantise"):
            print(*what, key, f"{min(row[key] for row in mine):.2f} to {max(row[key] for row in mine):.2f}", flush=True)


def main() -> None:
    options = arguments(__file__).parse_args()
    if options.worker:
        return warm(options.worker)
    compile_beforehand()
    report = Report(options)
    for spec, (out, width) in itertools.product(SPECS, SHAPES):
        if not report.late:
            for row in rows_of(spec, out, width):
                report.add(row)
    show(report.rows)


if __name__ == "__main__":
    main()
