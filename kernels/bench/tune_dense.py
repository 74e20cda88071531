"""Times every way to cut the dense packed product beside its rivals, and writes `fast/dispatch_table.py` from that.

    python kernels/bench/tune_dense.py OUT.json [--formats int4-128,mxfp4-32] [--tokens 64,128,..]
    python kernels/bench/tune_dense.py IN.json.. --table kernels/orbit_kernels/fast/dispatch_table.py

Rivals of one shape and number of tokens, in the same run: cuBLAS on a dense BF16 weight, dequantisation to a scratch
and cuBLAS, and for few tokens the decode kernel. Every candidate is checked against float64 before it is timed: its
error must not exceed that of dequantise + cuBLAS. Kernels are compiled by several processes beforehand.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import (
    Report,
    Row,
    add_choices,
    arguments,
    compile_beforehand,
    copies,
    error,
    random_packed,
    rotating,
    seconds,
    share,
)  # fmt: skip
from orbit_kernels import FormatSpec, PackedWeight, dequantize
from orbit_kernels.fast import dense
from orbit_kernels.fast.decode import MAX_TOKENS, decode
from orbit_kernels.fast.dense_packed import dense_packed
from orbit_kernels.fast.dispatch import MOST, named
from orbit_kernels.fast.packed_launch import ROUND, Cut
from orbit_kernels.fast.packed_pieces import STEP
from torch.nn import functional as F

TILES = [(128, 256, 128, 1), (128, 128, 64, 1), (128, 64, 64, 1), (128, 64, 64, 2)]  # outs, block, short, teams
TOKENS = [64, 128, 256, 512, 1024, 2048, 4096]
SLACK = 1.04  # of time, to keep the bits of fewer rows
ROOM = 1 << 26  # bytes of sums that are to be added


def candidates(made: int, length: int, tokens: int) -> list[Cut]:
    """Every sum whole or in parts; all steps, or those of the tiles that whole rounds leave over, in as many pieces as
    fill one round or in some to a tile."""
    found = []
    for outs, block, short, teams in TILES:
        tiles, bands, steps = made // outs, -(-tokens // block), length // STEP
        if block >= 2 * max(64, tokens) or (block == 64 and tokens > (256 if teams == 1 else 512)):
            continue
        for parts in (1, 2, 3, 4, 6, 8):
            if parts == 1 or (tiles * bands * parts <= ROUND and steps >= 4 * parts):
                found.append(Cut(outs, block, short, parts, teams))
        for full in range(tiles):
            uncut = full * ROUND // bands
            tail = tiles - uncut
            if tail <= 0:
                break
            for pieces in {ROUND // bands, *(parts * tail for parts in (2, 3, 4, 6) if uncut)}:
                even = pieces % tail == 0 and not uncut
                fits = tail < 2 * pieces and pieces * bands <= ROUND and tail * steps >= 4 * pieces
                if fits and tail != pieces and not even and bands * (tail + pieces) * outs * block * 4 <= ROOM:
                    found.append(Cut(outs, block, short, teams=teams, tail=tail, pieces=pieces))
    return list(dict.fromkeys(found))


def check(x: torch.Tensor, packed: PackedWeight, turned: bool, cut: Cut, exact: torch.Tensor) -> float:
    """Its error; the same result twice, everything written."""
    torch.empty(exact.shape, dtype=x.dtype, device="cuda").fill_(float("nan"))
    found = dense_packed(x, packed, turned, cut)
    again = dense_packed(x, packed, turned, cut)
    assert bool(torch.isfinite(found).all()) and torch.equal(found, again), "unwritten, or another result"
    return error(found, exact)


def exactly(x: torch.Tensor, packed: PackedWeight, turned: bool) -> tuple[torch.Tensor, float]:
    """The product in float64, and the error of dequantise + cuBLAS."""
    weight = dequantize(packed)
    exact = x.double() @ (weight.double() if turned else weight.double().T)
    return exact, error(x @ weight if turned else F.linear(x, weight), exact)


def warm(worker: str, specs: list[FormatSpec]) -> None:
    for tile, parts, turned, spec in share(list(itertools.product(TILES, (1, 2), (False, True), specs)), worker):
        packed = random_packed(spec, 512, 1024)
        x = torch.randn(tile[1] + 50, 512 if turned else 1024, device="cuda").bfloat16()
        print("begin", tile, parts, turned, spec, flush=True)
        cut = Cut(*tile[:3], parts, tile[3])
        print("done ", cut, turned, spec, check(x, packed, turned, cut, exactly(x, packed, turned)[0]), flush=True)


def rows_of(spec: FormatSpec, out: int, width: int, tokens: list[int], report: Report) -> Iterator[Row]:
    few = rotating(spec, out, width)
    wide = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(copies(out * width * 2))]
    for m, turned in itertools.product(tokens, (False, True)):
        if report.late:
            break
        made, length = (width, out) if turned else (out, width)
        x = torch.randn(m, length, device="cuda").bfloat16()
        some = few if m <= 256 else few[:12]
        row: Row = {"op": "dX" if turned else "forward", "format": named(spec), "out": out, "in": width, "M": m}
        row["cublas_us"] = seconds([partial(torch.mm, x, w if turned else w.t()) for w in wide], 11) * 1e6
        scratch = dense.dgrad if turned else partial(dense.forward, bias=None)
        row["scratch_us"] = seconds([partial(scratch, x, p, resident=None) for p in some[:8]], 9) * 1e6
        if m <= MAX_TOKENS and not turned:
            row["decode_us"] = seconds([partial(decode, x, p) for p in some], 11) * 1e6
        ways = []
        exact, theirs = exactly(x, some[0], turned) if m <= 2048 else (x, 0.0)
        for cut in candidates(made, length, m):
            try:
                mine = check(x, some[0], turned, cut, exact) if m <= 2048 else 0.0
                assert mine <= 1.02 * theirs, (mine, theirs)
                ways.append((seconds([partial(dense_packed, x, p, turned, cut) for p in some], 7) * 1e6, cut))
            except Exception as problem:
                row[f"failed {cut}"] = repr(problem)[:200]
        ways.sort(key=lambda way: way[0])
        if ways:
            row |= {"us": ways[0][0], "against_cublas": row["cublas_us"] / ways[0][0]}
            row["ways"] = [[round(us, 2), *written(cut)] for us, cut in ways]
        yield row


def written(cut: Cut) -> tuple[int, ...]:
    """As a table has it: what is after the last field that was chosen is left out."""
    fields = astuple(cut)
    return fields if cut.pieces else fields[:5] if cut.teams > 1 else fields[:4]


def entries(rows: list[Row]) -> list[tuple[int, str | tuple[int, ...]]]:
    """One shape's table: the fastest way for each number of rows, but what leaves the bits of the rows before alone
    where that costs at most SLACK. The last entry, of all larger numbers, adds nothing up: counters are limited."""
    found: list[tuple[int, str | tuple[int, ...]]] = []
    before: object = None
    ways: list[tuple[float, str | tuple[int, ...]]] = []
    for row in sorted(rows, key=lambda row: int(row["M"])):
        ways = [(row["scratch_us"], "scratch")]
        if "decode_us" in row:
            ways.append((row["decode_us"], "decode"))
        ways += [(us, tuple(way)) for us, *way in row.get("ways", [])]
        ways.sort(key=lambda way: way[0])
        alike = [way for way in ways if bits(way[1]) == before and way[0] <= SLACK * ways[0][0]]
        way = (alike or ways)[0][1]
        before = bits(way)
        if row["op"] == "forward" and not found and way != "decode":
            found.append((row["M"] // 2, "decode"))  # what fewer rows take
        if found and found[-1][1] == way:
            found.pop()
        found.append((row["M"], way))
    if not whole(found[-1][1]):
        found.append((0, next(way for _, way in ways if whole(way))))
    return [*found[:-1], (1 << 30, found[-1][1])]


def whole(way: str | tuple[int, ...]) -> bool:
    """Whether it cuts no sum."""
    return isinstance(way, str) or (way[3] == 1 and len(way) < 6)


def bits(way: str | tuple[int, ...]) -> str | tuple[int, ...]:
    """What decides them."""
    return way if isinstance(way, str) else (way[0] if len(way) > 5 else 0, *way[3:])


def write_table(measured: list[dict[str, Any]], path: str) -> None:
    """What was measured twice counts as it was first; a weight that was not measured as far as the rule goes is left to
    the rule."""
    lines = []
    keys = ("op", "format", "out", "in")
    for weight in sorted({tuple(row[key] for key in keys) for row in measured}):
        mine = {row["M"]: row for row in reversed(measured) if tuple(row[key] for key in keys) == weight}
        if max(mine) < MOST:
            continue
        found = entries(list(mine.values()))
        inner = filled(f"({most}, {json.dumps(way) if isinstance(way, str) else way})," for most, way in found)
        lines.append(f"    {json.dumps(weight).replace('[', '(').replace(']', ')')}: (\n{inner}    ),\n")
    text = Path(path).read_text()
    Path(path).write_text(text[: text.index("] = {") + len("] = {")] + "\n" + "".join(lines) + "}  # fmt: skip\n")


def filled(words: Iterable[str], width: int = 120, indent: str = " " * 8) -> str:
    """As many words a line as fit."""
    lines = [indent]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append(indent)
        lines[-1] += word + " "
    return "".join(line.rstrip() + "\n" for line in lines)


def main() -> None:
    parser = arguments(__file__)
    parser.add_argument("more", nargs="*", type=Path, help="files that --table reads besides")
    add_choices(parser, "int4-128,int4-32,mxfp4-32,nvfp4-16,fp8-128", TOKENS)
    parser.add_argument("--table", default="", help="no measuring: write this table from the files")
    options = parser.parse_args()
    if options.table:
        rows = [row for path in [options.path, *options.more] for row in json.loads(path.read_text())["rows"]]
        return write_table(rows, options.table)
    if options.worker:
        return warm(options.worker, options.formats)
    compile_beforehand()
    report = Report(options)
    for spec, (out, width) in itertools.product(options.formats, options.shapes):
        for row in rows_of(spec, out, width, options.tokens, report):
            report.add(row)


if __name__ == "__main__":
    main()
