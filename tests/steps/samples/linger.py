"""A step that never asks `should_stop`, as one that cannot resume."""

from __future__ import annotations

import time
from typing import Any

from orbit_core.steps.contract import StepContext


def run(context: StepContext) -> dict[str, Any]:
    context.progress(0, 1, "lingering")
    time.sleep(context.spec.params["seconds"])
    return {}
