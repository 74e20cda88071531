"""Products with 384 packed experts, forward and gradient, beside what they replace, in one run.

    python kernels/bench/grouped.py [OUT.json] [--tune] [--seconds 200]

    loop      for each expert that got rows: dequantise to a scratch, cuBLAS; captured in a graph with its counts known,
              which no training step can do (eager it also waits for the counts): the best that the loop can be
    BF16      experts of dense weights, four times the bytes: torch's grouped product, no unpacking at all
    peak      cuBLAS BF16 on 8192^3 in this run

Rows are drawn from a router with some experts more popular than others. Four experts of each shape are checked against
float64 before anything is timed: their error must not exceed that of dequantise + cuBLAS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial

import torch
from harness import Report, Row, arguments, compile_beforehand, random_packed, seconds, share
from orbit_kernels import FORMATS, FormatSpec, PackedStack
from orbit_kernels import dequantize as reference_dequantize
from orbit_kernels.fast import dequantize, grouped_product
from orbit_kernels.fast.grouped_int4 import grouped_int4
from orbit_kernels.fast.int4_product import Cut

EXPERTS, ACTIVE = 384, 8
SHAPES = [(2048, 7168), (7168, 2048)]
TOKENS = [4096, 8192, 16384, 32768]
SPECS = [FORMATS["bf16"], FormatSpec("int4", 32), FormatSpec("int4", 128)]
Choice = Callable[..., torch.Tensor]
CHOICES: dict[str, Choice] = {
    "default": grouped_product,
    "general": partial(grouped_product, block=128),
    "256x128-64": partial(grouped_int4, cut=Cut(256, 128, 64)),
    "256x128-128": partial(grouped_int4, cut=Cut(256, 128, 128)),
    "128x128-64": partial(grouped_int4, cut=Cut(128, 128, 64)),
    "128x256-128": partial(grouped_int4, cut=Cut(128, 256, 128)),
}


def stack_of(spec: FormatSpec, out: int, width: int, experts: int) -> PackedStack:
    one = random_packed(spec, out, width)
    tall = random_packed(spec, experts * out, width).tensors
    tensors = {key: tall[key].view(experts, *each.shape) for key, each in one.tensors.items() if key != "weight_shape"}
    if spec.name == "int4":
        tensors["weight_shape"] = torch.tensor([out, width]).repeat(experts, 1)
    return PackedStack(spec, (out, width), tensors, one.block, experts)


def routed(tokens: int) -> torch.Tensor:
    """Rows per expert when each token chooses 8 of 384 experts, some liked better than others."""
    liking = torch.randn(EXPERTS, device="cuda") * 0.3
    noise = -torch.log(-torch.log(torch.rand(tokens, EXPERTS, device="cuda").clamp(1e-6, 1 - 1e-6)))
    return torch.bincount((liking + noise).topk(ACTIVE, dim=1).indices.flatten(), minlength=EXPERTS)


def loop(x: torch.Tensor, counts: list[int], stack: PackedStack, turned: bool) -> torch.Tensor:
    out, width = stack.shape
    y = torch.empty(len(x), width if turned else out, dtype=x.dtype, device=x.device)
    scratch = torch.empty(out, width, dtype=x.dtype, device=x.device)
    first = 0
    for e, count in enumerate(counts):
        if count:
            rows = slice(first, first + count)
            weight = stack[e].tensors["weight"] if stack.spec.name == "bf16" else dequantize(stack[e], out=scratch)
            torch.mm(x[rows], weight if turned else weight.t(), out=y[rows])
            first += count
    return y


def check(x: torch.Tensor, counts: list[int], stack: PackedStack, turned: bool, choice: Choice) -> tuple[float, float]:
    """Relative errors of four experts' rows, ours and dequantise + cuBLAS; an unwritten row would be NaN."""
    torch.empty(len(x), max(stack.shape), dtype=x.dtype, device=x.device).fill_(float("nan"))
    found = choice(x, torch.tensor(counts, device="cuda"), stack, turned)
    ours, theirs, norm, first = 0.0, 0.0, 0.0, 0
    for e, count in enumerate(counts):
        if e in (0, 1, EXPERTS // 2, EXPERTS - 1):
            dense, part = reference_dequantize(stack[e]), x[first : first + count]
            weight = dense if turned else dense.t()
            exact = part.double() @ weight.double()
            ours += float((found[first : first + count].double() - exact).square().sum())
            theirs += float(((part @ weight).double() - exact).square().sum())
            norm += float(exact.square().sum())
        first += count
    assert bool(torch.isfinite(found).all())
    return (ours / norm) ** 0.5, (theirs / norm) ** 0.5


def warm(worker: str) -> None:
    work = list(itertools.product(SHAPES, (32, 128), (False, True), CHOICES.values()))
    for (out, width), group, turned, choice in share(work, worker):
        x = torch.randn(16, out if turned else width, device="cuda").bfloat16()
        choice(x, torch.tensor([16], device="cuda"), stack_of(FormatSpec("int4", group), out, width, 1), turned)
    torch.cuda.synchronize()


def measured(stack: PackedStack, tokens: int, turned: bool, choices: Mapping[str, Choice], peak: float) -> Row:
    out, width = stack.shape
    counts = routed(tokens)
    host = counts.tolist()
    x = torch.randn(tokens * ACTIVE, out if turned else width, device="cuda").bfloat16()
    row: Row = {
        "op": "dX" if turned else "forward", "format": f"{stack.spec.name}-{stack.spec.group_size}",
        "out": out, "in": width, "tokens": tokens, "rows": len(x), "largest": max(host), "smallest": min(host),
    }  # fmt: skip
    for name, choice in choices.items():
        try:
            errors = check(x, host, stack, turned, choice)
            assert errors[0] <= 1.02 * errors[1], errors
            row[f"{name}_ms"] = seconds([partial(choice, x, counts, stack, turned)] * 2, 7) * 1e3
            row |= {"error": errors[0], "error_cublas": errors[1]} if name == "default" else {}
        except Exception as problem:
            row[f"{name}_failed"] = repr(problem)[:300]
    row["loop_ms"] = seconds([partial(loop, x, host, stack, turned)], 3) * 1e3
    if "default_ms" in row:  # what a caller gets; the other ways to cut are there to judge the choice
        row["TFLOPs"] = 2 * len(x) * out * width / row["default_ms"] / 1e9
        row["of_peak"] = row["TFLOPs"] / peak
        row["over_loop"] = row["loop_ms"] / row["default_ms"]
    return row


def measure(report: Report, tune: bool) -> None:
    peak = report.result["ceilings"]["bf16_TFLOPs"]
    for shape, spec in itertools.product(SHAPES, SPECS):
        stack = stack_of(spec, *shape, EXPERTS)
        choices = CHOICES if tune and spec.name == "int4" else {"default": grouped_product}
        for tokens, turned in itertools.product(TOKENS, (False, True)):
            if not report.late:
                report.add(measured(stack, tokens, turned, choices, peak))


def main() -> None:
    parser = arguments(__file__)
    parser.add_argument("--tune", action="store_true", help="every way to cut, not only the one that is chosen")
    options = parser.parse_args()
    if options.worker:
        return warm(options.worker)
    if options.tune:
        compile_beforehand()
    measure(Report(options, experts=EXPERTS, active=ACTIVE), options.tune)


if __name__ == "__main__":
    main()
