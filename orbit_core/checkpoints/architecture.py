"""The sizes of a model that a checkpoint's layout depends on, read once from `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orbit_core.checkpoints.latent import MODEL_TYPES, WRAPPED, Latent
from orbit_core.errors import InputError

COMPUTED = ("qwen3", "qwen3_moe", "llama")  # by the torch engines too
SUPPORTED = (*COMPUTED, *MODEL_TYPES)
_LARGEST = 2**31 - 1
_FETCH = "fetch the model's config.json again"
_AGAIN = "convert again"
_OTHER = "give a model of one of these types"


def refuse_code(config: Mapping[str, Any], source: str = "config.json") -> None:
    """Raises InputError when a config names Python code that lies beside it."""
    if config.get("auto_map"):
        found = str(config["auto_map"])[:200]
        fix = "remove auto_map, if the model type is computed here without it"
        raise InputError(f"{source}: auto_map", "none: no code of a checkpoint is run", found, fix)


def refuse_uncomputed(directory: Path) -> None:
    """Raises InputError for a model that is quantised and converted, but that the torch engines do not compute. What
    else may be wrong with its config.json is for the step that reads it to say."""
    file = directory / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if kind in MODEL_TYPES:
        expected = f"one of {', '.join(COMPUTED)}, since an engine of the recipe is torch"
        fix = "set engines.trainer and engines.rollout to engines that compute it, or give another model"
        raise InputError(f"{file}: model_type", expected, repr(kind), fix)


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
    latent: Latent | None = None  # of models with latent attention

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> Architecture:
        """Raises InputError for a model type that is not supported or a size that is missing or impossible."""
        kind = config.get("model_type")
        if kind not in SUPPORTED:
            raise InputError(f"{source}: model_type", f"one of {', '.join(SUPPORTED)}", repr(kind), _OTHER)

        if kind == WRAPPED:
            text = config.get("text_config")
            if not isinstance(text, dict):
                raise InputError(f"{source}: text_config", "what the language model is like", repr(text)[:80], _FETCH)
            config = text

        def size(name: str, default: int | None = None, least: int = 1) -> int:
            value = config.get(name)
            value = default if value is None else value
            if type(value) is not int or not least <= value <= _LARGEST:
                raise InputError(f"{source}: {name}", f"an integer of {least} to {_LARGEST}", repr(value)[:80], _FETCH)
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        groups = size("num_key_value_heads", heads)
        if heads % groups:
            raise InputError(
                f"{source}: num_key_value_heads", f"a divisor of {heads} attention heads", str(groups), _FETCH
            )
        latent = None
        if kind in MODEL_TYPES:
            latent = Latent(
                query=size("q_lora_rank", 0, least=0),
                key_value=size("kv_lora_rank"),
                nope=size("qk_nope_head_dim"),
                rope=size("qk_rope_head_dim"),
                value=size("v_head_dim"),
                dense_layers=size("first_k_dense_replace", 0, least=0),
                shared_experts=size("n_shared_experts", 0, least=0),
                wrapped=kind == WRAPPED,
            )
        moe = kind == "qwen3_moe" or latent is not None
        routed = config.get("n_routed_experts") if latent else config.get("num_local_experts")
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
            experts=size("num_experts", routed) if moe else 0,
            expert_intermediate=size("moe_intermediate_size") if moe else 0,
            latent=latent,
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str) -> Architecture:
        try:
            latent = content.get("latent")
            found = cls(**{**content, "latent": None if latent is None else Latent(**latent)})
        except TypeError as error:
            raise InputError(f"{source}: architecture", "the sizes that convert writes", str(error), _AGAIN) from None
        fields = asdict(found)
        inner = fields.pop("latent") or {}
        for name, value in {**fields, **inner}.items():
            size, flag = type(value) is int and 0 <= value <= _LARGEST, type(value) is bool
            if not {"model_type": value in SUPPORTED, "tied": flag, "wrapped": flag}.get(name, size):
                raise InputError(f"{source}: architecture", f"{name} as convert writes it", repr(value)[:80], _AGAIN)
        return found

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}
