"""Trainers: one contract (base), one file per engine. Choosing one imports it, and only it."""

from __future__ import annotations

from pathlib import Path

from orbit_core.errors import InputError
from orbit_core.recipe import Adapter, Engines
from orbit_core.trainers.base import Trainer

__all__ = ["Trainer", "load_trainer"]


def load_trainer(
    engines: Engines, converted_dir: str | Path, quantized_dir: str | Path, adapter: Adapter, seed: int
) -> Trainer:
    """The trainer that `engines.trainer` names, holding the base of `converted_dir` and a fresh adapter.

    `quantized_dir` adds config.json, which the converted checkpoint does not carry. `seed` decides how the adapter
    starts. Raises InputError when the engine is not installed, or the checkpoint or adapter does not fit the model.
    """
    if engines.trainer == "torch":
        from orbit_core.trainers.torch import TorchTrainer

        return TorchTrainer.load(engines, Path(converted_dir), Path(quantized_dir), adapter, seed)
    raise InputError(
        f"engines.trainer {engines.trainer}",
        "an engine that is installed",
        "only torch is part of this installation",
        "set engines.trainer to torch",
    )
