"""A contest: one product by several entrants, on the shapes of the harness and the same numbers of tokens.

An entrant makes products for the weights of a shape, and a product makes, for an input x, the call that is timed: what
can be done to x or to the weight beforehand is done there. Those that multiply what `packs` holds are compared with
float64 first. One that cannot be imported, that errs or that fails is named with its reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from harness import SHAPES, Report, Row, Thunk, copies, error, random_packed, reader, seconds, share, stored
from orbit_kernels import FormatSpec, PackedWeight
from torch import Tensor
from torch.nn import functional as F

Product = Callable[[Tensor], Thunk]
CHECKED = 64  # rows that are compared
ALLOWED = 4e-3  # error; rounding y to bfloat16 alone is 1.7e-3


@dataclass(frozen=True)
class Entrant:
    products: Callable[[int, int, int], list[Product]]  # out, in, how many weights
    of: FormatSpec | None = None  # it multiplies `packs` of this format
    most: int = 1 << 30  # tokens beyond which it is not asked


@dataclass(frozen=True)
class Contest:
    name: str
    entrants: dict[str, Entrant]
    tokens: Sequence[int]
    weight_bytes: float  # of an element, about, as the entrants read it
    exact: Callable[[Tensor, PackedWeight], Tensor]  # in float64
    reads: Sequence[FormatSpec] = ()  # whose bytes are read beside


@cache
def packs(spec: FormatSpec, out: int, width: int, count: int) -> list[PackedWeight]:
    """The same weights for all entrants; emptied after each shape."""
    return [random_packed(spec, out, width) for _ in range(count)]


def cublas(out: int, width: int, count: int) -> list[Product]:
    """The measure: dense BF16 weights."""
    weights = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(copies(out * width * 2))]
    return [partial(partial, F.linear, weight=weight) for weight in weights]


def race(contest: Contest, report: Report, failed: dict[str, str]) -> None:
    for out, width in SHAPES:
        if report.late:
            failed[f"{contest.name} {out}x{width}"] = "no time left"
            continue
        rows: dict[int, Row] = {m: {"contest": contest.name, "out": out, "in": width, "M": m} for m in contest.tokens}
        count = copies(out * width * contest.weight_bytes)
        for spec in contest.reads:
            read = seconds([reader(words) for words in map(stored, packs(spec, out, width, count))])
            for row in rows.values():
                row[f"read_{spec.name}_us"] = read * 1e6
        for name, entrant in contest.entrants.items():
            if name in failed:
                continue
            try:
                _enter(name, entrant, contest, entrant.products(out, width, count), rows)
            except Exception as problem:
                failed[name if isinstance(problem, ImportError) else f"{name} {out}x{width}"] = repr(problem)[:400]
                print(name, out, width, repr(problem)[:400], flush=True)
        packs.cache_clear()
        torch.cuda.empty_cache()
        for row in rows.values():
            report.add(row)


def _enter(name: str, entrant: Entrant, contest: Contest, products: list[Product], rows: dict[int, Row]) -> None:
    for m, row in rows.items():
        if m > entrant.most:
            break
        x = torch.randn(m, row["in"], device="cuda").bfloat16()
        if entrant.of is not None and m == max(few for few in contest.tokens if few <= entrant.most):
            first = packs(entrant.of, row["out"], row["in"], len(products))[0]
            found = products[0](x)()
            row[f"{name}_error"] = error(found[-CHECKED:], contest.exact(x[-CHECKED:], first))  # type: ignore[index]
            if not row[f"{name}_error"] < ALLOWED:
                raise AssertionError(f"error {row[f'{name}_error']:.2e} against float64")
        calls = [product(x) for product in (products if m <= 256 else products[:12])]
        row[f"{name}_us"] = seconds(calls, 11) * 1e6


def warm(contests: Sequence[Contest], worker: str) -> None:
    """Compile a share of what will be timed; what fails says so when its turn comes."""
    entries = [(entrant, m) for each in contests for entrant in each.entrants.values() for m in each.tokens]
    for (entrant, m), (out, width) in share(list(itertools.product(entries, SHAPES)), worker):
        if m <= entrant.most:
            try:
                entrant.products(out, width, 1)[0](torch.randn(m, width, device="cuda").bfloat16())()
            except Exception as problem:
                print(out, width, m, repr(problem)[:200], flush=True)
    torch.cuda.synchronize()


def show(contest: Contest, rows: Sequence[Row]) -> None:
    """Ranges over the shapes of speed over cuBLAS BF16."""
    for m, name in itertools.product(contest.tokens, contest.entrants):
        mine = [row for row in rows if row.get("contest") == contest.name and row["M"] == m and f"{name}_us" in row]
        if mine:
            ratios = [row["cublas_us"] / row[f"{name}_us"] for row in mine]
            print(f"{contest.name} M {m:5} {name:16} {min(ratios):.2f} to {max(ratios):.2f}", flush=True)
