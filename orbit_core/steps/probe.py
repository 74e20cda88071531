"""probe: what a step finds where it runs. Of no recipe: `orbit k8s doctor --probe` runs it as a Job like any other.

That it runs at all shows that the image has this Orbit, that its pod is let in, and that the store takes the artifact.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field

from orbit_core.recipe import Section
from orbit_core.steps.contract import StepContext
from orbit_core.store import open_store
from orbit_core.store.artifacts import code_version
from orbit_core.store.checking import check_conditional_writes

MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Params(Section):
    nonce: str = Field(description="makes each probe a step of its own")


def run(context: StepContext) -> dict[str, Any]:
    Params.model_validate(context.spec.params)
    check_conditional_writes(open_store(context.spec.store))
    facts = {
        "orbit": code_version(),
        "python": platform.python_version(),
        "machine": platform.node(),
        "user": os.getuid(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "shm_gib": _gib("/dev/shm"),
        "scratch_gib": _gib(context.scratch),
        **_gpus(),
    }
    (context.output / "probe.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    context.progress(1, 1, f"Orbit {facts['orbit']}, {len(facts['gpus'])} GPU(s)")
    return facts


def _gpus() -> dict[str, Any]:
    """As the engines see them: through torch, where the image has it."""
    if importlib.util.find_spec("torch") is None:
        return {"torch": None, "gpus": []}
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"torch": torch.__version__, "gpus": names}


def _memory_gib() -> float | None:
    for file in MEMORY_LIMITS:
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            return round(int(text) / 2**30, 2)
    return None


def _gib(folder: str | Path) -> float | None:
    return round(shutil.disk_usage(folder).total / 2**30, 2) if Path(folder).is_dir() else None
