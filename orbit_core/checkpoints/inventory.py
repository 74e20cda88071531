"""Is a base what its config.json says: every tensor there, of the right shape, and none that has no place?

Asked before an hour is spent on quantising it. Shapes are those of the published (Hugging Face) layout, whatever
format the weights are stored in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from orbit_core.checkpoints import latent
from orbit_core.checkpoints.architecture import Architecture
from orbit_core.checkpoints.layout import rows_of
from orbit_core.errors import InputError
from orbit_core.recipe import ATTENTION, MLP

_FETCH = "fetch the model again, or take the config.json that belongs to it"
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,8})\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"mlp\.experts\.(0|[1-9]\d{0,8})\.([a-z_]+)")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # Qwen3's
_DERIVED = "rotary_emb.inv_freq"  # old checkpoints store what is computed from the config


class Inventory:
    """Takes the tensors of a base one by one, by published name and shape. `where` names the base in messages."""

    def __init__(self, architecture: Architecture, where: str, tensors: int) -> None:
        """Raises InputError when `tensors` are fewer than the config's layers, however many those may be."""
        if architecture.layers > tensors:
            found = f"{architecture.layers} layers for {tensors} tensors"
            raise InputError(f"{where}: num_hidden_layers", "as many layers as the checkpoint has", found, _FETCH)
        self.architecture, self.where = architecture, where
        self._seen: set[str] = set()
        self._listed: dict[str, tuple[int, ...]] | None = None
        if architecture.latent is not None:
            sparse = architecture.layers - architecture.latent.dense_layers
            if sparse * architecture.experts > tensors:
                found = f"{architecture.experts} in {sparse} layers, for {tensors} tensors"
                raise InputError(f"{where}: n_routed_experts", "as many as the checkpoint has", found, _FETCH)
            self._listed = dict(latent.expected(architecture))

    def take(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises InputError for a name that the config does not imply, or another shape."""
        if name.endswith(_DERIVED) or latent.is_carried(self.architecture, name):
            return
        expected = self._shape(name)
        if expected is None:
            raise InputError(f"{self.where}: tensor {name}", "a tensor that config.json implies", "no such one", _FETCH)
        if shape != expected:
            raise InputError(f"{self.where}: tensor {name}", f"shape {expected}, by config.json", str(shape), _FETCH)
        self._seen.add(name)

    def check_complete(self) -> None:
        """Raises InputError naming the first tensor that never came."""
        experts = self.architecture.experts
        if experts and self._listed is None and not any(name.endswith(".mlp.gate.weight") for name in self._seen):
            found = f"num_experts {experts}, and no layer with experts"
            raise InputError(f"{self.where}: num_experts", "experts in at least one layer", found, _FETCH)
        missing = [name for name in self._required() if name not in self._seen]
        if missing:
            found = "missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
            raise InputError(f"{self.where}: tensor {missing[0]}", "in the checkpoint", found, _FETCH)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        arch = self.architecture
        if self._listed is not None:
            return self._listed.get(name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return arch.vocabulary, arch.hidden
        if name == "model.norm.weight":
            return (arch.hidden,)
        match = _LAYER.fullmatch(name)
        if match is None or int(match[1]) >= arch.layers:
            return None
        module, suffix = match[2], match[3]
        rows = rows_of(arch, f"model.layers.{match[1]}.{module}")
        if rows is not None and self._has_place(module):
            return (rows,) if suffix == "bias" else (rows, self._width(module))
        if suffix == "bias":
            return None
        if module in _NORMS:
            return (arch.hidden,)
        if module in _HEAD_NORMS and arch.model_type != "llama":
            return (arch.head_dim,)
        return (arch.experts, arch.hidden) if module == "mlp.gate" and arch.experts else None

    def _has_place(self, module: str) -> bool:
        expert = _EXPERT.fullmatch(module)
        if expert is not None:
            return expert[2] in MLP and int(expert[1]) < self.architecture.experts
        parent, _, last = module.rpartition(".")
        return (parent == "self_attn" and last in ATTENTION) or (parent == "mlp" and last in MLP)

    def _width(self, module: str) -> int:
        arch, last = self.architecture, module.rpartition(".")[2]
        if last == "o_proj":
            return arch.heads * arch.head_dim
        if last == "down_proj":
            return arch.expert_intermediate if _EXPERT.fullmatch(module) else arch.intermediate
        return arch.hidden

    def _required(self) -> Iterator[str]:
        if self._listed is not None:
            yield from self._listed
            return
        yield from ("model.embed_tokens.weight", "model.norm.weight")
        if not self.architecture.tied:
            yield "lm_head.weight"
        for layer in range(self.architecture.layers):
            base = f"model.layers.{layer}"
            for module in (*_NORMS, *(f"self_attn.{name}" for name in ATTENTION)):
                yield f"{base}.{module}.weight"
            if self.architecture.model_type != "llama":
                yield from (f"{base}.{module}.weight" for module in _HEAD_NORMS)
            # which layers have experts only the tensors say (decoder_sparse_step, mlp_only_layers)
            sparse = f"{base}.mlp.gate.weight" in self._seen
            mlps = [f"mlp.experts.{expert}" for expert in range(self.architecture.experts)] if sparse else ["mlp"]
            yield from (f"{base}.{mlp}.{name}.weight" for mlp in mlps for name in MLP)
