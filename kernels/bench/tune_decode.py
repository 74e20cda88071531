"""Times every way to cut the decode product and prints the best: the data behind `fast.decode.plan`.

    PYTHONPATH=kernels python kernels/bench/tune_decode.py OUT.json [--format int4] [--group 128] [--tokens 16,64]

Every candidate is checked against float64 before it is timed. Kernels are compiled by several processes beforehand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import SHAPES, card, compact, copies, error, random_packed, reader, seconds, stored
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
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--tokens", default="16,64")
    parser.add_argument("--worker", default="")
    options = parser.parse_args()
    spec = FormatSpec(options.format, options.group)
    work = [
        (out, width, tokens, plan)
        for out, width in SHAPES
        for tokens in map(int, options.tokens.split(","))
        for plan in candidates(out, width, tokens)
    ]
    if options.worker:
        index, of = map(int, options.worker.split("/"))
        for out, width, tokens, plan in work[index::of]:
            x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
            decode(x, random_packed(spec, out, width), chosen=plan)
        torch.cuda.synchronize()
        return
    count = 14
    given = ["--format", spec.name, "--group", str(spec.group_size), "--tokens", options.tokens]
    argv = [sys.executable, __file__, options.path, *given]
    workers = [subprocess.Popen([*argv, "--worker", f"{i}/{count}"]) for i in range(count)]
    print(len(work), "candidates; workers returned", {worker.wait() for worker in workers}, flush=True)
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
    kept = [
        row
        for key in sorted({(row["out"], row["in"], row["tokens"]) for row in rows})
        for row in sorted(
            (r for r in rows if (r["out"], r["in"], r["tokens"]) == key), key=lambda r: r[f"us_{key[2]}"]
        )[:12]
    ]
    command = " ".join(["python kernels/bench/tune_decode.py OUT.json", *given])
    result = {**card(), "command": command, "kept": "the twelve fastest of each shape", "group": options.group}
    Path(options.path).write_text(compact(result | {"rows": kept}))


if __name__ == "__main__":
    main()
