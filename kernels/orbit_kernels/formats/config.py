"""The few facts that a checkpoint's `quantization_config` adds to its tensors.

Three dialects: compressed-tensors (`config_groups: {name: {weights: {...}}}`), fine-grained FP8 (`weight_block_size`)
and ModelOpt (`quant_algo`). Everything else in those blocks (targets, ignore lists, activations) is about models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def weight_schemes(quant_config: Mapping[str, Any] | None, num_bits: int, kind: str) -> list[Mapping[str, Any]]:
    """The `weights` entries of all compressed-tensors groups with this bit width and type ("int" or "float")."""
    groups = (quant_config or {}).get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values() if isinstance(group, Mapping)]
    return [scheme for scheme in weights if scheme.get("num_bits") == num_bits and scheme.get("type", "int") == kind]


def fp8_blocks(quant_config: Mapping[str, Any] | None) -> set[tuple[int, int]]:
    """The (rows, cols) of all FP8 blocks that are declared; empty when nothing is."""
    declared = [scheme.get("block_structure") for scheme in weight_schemes(quant_config, num_bits=8, kind="float")]
    declared.append((quant_config or {}).get("weight_block_size"))
    return {(int(block[0]), int(block[1])) for block in declared if block}
