"""What a checkpoint is to the rest of the system, whichever layout holds it: tensors by Hugging Face name.

    checkpoint.load_packed()   (module name, PackedWeight) of every linear: bytes as they lie, never re-derived
    checkpoint.load_plain()    (tensor name, tensor) of all the rest: embeddings, norms, router, biases, lm_head

Together they are every tensor of the model, each exactly once. A tied model has no `lm_head.weight`
(`checkpoint.architecture.tied`). One tensor is in memory at a time unless the caller keeps more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from orbit_kernels import FormatError, FormatSpec, PackedWeight, detect, read
from orbit_kernels.formats.config import fp8_blocks
from torch import Tensor

from orbit_core.checkpoints.architecture import Architecture
from orbit_core.checkpoints.tensorfile import TensorMeta
from orbit_core.errors import InputError
from orbit_core.recipe import ATTENTION, MLP

LINEARS = frozenset(ATTENTION + MLP)
_FETCH = "fetch the model again, or give the unquantised one"
_PLAIN_SUFFIXES = frozenset({"bias"})


class Checkpoint(ABC):
    """Tensors of one model by their published (Hugging Face) names."""

    architecture: Architecture
    quantization_config: dict[str, Any] | None

    @property
    @abstractmethod
    def metas(self) -> Mapping[str, TensorMeta]:
        """HF tensor name -> dtype and shape, in natural order."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, in memory of its own."""

    def modules(self) -> dict[str, list[str]]:
        """Module name -> the suffixes stored under it, e.g. ["weight_packed", "weight_scale", "weight_shape"]."""
        return self._modules

    @cached_property
    def _modules(self) -> dict[str, list[str]]:
        grouped: dict[str, list[str]] = {}
        for name in self.metas:
            module, _, suffix = name.rpartition(".")
            grouped.setdefault(module, []).append(suffix)
        return grouped

    def linears(self) -> list[str]:
        """Modules that `load_packed` yields: the projections, and whatever else is stored quantised."""
        return [name for name, suffixes in self.modules().items() if self._is_packed(name, suffixes)]

    def packed(self, module: str) -> PackedWeight:
        """The weight of one linear module. Raises InputError naming it when its tensors are no known format."""
        suffixes = [suffix for suffix in self.modules()[module] if suffix not in _PLAIN_SUFFIXES]
        return self._read(module, suffixes)

    def load_packed(self) -> Iterator[tuple[str, PackedWeight]]:
        """(module name, PackedWeight) of every linear, in natural order of the names."""
        for module, suffixes in self.modules().items():
            if self._is_packed(module, suffixes):
                yield module, self._read(module, [suffix for suffix in suffixes if suffix not in _PLAIN_SUFFIXES])

    def load_plain(self) -> Iterator[tuple[str, Tensor]]:
        """(tensor name, tensor) of everything that `load_packed` does not yield."""
        for module, suffixes in self.modules().items():
            packed = self._is_packed(module, suffixes)
            for suffix in suffixes:
                if not packed or suffix in _PLAIN_SUFFIXES:
                    yield join(module, suffix), self.tensor(join(module, suffix))

    def formats(self) -> dict[str, FormatSpec]:
        """Linear module -> its number format, told from names and shapes alone (int4: and its stored shape)."""
        return {module: self._format(module, suffixes) for module, suffixes in self.modules().items()
                if self._is_packed(module, suffixes)}  # fmt: skip

    def scale_rows(self, module: str) -> int:
        """Rows of a block FP8 weight that one of its scales covers, told from shapes and quantization_config."""
        out, width = self.metas[f"{module}.weight"].shape
        suffix = "weight_scale_inv" if "weight_scale_inv" in self.modules()[module] else "weight_scale"
        grid = self.metas[f"{module}.{suffix}"].shape
        declared = fp8_blocks(self.quantization_config) or {FormatSpec("fp8").block}
        for rows, columns in sorted(declared):
            if grid == (-(-out // rows), -(-width // columns)):
                return rows
        raise InputError(f"tensor {module}.{suffix}", f"one scale per block of {sorted(declared)}", str(grid), _FETCH)

    def _format(self, module: str, suffixes: list[str]) -> FormatSpec:
        name = self._detect(module, suffixes)
        if name is None:
            found = ", ".join(sorted(suffixes))
            raise InputError(f"module {module}", "the tensors of a known format", found, _FETCH)
        if name != "int4":
            return FormatSpec(name)
        grid, shape = self.metas[f"{module}.weight_scale"].shape, self.metas[f"{module}.weight_shape"]
        if shape.shape != (2,) or shape.dtype.is_floating_point:
            raise InputError(f"tensor {module}.weight_shape", "two integers (out, in)", str(shape), _FETCH)
        width = int(self.tensor(f"{module}.weight_shape")[1])
        if len(grid) != 2 or width < 1 or grid[1] < 1 or width % grid[1]:
            raise InputError(
                f"tensor {module}.weight_scale", f"a group count that divides in_features {width}", str(grid), _FETCH
            )
        return FormatSpec(name, width // grid[1])

    def _is_packed(self, module: str, suffixes: list[str]) -> bool:
        if module.rpartition(".")[2] in LINEARS:
            return True
        return "weight_packed" in suffixes or any(suffix.startswith("weight_scale") for suffix in suffixes)

    def _detect(self, module: str, suffixes: list[str]) -> str | None:
        try:
            return detect(suffixes)
        except FormatError as error:
            raise InputError(f"module {module}", "a supported number format", str(error), _FETCH) from None

    def _read(self, module: str, suffixes: list[str]) -> PackedWeight:
        tensors = {suffix: self.tensor(join(module, suffix)) for suffix in suffixes}
        try:
            return read(tensors, self.quantization_config)
        except FormatError as error:
            fix = _FETCH
            if set(tensors) == {"weight"}:
                fix = "the base is not BF16: run the quantize step on it (format bf16 only converts)"
            raise InputError(f"module {module}", "a weight in a known number format", str(error), fix) from None


def join(module: str, suffix: str) -> str:
    return f"{module}.{suffix}" if module else suffix
