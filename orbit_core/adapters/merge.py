"""Putting an adapter into a dense weight, and taking it out again.

    OFT    W' = W blockdiag(R^T)         from y = (x R) W^T;  W = W' blockdiag(R^-T)
    LoRA   W' = W + (alpha / r) B A      W = W' - (alpha / r) B A

Computed in float64 from the published values, rounded once. R mixes columns inside a block, so a merged weight has
left the grid of a quantised base: what is merged is the BF16 weight that the packed bytes stand for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from orbit_kernels import PackedWeight, cayley_neumann, dequantize
from torch import Tensor

from orbit_core.adapters.layout import method_of, published
from orbit_core.adapters.sites import Site
from orbit_core.errors import InputError
from orbit_core.recipe import OFT, Adapter

_EXPERT = re.compile(r"(\.experts)\.\d+(\.[^.]+)$")


class _Checkpoint(Protocol):
    def load_packed(self) -> Iterator[tuple[str, PackedWeight]]: ...
    def load_plain(self) -> Iterator[tuple[str, Tensor]]: ...


def merged_tensors(
    checkpoint: _Checkpoint, adapter: Adapter, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(HF tensor name, tensor) of the dense BF16 model with the adapter merged in, one in memory at a time.

    Raises InputError for tensors of a wrong shape, and at the end when a tensor of the adapter found no module.
    """
    merger = Merger(adapter, tensors)
    for module, packed in checkpoint.load_packed():
        yield f"{module}.weight", merger.merge(module, dequantize(packed, torch.bfloat16))
    yield from checkpoint.load_plain()
    merger.require_all_used()


class Merger:
    """Merges one adapter, module by module."""

    def __init__(self, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
        self.adapter, self.tensors = adapter, tensors
        self._method = method_of(adapter)
        self._suffix = "oft_R.weight" if isinstance(adapter, OFT) else "lora_A.weight"
        self._unused = set(tensors)

    def merge(self, module: str, weight: Tensor) -> Tensor:
        """weight[out, in] of HF module `module` -> merged, same dtype; the weight itself where no adapter sits."""
        return self._apply(module, weight, undo=False)

    def unmerge(self, module: str, weight: Tensor) -> Tensor:
        """The inverse of `merge`, up to the one rounding of each."""
        return self._apply(module, weight, undo=True)

    def require_all_used(self) -> None:
        if self._unused:
            odd = sorted(self._unused)[:3]
            raise InputError("adapter to merge", "a module for every tensor", f"none for {odd}", "is this its base?")

    def _apply(self, module: str, weight: Tensor, undo: bool) -> Tensor:
        values = self._values(module, weight)
        if values is None:
            return weight
        wide = weight.double()
        if isinstance(self.adapter, OFT):
            merged = _rotate_columns(wide, cayley_neumann(values["oft_R.weight"], self.adapter.block_size), undo)
        else:
            scaling = self.adapter.alpha / self.adapter.rank
            delta = scaling * (values["lora_B.weight"] @ values["lora_A.weight"])
            merged = wide - delta if undo else wide + delta
        return merged.to(weight.dtype)

    def _values(self, module: str, weight: Tensor) -> dict[str, Tensor] | None:
        """Suffix -> published value in float64 of the module's adapter, or of the one that its experts share."""
        for name in (module, _EXPERT.sub(r"\1\2", module)):
            site = Site(name, weight.shape[1], weight.shape[0], (module,))
            shapes = self._method.shapes(site) if site.peft_name(self._suffix) in self.tensors else {}
            for suffix, shape in shapes.items():
                found = self.tensors.get(site.peft_name(suffix))
                if found is None or tuple(found.shape) != shape:
                    size = "nothing" if found is None else str(tuple(found.shape))
                    raise InputError(
                        f"adapter tensor {site.peft_name(suffix)}",
                        f"shape {shape}",
                        size,
                        "give the adapter of this model",
                    )
            if shapes:
                self._unused -= {site.peft_name(suffix) for suffix in shapes}
                return {suffix: published(self.tensors[site.peft_name(suffix)]).double() for suffix in shapes}
        return None


def _rotate_columns(weight: Tensor, R: Tensor, undo: bool) -> Tensor:
    """weight[out, n*b], R[n, b, b] -> weight blockdiag(R^T), or its inverse."""
    blocks = weight.unflatten(1, R.shape[:2]).transpose(0, 1)  # [n, out, b]
    turn = R.transpose(-1, -2)
    turned = torch.linalg.solve(turn, blocks, left=False) if undo else blocks @ turn
    return turned.transpose(0, 1).flatten(1)
