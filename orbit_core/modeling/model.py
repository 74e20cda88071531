"""A frozen model with packed weights and room for an adapter: what trainer and rollout engine both compute with.

The decoder layers are transformers'; the loop over them is ours, so that masks and caches are built once, and heads
are computed only where logits are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orbit_core.adapters.operands import Operand
from orbit_core.modeling.cache import KeyValueCache
from orbit_core.modeling.layers import PackedExperts, PackedLinear
from orbit_core.modeling.shared_input import shared_inputs


class PackedModel:
    def __init__(
        self,
        module: nn.Module,
        linears: dict[str, PackedLinear],
        stored: Mapping[str, torch.dtype],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`linears`: by HF module name; `stored`: dtype on disk of every plain tensor, by HF name."""
        self.module, self.linears, self.stored = module, linears, stored
        self.device, self.dtype = device, dtype
        self._operands: Mapping[str, Operand] | None = None
        self._stacked = [each for each in module.modules() if isinstance(each, PackedExperts) and each.stacks]
        self._shared = list(shared_inputs(module)) if device.type == "cuda" else []
        self._adapt()

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """HF module name -> (in, out) of every linear that may carry an adapter."""
        return {
            name: (linear.in_features, linear.out_features)
            for name, linear in self.linears.items()
            if name != "lm_head"
        }

    @property
    def head_size(self) -> int:
        """Elements of one attention head."""
        return int(self.module.model.layers[0].self_attn.head_dim)  # type: ignore[union-attr, index]

    def use(self, operands: Mapping[str, Operand] | None) -> None:
        """Compute with these operands (HF module name -> operand) from now on; None: the base alone."""
        if operands is self._operands:
            return
        for name, linear in self.linears.items():
            linear.operand = None if operands is None else operands.get(name)
        self._operands = operands
        self._adapt()

    def _adapt(self) -> None:
        for experts in self._stacked:
            experts.adapt()
        for shared in self._shared:
            shared.adapt()

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        watch: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        """ids[rows, tokens] -> final hidden states [rows, tokens, hidden], normed.

        positions  [rows, tokens]; left out: 0, 1, ...
        mask       additive, [rows, 1, tokens, keys]; left out: causal
        watch      called with (module name, states) after the embedding and after each layer
        """
        decoder: Any = self.module.model
        states = decoder.embed_tokens(ids)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = decoder.rotary_emb(states, position_ids=positions)
        if watch:
            watch("model.embed_tokens", states)
        for index, layer in enumerate(decoder.layers):
            states = layer(
                states,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                position_embeddings=rotary,
            )
            if watch:
                watch(f"model.layers.{index}", states)
        if cache is not None:
            cache.advance(ids.shape[1])
        return decoder.norm(states)

    def logits(self, states: Tensor) -> Tensor:
        """states[..., hidden] -> float32 [..., vocabulary]."""
        head: Any = self.module.lm_head
        return head(states).float()

    def new_cache(self, capacity: int) -> KeyValueCache:
        return KeyValueCache(self.config.num_hidden_layers, capacity)

    def packed_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, tensor as on disk) of every base tensor."""
        for name, linear in self.linears.items():
            assert linear.packed is not None
            for suffix, tensor in linear.packed.tensors.items():
                yield f"{name}.{suffix}", tensor
        for name, dtype in self.stored.items():
            owner, _, last = name.rpartition(".")
            yield name, getattr(self.module.get_submodule(owner), last).detach().to(dtype)

    @torch.inference_mode()
    def layer_outputs(self, token_ids: Sequence[int]) -> list[tuple[str, Tensor]]:
        """(module name, float32 [tokens, hidden]) after the embedding and after each decoder layer."""
        seen: list[tuple[str, Tensor]] = []
        ids = torch.tensor([list(token_ids)], device=self.device)
        self.hidden(ids, watch=lambda name, states: seen.append((name, states[0].float())))
        return seen
