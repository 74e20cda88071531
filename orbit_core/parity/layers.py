"""Which layer drifts first: the hidden states of both engines after the embedding and after every decoder layer.

A layer's error is relative, max |a - b| / max |b|. The first drifting layer is the first whose error passes what
rounding explains, `DRIFT[compute dtype]`; when none does, the layer at which the error grows most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from orbit_core.rollout.base import RolloutEngine
from orbit_core.trainers.base import Trainer

DRIFT = {"float32": 1e-4, "bfloat16": 5e-2}


def compare_layers(
    trainer: Trainer, rollout: RolloutEngine, token_ids: Sequence[int], compute_dtype: str
) -> dict[str, Any]:
    """{"first_drifting_layer": name or None, "relative_errors": {name: error}}; JSON."""
    ours, theirs = trainer.layer_outputs(token_ids), rollout.layer_outputs(token_ids)
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        raise ValueError(f"layers: trainer has {[n for n, _ in ours]}, rollout has {[n for n, _ in theirs]}")
    errors = {name: _error(left, right) for (name, left), (_, right) in zip(ours, theirs, strict=True)}
    first = next((name for name, error in errors.items() if error > DRIFT[compute_dtype]), None)
    return {
        "first_drifting_layer": first,
        "relative_errors": {name: error if math.isfinite(error) else str(error) for name, error in errors.items()},
    }


def _error(left: Tensor, right: Tensor) -> float:
    error = float((left - right).abs().max() / right.abs().max().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf
