"""Quantisation beside a copy of as many bytes and beside the reference on the same card, in one run.

    python kernels/bench/quantize.py [OUT.json]

Bytes are those of the weight, read once, and of what is stored; NVFP4, which needs the largest magnitude of all before
it starts, reads the weight twice and is still compared with one reading. The reference is eager: it looks at values on
the host. Bits are compared first, with the reference on the CPU.
"""

from __future__ import annotations

import itertools
import statistics
import time
from functools import partial

import torch
from harness import Report, Row, Thunk, arguments, copies, seconds
from orbit_kernels import FormatSpec, quantize
from orbit_kernels.fast.quantize import pack
from orbit_kernels.formats.base import implementation

SPECS = [FormatSpec("int4", 32), FormatSpec("int4", 128), *(FormatSpec(name) for name in ("nvfp4", "mxfp4", "fp8"))]


def measured(out: int, width: int, dtype: torch.dtype, spec: FormatSpec) -> Row:
    weight = (torch.randn(out, width, device="cuda") * 0.05).to(dtype)
    packed = quantize(weight, spec)
    expected = (
        quantize(weight[: 128 * (out // 256)].cpu(), spec) if spec.name != "nvfp4" else quantize(weight.cpu(), spec)
    )
    for key, tensor in expected.tensors.items():
        mine = packed.tensors[key][: len(tensor)].cpu()
        assert key == "weight_shape" or torch.equal(mine.view(torch.uint8), tensor.view(torch.uint8)), key
    nbytes = weight.nbytes + packed.nbytes
    count = copies(nbytes)
    weights = [weight.clone() for _ in range(count)]
    peak = torch.zeros(1, dtype=torch.int32, device="cuda")
    ours = seconds([partial(pack, each, spec, peak) for each in weights])
    halves = [torch.empty(2, nbytes // 8, device="cuda").normal_() for _ in range(count)]
    copy = seconds([partial(torch.mul, half[0], 1.0, out=half[1]) for half in halves])
    reference = eager([partial(by_reference, each, spec) for each in weights])
    door = eager([partial(quantize, each, spec) for each in weights])
    return {
        "op": "quantise", "format": f"{spec.name}-{spec.group_size}", "of": str(dtype).removeprefix("torch."),
        "out": out, "in": width, "us": ours * 1e6, "copy_us": copy * 1e6, "of_copy": copy / ours,
        "GBps": nbytes / ours / 1e9, "door_us": door * 1e6, "reference_us": reference * 1e6,
        "against_reference": reference / door,
    }  # fmt: skip


def by_reference(weight: torch.Tensor, spec: FormatSpec) -> object:
    return implementation(spec).quantize(weight.to(torch.float32, copy=True), spec)


def eager(calls: list[Thunk]) -> float:
    """Median seconds per call from the host, its launches and its looks at values included."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / len(calls))
    return statistics.median(times)


def main() -> None:
    report = Report(arguments(__file__).parse_args())
    shapes, dtypes = [(9728, 2560), (7168, 2048)], (torch.bfloat16, torch.float32)
    for (out, width), dtype, spec in itertools.product(shapes, dtypes, SPECS):
        report.add(measured(out, width, dtype, spec))


if __name__ == "__main__":
    main()
