"""FP8 with FP8 beside cuBLAS BF16 and torch's row-wise FP8 product, in one run; checked against float64 first.

    PYTHONPATH=kernels python kernels/bench/w8a8.py [OUT.json]

"product" is timed with activations quantised beforehand, "whole" with their quantisation. `torch._scaled_mm` has one
scale a row and a column, so it adds nothing up between steps: a ceiling, and other numbers. See harness.py for how
times are taken.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import SHAPES, card, ceilings, compact, copies, error, random_packed, seconds
from orbit_kernels import FORMATS, PackedWeight, linear_w8a8, quantize_activations
from orbit_kernels.fast.w8a8 import product_w8a8
from orbit_kernels.w8a8 import GROUP

ROWS = [1024, 2048, 4096, 8192, 16384]
SAID = ("product_us", "against_bf16", "whole_against_bf16", "against_rowwise", "TFLOPs", "us_128", "us_256")


def require_right(x: Tensor, packed: PackedWeight) -> float:
    """The error of some rows against float64 over the same codes, the same bits for both tiles and for fewer rows."""
    codes, scales = quantize_activations(x)
    narrow, wide = (product_w8a8(codes, scales, packed, outs=outs) for outs in (128, 256))
    few = slice(3, 260)
    fewer = product_w8a8(codes[few].contiguous(), scales[few], packed)
    if not (torch.equal(narrow, wide) and torch.equal(fewer, narrow[few])):
        raise AssertionError(f"rows of {packed.shape} depend on the tile or on the number of rows")
    block_scales = packed.tensors["weight_scale_inv"].double()
    weight = packed.tensors["weight"].double() * block_scales.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    exact = (codes[few].double() * scales[few].double().repeat_interleave(GROUP, 1)) @ weight.t()
    found = error(narrow[few], exact)
    if found > 4e-3:  # rounding y to bfloat16 alone is 1.7e-3
        raise AssertionError(f"{packed.shape}: error {found:.2e} against float64")
    return found


def rows_of(out: int, width: int) -> list[dict[str, Any]]:
    found = []
    packs = [random_packed(FORMATS["fp8"], out, width) for _ in range(min(4, copies(out * width)))]
    dense = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(4)]
    codes_t = [packed.tensors["weight"].t() for packed in packs]
    by_column = torch.rand(1, out, device="cuda")
    for rows in ROWS:
        x = torch.randn(rows, width, device="cuda").bfloat16()
        wrong = require_right(x, packs[0])
        codes, scales = quantize_activations(x)
        by_row = torch.rand(rows, 1, device="cuda")
        cut = {o: seconds([partial(product_w8a8, codes, scales, p, None, o) for p in packs]) for o in (128, 256)}
        product = seconds([partial(product_w8a8, codes, scales, p) for p in packs])
        whole = seconds([partial(linear_w8a8, x, p) for p in packs])
        bf16 = seconds([partial(F.linear, x, w) for w in dense])
        quantising = seconds([partial(quantize_activations, each) for each in [x, *(x.clone() for _ in range(3))]])
        rowwise = partial(torch._scaled_mm, scale_a=by_row, scale_b=by_column, out_dtype=torch.bfloat16)
        by_rows = seconds([partial(rowwise, codes, w) for w in codes_t])
        found.append({
            "out": out, "in": width, "M": rows, "product_us": product * 1e6, "whole_us": whole * 1e6,
            "quantise_us": quantising * 1e6, "quantise_GBps": x.numel() * (3 + 4 / GROUP) / quantising / 1e9,
            "bf16_us": bf16 * 1e6, "rowwise_us": by_rows * 1e6, "us_128": cut[128] * 1e6, "us_256": cut[256] * 1e6,
            "against_bf16": bf16 / product, "whole_against_bf16": bf16 / whole, "against_rowwise": by_rows / product,
            "TFLOPs": 2 * rows * out * width / product / 1e12, "error": wrong,
        })  # fmt: skip
        print(f"{out}x{width} {rows}".ljust(18), "  ".join(f"{k} {found[-1][k]:.2f}" for k in SAID), flush=True)
    return found


def main(path: str) -> None:
    result: dict[str, Any] = {**card(), "command": "python kernels/bench/w8a8.py", "ceilings": ceilings()}
    print(result)
    result["rows"] = [row for shape in SHAPES for row in rows_of(*shape)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(compact(result))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "results" / "w8a8.json"))
