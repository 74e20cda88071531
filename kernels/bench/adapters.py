"""Adapters on one linear, forward and backward with gradients for input and adapter, beside PEFT's layers, in one run.

    PYTHONPATH=kernels python kernels/bench/adapters.py [OUT.json]

PEFT's layers sit on a BF16 linear, as PEFT runs them; ours on the same weight as INT4 (group 32), and on it dense. The
linear without an adapter is timed too, so that "added" is the ratio of what the adapters cost. R comes from the
parameters in every step. Forward and backward are captured in a graph (where PEFT's layer can be, else both are eager),
so that the host's speed does not count; "eager" rows say what it costs where it does.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import card, ceilings, compact, seconds
from orbit_kernels import FORMATS, dequantize, linear, lora_delta, oft, quantize

SHAPES = [(9728, 2560), (2560, 9728), (4096, 2560)]
TOKENS = 8192
RANK = 16
Step = Callable[[Tensor], Tensor]


def eager(step: Step, x: Tensor, dy: Tensor, wanted: list[Tensor]) -> float:
    """Median seconds of forward and backward, the host's part included."""
    times = []
    for turn in range(14):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        torch.autograd.grad(step(x), [x, *wanted], dy)
        end.record()
        end.synchronize()
        if turn > 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def captured(step: Step, x: Tensor, dy: Tensor, wanted: list[Tensor]) -> float:
    """Median seconds of forward and backward in a captured graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # autograd's own warm-up, on a stream that may be captured
        torch.autograd.grad(step(x), [x, *wanted], dy)
    torch.cuda.synchronize()
    return seconds([lambda: torch.autograd.grad(step(x), [x, *wanted], dy)] * 3, 9)


def peft_layer(config: Any, base: nn.Linear) -> nn.Module:
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(config, nn.ModuleDict({"linear": base}))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * (0.02 if "oft" in name else 0.05)
    return model["linear"]


def close(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours.double() - theirs.double()).norm() / theirs.double().norm()).detach())


def rows_of(out: int, width: int, how: str) -> list[dict[str, Any]]:
    from peft import LoraConfig, OFTConfig

    timed = {"eager": eager, "captured": captured}[how]
    x = torch.randn(TOKENS, width, device="cuda").bfloat16().requires_grad_()
    dy = torch.randn(TOKENS, out, device="cuda").bfloat16()
    packed = quantize(torch.randn(out, width, device="cuda") * 0.02, FORMATS["int4"])
    dense = dequantize(packed)
    plain = timed(lambda x: nn.functional.linear(x, dense), x, dy, [])
    packed_plain = timed(lambda x: linear(x, packed), x, dy, [])
    rows = []
    for what in ("oft-32", "oft-64", "oft-128", f"lora-{RANK}"):
        base = nn.Linear(width, out, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        base.weight.data = dense
        b = int(what.split("-")[1])
        if what.startswith("oft"):
            config: Any = OFTConfig(
                r=0, oft_block_size=b, target_modules=["linear"], use_cayley_neumann=True,
                num_cayley_neumann_terms=5, module_dropout=0.0,
            )  # fmt: skip
        else:
            config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"], lora_dropout=0.0)
        layer = peft_layer(config, base).bfloat16()
        theirs = [p for p in layer.parameters() if p.requires_grad]
        mine = [p.detach().clone().requires_grad_() for p in theirs]
        if what.startswith("oft"):
            v = mine[0]

            def ours(x: Tensor, project: Step, v: Tensor = v, b: int = b) -> Tensor:
                return project(oft.rotate(x, oft.cayley_neumann(v.float(), b).bfloat16()))
        else:
            A, B = mine

            def ours(x: Tensor, project: Step, A: Tensor = A, B: Tensor = B) -> Tensor:
                return project(x) + lora_delta(x, A, B, 1.0)

        def on_dense(x: Tensor, ours: Any = ours) -> Tensor:
            return ours(x, lambda z: linear(z, packed, weight=dense))

        def on_packed(x: Tensor, ours: Any = ours) -> Tensor:
            return ours(x, lambda z: linear(z, packed))

        differs = close(on_dense(x), layer(x))
        assert differs < 2e-2, (what, differs)
        peft, light, low = (
            timed(step, x, dy, wanted) for step, wanted in ((layer, theirs), (on_dense, mine), (on_packed, mine))
        )
        rows.append({
            "adapter": what, "how": how, "out": out, "in": width, "M": TOKENS,
            "plain_ms": plain * 1e3, "packed_ms": packed_plain * 1e3,
            "peft_ms": peft * 1e3, "ours_ms": light * 1e3, "ours_int4_ms": low * 1e3, "differs": differs,
            "whole": peft / light, "added": (peft - plain) / (light - plain),
            "overhead_int4": low / packed_plain - 1,
        })  # fmt: skip
        print({key: round(v, 4) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    return rows


def main(path: str) -> None:
    result: dict[str, Any] = {**card(), "command": "python kernels/bench/adapters.py", "ceilings": ceilings()}
    result["rows"] = []
    for how, shape in itertools.product(("captured", "eager"), SHAPES):
        try:
            result["rows"] += rows_of(*shape, how)
        except Exception as problem:  # one shape's trouble is written down beside the others' figures
            result["rows"].append({"how": how, "out": shape[0], "in": shape[1], "failed": repr(problem)[:400]})
            print(repr(problem), flush=True)
        Path(path).write_text(compact(result))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "results" / "adapters.json"))
