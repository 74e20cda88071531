"""Which Megatron-Core key holds which Hugging Face tensors.

    model.embed_tokens                          embedding.word_embeddings
    model.layers.I.input_layernorm              decoder.layers.I.self_attention.linear_qkv.layer_norm_weight
    model.layers.I.self_attn.{q,k,v}_proj       decoder.layers.I.self_attention.linear_qkv
    model.layers.I.self_attn.o_proj             decoder.layers.I.self_attention.linear_proj
    model.layers.I.self_attn.{q,k}_norm         decoder.layers.I.self_attention.{q,k}_layernorm
    model.layers.I.post_attention_layernorm     decoder.layers.I.mlp.linear_fc1.layer_norm_weight   (dense layer)
                                                decoder.layers.I.pre_mlp_layernorm                  (MoE layer)
    model.layers.I.mlp.{gate,up}_proj           decoder.layers.I.mlp.linear_fc1
    model.layers.I.mlp.down_proj                decoder.layers.I.mlp.linear_fc2
    model.layers.I.mlp.gate                     decoder.layers.I.mlp.router
    model.layers.I.mlp.experts.E.{gate,up}_proj decoder.layers.I.mlp.experts.experts.linear_fc1 [E]
    model.layers.I.mlp.experts.E.down_proj      decoder.layers.I.mlp.experts.experts.linear_fc2 [E]
    model.norm, lm_head                         decoder.final_layernorm, output_layer
    (models with latent attention)              latent.py

These are the keys of Megatron-Core's sharded state dict with one key per layer (non-homogeneous layers). Experts share
one key per layer whose first axis is the expert, one chunk each: what both its grouped and its sequential experts save
and load, at any expert-parallel size. A packed weight keeps its on-disk suffix after the module (`...weight_packed`).

Megatron-Core 0.16 loads the BF16 keys of all three model types through its own dist_checkpointing, at TP 2 and EP 2
too, and computes the logits of transformers (float32, 5e-7). Two things are its caller's: Transformer Engine's
`_extra_state` entries are not written (leave them out of the state dict to load), and the layer spec without
Transformer Engine calls a MoE layer's pre_mlp_layernorm by the dense layer's key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from orbit_core.checkpoints import latent
from orbit_core.checkpoints.architecture import Architecture
from orbit_core.checkpoints.base import LINEARS
from orbit_core.checkpoints.fusion import Fusion, grid_of
from orbit_core.checkpoints.tensorfile import TensorMeta
from orbit_core.errors import InputError

PER_TENSOR = frozenset({"weight_shape", "weight_global_scale", "weight_scale_2", "input_global_scale", "input_scale"})
_PER_ROW = frozenset({"weight", "weight_packed", "weight_scale", "bias"})
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_OUTSIDE = {  # HF module -> Megatron module
    "model.embed_tokens": "embedding.word_embeddings",
    "model.norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
}
_ALONE = {  # within a layer, module by module
    "self_attn.o_proj": "self_attention.linear_proj",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "mlp.down_proj": "mlp.linear_fc2",
    "mlp.gate": "mlp.router",
}
_RENAMED = {"e_score_correction_bias": "expert_bias"}  # of the router
_LAYER = re.compile(rf"(?:{re.escape(latent.PREFIX)})?model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)")


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a Megatron tensor and what it is made of. With an expert, the first axis is the expert's."""

    parts: tuple[str, ...]  # HF tensor names
    fusion: Fusion
    shape: tuple[int, ...]  # of the fused parts, without the expert axis
    expert: int | None = None

    @property
    def offsets(self) -> tuple[int, ...]:
        zeros = (0,) * len(self.shape)
        return zeros if self.expert is None else (self.expert, *zeros)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.shape if self.expert is None else (1, *self.shape)


@dataclass
class MegatronTensor:
    """One key of the checkpoint: a global tensor in one chunk, or one chunk per expert."""

    meta: TensorMeta
    chunks: list[Chunk] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """Where a group of HF modules goes, all their tensors suffix by suffix."""

    module: str
    sources: tuple[str, ...]
    groups: int = 1
    expert: int | None = None
    rename: str | None = None  # the key's last part, when it is not the HF suffix


