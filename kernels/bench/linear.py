"""Training shapes of packed linears, dequantisation and OFT rotation beside their ceilings, in one run.

    python kernels/bench/linear.py [OUT.json]

Decode shapes are in decode.py; see harness.py for how times are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from harness import Report, Row, arguments, copies, random_packed, seconds
from orbit_kernels import FormatSpec, linear, oft, quantize
from orbit_kernels import dequantize as reference_dequantize
from orbit_kernels.fast import dequantize, dgrad
from orbit_kernels.fast.rotate import turn, turn_backward
from torch.nn import functional as F

TRAIN = [512, 2048, 8192]


def by_bmm(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """What `oft.rotate` does without a fast path."""
    return torch.bmm(x.unflatten(1, (-1, R.shape[1])).transpose(0, 1), R).transpose(0, 1).reshape(x.shape)


def training_rows() -> Iterator[Row]:
    for out, width in [(9728, 2560), (2560, 9728), (7168, 2048)]:
        few = [random_packed(FormatSpec("int4", 32), out, width) for _ in range(4)]
        dense = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(4)]
        for m in TRAIN:
            x, dy = (torch.randn(m, size, device="cuda").bfloat16() for size in (width, out))
            for op, ours, cublas in (
                ("forward", [partial(linear, x, p) for p in few], [partial(F.linear, x, w) for w in dense]),
                ("dX", [partial(dgrad, dy, p, None) for p in few], [partial(torch.mm, dy, w) for w in dense]),
            ):
                mine, theirs = seconds(ours), seconds(cublas)
                yield {
                    "op": op, "format": "int4-32", "out": out, "in": width, "M": m, "us": mine * 1e6,
                    "cublas_bf16_us": theirs * 1e6, "against_cublas": theirs / mine,
                    "TFLOPs": 2 * m * out * width / mine / 1e12,
                }  # fmt: skip


def dequantise_rows() -> Iterator[Row]:
    for out, width in [(9728, 2560), (7168, 2048)]:
        for spec in [FormatSpec(n, *g) for n, g in (("int4", [32]), ("int4", [128]))] + [
            FormatSpec(name) for name in ("nvfp4", "mxfp4", "fp8")
        ]:
            packed = quantize(torch.randn(out, width, device="cuda") * 0.05, spec)
            assert torch.equal(dequantize(packed), reference_dequantize(packed))
            nbytes = packed.nbytes + out * width * 2
            count = copies(nbytes)
            same = [packed.to("cpu").to("cuda") for _ in range(count)]
            outs = [torch.empty(out, width, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
            ours = seconds([partial(dequantize, p, out=o) for p, o in zip(same, outs, strict=True)])
            halves = [torch.empty(2, nbytes // 8, device="cuda").normal_() for _ in range(count)]
            copy = seconds([partial(torch.mul, h[0], 1.0, out=h[1]) for h in halves])
            yield {
                "op": "dequantise", "format": f"{spec.name}-{spec.group_size}", "out": out, "in": width,
                "us": ours * 1e6, "copy_us": copy * 1e6, "of_copy": copy / ours, "GBps": nbytes / ours / 1e9,
            }  # fmt: skip


def rotation_rows() -> Iterator[Row]:
    m = 8192
    for width in (2560, 9728):
        for b in (16, 32, 64, 128):
            R = oft.cayley_neumann(torch.randn(width // b, b * (b - 1) // 2, device="cuda") * 0.02, b).bfloat16()
            xs = [torch.randn(m, width, device="cuda").bfloat16() for _ in range(copies(m * width * 4))]
            dys = [torch.randn_like(x) for x in xs]
            y = torch.empty_like(xs[0])
            copy = seconds([partial(torch.mul, x, 1.0, out=y) for x in xs])
            forward = seconds([partial(turn, x, R) for x in xs])
            both = seconds([partial(turn_backward, x, R, [d]) for x, d in zip(xs, dys, strict=True)])
            reference = seconds([partial(by_bmm, x, R) for x in xs])
            yield {
                "op": "rotate", "b": b, "in": width, "M": m, "us": forward * 1e6, "of_copy": copy / forward,
                "backward_us": both * 1e6, "backward_of_copy": 1.5 * copy / both, "reference_us": reference * 1e6,
            }  # fmt: skip


def main() -> None:
    report = Report(arguments(__file__).parse_args())
    for rows in (training_rows, dequantise_rows, rotation_rows):
        for row in rows():
            report.add(row)


if __name__ == "__main__":
    main()
