"""LoRA as an adapter: A starts as PEFT starts it (Kaiming uniform, that is U(-1/sqrt(in), 1/sqrt(in))), B at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from orbit_core.adapters.operands import LowRank
from orbit_core.adapters.sites import Site
from orbit_core.recipe import LoRA

A, B = "lora_A.weight", "lora_B.weight"


class LoRAMethod:
    def __init__(self, adapter: LoRA) -> None:
        self.rank = adapter.rank
        self.scaling = adapter.alpha / adapter.rank

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {A: (self.rank, site.in_features), B: (site.out_features, self.rank)}

    def initial(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        bound = site.in_features**-0.5
        shapes = self.shapes(site)
        return {A: torch.empty(shapes[A]).uniform_(-bound, bound, generator=generator), B: torch.zeros(shapes[B])}

    def operands(self, sites: Sequence[Site], values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, LowRank]:
        """Site name -> low-rank delta; differentiable in the values."""
        return {
            site.name: LowRank(values[site.peft_name(A)].to(dtype), values[site.peft_name(B)].to(dtype), self.scaling)
            for site in sites
        }

    def monitors(self, sites: Sequence[Site], values: Mapping[str, Tensor]) -> dict[str, float]:
        """The largest Frobenius norm of scaling * B A, as ||B A||_F^2 = <B^T B, A A^T>."""
        norms = []
        for site in sites:
            a, b = values[site.peft_name(A)].double(), values[site.peft_name(B)].double()
            norms.append(float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()) * self.scaling)
        return {"max_delta_norm": max(norms)}
