"""The two modules that replace those of transformers: a linear on packed bytes, and experts made of such linears.

    y = operand.linear(x, W, bias); without an operand x dequantize(W)^T + bias

Experts of transformers are fused three-dimensional parameters; here each expert has its own three packed linears under
the names of the checkpoint, so that an adapter sits in an expert exactly as it sits anywhere else. They are computed in
one of two ways:

    one by one   a loop over the experts that got tokens, which the host has to know; the readable reference
    together     rows sorted by expert, and one grouped product per projection, adapters included, for all experts,
                 whose weights lie in one stack

Together is for stacked weights, which `loading` makes on a GPU. On a CPU both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from orbit_kernels import PackedStack, PackedWeight, dequantize, grouped_linear, linear
from torch import Tensor, nn

from orbit_core.adapters.grouped import GroupedOperand, join
from orbit_core.adapters.operands import Operand
from orbit_core.modeling.routing import Routing


class TurnsInput(Protocol):
    """`shared_input.SharedInput`, as a linear sees it."""

    def turned(self, x: Tensor, linear: PackedLinear) -> Tensor: ...


class PackedLinear(nn.Module):
    """x[..., in] -> [..., out] with a frozen packed weight and, when one is set, an adapter."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self.packed: PackedWeight | None = None
        self.bias: Tensor | None = None
        self.resident: Tensor | None = None
        self.operand: Operand | None = None
        self.shared: TurnsInput | None = None  # turns x for this linear and its siblings together

    def keep_resident(self, dtype: torch.dtype) -> int:
        """Keep the dequantised weight in `dtype`; returns the bytes it costs."""
        assert self.packed is not None
        self.resident = dequantize(self.packed, torch.bfloat16).to(dtype)
        return self.resident.numel() * self.resident.element_size()

    def project(self, x: Tensor) -> Tensor:
        return linear(x, self.packed, self.bias, self.resident)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.operand is None:
            return self.project(x)
        if self.shared is not None:
            return self.project(self.shared.turned(x, self))
        return self.operand.linear(x, self.packed, self.bias, self.resident)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.packed.spec.name if self.packed else 'empty'}"


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = PackedLinear(hidden, intermediate, bias=False)
        self.up_proj = PackedLinear(hidden, intermediate, bias=False)
        self.down_proj = PackedLinear(intermediate, hidden, bias=False)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PackedExperts(nn.ModuleList):
    """In place of transformers' fused experts, with their signature."""

    def __init__(self, fused: Any) -> None:
        expert = (fused.hidden_dim, fused.intermediate_dim, fused.act_fn)
        super().__init__([Expert(*expert) for _ in range(fused.num_experts)])
        self.stacks: dict[str, PackedStack] = {}  # by projection
        self.apart = False  # a weight is of another kind than its neighbours'
        self.joined: Mapping[str, GroupedOperand] | None = None  # None: adapters that only one expert at a time applies

    def place(self, index: int, projection: str, packed: PackedWeight, device: torch.device) -> PackedWeight:
        """Copy the weight of one expert's projection to its place in a stack on `device`: the only copy there.

        A weight of another kind stays by itself, and then these experts are computed one by one.
        """
        stack = self.stacks.get(projection)
        if stack is None:
            stack = self.stacks[projection] = PackedStack.empty(packed, len(self), device)
        if not stack.takes(packed):
            self.apart = True
            return packed.to(device)
        return stack.put(index, packed)

    @property
    def together(self) -> bool:
        return bool(self.stacks) and not self.apart and self.joined is not None

    def adapt(self) -> None:
        """Take over the operands of the linears; once per adapter, not per forward pass."""
        names = ("gate_proj", "up_proj", "down_proj")
        joined = {name: join([getattr(expert, name).operand for expert in self]) for name in names}
        whole = {name: operand for name, operand in joined.items() if operand is not None}
        self.joined = whole if len(whole) == len(names) else None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states[tokens, hidden], top_k_index and top_k_weights[tokens, k] -> [tokens, hidden].

        A token chooses an expert at most once, and its experts' answers are added in rising order of expert: the
        result is the same in every run.
        """
        if self.together:
            return self._together(hidden_states, top_k_index, top_k_weights)
        return self._one_by_one(hidden_states, top_k_index, top_k_weights)

    def _one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            token, choice = torch.where(top_k_index == index)
            answer = self[index](hidden_states[token]) * top_k_weights[token, choice, None]
            out = out.index_add(0, token, answer.to(out.dtype))
        return out

    def _together(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routing = Routing.of(top_k_index, len(self))
        x, first = routing.spread(hidden_states), cast(Expert, self[0])
        inner = first.act_fn(self._project("gate_proj", x, routing)) * self._project("up_proj", x, routing)
        answer = self._project("down_proj", inner, routing) * top_k_weights.flatten()[routing.order, None]
        return routing.gather(answer.to(hidden_states.dtype))

    def _project(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        assert self.joined is not None
        stack = self.stacks[name]
        return self.joined[name](x, routing.counts, lambda rows: grouped_linear(rows, routing.counts, stack))


def swap_in(model: nn.Module) -> dict[str, PackedLinear]:
    """Replace every nn.Linear of the decoder and every fused expert bank; returns HF module name -> packed linear."""
    decoder: Any = model.model
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            _replace(decoder, name, PackedLinear(module.in_features, module.out_features, module.bias is not None))
        elif type(module).__name__.endswith("Experts"):
            _replace(decoder, name, PackedExperts(module))
    return {f"model.{name}": module for name, module in decoder.named_modules() if isinstance(module, PackedLinear)}


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
