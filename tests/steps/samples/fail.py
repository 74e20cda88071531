"""A step that crashes half-way through its output."""

from __future__ import annotations

from typing import Any

from orbit_core.steps.contract import StepContext


def run(context: StepContext) -> dict[str, Any]:
    (context.output / "half").write_text("half")
    raise RuntimeError("lost the GPU")
