"""Models with latent attention and a mixture of experts: DeepSeek-V3, Kimi-K2 and, within a model that also sees, K2.6.

Their names and shapes follow from config.json alone:

    self_attn.q_a_proj, q_a_layernorm, q_b_proj            hidden -> query latent -> heads of (nope + rope)
    self_attn.kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj  hidden -> latent + rope; latent -> heads of (nope + value)
    mlp                                                    of the first `dense_layers` layers
    mlp.gate, mlp.shared_experts, mlp.experts.E            of the others

Kimi-K2.6 wraps this as `language_model.`, beside `vision_tower.` and `mm_projector.`, which are carried along as they
lie. Nothing here computes such a model: these are the names by which its checkpoints are checked and converted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orbit_core.checkpoints.architecture import Architecture

WRAPPED = "kimi_k25"  # the model_type of K2.5 and K2.6, whose language model is described by `text_config`
MODEL_TYPES = ("deepseek_v3", "kimi_k2", WRAPPED)
PREFIX = "language_model."
SEEING = re.compile(r"(vision_tower|mm_projector)(\.\w+)+")
BIAS = "mlp.gate.e_score_correction_bias"

MEGATRON = {  # HF module of a layer -> Megatron module, or key where it ends in a tensor's name
    "self_attn.q_proj": "self_attention.linear_q_proj",
    "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
    "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
    "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
    "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
    "self_attn.o_proj": "self_attention.linear_proj",
}
MEGATRON_NORMS = {
    "input_layernorm": ("input_layernorm", "weight"),
    "self_attn.q_a_layernorm": ("self_attention.linear_q_up_proj", "layer_norm_weight"),
    "self_attn.kv_a_layernorm": ("self_attention.linear_kv_up_proj", "layer_norm_weight"),
}


@dataclass(frozen=True)
class Latent:
    """Sizes in elements. `query` is 0 where queries have no latent."""

    query: int
    key_value: int
    nope: int  # of a head: the part without position
    rope: int  # the part with it; keys share one
    value: int
    dense_layers: int
    shared_experts: int
    wrapped: bool = False


def expected(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every published name of the language model, with its shape."""
    prefix = prefix_of(arch)
    yield f"{prefix}model.embed_tokens.weight", (arch.vocabulary, arch.hidden)
    yield f"{prefix}model.norm.weight", (arch.hidden,)
    if not arch.tied:
        yield f"{prefix}lm_head.weight", (arch.vocabulary, arch.hidden)
    attention = list(_attention(arch))
    for layer in range(arch.layers):
        base = f"{prefix}model.layers.{layer}"
        for name, shape in attention:
            yield f"{base}.{name}", shape
        yield from ((f"{base}.{name}", shape) for name, shape in _mlp(arch, layer))


def prefix_of(arch: Architecture) -> str:
    return PREFIX if arch.latent is not None and arch.latent.wrapped else ""


def is_carried(arch: Architecture, name: str) -> bool:
    """Whether a tensor belongs to the part that sees."""
    return arch.latent is not None and arch.latent.wrapped and SEEING.fullmatch(name) is not None


def _attention(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    latent = arch.latent
    assert latent is not None
    queries = arch.heads * (latent.nope + latent.rope)
    yield from ((f"{norm}.weight", (arch.hidden,)) for norm in ("input_layernorm", "post_attention_layernorm"))
    if latent.query:
        yield "self_attn.q_a_proj.weight", (latent.query, arch.hidden)
        yield "self_attn.q_a_layernorm.weight", (latent.query,)
        yield "self_attn.q_b_proj.weight", (queries, latent.query)
    else:
        yield "self_attn.q_proj.weight", (queries, arch.hidden)
    yield "self_attn.kv_a_proj_with_mqa.weight", (latent.key_value + latent.rope, arch.hidden)
    yield "self_attn.kv_a_layernorm.weight", (latent.key_value,)
    yield "self_attn.kv_b_proj.weight", (arch.heads * (latent.nope + latent.value), latent.key_value)
    yield "self_attn.o_proj.weight", (arch.hidden, arch.heads * latent.value)


def _mlp(arch: Architecture, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    latent = arch.latent
    assert latent is not None
    if layer < latent.dense_layers:
        yield from _gated("mlp", arch.hidden, arch.intermediate)
        return
    yield "mlp.gate.weight", (arch.experts, arch.hidden)
    yield BIAS, (arch.experts,)
    if latent.shared_experts:
        yield from _gated("mlp.shared_experts", arch.hidden, arch.expert_intermediate * latent.shared_experts)
    for expert in range(arch.experts):
        yield from _gated(f"mlp.experts.{expert}", arch.hidden, arch.expert_intermediate)


def _gated(module: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{module}.gate_proj.weight", (inner, hidden)
    yield f"{module}.up_proj.weight", (inner, hidden)
    yield f"{module}.down_proj.weight", (hidden, inner)


def attention_places(hf: str, megatron: str, stored: Mapping[str, list[str]]) -> Iterator[tuple[str, str, str | None]]:
    """(HF module, Megatron module, name of the tensor there if it is another) of a layer's attention."""
    for source, module in MEGATRON.items():
        if f"{hf}.{source}" in stored:
            yield f"{hf}.{source}", f"{megatron}.{module}", None
    for source, (module, name) in MEGATRON_NORMS.items():
        if f"{hf}.{source}" in stored:
            yield f"{hf}.{source}", f"{megatron}.{module}", name
