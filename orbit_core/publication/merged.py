"""A plain BF16 model: the weights that the packed bytes stand for, with the adapter merged in.

One tensor at a time, so memory is that of the largest one and its float64 working copies. The result needs neither
PEFT nor the number format; in exchange it is as large as any BF16 model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from orbit_core.adapters.merge import merged_tensors
from orbit_core.checkpoints.hf import SHARD_BYTES, HFCheckpoint, HFWriter, copy_companions, write_json
from orbit_core.checkpoints.tensorfile import TensorMeta, natural_order
from orbit_core.recipe import Adapter

QUANTIZED_ONLY = ("quantization_config", "compression_config", "torch_dtype")


def write_merged(
    quantized: HFCheckpoint,
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    directory: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    max_shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the merged model as an HF directory; returns the number of its tensors.

    Raises InputError when `tensors` (PEFT names) are not those of `adapter` on this model.
    """
    plan = _plan(quantized)
    with HFWriter(directory, plan, max_shard_bytes) as writer:
        for done, (name, tensor) in enumerate(merged_tensors(quantized, adapter, tensors), start=1):
            writer.add(name, tensor)
            progress(done, len(plan))
    config = {key: value for key, value in quantized.config.items() if key not in QUANTIZED_ONLY}
    write_json(directory / "config.json", {**config, "dtype": "bfloat16"})
    copy_companions(quantized.directory, directory)
    return len(plan)


def _plan(quantized: HFCheckpoint) -> dict[str, TensorMeta]:
    """Name, dtype and shape of every tensor of the dense model, told without reading a weight."""
    linears = set(quantized.linears())
    plan = {f"{module}.weight": TensorMeta(torch.bfloat16, _shape(quantized, module)) for module in linears}
    for name, meta in quantized.metas.items():
        module, _, suffix = name.rpartition(".")
        if module not in linears or suffix == "bias":
            plan[name] = meta
    return {name: plan[name] for name in natural_order(plan)}


def _shape(checkpoint: HFCheckpoint, module: str) -> tuple[int, ...]:
    """[out, in] of a linear: as written beside INT4 codes, or that of the stored codes, two to a byte where packed."""
    suffixes = checkpoint.modules()[module]
    if "weight_shape" in suffixes:
        return tuple(checkpoint.tensor(f"{module}.weight_shape").tolist())
    meta = checkpoint.metas[f"{module}.{'weight_packed' if 'weight_packed' in suffixes else 'weight'}"]
    out, width = meta.shape
    return (out, 2 * width) if meta.dtype == torch.uint8 else (out, width)