def plan(
    architecture: Architecture, metas: Mapping[str, TensorMeta], fp8_rows: Mapping[str, int]
) -> dict[str, MegatronTensor]:
    """Megatron key -> its tensor and parts, for every tensor of a HF checkpoint.

    metas     HF name -> dtype and shape
    fp8_rows  linear module -> rows that one of its block scales covers, for the modules that are block FP8

    Raises InputError for a tensor with no place in Megatron, one that is missing, or parts that cannot be fused
    without loss (different formats or dtypes among q/k/v, gate/up or the experts of a layer).
    """
    tensors: dict[str, MegatronTensor] = {}
    taken: set[str] = set()
    stored: dict[str, list[str]] = {}
    for name in metas:
        module, _, suffix = name.rpartition(".")
        stored.setdefault(module, []).append(suffix)
    for place in _places(architecture, stored):
        suffixes = _common_suffixes(place, stored)
        for suffix in suffixes:
            names = tuple(f"{source}.{suffix}" for source in place.sources)
            chunk = _chunk(place, suffix, names, metas, fp8_rows)
            _add(
                tensors,
                f"{place.module}.{place.rename or _RENAMED.get(suffix, suffix)}",
                chunk,
                metas[names[0]],
                architecture,
            )
            taken.update(names)
    left = [name for name in metas if name not in taken]
    if left:
        raise InputError(
            f"tensor {left[0]}",
            "a tensor that Megatron-Core has a place for",
            f"{len(left)} without one",
            "remove it from the checkpoint, or give a model without it",
        )
    for key, tensor in tensors.items():
        if tensor.chunks[0].expert is not None and len(tensor.chunks) != architecture.experts:
            raise InputError(
                f"{key}", f"{architecture.experts} experts", f"{len(tensor.chunks)}", "fetch the model again"
            )
    return tensors


def _places(architecture: Architecture, stored: Mapping[str, list[str]]) -> Iterator[_Place]:
    prefix = latent.prefix_of(architecture)
    for source, module in _OUTSIDE.items():
        if f"{prefix}{source}" in stored:
            yield _Place(module, (f"{prefix}{source}",))
        elif source != "lm_head" or not architecture.tied:
            raise InputError(f"tensor {prefix}{source}.weight", "in the checkpoint", "missing", "fetch the model again")
    yield from (_Place(module, (module,)) for module in stored if latent.is_carried(architecture, f"{module}.weight"))
    for layer in range(architecture.layers):
        yield from _layer_places(architecture, stored, layer)


def _layer_places(architecture: Architecture, stored: Mapping[str, list[str]], layer: int) -> Iterator[_Place]:
    hf, megatron = f"{latent.prefix_of(architecture)}model.layers.{layer}", f"decoder.layers.{layer}"
    moe = f"{hf}.mlp.gate" in stored
    if architecture.latent is None:
        yield _Place(f"{megatron}.self_attention.linear_qkv", (f"{hf}.input_layernorm",), rename="layer_norm_weight")
        qkv = tuple(f"{hf}.self_attn.{name}" for name in _QKV)
        yield _Place(f"{megatron}.self_attention.linear_qkv", qkv, groups=architecture.query_groups)
    else:
        for source, module, rename in latent.attention_places(hf, megatron, stored):
            yield _Place(module, (source,), rename=rename)
    for source, module in _ALONE.items():
        if f"{hf}.{source}" in stored and not (architecture.latent and source in latent.MEGATRON):
            yield _Place(f"{megatron}.{module}", (f"{hf}.{source}",))
    after = f"{hf}.post_attention_layernorm"
    if not moe:
        yield _Place(f"{megatron}.mlp.linear_fc1", (after,), rename="layer_norm_weight")
        yield _Place(f"{megatron}.mlp.linear_fc1", tuple(f"{hf}.mlp.{name}" for name in _GATE_UP))
        return
    yield _Place(f"{megatron}.pre_mlp_layernorm", (after,))
    shared = f"{hf}.mlp.shared_experts"
    if f"{shared}.gate_proj" in stored:
        module = f"{megatron}.mlp.shared_experts"
        yield _Place(f"{module}.linear_fc1", tuple(f"{shared}.{name}" for name in _GATE_UP))
        yield _Place(f"{module}.linear_fc2", (f"{shared}.down_proj",))
    for expert in range(architecture.experts):
        base, experts = f"{hf}.mlp.experts.{expert}", f"{megatron}.mlp.experts.experts"
        yield _Place(f"{experts}.linear_fc1", tuple(f"{base}.{name}" for name in _GATE_UP), expert=expert)
        yield _Place(f"{experts}.linear_fc2", (f"{base}.down_proj",), expert=expert)


