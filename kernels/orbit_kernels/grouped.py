"""y[t] = x[t] W[expert of t]^T for tokens sorted by expert: the products of a mixture of experts in one call.

    x[first[e] : first[e] + counts[e]]  belongs to expert e,   first = cumulative sum of counts

The reference is a loop of `linear`s over the experts that got tokens. On a GPU the counts stay there: which expert a
row belongs to is worked out on the device, nothing waits for the host, and a frozen packed weight is unpacked tile by
tile as it is multiplied (`fast.grouped`). dX = dY W[expert] likewise; the weights get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .counts import require_counts
from .formats import FormatError, dequantize
from .formats.stack import PackedStack
from .linear import fast, linear


def grouped_linear(x: Tensor, counts: Tensor, experts: PackedStack) -> Tensor:
    """x[tokens, in] sorted by expert, counts[experts] -> y[tokens, out] in the dtype of x; differentiable in x only.

    counts  int32 or int64 on the device of x, zeros allowed. They must add up to `tokens`: checked on a CPU; on a GPU
            looking would stall it: rows beyond their sum come back undefined, a larger sum is the caller's error
    Raises FormatError when shapes, dtypes or devices do not fit.
    """
    width = experts.shape[1]
    if x.dim() != 2 or x.shape[1] != width or not x.is_floating_point():
        raise FormatError(f"grouped_linear input: expected float [tokens, {width}]; found {x.dtype} {tuple(x.shape)}")
    require_counts(counts, experts.count, x)
    return _GroupedLinear.apply(x, counts, experts)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Tensor, experts: PackedStack) -> Tensor:
        ctx.save_for_backward(counts)
        ctx.experts = experts
        if x.is_cuda and fast().takes_grouped(x, experts):
            return fast().grouped_product(x, counts, experts, False)
        pieces = [linear(part, experts[e]) for e, part in enumerate(x.split(counts.tolist())) if len(part)]
        return torch.cat(pieces or [x.new_empty(0, experts.shape[0])])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (counts,), experts = grads, ctx.saved_tensors, ctx.experts
        if grad.is_cuda and fast().takes_grouped(grad, experts):
            return fast().grouped_product(grad, counts, experts, True), None, None
        pieces = []
        for e, part in enumerate(grad.split(counts.tolist())):
            if len(part):
                pieces.append(part @ dequantize(experts[e], torch.bfloat16).to(part.dtype))
        return torch.cat(pieces or [grad.new_empty(0, experts.shape[1])]), None, None
