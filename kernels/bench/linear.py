"""The table of kernels/README.md: packed linears, dequantisation and OFT rotation beside their ceilings, in one run.

    PYTHONPATH=kernels python kernels/bench/linear.py [OUT.json]

Every product is checked against float64 before it is timed: its error must not exceed that of dequantise + cuBLAS.
"read" is a kernel that only reads the packed bytes (codes and scales); see harness.py for how times are taken.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import card, ceilings, compact, copies, random_int4, reader, seconds
from orbit_kernels import FormatSpec, PackedWeight, linear, oft, quantize
from orbit_kernels import dequantize as reference_dequantize
from orbit_kernels.fast import dequantize, dgrad
from orbit_kernels.fast.rotate import turn, turn_backward

SHAPES = [(9728, 2560), (2560, 9728), (4096, 2560), (7168, 2048), (2048, 7168)]
DECODE = [1, 4, 16, 32, 64]
TRAIN = [512, 2048, 8192]


def int4(out: int, width: int, group: int) -> PackedWeight:
    words, scales = random_int4(out, width, group)
    shape = torch.tensor([out, width], device="cuda")
    tensors = {"weight_packed": words, "weight_scale": scales, "weight_shape": shape}
    return PackedWeight(FormatSpec("int4", group), (out, width), tensors)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def through_scratch(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    return F.linear(x, dequantize(packed))


def by_bmm(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """What `oft.rotate` does without a fast path."""
    return torch.bmm(x.unflatten(1, (-1, R.shape[1])).transpose(0, 1), R).transpose(0, 1).reshape(x.shape)


def decode_rows(group: int) -> list[dict[str, Any]]:
    rows = []
    for out, width in SHAPES:
        few = [int4(out, width, group) for _ in range(copies(out * width * (0.5 + 2 / group)))]
        dense = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(copies(out * width * 2))]
        words = [torch.cat([t.flatten().view(torch.int32) for t in list(p.tensors.values())[:2]]) for p in few]
        read = seconds([reader(w) for w in words])
        reference = reference_dequantize(few[0])
        for m in DECODE:
            x = torch.randn(m, width, device="cuda").bfloat16()
            exact = x.double() @ reference.double().T
            errors = error(linear(x, few[0]), exact), error(F.linear(x, reference), exact)
            assert errors[0] <= 1.02 * errors[1], (out, width, m, errors)
            ours = seconds([partial(linear, x, p) for p in few])
            cublas = seconds([partial(F.linear, x, w) for w in dense])
            scratch = [partial(through_scratch, x, p) for p in few[:8]]
            rows.append({
                "op": "decode", "format": f"int4-{group}", "out": out, "in": width, "M": m, "us": ours * 1e6,
                "read_us": read * 1e6, "cublas_bf16_us": cublas * 1e6, "dequantise_cublas_us": seconds(scratch) * 1e6,
                "over_read": ours / read, "against_cublas": cublas / ours,
                "error": errors[0], "error_cublas": errors[1],
            })  # fmt: skip
            show(rows[-1], "us", "over_read", "against_cublas")
    return rows


def training_rows() -> list[dict[str, Any]]:
    rows = []
    for out, width in [(9728, 2560), (2560, 9728), (7168, 2048)]:
        few = [int4(out, width, 32) for _ in range(4)]
        dense = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(4)]
        for m in TRAIN:
            x, dy = (torch.randn(m, size, device="cuda").bfloat16() for size in (width, out))
            for op, ours, cublas in (
                ("forward", [partial(linear, x, p) for p in few], [partial(F.linear, x, w) for w in dense]),
                ("dX", [partial(dgrad, dy, p, None) for p in few], [partial(torch.mm, dy, w) for w in dense]),
            ):
                mine, theirs = seconds(ours), seconds(cublas)
                rows.append({
                    "op": op, "format": "int4-32", "out": out, "in": width, "M": m, "us": mine * 1e6,
                    "cublas_bf16_us": theirs * 1e6, "against_cublas": theirs / mine,
                    "TFLOPs": 2 * m * out * width / mine / 1e12,
                })  # fmt: skip
                show(rows[-1], "us", "against_cublas", "TFLOPs")
    return rows


def dequantise_rows() -> list[dict[str, Any]]:
    rows = []
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
            rows.append({
                "op": "dequantise", "format": f"{spec.name}-{spec.group_size}", "out": out, "in": width,
                "us": ours * 1e6, "copy_us": copy * 1e6, "of_copy": copy / ours, "GBps": nbytes / ours / 1e9,
            })  # fmt: skip
            show(rows[-1], "us", "of_copy", "GBps")
    return rows


def rotation_rows() -> list[dict[str, Any]]:
    rows, m = [], 8192
    for width in (2560, 9728):
        for b in (16, 32, 64, 128):
            R = oft.cayley_neumann(torch.randn(width // b, b * (b - 1) // 2, device="cuda") * 0.02, b).bfloat16()
            xs = [torch.randn(m, width, device="cuda").bfloat16() for _ in range(copies(m * width * 4))]
            dys = [torch.randn_like(x) for x in xs]
            y = torch.empty_like(xs[0])
            copy = seconds([partial(torch.mul, x, 1.0, out=y) for x in xs])
            forward = seconds([partial(turn, x, R) for x in xs])
            both = seconds([partial(turn_backward, x, R, d) for x, d in zip(xs, dys, strict=True)])
            reference = seconds([partial(by_bmm, x, R) for x in xs])
            rows.append({
                "op": "rotate", "b": b, "in": width, "M": m, "us": forward * 1e6, "of_copy": copy / forward,
                "backward_us": both * 1e6, "backward_of_copy": 1.5 * copy / both, "reference_us": reference * 1e6,
            })  # fmt: skip
            show(rows[-1], "us", "of_copy", "backward_us", "backward_of_copy", "reference_us")
    return rows


def show(row: dict[str, Any], *measures: str) -> None:
    what = " ".join(str(row[key]) for key in ("op", "format", "b", "out", "in", "M") if key in row)
    print(what.ljust(40), "  ".join(f"{key} {row[key]:.2f}" for key in measures), flush=True)


def main(path: str) -> None:
    result: dict[str, Any] = {**card(), "command": "python kernels/bench/linear.py", "ceilings": ceilings()}
    print(result)
    result["rows"] = [*decode_rows(128), *decode_rows(32), *training_rows(), *dequantise_rows(), *rotation_rows()]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(compact(result))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "results" / "linear.json"))
