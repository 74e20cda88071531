"""The sizes of a model that a checkpoint's layout depends on, read once from `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orbit_core.errors import InputError

SUPPORTED = ("qwen3", "qwen3_moe", "llama")


@dataclass(frozen=True)
class Architecture:
    """Sizes in elements. `query_groups` is the number of key/value heads; `experts` is 0 for a dense model."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    query_groups: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    experts: int = 0
    expert_intermediate: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> Architecture:
        """Raises InputError for a model type that is not supported or a size that is missing or impossible."""
        kind = config.get("model_type")
        if kind not in SUPPORTED:
            raise InputError(f"{source}: model_type", f"one of {', '.join(SUPPORTED)}", repr(kind))

        def size(name: str, default: int | None = None) -> int:
            value = config.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{source}: {name}", "a positive integer", repr(value))
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        groups = size("num_key_value_heads", heads)
        if heads % groups:
            raise InputError(f"{source}: num_key_value_heads", f"a divisor of {heads} attention heads", str(groups))
        moe = kind == "qwen3_moe"
        return cls(
            model_type=kind,
            layers=size("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            query_groups=groups,
            head_dim=size("head_dim", hidden // heads),
            intermediate=size("intermediate_size"),
            vocabulary=size("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
            # transformers 5 writes num_local_experts or num_experts, depending on its release
            experts=size("num_experts", config.get("num_local_experts")) if moe else 0,
            expert_intermediate=size("moe_intermediate_size") if moe else 0,
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str) -> Architecture:
        try:
            return cls(**content)
        except TypeError as error:
            raise InputError(f"{source}: architecture", "the sizes that convert writes", str(error)) from None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
