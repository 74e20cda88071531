"""What an adapter adds to a decode product: rows for `adapters.py`, which runs them.

Adapters take turns as the weights do, so their bytes are read from memory too. "ours" are the doors `oft_linear` and
`lora_linear`; "torch" is the same packed product with torch's operations before it (OFT) or beside it (LoRA). "bytes"
is what R, or A and B, add to the bytes of the weight: where a product is bound by bytes, no implementation can add less
than that share of the time. Rows "q, k, v" and "gate, up" are several products of one input, rotated by one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from harness import SHAPES, copies, error, random_packed, rotating, seconds
from orbit_kernels import FormatSpec, PackedWeight, dequantize, linear, lora_delta, lora_linear, oft, oft_linear
from orbit_kernels.fast.dispatch import named
from torch import Tensor

TOKENS = [1, 16, 64]
SPEC = FormatSpec("int4", 128)
GROUPS = {"q, k, v": [(4096, 2560), (1024, 2560), (1024, 2560)], "gate, up": [(9728, 2560), (9728, 2560)]}
BLOCKS, RANKS = (32, 128), (16, 64)


def rotations(width: int, b: int, *several: int) -> Tensor:
    layers = several[0] if several else 1
    v = torch.randn(layers * (width // b), b * (b - 1) // 2, device="cuda") * (0.1 / b**0.5)
    return oft.cayley_neumann(v, b, torch.bfloat16).view(*several, width // b, b, b)


def factors(out: int, width: int, rank: int) -> tuple[Tensor, Tensor]:
    A, B = torch.randn(rank, width, device="cuda") / width**0.5, torch.randn(out, rank, device="cuda") * 0.1
    return A.bfloat16(), B.bfloat16()


def by_torch(x: Tensor, R: Tensor) -> Tensor:
    n, b, _ = R.shape
    return torch.bmm(x.reshape(-1, n, b).transpose(0, 1), R).transpose(0, 1).reshape(x.shape)


def after_torch(x: Tensor, packed: PackedWeight, R: Tensor) -> Tensor:
    return linear(by_torch(x, R), packed)


def beside_torch(x: Tensor, packed: PackedWeight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return linear(x, packed) + lora_delta(x, A, B, scaling)


def checked(found: Tensor, theirs: Tensor, exact: Tensor) -> None:
    errors = error(found, exact), error(theirs, exact)
    assert errors[0] <= 1.02 * errors[1], errors


def rows_of(spec: FormatSpec, out: int, width: int) -> Iterator[dict[str, Any]]:
    few = rotating(spec, out, width)
    dense = dequantize(few[0])
    turns = {b: [rotations(width, b) for _ in few] for b in BLOCKS}
    pairs = {rank: [factors(out, width, rank) for _ in few] for rank in RANKS}
    for m in TOKENS:
        x = torch.randn(m, width, device="cuda").bfloat16()
        plain = seconds([partial(linear, x, packed) for packed in few])
        head = {"op": "decode", "format": named(spec), "out": out, "in": width, "M": m}
        for b, each in turns.items():
            exact = by_torch(x.double(), each[0].double()) @ dense.double().T
            checked(oft_linear(x, few[0], each[0]), by_torch(x, each[0]) @ dense.T, exact)
            both = list(zip(few, each, strict=True))
            fused, torch_s = (
                seconds([partial(how, x, packed, R) for packed, R in both]) for how in (oft_linear, after_torch)
            )
            yield row(head, f"oft-{b}", plain, fused, torch_s, each[0].nbytes / few[0].nbytes)
        for rank, factors in pairs.items():
            A, B = factors[0]
            exact = x.double() @ dense.double().T + x.double() @ A.double().T @ B.double().T
            checked(lora_linear(x, few[0], A, B, 1.0), x @ dense.T + x @ A.T @ B.T, exact)
            fused, torch_s = (
                seconds([partial(how, x, packed, A, B, 1.0) for packed, (A, B) in zip(few, factors, strict=True)])
                for how in (lora_linear, beside_torch)
            )
            yield row(head, f"lora-{rank}", plain, fused, torch_s, (A.nbytes + B.nbytes) / few[0].nbytes)


def row(head: dict[str, Any], adapter: str, plain: float, ours: float, by_torch: float, share: float) -> dict[str, Any]:
    return head | {
        "adapter": adapter, "plain_us": plain * 1e6, "ours_us": ours * 1e6, "torch_us": by_torch * 1e6,
        "overhead": ours / plain - 1, "overhead_torch": by_torch / plain - 1, "bytes": share,
    }  # fmt: skip


def rows_of_group(spec: FormatSpec, name: str) -> Iterator[dict[str, Any]]:
    width = GROUPS[name][0][1]
    one = [random_packed(spec, out, width) for out, _ in GROUPS[name]]
    count = copies(sum(packed.nbytes for packed in one))
    few = [one, *([random_packed(spec, out, width) for out, _ in GROUPS[name]] for _ in range(count - 1))]
    for b in BLOCKS:
        turns = [rotations(width, b, len(one)) for _ in few]
        for m in TOKENS:
            x = torch.randn(m, width, device="cuda").bfloat16()

            def plainly(weights: Any, R: Tensor, x: Tensor = x) -> list[Tensor]:
                return [linear(x, packed) for packed in weights]

            def shared(weights: Any, R: Tensor, x: Tensor = x) -> list[Tensor]:
                turned = oft.rotate_slices(x, R)
                return [linear(part, packed) for part, packed in zip(turned, weights, strict=True)]

            def each(weights: Any, R: Tensor, x: Tensor = x) -> list[Tensor]:
                return [oft_linear(x, packed, r) for packed, r in zip(weights, R, strict=True)]

            assert all(map(torch.equal, shared(few[0], turns[0]), each(few[0], turns[0])))
            plain, fused, apart = (
                seconds([partial(how, *both) for both in zip(few, turns, strict=True)])
                for how in (plainly, shared, each)
            )
            yield {
                "op": "decode", "format": named(spec), "group": name, "in": width, "M": m,
                "adapter": f"oft-{b}", "plain_us": plain * 1e6, "one_launch_us": fused * 1e6, "each_us": apart * 1e6,
                "overhead_one_launch": fused / plain - 1, "overhead_each": apart / plain - 1,
                "bytes": turns[0].nbytes / sum(packed.nbytes for packed in one),
            }  # fmt: skip


def all_rows() -> Iterator[Callable[[], Iterator[dict[str, Any]]]]:
    """One thunk a weight, the most important first."""
    yield from (partial(rows_of, SPEC, *shape) for shape in SHAPES)
    yield from (partial(rows_of_group, SPEC, name) for name in GROUPS)
