"""What a packed weight is: a format, a logical shape, and the tensors exactly as a checkpoint stores them.

A frozen weight W[out, in] is kept as the bytes that are on disk. Nothing is renamed, re-derived or re-gridded after it
was read, so a weight that went checkpoint -> trainer -> checkpoint is the same bytes, and two engines that hold equal
bytes compute with equal values.

One scale covers a rectangle of `block = (rows, cols)` elements: (1, group_size) for the grouped 4-bit formats,
(128, 128) for FP8, (0, 0) where there is no scale. The rectangle is a field of the weight and never guessed from
tensor shapes, because rows that were interleaved (fused QKV) may carry a finer grid than their checkpoint had.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

DEFAULT_GROUP_SIZE = {"int4": 32, "fp8": 128, "nvfp4": 16, "mxfp4": 32, "bf16": 0}


class FormatError(ValueError):
    """A format, a tensor or a checkpoint is not what its description says. The message names what, expected, found."""


@dataclass(frozen=True)
class FormatSpec:
    """A number format and how many elements along `in` share one scale.

    name        "int4" | "fp8" | "nvfp4" | "mxfp4" | "bf16"
    group_size  left out: the format's own (int4 32, fp8 128, nvfp4 16, mxfp4 32, bf16 0). Only int4 has a choice:
                any positive size is readable, 32 and 128 are the sizes that `quantize` writes.

    Raises FormatError for an unknown name or a group size that the format does not have.
    """

    name: str
    group_size: int = None  # type: ignore[assignment]  # filled below, an int ever after

    def __post_init__(self) -> None:
        if self.name not in DEFAULT_GROUP_SIZE:
            raise FormatError(f"format: expected one of {', '.join(DEFAULT_GROUP_SIZE)}; found {self.name!r}")
        default = DEFAULT_GROUP_SIZE[self.name]
        if self.group_size is None:
            object.__setattr__(self, "group_size", default)
        size: Any = self.group_size
        if not isinstance(size, int) or isinstance(size, bool):
            raise FormatError(f"{self.name} group_size: expected an int; found {size!r}")
        if self.name == "int4" and size < 1:
            raise FormatError(f"int4 group_size: expected a positive int; found {size}")
        if self.name != "int4" and size != default:
            raise FormatError(f"{self.name} group_size: the format fixes {default}; found {size}")

    @property
    def block(self) -> tuple[int, int]:
        """(rows, cols) that one scale covers in this format's usual layout."""
        if self.name == "fp8":
            return self.group_size, self.group_size
        return (1, self.group_size) if self.group_size else (0, 0)


@dataclass(frozen=True)
class TensorRule:
    """What one stored tensor must look like."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]
    required: bool = True


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One weight W[out, in] as stored.

    spec     the number format
    shape    (out, in), the logical shape
    tensors  suffix after "<module>." -> the tensor, exactly as on disk (see README.md for each format's suffixes)
    block    (rows, cols) that one scale covers; left out: `spec.block`

    Raises FormatError at construction when a tensor is missing, unknown, or of the wrong dtype or shape. What takes a
    look at the numbers (`validate`) is separate: it costs a pass over the scales and a synchronisation on a GPU.
    """

    spec: FormatSpec
    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    block: tuple[int, int] = None  # type: ignore[assignment]  # filled below, a pair ever after

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _two_sizes(self.shape))
        if self.block is None:
            object.__setattr__(self, "block", self.spec.block)
        object.__setattr__(self, "block", tuple(int(size) for size in self.block))
        _check_block(self)
        _check_structure(self)

    def validate(self) -> PackedWeight:
        """Returns self, or raises FormatError: NaN or infinite scales, zero scales under nonzero codes, and whatever
        else the format can tell from its numbers."""
        implementation(self.spec).check_values(self)
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedWeight:
        """The same bytes on another device."""
        moved = {key: tensor.to(device, non_blocking=non_blocking) for key, tensor in self.tensors.items()}
        return replace(self, tensors=moved)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes stored, all tensors together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def __repr__(self) -> str:
        stored = ", ".join(f"{key} {tuple(t.shape)} {t.dtype}" for key, t in self.tensors.items())
        return f"PackedWeight({self.spec.name}, {self.shape}, block={self.block}, {stored})"


class Format(ABC):
    """One number format: what its tensors are called, what their bytes mean, how to make and undo them."""

    name: str
    compute_dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

    @abstractmethod
    def claims(self, names: set[str]) -> bool:
        """Whether a module that stores exactly these suffixes (bias aside) is of this format."""

    @abstractmethod
    def rules(self, packed: PackedWeight) -> dict[str, TensorRule]:
        """Suffix -> what that tensor must look like, given the weight's shape and block."""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], quant_config: Mapping[str, Any] | None) -> PackedWeight:
        """The packed weight of one module's stored tensors, bytes untouched."""

    @abstractmethod
    def quantize(self, weight: Tensor, spec: FormatSpec) -> PackedWeight:
        """float32 weight[out, in], which may be overwritten -> packed, round to nearest."""

    @abstractmethod
    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        """packed -> dense[out, in] of `dtype`."""

    @abstractmethod
    def check_values(self, packed: PackedWeight) -> None:
        """Raises FormatError when the stored numbers cannot be a weight."""


