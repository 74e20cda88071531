"""The tables of MEASURED.md that stand between marks, from the JSON of the runs.

    python kernels/bench/write_tables.py          prints what differs, exit code 1 if something does
    python kernels/bench/write_tables.py --write  writes it

A mark is a line `<!-- NAME -->`; its table is all up to the next line `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from orbit_kernels.fast.dispatch_table import TABLE

HERE = Path(__file__).resolve().parent
MEASURED = HERE.parent / "MEASURED.md"
NAMES = {
    "int4-128": "INT4, group 128", "int4-32": "INT4, group 32", "mxfp4-32": "MXFP4", "nvfp4-16": "NVFP4",
    "fp8-128": "FP8",
}  # fmt: skip
ENTRANTS = {
    "int4": "INT4, `linear`", "int4_fast": "INT4, fast", "tinygemm": "torch's tinygemm", "marlin": "Marlin",
    "int4_scratch": "dequantise + cuBLAS", "mxfp4": "MXFP4, `linear`", "mxfp4_fast": "MXFP4, fast",
}  # fmt: skip
PEERS = ("tinygemm", "marlin", "int4_scratch")
OPERATIONS = {"forward": "forward", "dX": "dX"}
Rows = list[dict[str, Any]]


def rows_of(*files: str) -> Rows:
    """Of one weight, operation and number of tokens that which was measured first."""
    found: dict[object, dict[str, Any]] = {}
    for file in files:
        for row in json.loads((HERE / "results" / file).read_text())["rows"]:
            key = tuple(row.get(name) for name in ("contest", "op", "mode", "format", "out", "in", "M", "tokens"))
            found.setdefault(key, row)
    return list(found.values())


def chosen(rows: Rows, **wanted: object) -> Rows:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def under(titles: dict[str, str], rows: Rows, key: str, by: str) -> Iterator[tuple[list[object], Rows]]:
    """Of each title and each number under `by`: how its line begins, and the rows with both."""
    for name, title in titles.items():
        for i, number in enumerate(sorted({row[by] for row in rows})):
            yield ["" if i else title, number], chosen(rows, **{key: name, by: number})


def span(values: Iterable[float], places: int = 2) -> str:
    """The least and the largest; nothing of nothing."""
    ends = [f"{value:.{places}f}" for value in sorted(values)]
    return " to ".join(dict.fromkeys([ends[0], ends[-1]])) if ends else ""


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    written = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in written)


def decode() -> str:
    rows, lines = rows_of("decode.json"), []
    for begin, mine in under(NAMES, rows, "format", "M"):
        kept, fast = (chosen(mine, mode=mode) for mode in ("invariant", "fast"))
        some = f" ({len(fast)} shapes)" if 0 < len(fast) < len(kept) else ""
        lines.append([
            *begin, *(span(row[key] for row in kept) for key in ("over_read", "against_cublas", "against_dequantise")),
            span(row["over_read"] for row in fast) + some, span(row["against_cublas"] for row in fast),
        ])  # fmt: skip
    head = ["decode", "M", "time / read", "speed / cuBLAS BF16", "speed / (dequantise + cuBLAS)"]
    return table([*head, "fast: time / read", "fast: / cuBLAS BF16"], lines)


def decode_by_shape() -> str:
    rows, names = chosen(rows_of("decode.json"), mode="fast"), [name for name in NAMES if name != "int4-32"]
    few = sorted({row["M"] for row in rows})
    head = [f"{NAMES[name]}: M = {m}" if m == few[0] else str(m) for name in names for m in few]
    lines = []
    for out, width in dict.fromkeys((row["out"], row["in"]) for row in rows):
        mine = chosen(rows, **{"out": out, "in": width})
        cells = [span(row["over_read"] for row in chosen(mine, format=name, M=m)) for name in names for m in few]
        lines.append([f"{out}x{width}", *cells])
    return table(["out x in", *head], lines)


def taken(row: dict[str, Any]) -> float:
    """Microseconds of the way that the table names."""
    entries = TABLE[row["op"], row["format"], row["out"], row["in"]]
    way = next(way for most, way in entries if row["M"] <= most)
    if isinstance(way, str):
        return float(row[f"{way}_us"])
    return float(next(us for us, *cut in row["ways"] if tuple(cut) == way))


def fused(row: dict[str, Any]) -> float:
    return min(float(us) for us, *_ in row["ways"])


def scratch(row: dict[str, Any]) -> float:
    return float(row["scratch_us"])


def against_cublas(mine: Rows) -> list[str]:
    return [span(row["cublas_us"] / way(row) for row in mine) for way in (taken, fused, scratch)]


def dense_int4() -> str:
    rows = rows_of("dense_int4.json", "dense_int4_32.json")
    lines = [
        [*begin, *against_cublas(mine), span(scratch(row) / taken(row) for row in mine)]
        for begin, mine in under(OPERATIONS, rows, "op", "M")
    ]
    beside = " / cuBLAS BF16"
    head = ["dense INT4", "M", *(way + beside for way in ("taken", "fused", "scratch")), "taken / scratch"]
    return table(head, lines)


def dense_formats() -> str:
    names = ("mxfp4-32", "fp8-128", "nvfp4-16")
    rows = [
        row
        for row in rows_of("dense_fp8.json", "dense_formats.json")
        if (row["op"], row["format"], row["out"], row["in"]) in TABLE  # else it has hardly been measured
    ]
    lines = [
        [*begin, *("; ".join(against_cublas(chosen(mine, format=name))) for name in names)]
        for begin, mine in under(OPERATIONS, rows, "op", "M")
    ]
    return table(["dense", "M", "MXFP4", "FP8 (weight only)", "NVFP4"], lines)


def peers() -> str:
    """Speed over cuBLAS BF16 and, for few tokens, time over a read of the packed bytes; ours beside the best other."""
    rows = chosen(rows_of("peers_w4a16.json"), contest="w4a16")
    entered = {who: title for who, title in ENTRANTS.items() if any(f"{who}_us" in row for row in rows)}
    lines = []
    for m in sorted({row["M"] for row in rows}):
        cells = []
        for who in entered:
            mine = [row for row in chosen(rows, M=m) if f"{who}_us" in row]
            bytes_of = "mxfp4" if who.startswith("mxfp4") else "int4"
            read = span((row[f"{who}_us"] / row[f"read_{bytes_of}_us"] for row in mine), 1)
            speed = span(row["cublas_us"] / row[f"{who}_us"] for row in mine)
            cells.append(f"{speed} ({read})" if mine and m <= 256 else speed)
        best = span(
            min(row[f"{who}_us"] for who in PEERS if f"{who}_us" in row) / row.get("int4_fast_us", row["int4_us"])
            for row in chosen(rows, M=m)
        )
        lines.append([m, *cells, best])
    return table(["W4A16 forward, M", *entered.values(), "INT4 here / the best other"], lines)


def grouped() -> str:
    names, lines = ("int4-32", "mxfp4-32", "fp8-128", "nvfp4-16"), []
    for begin, mine in under(OPERATIONS, rows_of("grouped.json"), "op", "tokens"):
        cells = []
        for name in names:
            some = chosen(mine, format=name)
            beside = (span((row[f"{who}_ms"] / row["default_ms"] for row in some), 1) for who in ("loop", "general"))
            cells.append("; ".join([span((row["TFLOPs"] for row in some), 0), *beside]))
        against = span(row["bf16_ms"] / row["default_ms"] for row in chosen(mine, format=names[0]))
        lines.append([*begin, *cells, against])
    head = ["grouped: TFLOP/s; speed / loop; speed / general", "tokens", "INT4 group 32", "MXFP4", "FP8", "NVFP4"]
    return table([*head, "INT4: speed / BF16"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "decode": decode, "decode by shape": decode_by_shape, "dense INT4": dense_int4, "dense formats": dense_formats,
    "peers": peers, "grouped": grouped,
}  # fmt: skip


def made_anew(text: str) -> str:
    """The text with all tables between marks as they are now. Raises ValueError where a mark or its end is missing."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        if begin not in text or end not in text[text.index(begin) :]:
            raise ValueError(f"{MEASURED.name}: expected the lines {begin.strip()} and {end.strip()}; found none")
        at = text.index(begin) + len(begin)
        text = text[:at] + make() + text[text.index(end, at) :]
    return text


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    write, text = parser.parse_args().write, MEASURED.read_text()
    anew = made_anew(text)
    if write:
        MEASURED.write_text(anew)
        return 0
    old, new = text.splitlines(), anew.splitlines()
    print("\n".join(line for line in new if line not in old))
    return int(old != new)


if __name__ == "__main__":
    sys.exit(main())
