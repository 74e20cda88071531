"""Made by kernels/bench/tune_dense.py. (operation, format, out, in) -> (at most so many rows, way), ascending."""

from __future__ import annotations

from typing import Literal

Entry = tuple[int, Literal["decode", "scratch"] | tuple[int, int, int, int]]  # outs, block, short, parts
TABLE: dict[tuple[str, str, int, int], tuple[Entry, ...]] = {}
