"""Times every way to cut the decode product and prints the best: the data behind `fast.decode.plan`.

    python kernels/bench/tune_decode.py OUT.json [--format int4] [--group 128] [--tokens 16,64]

Every candidate is checked against float64 before it is timed. Kernels are compiled by several processes beforehand.
"""

from __future__ import annotations

import sys

import torch
from harness import (
    SHAPES,
    Report,
    arguments,
    compile_beforehand,
    copies,
    error,
    random_packed,
    reader,
    seconds,
    share,
    stored,
)
from orbit_kernels import FormatSpec, dequantize
from orbit_kernels.fast.decode import STEP, Plan, decode


def candidates(out: int, width: int, tokens: int) -> list[Plan]:
    found = []
    for rows, warps, depths, arranged in ((64, 4, (2, 3, 4), False), (64, 4, (3, 4), True), (128, 8, (3,), True)):
        steps = width // STEP
        for parts, fold in ((p, fold) for p in (1, 2, 3, 4, 5, 7, 10) for fold in (False, True)):
            per_part = -(-steps // parts)
            programs = out // rows * (1 if fold else parts) * warps // 4
            if (fold and (parts == 1 or per_part == 1)) or (parts - 1) * per_part >= steps or not 90 <= programs <= 680:
                continue
            for stages in depths:
                tile = rows * STEP // 2 + tokens * STEP * 2 + rows * 16
                if tile * (stages - 1) + tokens * STEP * 2 < 225_000 and stages - 2 <= per_part:
                    found.append(Plan(parts, fold, stages, arranged, rows, warps))
    return found


def main() -> None:
    parser = arguments(__file__)
    parser.add_argument("--format", default="int4")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--tokens", default="16,64")
    options = parser.parse_args()
    spec = FormatSpec(options.format, options.group)
    work = [
        (out, width, tokens, plan)
        for out, width in SHAPES
        for tokens in map(int, options.tokens.split(","))
        for plan in candidates(out, width, tokens)
    ]
    if options.worker:
        for out, width, tokens, plan in share(work, options.worker):
            x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
            decode(x, random_packed(spec, out, width), chosen=plan)
        torch.cuda.synchronize()
        return
    print(len(work), "candidates", flush=True)
    compile_beforehand()
    report = Report(options, kept="the twelve fastest of each shape", group=options.group)
    rows = []
    for out, width in SHAPES:
        packed = random_packed(spec, out, width)
        dense = dequantize(packed).double()
        sets = [random_packed(spec, out, width) for _ in range(copies(packed.nbytes))]
        floor = seconds([reader(words) for words in [stored(each) for each in sets]])
        for tokens in map(int, options.tokens.split(",")):
            x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
            exact = x.double() @ dense.T
            cublas = torch.nn.functional.linear(x, dense.bfloat16())
            allowed = float((cublas - exact).norm() / exact.norm()) * 1.001
            for plan in candidates(out, width, tokens):
                row = {"out": out, "in": width, "tokens": tokens, **plan.__dict__, "read_us": floor * 1e6}
                same = decode(x, packed, chosen=plan)
                bits = torch.equal(same, decode(x, packed, chosen=Plan(plan.parts, False, 3)))
                off = error(decode(x, packed, chosen=plan), exact)
                row |= {"error": off, "error_cublas": allowed / 1.001, "right": off <= allowed, "bits": bits}
                for m in (1, 16) if tokens == 16 else (tokens,):
                    part = x[:m].contiguous()
                    calls = [lambda s=s, p=plan, part=part: decode(part, s, chosen=p) for s in sets]
                    row[f"us_{m}"] = seconds(calls, 9) * 1e6
                rows.append(row)
            mine = [row for row in rows if (row["out"], row["in"], row["tokens"]) == (out, width, tokens)]
            print(
                f"{out}x{width} tokens {tokens} read {floor * 1e6:.2f} us; wrong: {sum(not r['right'] for r in mine)}"
            )
            for row in sorted(mine, key=lambda row: row[f"us_{tokens}"])[:4]:
                times = {key: round(value, 2) for key, value in row.items() if key.startswith("us_")}
                print("   ", {k: row[k] for k in (*plan.__dict__, "bits")}, times, f"{row['error']:.2e}")
            sys.stdout.flush()
        del sets
    for key in sorted({(row["out"], row["in"], row["tokens"]) for row in rows}):
        mine = [row for row in rows if (row["out"], row["in"], row["tokens"]) == key]
        for row in sorted(mine, key=lambda row: row[f"us_{key[2]}"])[:12]:
            report.add(row)


if __name__ == "__main__":
    main()
