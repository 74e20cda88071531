"""Makes `orbit_kernels` importable, and compressed-tensors available as the outside judge of bytes and values."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from orbit_kernels import FormatSpec, PackedWeight, set_batch_invariant

LAYOUTS = {
    "int4": "pack-quantized",
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}


class CompressedTensors:
    """The installed package behind three verbs. Scales come, as in its observers, from the min and max of a group."""

    def __init__(self) -> None:
        self.quantization = pytest.importorskip("compressed_tensors.quantization")
        compressors = pytest.importorskip("compressed_tensors.compressors")
        self._registry = compressors.BaseCompressor

    def args(self, spec: FormatSpec, block: tuple[int, int] | None = None):
        shapes = {
            "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": spec.group_size},
            "fp8": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": list(block or spec.block)},
            "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        }
        scale_dtype = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8}.get(spec.name)
        return self.quantization.QuantizationArgs(**shapes[spec.name], scale_dtype=scale_dtype, symmetric=True)

    def decompress(self, packed: PackedWeight) -> torch.Tensor:
        """What its own loader makes of the stored tensors, in whatever dtype it chooses."""
        layout = LAYOUTS[packed.spec.name]
        scheme = self.quantization.QuantizationScheme(targets=["Linear"], weights=self.args(packed.spec, packed.block))
        tensors = {key.removesuffix("_inv"): tensor for key, tensor in packed.tensors.items()}
        return self._registry.get_value_from_registry(layout).decompress(tensors, scheme)["weight"]

    def scales(self, weight: torch.Tensor, spec: FormatSpec):
        """(scales as floats, global scale or None) that it derives from `weight`, in the dtype of `weight`."""
        args = self.args(spec)
        utils = pytest.importorskip("compressed_tensors.quantization.utils")
        if spec.name == "fp8":
            rows, cols = spec.block
            blocks = weight.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
            low, high = blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3))
        else:
            groups = weight.unflatten(1, (-1, spec.group_size))
            low, high = groups.amin(dim=2), groups.amax(dim=2)
        whole = utils.generate_gparam(weight.amin(), weight.amax()) if spec.name == "nvfp4" else None
        return utils.calculate_qparams(low, high, args, global_scale=whole)[0], whole

    def codes(self, weight: torch.Tensor, spec: FormatSpec, scale: torch.Tensor, whole: torch.Tensor | None = None):
        """The numbers on the grid (not yet packed) that it rounds `weight` to, given the stored scales."""
        return self.quantization.lifecycle.forward.quantize(
            x=weight, scale=scale, zero_point=None, args=self.args(spec), global_scale=whole
        )


@pytest.fixture(scope="session")
def compressed_tensors() -> CompressedTensors:
    return CompressedTensors()


@pytest.fixture
def weight() -> torch.Tensor:
    """A float32 weight [64, 256] with a few outliers, a zero group and a zero row."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator) * 0.05
    weight[3, 7], weight[5, 130] = 4.0, -3.0
    weight[8, 32:64] = 0.0
    weight[9] = 0.0
    return weight


@pytest.fixture
def fast_mode() -> Iterator[None]:
    """Products may take the ways in which rows do not keep their bits."""
    set_batch_invariant(False)
    yield
    set_batch_invariant(True)
