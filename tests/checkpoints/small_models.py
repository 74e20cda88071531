"""Small models written to disk without transformers: real files, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from orbit_core.checkpoints.hf import HFWriter, write_json
from orbit_core.checkpoints.tensorfile import TensorMeta, natural_order
from orbit_core.recipe import Precision

PRECISIONS = {
    "int4-32": Precision(format="int4"),
    "int4-128": Precision(format="int4", group_size=128),
    "fp8": Precision(format="fp8"),
    "nvfp4": Precision(format="nvfp4"),
    "mxfp4": Precision(format="mxfp4"),
    "bf16": Precision(format="bf16"),
}
TOKENIZER = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
 "pre_tokenizer": null, "post_processor": null, "decoder": null,
 "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 39}, "unk_token": "a"}}"""
MODELS: dict[str, dict[str, Any]] = {  # hidden 128 everywhere, so that every group size divides
    "dense-gqa": {"model_type": "qwen3", "heads": 4, "groups": 2, "head_dim": 32},
    "dense-tied-wide-heads": {"model_type": "qwen3", "heads": 4, "groups": 1, "head_dim": 64, "tied": True},
    "dense-bias-128": {"model_type": "llama", "heads": 3, "groups": 3, "head_dim": 128, "bias": True, "inner": 384},
    "moe": {"model_type": "qwen3_moe", "heads": 4, "groups": 2, "head_dim": 96, "experts": 3, "tied": True},
}


def config_of(
    model_type: str,
    heads: int,
    groups: int,
    head_dim: int,
    inner: int = 256,
    experts: int = 0,
    tied: bool = False,
    bias: bool = False,
    hidden: int = 128,
) -> dict[str, Any]:
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "vocab_size": 40,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "torch_dtype": "bfloat16",
    }
    if experts:
        config |= {"num_experts": experts, "moe_intermediate_size": 128, "num_experts_per_tok": 2}
    return config


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published tensor names and shapes of a model."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (40, hidden)
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        for name, rows, width in (
            ("q_proj", query, hidden),
            ("k_proj", key, hidden),
            ("v_proj", key, hidden),
            ("o_proj", hidden, query),
        ):
            shapes[f"{base}.self_attn.{name}.weight"] = (rows, width)
            if config["attention_bias"]:
                shapes[f"{base}.self_attn.{name}.bias"] = (rows,)
        shapes[f"{base}.input_layernorm.weight"] = (hidden,)
        shapes[f"{base}.post_attention_layernorm.weight"] = (hidden,)
        if config["model_type"] != "llama":
            shapes[f"{base}.self_attn.q_norm.weight"] = shapes[f"{base}.self_attn.k_norm.weight"] = (head,)
        if "num_experts" not in config:
            mlps = [(f"{base}.mlp", inner)]
        else:
            shapes[f"{base}.mlp.gate.weight"] = (config["num_experts"], hidden)
            size = config["moe_intermediate_size"]
            mlps = [(f"{base}.mlp.experts.{e}", size) for e in range(config["num_experts"])]
        for mlp, size in mlps:
            shapes[f"{mlp}.gate_proj.weight"] = shapes[f"{mlp}.up_proj.weight"] = (size, hidden)
            shapes[f"{mlp}.down_proj.weight"] = (hidden, size)
    return shapes


def write_model(
    directory: Path,
    config: dict[str, Any],
    replace: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 10**9,
) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(config)
    tensors = {
        name: torch.randn(shapes[name], generator=generator).mul_(0.05).to(dtype) for name in natural_order(shapes)
    }
    tensors |= replace or {}
    plan = {name: TensorMeta.of(tensor) for name, tensor in tensors.items()}
    with HFWriter(directory, plan, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    write_json(directory / "config.json", config)
    (directory / "tokenizer.json").write_text(TOKENIZER)
    (directory / "generation_config.json").write_text("{}")
    return directory


def tensors_of(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """name -> (dtype, shape, bytes) of every tensor, read with the safetensors library and not with ours."""
    from safetensors import safe_open

    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensor = opened.get_tensor(name)
                found[name] = (tensor.dtype, tuple(tensor.shape), bytes(tensor.reshape(-1).view(torch.uint8).numpy()))
    return found
