"""Rows of a mixture of experts: each token once for every expert that it chose, sorted by expert, and back.

    spread   states[tokens, hidden] -> rows[tokens * k, hidden]     a token's states at each of its rows
    gather   rows[tokens * k, hidden] -> states[tokens, hidden]     the sum of a token's rows, in rising order of expert

Either is the other's gradient, and none adds two numbers at one place at the same time: results are the same in every
run. Nothing waits for the device: how many rows an expert got is a tensor there, `counts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Routing:
    order: Tensor  # [tokens * k] of each row: token * k + which of the token's choices
    counts: Tensor  # [experts] rows of each expert
    rows_of: Tensor  # [k, tokens] rows of each token, in rising order of expert

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Routing:
        """chosen[tokens, k]: the experts of each token, no expert twice."""
        tokens, k = chosen.shape
        expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(experts, device=chosen.device), right=True)
        row = torch.empty_like(order)
        row[order] = torch.arange(tokens * k, device=chosen.device)
        rows_of = row.view(tokens, k).gather(1, chosen.argsort(dim=1)).t().contiguous()
        return cls(order, ends.diff(prepend=ends.new_zeros(1)), rows_of)

    @cached_property
    def token(self) -> Tensor:
        """[tokens * k] of each row."""
        return self.order // len(self.rows_of)

    def spread(self, states: Tensor) -> Tensor:
        return _Spread.apply(states, self)

    def gather(self, rows: Tensor) -> Tensor:
        return _Gather.apply(rows, self)


def _sum_of_rows(rows: Tensor, routing: Routing) -> Tensor:
    """Added one after the other in the dtype of the rows, as a loop over experts would add them."""
    k, tokens = routing.rows_of.shape
    parts = rows.index_select(0, routing.rows_of.flatten()).unflatten(0, (k, tokens))
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return states.index_select(0, routing.token)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_of_rows(grads[0], ctx.routing), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return _sum_of_rows(rows, routing)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.routing.token), None
