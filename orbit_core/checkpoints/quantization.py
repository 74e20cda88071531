"""`quantization_config`: which modules of a checkpoint are in which format, as transformers, SGLang and vLLM read it.

Written  INT4, NVFP4, MXFP4 in compressed-tensors' dialect, FP8 in the fine-grained dialect (`quant_method: fp8`).
Read     those, compressed-tensors' block FP8, and ModelOpt's NVFP4.

Modules that stay BF16 are written out by their full names, so that no reader has to agree with us on patterns.

What transformers 5.23 with compressed-tensors 0.20 makes of the directories on a CPU: the same logits as our reference
for every format and model type but one. **NVFP4 experts of Qwen3-MoE load without an error and are wrong**: its
converter for fused experts (CompressedTensorsDequantize, the branch for packed experts) hands codes, scales and shape
to the decompressor and drops `weight_global_scale`, so those weights come out too large by that factor. Its other
modules, and dense NVFP4 models, are right. A test pins this down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from orbit_kernels import FormatError, FormatSpec

from orbit_core.checkpoints.base import Checkpoint
from orbit_core.checkpoints.scheme import GIVE
from orbit_core.checkpoints.tensorfile import TensorMeta
from orbit_core.errors import InputError

_COMPRESSED = {  # our format -> compressed-tensors' name of the layout, and what it says about the weights
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group"}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "scale_dtype": "torch.uint8"},
    ),
}


@dataclass(frozen=True)
class Declared:
    """What a quantization_config says: the formats that occur and the modules (or patterns) left alone."""

    formats: tuple[FormatSpec, ...]
    ignore: tuple[str, ...]


def quantization_config(spec: FormatSpec, unquantized: Iterable[str]) -> dict[str, Any] | None:
    """The block for config.json, or None for bf16. `unquantized`: full names of the linears that stay BF16."""
    if spec.name == "bf16":
        return None
    ignore = list(unquantized)
    if spec.name == "fp8":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(spec.block),
            "modules_to_not_convert": ignore,
        }
    layout, weights = _COMPRESSED[spec.name]
    scheme = {"symmetric": True, "dynamic": False, "group_size": spec.group_size, **weights}
    group = {
        "targets": ["Linear"],
        "weights": scheme,
        "input_activations": None,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def declared(config: Mapping[str, Any] | None) -> Declared:
    """Read a quantization_config. Raises InputError for a scheme that no format of ours stands for."""
    if config is None:
        return Declared((FormatSpec("bf16"),), ())
    method = config.get("quant_method")
    try:
        if method == "fp8":
            return Declared((FormatSpec("fp8"),), tuple(config.get("modules_to_not_convert") or ()))
        if method == "modelopt" or method == "modelopt_fp4":
            if config.get("quant_algo") != "NVFP4":
                raise FormatError(f"ModelOpt quant_algo: expected NVFP4; found {config.get('quant_algo')!r}")
            return Declared((FormatSpec("nvfp4"),), tuple(config.get("exclude_modules") or config.get("ignore") or ()))
        if method == "compressed-tensors":
            groups = list((config.get("config_groups") or {}).values())
            formats = tuple(dict.fromkeys(_format(group.get("weights") or {}) for group in groups))
            return Declared(formats, tuple(config.get("ignore") or ()))
    except FormatError as error:
        raise InputError("quantization_config", "a supported scheme", str(error), GIVE) from None
    raise InputError("quantization_config: quant_method", "compressed-tensors, fp8 or modelopt", repr(method), GIVE)


def precision_of(checkpoint: Checkpoint) -> tuple[dict[str, FormatSpec], tuple[str, ...]]:
    """(linear module -> the format it is stored in, what quantization_config says is ignored).

    The formats are told from the tensors themselves. Raises InputError when a module is stored in a quantised format
    that the quantization_config does not declare.
    """
    formats = checkpoint.formats()
    said = declared(checkpoint.quantization_config)
    known = {spec.name for spec in said.formats} | {"bf16"}
    for module, spec in formats.items():
        if spec.name not in known:
            expected = f"{' or '.join(sorted(known))}, as quantization_config says"
            raise InputError(f"module {module}", expected, spec.name, "fetch the model again: its parts do not agree")
    return formats, said.ignore


def is_ignored(module: str, ignore: Iterable[str]) -> bool:
    """Whether the last dotted parts of the module's name are an entry of `ignore`."""
    return any(module == entry or module.endswith(f".{entry}") for entry in ignore)


def stored_tensors(spec: FormatSpec, shape: tuple[int, int]) -> dict[str, TensorMeta]:
    """Suffix -> dtype and shape of what `orbit_kernels.quantize` makes of a weight [out, in]."""
    out, width = shape
    group = spec.group_size
    if spec.name == "int4":
        return {
            "weight_packed": TensorMeta(torch.int32, (out, width // 8)),
            "weight_scale": TensorMeta(torch.bfloat16, (out, width // group)),
            "weight_shape": TensorMeta(torch.int64, (2,)),
        }
    if spec.name == "fp8":
        grid = (-(-out // group), -(-width // group))
        return {
            "weight": TensorMeta(torch.float8_e4m3fn, shape),
            "weight_scale_inv": TensorMeta(torch.float32, grid),
        }
    if spec.name == "nvfp4":
        return {
            "weight_packed": TensorMeta(torch.uint8, (out, width // 2)),
            "weight_scale": TensorMeta(torch.float8_e4m3fn, (out, width // group)),
            "weight_global_scale": TensorMeta(torch.float32, (1,)),
        }
    if spec.name == "mxfp4":
        return {
            "weight_packed": TensorMeta(torch.uint8, (out, width // 2)),
            "weight_scale": TensorMeta(torch.uint8, (out, width // group)),
        }
    return {"weight": TensorMeta(torch.bfloat16, shape)}


def _format(weights: Mapping[str, Any]) -> FormatSpec:
    """One compressed-tensors `weights` entry."""
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if not weights.get("symmetric", True):
        raise FormatError("weights: expected symmetric quantisation; found symmetric=false")
    if (bits, kind) == (4, "int") and isinstance(group, int) and group > 0:
        return FormatSpec("int4", group)
    if (bits, kind, strategy) == (8, "float", "block"):
        return FormatSpec("fp8")
    if (bits, kind) == (4, "float"):
        return FormatSpec("nvfp4" if strategy == "tensor_group" else "mxfp4")
    raise FormatError(f"weights: expected int4 groups, block FP8, NVFP4 or MXFP4; found {dict(weights)}")
