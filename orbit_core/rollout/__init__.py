"""Rollout engines: one contract (base), one file per engine. Choosing one imports it, and only it."""

from __future__ import annotations

from pathlib import Path

from orbit_core.errors import InputError
from orbit_core.recipe import Adapter, Engines
from orbit_core.rollout.base import RolloutEngine

__all__ = ["RolloutEngine", "load_rollout_engine"]


def load_rollout_engine(engines: Engines, quantized_dir: str | Path, adapter: Adapter) -> RolloutEngine:
    """The rollout engine that `engines.rollout` names, holding the base of `quantized_dir`, adapter version 0 (none).

    Raises InputError when the engine is not installed, or the checkpoint or adapter does not fit the model.
    """
    if engines.rollout == "torch":
        from orbit_core.rollout.torch import TorchRolloutEngine

        return TorchRolloutEngine.load(engines, Path(quantized_dir), adapter)
    raise InputError(
        f"engines.rollout {engines.rollout}",
        "an engine that is installed",
        "only torch is part of this installation",
        "set engines.rollout to torch",
    )
