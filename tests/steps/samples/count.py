"""A real small step: counts to `to`, one file a number, and resumes where the last try stopped."""

from __future__ import annotations

import os
import time
from typing import Any

from orbit_core.errors import Interrupted
from orbit_core.steps.contract import StepContext


def run(context: StepContext) -> dict[str, Any]:
    to, pause = context.spec.params["to"], context.spec.params.get("pause", 0.0)
    counted = context.scratch / "counted"
    first = int(counted.read_text()) if counted.exists() else 0
    print("noise of a library on stdout")
    for number in range(first, to):
        if context.should_stop():
            raise Interrupted(f"counted to {number} of {to}")
        time.sleep(pause)
        counted.write_text(str(number + 1))
        context.progress(number + 1, to, "counting")
    (context.output / "parts").mkdir()
    for number in range(to):
        (context.output / "parts" / f"{number}.txt").write_text(f"{number}\n" * 100)
    return {"resumed_from": first, "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}
