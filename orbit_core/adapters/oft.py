"""OFT as an adapter: one vector per block of the input, zeros at the start, R = cayley_neumann(v).

The rotations of all sites are made in one batch: sites differ in their number of blocks, not in the block size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from orbit_kernels import cayley_neumann, orthogonality_error, skew_norm
from torch import Tensor

from orbit_core.adapters.operands import Rotation
from orbit_core.adapters.sites import Site
from orbit_core.errors import InputError
from orbit_core.recipe import OFT

SUFFIX = "oft_R.weight"


class OFTMethod:
    def __init__(self, adapter: OFT) -> None:
        self.block = adapter.block_size

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape. Raises InputError unless the block size divides the input width."""
        if site.in_features % self.block:
            raise InputError(
                f"OFT block size {self.block} at {site.name}",
                f"a divisor of the input width {site.in_features}",
                f"remainder {site.in_features % self.block}",
                "choose another adapter.block_size, or leave the module out of adapter.targets",
            )
        return {SUFFIX: (site.in_features // self.block, self.block * (self.block - 1) // 2)}

    def initial(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {suffix: torch.zeros(shape) for suffix, shape in self.shapes(site).items()}

    def operands(self, sites: Sequence[Site], values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Rotation]:
        """Site name -> rotation; differentiable in the values."""
        vectors = [values[site.peft_name(SUFFIX)] for site in sites]
        rotations = cayley_neumann(torch.cat(vectors), self.block, dtype).split([len(v) for v in vectors])
        return {site.name: Rotation(R) for site, R in zip(sites, rotations, strict=True)}

    def monitors(self, sites: Sequence[Site], values: Mapping[str, Tensor]) -> dict[str, float]:
        """How far from orthogonal the rotations are, and s = ||Q||_2 that says why (error = 2 s^4 - s^8)."""
        vectors = torch.cat([values[site.peft_name(SUFFIX)] for site in sites])
        return {
            "max_orthogonality_error": float(orthogonality_error(vectors, self.block)),
            "max_skew_norm": float(skew_norm(vectors, self.block)),
        }
