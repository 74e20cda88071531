"""A frozen packed linear with its adapter, as one operation.

    OFT    y = (x R) W^T + bias                     R[n, b, b], or R[slots, n, b, b] and a slot
    LoRA   y = x W^T + bias + scaling (x A^T) B^T   A[r, in], B[out, r], or with slots in front

A slot is a number on the device: which of several resident adapters is active can change between replays of a captured
graph, and the host never looks at it. Slots are for engines: their adapters get no gradient.

The reference is `oft.rotate`, `linear` and `lora.lora_delta` one after the other. On a GPU, 1 to 64 tokens without
gradients take one launch (`fast.beside`), and LoRA on many tokens is added up inside the matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import PackedWeight
from .linear import fast, linear
from .lora import lora_delta
from .oft import require_rotations, rotate


def oft_linear(
    x: Tensor,
    packed: PackedWeight,
    R: Tensor,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    slot: Tensor | None = None,
) -> Tensor:
    """x[..., in] -> y[..., out] in the dtype of x; differentiable in x and R. Errors: those of `rotate` and `linear`.

    On a GPU x R has the bits of `rotate` and the result those of `linear`, in one launch or in two.
    """
    require_rotations(x, R, 3 if slot is None else 4)
    if _without_gradient(x, R) and fast().decodes_adapted(x, packed, R, None):
        return fast().decode_adapted(x, packed, bias, R, None, 1.0, slot)
    return linear(rotate(x, R, slot), packed, bias, weight)


def lora_linear(
    x: Tensor,
    packed: PackedWeight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    slot: Tensor | None = None,
) -> Tensor:
    """x[..., in] -> y[..., out] in the dtype of x; differentiable in x, A and B (once, on a GPU).

    Raises ValueError when shapes do not chain, and the errors of `linear`.
    """
    dims = 2 if slot is None else 3
    chain = A.dim() == B.dim() == dims and A.shape[-1] == packed.shape[1] and B.shape[-2] == packed.shape[0]
    if not chain or A.shape[-2] != B.shape[-1] or (slot is not None and slot.numel() != 1):
        found = f"found A {tuple(A.shape)}, B {tuple(B.shape)}, slot {None if slot is None else tuple(slot.shape)}"
        raise ValueError(
            f"lora_linear on {packed.shape}: expected A[r, in], B[out, r], or [slots, ..] and one slot; {found}"
        )
    if _without_gradient(x, A, B) and fast().decodes_adapted(x, packed, A, B):
        return fast().decode_adapted(x, packed, bias, A, B, scaling, slot)
    if slot is not None:
        A, B = (tensor.index_select(0, slot.reshape(1).long())[0] for tensor in (A, B))
    if x.is_cuda and fast().takes_low_rank(x, packed, A, B):
        return fast().low_rank(x, packed, A, B, scaling, bias, weight)
    return linear(x, packed, bias, weight) + lora_delta(x, A, B, scaling)


def _without_gradient(*tensors: Tensor) -> bool:
    """On a GPU, and nobody asks for a gradient."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return tensors[0].is_cuda and not wanted