REGISTRY: dict[str, Format] = {}  # filled by formats/__init__.py, one entry per file


def implementation(spec: FormatSpec) -> Format:
    return REGISTRY[spec.name]


def require(condition: bool, what: str, expected: object, found: object, hint: str = "") -> None:
    """Raises FormatError "<what>: expected <expected>; found <found>. <hint>" unless the condition holds."""
    if not condition:
        raise FormatError(f"{what}: expected {expected}; found {found}" + (f". {hint}" if hint else ""))


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. By the extremes, which a NaN passes through: a tenth of what a look at each
    value costs on a CPU."""
    if values.numel() == 0 or values.dtype not in _WITH_EXTREMES:
        return bool(torch.isfinite(values).all())
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values))


_WITH_EXTREMES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def require_finite(key: str, scale: Tensor) -> None:
    """Raises FormatError naming the first scale that is NaN or infinite."""
    bad = ~torch.isfinite(scale.float())
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise FormatError(f"{key}: expected finite scales; found {scale[where].item()} at {where}")


def require_codes_under_zero_scales(
    key: str, scale: Tensor, codes_of: Callable[[], Tensor], spread: tuple[int, int]
) -> None:
    """Raises FormatError when a scale is zero but its elements are not: the weight lost a block of values.

    `codes_of()` [out, in] is nonzero where a value is, and is asked for only if there is a zero scale at all; `spread`
    (rows, cols) is the rectangle of one scale.
    """
    zero = scale.float() == 0
    if not bool(zero.any()):
        return
    codes, (rows, cols) = codes_of(), spread
    lost = spread_blocks(zero, rows, cols, (codes.shape[0], codes.shape[1])) & (codes != 0)
    if bool(lost.any()):
        row, col = (int(i) for i in lost.nonzero()[0])
        raise FormatError(
            f"{key}: expected a nonzero scale where codes are nonzero; "
            f"found scale 0 at {(row // rows, col // cols)} over a nonzero code at {(row, col)}"
        )


def spread_blocks(scale: Tensor, rows: int, cols: int, shape: tuple[int, int]) -> Tensor:
    """scale[ceil(out/rows), ceil(in/cols)] -> one value per element, [out, in]; ragged edges are cut off."""
    wide = scale.repeat_interleave(cols, dim=1)[:, : shape[1]]
    return wide if rows == 1 else wide.repeat_interleave(rows, dim=0)[: shape[0]]


def divide(values: Tensor, number: float) -> Tensor:
    """values / number, correctly rounded on every device. CUDA multiplies by 1 / number when given a Python number."""
    return values / torch.tensor(number, dtype=values.dtype, device=values.device)


def in_pieces(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight [out, in], some at a time, so that several passes over them find them in the cache."""
    step = max(1, _PIECE // weight.shape[1])
    return (slice(first, first + step) for first in range(0, weight.shape[0], step))


_PIECE = 1 << 18  # elements: a MiB of float32


def require_divisible(what: str, width: int, group: int) -> None:
    require(
        width % group == 0,
        f"{what} with in_features {width}",
        f"in_features divisible by group size {group}",
        f"remainder {width % group}",
    )


def _two_sizes(shape: Sequence[int]) -> tuple[int, int]:
    sizes = tuple(int(size) for size in shape)
    require(len(sizes) == 2 and min(sizes) > 0, "shape", "(out, in), both positive", sizes)
    return sizes[0], sizes[1]


def _check_block(packed: PackedWeight) -> None:
    name, block = packed.spec.name, packed.block
    if name == "fp8":
        require(len(block) == 2 and min(block) > 0, "fp8 block", "(rows, cols), both positive", block)
    else:
        require(block == packed.spec.block, f"{name} block", packed.spec.block, block)


def _check_structure(packed: PackedWeight) -> None:
    rules = implementation(packed.spec).rules(packed)
    name = packed.spec.name
    unknown = sorted(set(packed.tensors) - set(rules))
    require(not unknown, f"{name} tensors", f"only {', '.join(rules)}", f"also {', '.join(unknown)}")
    for key, rule in rules.items():
        tensor = packed.tensors.get(key)
        if tensor is None:
            require(not rule.required, f"{name} tensor {key}", f"shape {rule.shape}", "nothing")
            continue
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in rule.dtypes)
        require(tensor.dtype in rule.dtypes, f"{name} {key} dtype", wanted, str(tensor.dtype).removeprefix("torch."))
        found = tuple(tensor.shape)
        scalar = rule.shape == (1,) and tensor.numel() == 1 and tensor.dim() <= 1  # stored as [] or [1]
        require(scalar or found == rule.shape, f"{name} {key} shape for weight {packed.shape}", rule.shape, found)
