"""A real small step that works as training does: commits numbers to the store, put if absent, and goes on after them.

Each commit says which process made it, so that a test sees who worked. `pause` seconds lie between two.
"""

from __future__ import annotations

import os
import time
from typing import Any

from orbit_core.errors import Interrupted
from orbit_core.steps.contract import StepContext
from orbit_core.store import open_store


def run(context: StepContext) -> dict[str, Any]:
    store, to, pause = open_store(context.spec.store), context.spec.params["to"], context.spec.params["pause"]
    run = f"runs/{context.spec.digest[:16]}"
    for number in range(len(store.list(f"{run}/commit-")), to):
        if context.should_stop():
            raise Interrupted(f"committed {number} of {to}")
        time.sleep(pause)
        store.put(f"{run}/worked-{os.getpid()}-{number:04d}", b"")
        context.fence()
        store.put_if_absent(f"{run}/commit-{number:04d}", str(os.getpid()).encode())
        context.progress(number + 1, to, "committing")
    (context.output / "last").write_text(str(to))
    return {"pid": os.getpid()}
