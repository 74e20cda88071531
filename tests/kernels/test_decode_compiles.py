"""How LoRA beside a decode product compiles for Hopper, which can be said without a GPU.

ptxas keeps what addresses a product's operands in uniform registers, and takes them for a later product even where a
branch went round the product that set them: addresses out of range, or another product's operands. So each product must
come before every other that follows it, on every path.
"""

from __future__ import annotations

import re

import pytest
from compiling import run_compiling

COMPILE = """
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from orbit_kernels.fast.beside import helping
from orbit_kernels.fast.decode import _decode, padded_tokens, plan

out, width, tokens, rank, slot = map(int, sys.argv[2:])
chosen, (narrow, helpers) = plan(out, width, tokens, 32), helping(out // 64, width)
constants = {
    "N": out, "K": width, "BLOCK_ROWS": 1, "GROUP": 32, "FORMAT": "int4", "TOKENS": padded_tokens(tokens),
    "ROWS": chosen.rows, "PARTS": chosen.parts, "FOLD": chosen.fold, "STAGES": chosen.stages, "BIAS": False,
    "ASM": True, "ARRANGED": chosen.arranged, "EARLY": chosen.early, "RANK": rank, "SLOT": bool(slot), "NARROW": narrow,
    "HELPERS": helpers,
}
signature = {
    **dict.fromkeys(("x", "scales", "bias", "y", "a", "b"), "*bf16"), "pieces": "*i16",
    **dict.fromkeys(("whole", "partial", "made"), "*fp32"), **dict.fromkeys(("arrivals", "flags", "slot"), "*i32"),
    "scaling": "fp32", "M": "i32", **dict.fromkeys(constants, "constexpr"),
}
names = _decode.arg_names
even = ("x", "pieces", "scales", "y", "partial", "a", "b", "made")
aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
source = ASTSource(_decode, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
options = {"num_warps": 4, "launch_pdl": True, **({"maxnreg": 128} if padded_tokens(tokens) == 16 else {})}
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
Path(sys.argv[1], "decode.ptx").write_text(compiled.asm["ptx"])
"""


def blocks_of(ptx: str) -> tuple[list[int], list[set[int]]]:
    """Of each straight piece of code how many products it has, and where it can go from its end."""
    products, ends, labels = [0], [""], {}
    body = re.search(r"\.entry .*?\{(.*)\n\}", ptx, re.S)
    assert body
    for line in map(str.strip, body[1].splitlines()):
        label = re.match(r"(\$L__BB\w+):", line)
        jump = re.match(r"(@\S+\s+)?(bra(?:\.uni)?\s+\$L__BB\w+|ret|exit);", line)
        if label or ends[-1]:
            products.append(0)
            ends.append("")
        if label:
            labels[label[1]] = len(ends) - 1
        products[-1] += "wgmma.mma_async" in line
        if jump:
            ends[-1] = line
    after: list[set[int]] = []
    for block, end in enumerate(ends):
        target = re.search(r"\$L__BB\w+", end)
        falls = not end or end.startswith("@")
        after.append({labels[target[0]]} if target else set())
        if falls and block + 1 < len(ends):
            after[-1].add(block + 1)
    return products, after


def reached(after: list[set[int]], start: int, without: int = -1) -> set[int]:
    """From the end of `start` on, by ways that do not go through `without`."""
    found: set[int] = set()
    left = [start]
    while left:
        new = after[left.pop()] - found - {without}
        found |= new
        left += new
    return found


def gone_round(ptx: str) -> list[tuple[int, int]]:
    """Products, and those that follow them though they can be reached without them."""
    products, after = blocks_of(ptx)
    places = [block for block, count in enumerate(products) if count]
    assert len(places) >= 2
    return [
        (first, then)
        for first in places
        for then in places
        if first != then and then in reached(after, first) and (then in reached(after, 0, without=first) or then == 0)
    ]


@pytest.mark.parametrize(
    "arguments",
    [(1024, 2560, 64, 64, 1), (2560, 9728, 16, 8, 1)],
    ids=lambda arguments: "x".join(map(str, arguments)),
)
def test_no_product_follows_one_that_a_branch_may_have_gone_round(tmp_path, arguments):
    pytest.importorskip("triton")
    run_compiling(COMPILE, tmp_path, *arguments)
    assert gone_round((tmp_path / "decode.ptx").read_text()) == []
