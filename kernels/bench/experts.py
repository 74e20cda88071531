"""One layer of experts as the engines compute it: together (stacked, grouped products) beside one by one, in one run.

    python kernels/bench/experts.py [OUT.json]

Qwen3-30B-A3B: 128 experts, 8 active, hidden 2048, intermediate 768; INT4, group 32; without an adapter, with OFT
(b = 32) and LoRA (r = 8) of each expert's own. Eager, the host's launches and waiting included, because a step pays
them. Both ways are checked against float64 before anything is timed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from harness import Report, Row, arguments, random_packed
from orbit_kernels import FormatSpec, cayley_neumann, dequantize
from torch import Tensor

from orbit_core.adapters.operands import LowRank, Operand, Rotation
from orbit_core.modeling.layers import PackedExperts

EXPERTS, ACTIVE, HIDDEN, INNER, GROUP, BLOCK, RANK = 128, 8, 2048, 768, 32, 32, 8
TOKENS = [1, 16, 1024, 8192]
PROJECTIONS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def layer() -> PackedExperts:
    fused = SimpleNamespace(hidden_dim=HIDDEN, intermediate_dim=INNER, act_fn=torch.nn.SiLU(), num_experts=EXPERTS)
    experts = PackedExperts(fused)
    for name, (out, width) in PROJECTIONS.items():
        for index, expert in enumerate(experts):
            packed = random_packed(FormatSpec("int4", GROUP), out, width)
            getattr(expert, name).packed = experts.place(index, name, packed, packed.device)
    return experts


def operand(kind: str, out: int, width: int) -> Operand | None:
    """Of one expert; its tensors are leaves."""

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(*shape, device="cuda") * 0.05).bfloat16().requires_grad_()

    if kind == "oft":
        v = torch.randn(width // BLOCK, BLOCK * (BLOCK - 1) // 2, device="cuda") * 0.02
        return Rotation(cayley_neumann(v, BLOCK).bfloat16().requires_grad_())
    return LowRank(leaf(RANK, width), leaf(out, RANK), 2.0) if kind == "lora" else None


def exact(experts: PackedExperts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """float64, dense."""
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for index in torch.unique(chosen).tolist():
        token, choice = torch.where(chosen == index)

        def product(name: str, z: Tensor, index: int = index) -> Tensor:
            linear = getattr(experts[index], name)
            dense, operand = dequantize(linear.packed).double(), linear.operand
            if isinstance(operand, Rotation):
                return z @ torch.block_diag(*operand.R.detach().double()) @ dense.T
            if isinstance(operand, LowRank):
                return z @ dense.T + z @ operand.A.detach().double().T @ operand.B.detach().double().T * operand.scaling
            return z @ dense.T

        z = x[token].double()
        inner = torch.nn.functional.silu(product("gate_proj", z)) * product("up_proj", z)
        total.index_add_(0, token, product("down_proj", inner) * weights[token, choice, None].double())
    return total


def timed(step: Any, repeats: int = 6) -> float:
    """Median milliseconds by the host's clock."""
    times = []
    for turn in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if turn > 1:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def row(experts: PackedExperts, kind: str, tokens: int) -> Row:
    for name, shape in PROJECTIONS.items():
        for expert in experts:
            getattr(expert, name).operand = operand(kind, *shape)
    experts.adapt()
    leaves = [t for e in experts for n in PROJECTIONS for t in getattr(getattr(e, n).operand, "tensors", ())]
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16().requires_grad_()
    weights, chosen = (torch.randn(tokens, EXPERTS, device="cuda") * 0.5).softmax(1).topk(ACTIVE, 1)
    weights = (weights / weights.sum(1, keepdim=True)).bfloat16()
    dy = torch.randn_like(x)
    found: Row = {"adapter": kind, "tokens": tokens}
    ways = {"together": experts._together, "one_by_one": experts._one_by_one}
    part = slice(0, 64)
    reference = exact(experts, x.detach()[part], chosen[part], weights[part])
    for name, way in ways.items():
        with torch.no_grad():
            error = (way(x, chosen, weights)[part].double() - reference).norm() / reference.norm()
        found[f"{name}_error"] = float(error)
    assert found["together_error"] <= 1.05 * found["one_by_one_error"], found
    for name, way in ways.items():
        experts.adapt()

        def both(way: Any = way) -> None:
            torch.autograd.grad(way(x, chosen, weights), [x, *leaves], dy, allow_unused=True, retain_graph=bool(leaves))

        with torch.no_grad():
            found[f"{name}_forward_ms"] = timed(lambda way=way: way(x, chosen, weights))
        found[f"{name}_both_ms"] = timed(both, 4)
    for what in ("forward", "both"):
        found[f"{what}_speed"] = found[f"one_by_one_{what}_ms"] / found[f"together_{what}_ms"]
    return found


def main() -> None:
    torch.manual_seed(0)
    experts = layer()
    shape = {"experts": EXPERTS, "active": ACTIVE, "hidden": HIDDEN, "intermediate": INNER, "format": f"int4-{GROUP}"}
    report = Report(arguments(__file__).parse_args(), **shape)
    for kind, tokens in itertools.product(("none", "oft", "lora"), TOKENS):
        try:
            report.add(row(experts, kind, tokens))
        except Exception as problem:  # one row's trouble is written down beside the others' figures
            report.add({"adapter": kind, "tokens": tokens, "failed": repr(problem)[:400]})


if __name__ == "__main__":
    main()
