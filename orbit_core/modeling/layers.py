"""The two modules that replace those of transformers: a linear on packed bytes, and experts made of such linears.

    y = operand(x, project),  project(x) = x dequantize(W)^T + bias

Experts of transformers are fused three-dimensional parameters; here each expert has its own three packed linears under
the names of the checkpoint, so that an adapter sits in an expert exactly as it sits anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from orbit_kernels import PackedWeight, dequantize, linear
from torch import Tensor, nn

from orbit_core.adapters.operands import Operand


class PackedLinear(nn.Module):
    """x[..., in] -> [..., out] with a frozen packed weight and, when one is set, an adapter."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self.packed: PackedWeight | None = None
        self.bias: Tensor | None = None
        self.resident: Tensor | None = None
        self.operand: Operand | None = None

    def keep_resident(self, dtype: torch.dtype) -> int:
        """Keep the dequantised weight in `dtype`; returns the bytes it costs."""
        assert self.packed is not None
        self.resident = dequantize(self.packed, torch.bfloat16).to(dtype)
        return self.resident.numel() * self.resident.element_size()

    def project(self, x: Tensor) -> Tensor:
        return linear(x, self.packed, self.bias, self.resident)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) if self.operand is None else self.operand(x, self.project)

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
    """In place of transformers' fused experts, with their signature: only experts that got tokens are computed."""

    def __init__(self, fused: Any) -> None:
        expert = (fused.hidden_dim, fused.intermediate_dim, fused.act_fn)
        super().__init__([Expert(*expert) for _ in range(fused.num_experts)])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states[tokens, hidden], top_k_index and top_k_weights[tokens, k] -> [tokens, hidden].

        Experts are added in rising order; a token chooses an expert at most once, so no two additions collide and the
        result is the same on every run.
        """
        out = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            token, choice = torch.where(top_k_index == index)
            answer = self[index](hidden_states[token]) * top_k_weights[token, choice, None]
            out = out.index_add(0, token, answer.to(out.dtype))
        return out


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
