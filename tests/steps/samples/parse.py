"""A step in the middle of reading a file, whose reader takes every failure for one of the file."""

from __future__ import annotations

import time
from typing import Any

from orbit_core.errors import InputError
from orbit_core.steps.contract import StepContext


def run(context: StepContext) -> dict[str, Any]:
    context.progress(0, 1, "reading")
    try:
        time.sleep(context.spec.params["seconds"])
    except Exception as error:
        raise InputError("config.json", "a configuration", str(error)) from None
    return {}
