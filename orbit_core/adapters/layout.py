"""The adapter of one model: its sites, the tensors that it consists of, and what the forward pass makes of them.

Values are float32 masters while they are trained. What is computed with, published and hashed is always the value
rounded to BF16, so trainer, engine and file agree bit for bit; the gradient passes the rounding unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from orbit_core.adapters.lora import LoRAMethod
from orbit_core.adapters.oft import OFTMethod
from orbit_core.adapters.operands import Operand
from orbit_core.adapters.sites import Site, choose_sites
from orbit_core.errors import InputError
from orbit_core.recipe import OFT, Adapter

PUBLICATION_DTYPE = torch.bfloat16
_OTHER = "give an adapter of this model, block size or rank, and targets"

__all__ = ["PUBLICATION_DTYPE", "AdapterLayout", "method_of", "published", "random_adapter"]


class Method(Protocol):
    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]: ...
    def initial(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]: ...
    def operands(
        self, sites: Sequence[Site], values: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Mapping[str, Operand]: ...
    def monitors(self, sites: Sequence[Site], values: Mapping[str, Tensor]) -> dict[str, float]: ...


def method_of(adapter: Adapter) -> Method:
    return OFTMethod(adapter) if isinstance(adapter, OFT) else LoRAMethod(adapter)


def published(value: Tensor) -> Tensor:
    """The value as it is published: rounded to BF16, detached."""
    return value.detach().to(PUBLICATION_DTYPE)


@dataclass(frozen=True)
class AdapterLayout:
    adapter: Adapter
    sites: tuple[Site, ...]
    method: Method

    @classmethod
    def of(cls, linears: Mapping[str, tuple[int, int]], adapter: Adapter) -> AdapterLayout:
        """Layout of `adapter` on a model's linears (HF name -> (in, out)).

        Raises InputError when a target matches nothing or an OFT block does not divide an input width.
        """
        share = isinstance(adapter, OFT) and adapter.share_experts
        layout = cls(adapter, choose_sites(linears, adapter.targets, share), method_of(adapter))
        layout.shapes()
        return layout

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """PEFT name -> shape of every tensor."""
        return {
            site.peft_name(suffix): shape for site in self.sites for suffix, shape in self.method.shapes(site).items()
        }

    def initial(self, seed: int) -> dict[str, Tensor]:
        """float32 values at the start of training: the identity. Depends on (seed, module name) alone."""
        return {
            site.peft_name(suffix): value
            for site in self.sites
            for suffix, value in self.method.initial(site, _generator(seed, site.name)).items()
        }

    def operands(self, values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Operand]:
        """HF module name -> operand; `values` are float32 and already rounded to BF16 values; differentiable."""
        by_site = self.method.operands(self.sites, values, dtype)
        return {module: by_site[site.name] for site in self.sites for module in site.modules}

    def monitors(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """What to watch, measured on the published values."""
        return self.method.monitors(self.sites, {name: published(value).float() for name, value in values.items()})

    def check(self, tensors: Mapping[str, Tensor], what: str = "adapter") -> None:
        """Raises InputError unless `tensors` are exactly this adapter's, by name and shape."""
        expected = self.shapes()
        if unknown := sorted(set(tensors) - set(expected)):
            raise InputError(f"{what}: {len(unknown)} unknown tensor(s)", _some(expected), _some(unknown), _OTHER)
        if missing := sorted(set(expected) - set(tensors)):
            raise InputError(
                f"{what}: {len(missing)} missing tensor(s)", _some(missing), "nothing of these names", _OTHER
            )
        for name, shape in expected.items():
            found = tensors[name]
            if tuple(found.shape) != shape:
                raise InputError(
                    f"{what}: {name}", f"shape {shape}", f"{tuple(found.shape)}", "block size or rank differ?"
                )
            if not found.is_floating_point():
                raise InputError(f"{what}: {name}", "floating point", str(found.dtype), _OTHER)
            if not bool(torch.isfinite(found).all()):
                raise InputError(
                    f"{what}: {name}", "finite numbers", "NaN or infinity", "give an adapter that is whole"
                )


def random_adapter(like: Mapping[str, Tensor], seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """Values away from the identity, in BF16, for the tensors of an exported adapter: for the parity gate and tests.

    OFT: ||Q||_2 of a block is about `scale`, whatever its size. LoRA: A and B are drawn so that the delta's gain is
    about scale * alpha / r. Depends on (seed, name) alone.
    """
    drawn = {}
    for name, tensor in like.items():
        if name.endswith("oft_R.weight"):
            block = (1 + (1 + 8 * tensor.shape[-1]) ** 0.5) / 2  # of b(b-1)/2 elements
            sigma = scale / (2 * block**0.5)
        else:  # A: [r, in] keeps the size of its input; B: [out, r]
            sigma = tensor.shape[1] ** -0.5 * (1.0 if name.endswith("lora_A.weight") else scale)
        drawn[name] = published(torch.randn(tensor.shape, generator=_generator(seed, name)) * sigma)
    return drawn


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _some(names: Iterable[str], limit: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f", ... ({len(listed)} in all)" if len(listed) > limit else "")
