"""What adapters cost: on decode products (`adapters_decode.py`) and in training, beside PEFT's layers, in one run.

    python kernels/bench/adapters.py [OUT.json [decode] [rotation] [training] [eager]]

Training is one linear, forward and backward with gradients for input and adapter. PEFT's layers sit on a BF16 linear,
as PEFT runs them; ours on the same weight as INT4 (group 32), and on it dense. The linear without an adapter is timed
too, so that "added" is the ratio of what the adapters cost. R comes from the parameters in every step
("overhead_given_R": it is given, as where an engine makes it once per update for all micro-batches). "floor" is what
reading and writing the activations once each (OFT: x, xR; x, dZ, dX) must add at the speed of a copy. Rows "q, k, v"
and "gate, up" rotate one input for several linears, at once or each for itself. Forward and backward are captured in a
graph (where PEFT's layer can be, else both are eager), so that the host's speed does not count; "eager" rows say what
it costs where it does. "rotation" rows are shares of the speed of a copy of a gigabyte; "copy" says what a copy of x
alone reaches.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import adapters_decode
import torch
from adapters_decode import GROUPS, rotations
from harness import Report, Row, arguments, seconds
from orbit_kernels import FORMATS, dequantize, linear, lora_linear, oft, oft_linear, quantize
from orbit_kernels.fast import cayley
from orbit_kernels.fast.rotate import turn, turn_backward
from torch import Tensor, nn

SHAPES = [(9728, 2560), (2560, 9728), (4096, 2560)]
TOKENS = 8192
RANK = 16
Step = Callable[[Tensor], Tensor]
Rows = Callable[[], Iterator[Row]]


def eager(step: Step, x: Tensor, dy: Tensor, wanted: Sequence[Tensor]) -> float:
    """Median seconds of forward and backward, the host's part included."""
    times = []
    for lap in range(14):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        torch.autograd.grad(step(x), [x, *wanted], dy)
        end.record()
        end.synchronize()
        if lap > 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def captured(step: Step, x: Tensor, dy: Tensor, wanted: Sequence[Tensor]) -> float:
    """Median seconds of forward and backward in a captured graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # autograd's own warm-up, on a stream that may be captured
        torch.autograd.grad(step(x), [x, *wanted], dy)
    torch.cuda.synchronize()
    return seconds([lambda: torch.autograd.grad(step(x), [x, *wanted], dy)] * 3, 9)


def peft_layer(config: Any, base: nn.Linear) -> Any:
    from peft import inject_adapter_in_model

    model: Any = inject_adapter_in_model(config, nn.ModuleDict({"linear": base}))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * (0.02 if "oft" in name else 0.05)
    return model["linear"]


def close(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours.double() - theirs.double()).norm() / theirs.double().norm()).detach())


def rows_of(out: int, width: int, how: str, copy: float) -> Iterator[Row]:
    from peft import LoraConfig, OFTConfig

    timed = {"eager": eager, "captured": captured}[how]
    x = torch.randn(TOKENS, width, device="cuda").bfloat16().requires_grad_()
    dy = torch.randn(TOKENS, out, device="cuda").bfloat16()
    packed = quantize(torch.randn(out, width, device="cuda") * 0.02, FORMATS["int4"])
    dense = dequantize(packed)
    plain = timed(lambda x: nn.functional.linear(x, dense), x, dy, [])
    packed_plain = timed(lambda x: linear(x, packed), x, dy, [])
    for what in ("oft-32", "oft-128", f"lora-{RANK}", "oft-64"):
        base = nn.Linear(width, out, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        base.weight.data = dense
        b, turning = int(what.split("-")[1]), what.startswith("oft")
        if turning:
            config: Any = OFTConfig(
                r=0, oft_block_size=b, target_modules=["linear"], use_cayley_neumann=True,
                num_cayley_neumann_terms=5, module_dropout=0.0,
            )  # fmt: skip
        else:
            config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"], lora_dropout=0.0)
        layer = peft_layer(config, base).bfloat16()
        theirs = [p for p in layer.parameters() if p.requires_grad]
        mine = [p.detach().clone().requires_grad_() for p in theirs]

        def ours(x: Tensor, weight: Tensor | None, mine: Any = mine, b: int = b, turning: bool = turning) -> Tensor:
            if turning:
                R = mine[0] if mine[0].dim() == 3 else oft.cayley_neumann(mine[0], b)
                return oft_linear(x, packed, R, weight=weight)
            return lora_linear(x, packed, mine[0], mine[1], 1.0, weight=weight)

        differs = close(ours(x, dense), layer(x))
        assert differs < 2e-2, (what, differs)
        peft = timed(layer, x, dy, theirs)
        light, low = (timed(partial(ours, weight=weight), x, dy, mine) for weight in (dense, None))
        row = {
            "op": "training", "adapter": what, "how": how, "out": out, "in": width, "M": TOKENS,
            "plain_ms": plain * 1e3, "packed_ms": packed_plain * 1e3,
            "peft_ms": peft * 1e3, "ours_ms": light * 1e3, "ours_int4_ms": low * 1e3, "differs": differs,
            "whole": peft / light, "added": (peft - plain) / (light - plain),
            "overhead_int4": low / packed_plain - 1,
        }  # fmt: skip
        if turning:
            given = [oft.cayley_neumann(mine[0].detach(), b).requires_grad_()]
            with_R = timed(partial(ours, weight=None, mine=given), x, dy, given)
            row["overhead_given_R"] = with_R / packed_plain - 1
            row["floor"] = 5 * x.nbytes / copy / packed_plain
        yield row


def rows_of_group(name: str, b: int) -> Iterator[Row]:
    width, outs = GROUPS[name][0][1], [out for out, _ in GROUPS[name]]
    x = torch.randn(TOKENS, width, device="cuda").bfloat16().requires_grad_()
    dys = [torch.randn(TOKENS, out, device="cuda").bfloat16() for out in outs]
    weights = [quantize(torch.randn(out, width, device="cuda") * 0.02, FORMATS["int4"]) for out in outs]
    R = rotations(width, b, len(outs)).requires_grad_()

    def step(parts: Callable[[], Any], wanted: Sequence[Tensor]) -> Any:
        ys = [linear(part, packed) for part, packed in zip(parts(), weights, strict=True)]
        return torch.autograd.grad(ys, wanted, dys)

    hows: dict[str, Any] = {
        "plain": (lambda: [x] * len(outs), [x]),
        "one_pass": (lambda: oft.rotate_slices(x, R), [x, R]),
        "each": (lambda: [oft.rotate(x, one) for one in R.unbind(0)], [x, R]),
    }
    for a, b_ in zip(step(*hows["one_pass"]), step(*hows["each"]), strict=True):
        assert close(a, b_) < 1e-2
    side = torch.cuda.Stream()
    times = {}
    for how, (parts, wanted) in hows.items():
        with torch.cuda.stream(side):
            step(parts, wanted)
        torch.cuda.synchronize()
        times[how] = seconds([partial(step, parts, wanted)] * 3, 9)
    yield {
        "op": "training", "adapter": f"oft-{b}", "group": name, "in": width, "M": TOKENS,
        **{f"{how}_ms": value * 1e3 for how, value in times.items()},
        **{f"overhead_{how}": times[how] / times["plain"] - 1 for how in ("one_pass", "each")},
    }  # fmt: skip


def rotation_rows(copy: float) -> Iterator[Row]:
    """The rotation by itself and v -> R, as shares of the speed of a copy, and in microseconds."""
    for width in (2560, 9728):
        x, dy = (torch.randn(TOKENS, width, device="cuda").bfloat16() for _ in range(2))
        for b in (32, 64, 128):
            R = rotations(width, b)
            itself = seconds([partial(torch.mul, x, 1.0, out=dy)] * 4)
            forward = seconds([partial(turn, x, R)] * 4)
            backward = seconds([partial(turn_backward, x, R, [dy])] * 4)
            v = (torch.randn(width // b, b * (b - 1) // 2, device="cuda") * 0.01).bfloat16()
            makes, unmakes = (
                seconds([partial(f, *args)] * 8) for f, args in ((cayley.forward, (v, b)), (cayley.backward, (v, R, b)))
            )
            yield {
                "op": "rotation", "in": width, "M": TOKENS, "b": b,
                "copy": 2 * x.nbytes / copy / itself, "forward": 2 * x.nbytes / copy / forward,
                "backward": 3 * x.nbytes / copy / backward, "v_to_R_us": makes * 1e6, "dR_to_dv_us": unmakes * 1e6,
            }  # fmt: skip


def training(copy: float) -> list[Rows]:
    return [
        *(partial(rows_of, *shape, "captured", copy) for shape in SHAPES),
        *(partial(rows_of_group, name, b) for name in GROUPS for b in (32, 128)),
    ]


PARTS: dict[str, Callable[[float], list[Rows]]] = {  # of the speed of a copy
    "decode": lambda copy: list(adapters_decode.all_rows()),
    "rotation": lambda copy: [partial(rotation_rows, copy)],
    "training": training,
    "eager": lambda copy: [partial(rows_of, *shape, "eager", copy) for shape in SHAPES],
}


def measure(report: Report, parts: Sequence[str]) -> None:
    for rows in (rows for part in parts for rows in PARTS[part](report.copy)):
        if report.late:
            return report.add({"case": str(rows)[:200], "failed": "no time left"})
        try:
            for row in rows():
                report.add(row)
        except Exception as problem:  # one shape's trouble is written down beside the others' figures
            report.add({"case": str(rows)[:200], "failed": repr(problem)[:600]})
        torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = arguments(__file__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    options = parser.parse_args()
    measure(Report(options), options.parts)
