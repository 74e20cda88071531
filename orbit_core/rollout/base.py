"""What the loop asks of a rollout engine; `torch` is embedded, `sglang` lives in its own environment.

Adapter publication is two-phase: `stage_adapter` puts version v beside the active one and returns the digest of what
arrived; only when every engine holds it does `activate_adapter` switch, so that a failure anywhere leaves every engine
on the old version, generating.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from orbit_core.recipe import Sampling
from orbit_core.rl.types import Completion, Request


class RolloutEngine(Protocol):
    @property
    def adapter_version(self) -> int:
        """The active version; 0 before anything was activated."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, greedy: bool = False) -> list[Completion]:
        """Completions in the order of the requests; deterministic in the requests' keys."""

    def score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0, adapter: bool = True
    ) -> list[torch.Tensor]:
        """Log-prob (float32 [len(response)]) of every response token of (prompt_ids, response_ids)."""

    def stage_adapter(self, version: int, tensors: dict[str, torch.Tensor]) -> str:
        """Hold `tensors` (PEFT names, see adapters/) as `version` without using them; returns their digest."""

    def activate_adapter(self, version: int) -> None:
        """Use the staged version from the next token on. Raises OrbitError if it is not the staged one."""

    def packed_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, tensor as on disk) of every base tensor the engine computes with."""

    def layer_outputs(self, token_ids: Sequence[int]) -> list[tuple[str, torch.Tensor]]:
        """(module name, float32 [tokens, hidden]) after the embedding and after each decoder layer, adapter on."""
