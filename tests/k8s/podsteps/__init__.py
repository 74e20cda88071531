"""Steps small enough to be run hundreds of times in pods, and the specs that name them."""

from __future__ import annotations

from typing import Any

from orbit_core.steps.contract import InputRef, StepSpec

PACKAGE = "podsteps"


def spec_of(store: str, step: str = "tally", inputs: dict[str, InputRef] | None = None, **params: Any) -> StepSpec:
    return StepSpec(step=step, version=1, params=params, inputs=inputs or {}, store=store)