def _common_suffixes(place: _Place, stored: Mapping[str, list[str]]) -> list[str]:
    for source in place.sources:
        if source not in stored:
            raise InputError(f"tensor {source}.weight", "in the checkpoint", "missing", "fetch the model again")
    first = sorted(stored[place.sources[0]])
    for source in place.sources[1:]:
        if sorted(stored[source]) != first:
            raise InputError(
                f"{place.module}: {', '.join(place.sources)}",
                "one number format, because Megatron-Core fuses them",
                f"{first} and {sorted(stored[source])}",
                "quantise all of them, or ignore all of them",
            )
    return first


def _chunk(
    place: _Place, suffix: str, names: tuple[str, ...], metas: Mapping[str, TensorMeta], fp8_rows: Mapping[str, int]
) -> Chunk:
    parts = [metas[name] for name in names]
    for name, part in zip(names, parts, strict=True):
        if part.dtype != parts[0].dtype or part.shape[1:] != parts[0].shape[1:]:
            raise InputError(
                f"tensor {name}",
                f"{parts[0].dtype} like {names[0]}",
                f"{part.dtype} {part.shape}",
                "fetch the model again",
            )
    fusion = _fusion(place, suffix, names, metas, fp8_rows)
    return Chunk(names, fusion, fusion.fused_shape([part.shape for part in parts]), place.expert)


def _fusion(
    place: _Place, suffix: str, names: tuple[str, ...], metas: Mapping[str, TensorMeta], fp8_rows: Mapping[str, int]
) -> Fusion:
    if len(names) == 1:
        return Fusion("copy")
    if suffix in PER_TENSOR:
        if len({metas[name].shape for name in names}) > 1:
            raise InputError(
                f"{place.module}.{suffix}",
                "equal shapes",
                str([metas[name].shape for name in names]),
                "fetch the model again",
            )
        return Fusion("stack")
    rows = tuple(_weight_rows(source, metas) for source in place.sources)
    uneven = [source for source, count in zip(place.sources, rows, strict=True) if count % place.groups]
    if uneven:
        raise InputError(
            f"module {uneven[0]}", f"rows divisible by {place.groups} query groups", str(rows), "fetch the model again"
        )
    blocks = {fp8_rows[source] for source in place.sources if source in fp8_rows}
    if suffix == "weight_scale_inv" or (suffix == "weight_scale" and blocks):
        if len(blocks) != 1:
            raise InputError(
                f"{place.module}: FP8 blocks", "one block size", str(sorted(blocks)), "give the unquantised model"
            )
        (block,) = blocks
        return Fusion("blocks", place.groups, rows, block, grid_of(rows, place.groups, block))
    if suffix not in _PER_ROW or any(
        metas[name].shape[:1] != (count,) for name, count in zip(names, rows, strict=True)
    ):
        raise InputError(
            f"tensor {names[0]}",
            "a tensor whose rows are the weight's",
            str(metas[names[0]].shape),
            "fetch the model again",
        )
    return Fusion("rows", place.groups, rows)


def _weight_rows(module: str, metas: Mapping[str, TensorMeta]) -> int:
    for suffix in ("weight_packed", "weight"):
        if f"{module}.{suffix}" in metas:
            return metas[f"{module}.{suffix}"].shape[0]
    raise InputError(f"module {module}", "a weight", "none", "fetch the model again")


def _add(
    tensors: dict[str, MegatronTensor], key: str, chunk: Chunk, part: TensorMeta, architecture: Architecture
) -> None:
    shape = chunk.shape if chunk.expert is None else (architecture.experts, *chunk.shape)
    meta = TensorMeta(part.dtype, shape)
    tensor = tensors.setdefault(key, MegatronTensor(meta))
    if tensor.meta != meta:
        raise InputError(
            f"{key}: {chunk.parts[0]}", f"{tensor.meta}, like the other experts", str(meta), "fetch the model again"
        )
    tensor.chunks.append(chunk)


def rows_of(architecture: Architecture, module: str) -> int | None:
    """Rows that the config asks of a HF projection, or None for a module that is none."""
    match = _LAYER.fullmatch(module)
    name = module.rpartition(".")[2]
    if match is None or name not in LINEARS:
        return None
    hidden, inner = architecture.hidden, architecture.intermediate
    heads = architecture.latent
    if heads is not None and match[2].startswith("mlp.shared_experts."):
        inner = architecture.expert_intermediate * heads.shared_experts
    if _EXPERT.fullmatch(match[2]):
        inner = architecture.expert_intermediate
    query = architecture.heads * (heads.nope + heads.rope if heads else architecture.head_dim)
    key = architecture.query_groups * architecture.head_dim
    return {
        "q_proj": query,
        "k_proj": key,
        "v_proj": key,
        "o_proj": hidden,
        "gate_proj": inner,
        "up_proj": inner,
        "down_proj": hidden,
    }[name]
