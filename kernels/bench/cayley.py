"""Cayley-Neumann v -> R and dR -> dv beside the reference on the same card, both in captured graphs.

    python kernels/bench/cayley.py [OUT.json]

`blocks` are those of one linear of width 2560 or 9728, and of a dense layer of Qwen3-4B with an adapter at all seven.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
from harness import Report, Row, Thunk, arguments, error, seconds
from orbit_kernels import oft
from orbit_kernels.fast import cayley
from torch import Tensor

WIDTHS = {"2560": 2560, "9728": 9728, "layer": 5 * 2560 + 4096 + 9728}


class Kept:
    """What autograd keeps between the passes of the reference."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def measured(b: int, blocks: int) -> Row:
    v = torch.randn(blocks, b * (b - 1) // 2, device="cuda") * (0.1 / b**0.5)
    dR, kept = torch.randn(blocks, b, b, device="cuda"), Kept()
    reference = oft._CayleyNeumann
    exact = oft.cayley_neumann(v.double(), b)
    R = reference.forward(kept, v, b, v.dtype)
    assert error(cayley.forward(v, b), exact) < max(2 * error(R, exact), 1e-6)
    wide = b > 128  # keeps what the reference keeps, and has its gradient
    forward = partial(cayley.forward_kept, v, b, v.dtype) if wide else partial(cayley.forward, v, b)
    times: dict[str, Thunk] = {"forward": forward, "forward_reference": partial(reference.forward, kept, v, b, v.dtype)}
    times |= {} if wide else {"backward": partial(cayley.backward, v, dR, b)}
    times["backward_reference"] = partial(reference.backward, kept, dR)
    taken = {what: seconds([call] * 8) for what, call in times.items()}
    both = sum(taken.get(way, taken["backward_reference"]) for way in ("forward", "backward"))
    return {
        "op": "cayley_neumann", "b": b, "blocks": blocks, **{f"{what}_us": time * 1e6 for what, time in taken.items()},
        "forward_against_reference": taken["forward_reference"] / taken["forward"],
        "both_against_reference": (taken["forward_reference"] + taken["backward_reference"]) / both,
    }  # fmt: skip


def main() -> None:
    report = Report(arguments(__file__).parse_args())
    for b, width in itertools.product((32, 64, 128, 256), WIDTHS.values()):
        report.add(measured(b, width // b))


if __name__ == "__main__":
    main()
