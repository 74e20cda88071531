"""Models made once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import MODELS, PRECISIONS, config_of, write_model

from orbit_core.checkpoints.hf import HFCheckpoint
from orbit_core.checkpoints.quantizer import quantize_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of an unquantised model by its name in MODELS."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_model(tmp_path_factory.mktemp(name), config_of(**MODELS[name]))
        return made[name]

    return get


@pytest.fixture(scope="session")
def quantized(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a quantised model by names in MODELS and PRECISIONS."""
    made: dict[tuple[str, str], Path] = {}

    def get(model: str, precision: str) -> Path:
        if (model, precision) not in made:
            target = tmp_path_factory.mktemp(f"{model}-{precision}")
            quantize_checkpoint(HFCheckpoint(base_model(model)), target, PRECISIONS[precision])
            made[model, precision] = target
        return made[model, precision]

    return get
