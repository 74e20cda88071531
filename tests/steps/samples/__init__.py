"""Steps small enough to test the runner and the executors with, and the specs that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orbit_core.steps.contract import InputRef, StepSpec

PACKAGE = "samples"


def spec_of(store: Path | str, step: str, inputs: dict[str, InputRef] | None = None, **params: Any) -> StepSpec:
    return StepSpec(step=step, version=1, params=params, inputs=inputs or {}, store=str(store))
