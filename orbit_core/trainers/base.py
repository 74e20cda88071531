"""What the loop asks of a trainer; `torch` is embedded, `megatron` lives in its own environment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from orbit_core.recipe import Algorithm
from orbit_core.rl.types import Sample


class Trainer(Protocol):
    def score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0, adapter: bool = True
    ) -> list[torch.Tensor]:
        """Log-prob (float32 [len(response)]) of every response token; `adapter=False` is the KL reference."""

    def update(self, samples: Sequence[Sample], algorithm: Algorithm, step: int) -> dict[str, float]:
        """One optimiser update on the samples with `trained`; without any, nothing moves. Returns metrics (loss, kl,
        grad_norm, clip_fraction, learning_rate, importance_weight_mean, max_orthogonality_error, ...)."""

    def export_adapter(self) -> dict[str, torch.Tensor]:
        """Adapter in PEFT names and its publication dtype (BF16)."""

    def load_adapter(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replace the adapter's values (warm start, parity tests)."""

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next update depends on: master weights, optimiser moments, counters."""

    def load_state(self, state: dict[str, torch.Tensor]) -> None: ...

    def packed_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, tensor as on disk) of every base tensor the trainer computes with."""

    def layer_outputs(self, token_ids: Sequence[int]) -> list[tuple[str, torch.Tensor]]:
        """As RolloutEngine.layer_outputs."""
