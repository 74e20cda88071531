"""Fetch a step's inputs before the step runs: what an init container does, so that GPUs need not wait for a download.

Any number of stagers may share one scratch: each artifact is fetched by one of them, and a killed one's successor goes
on where it stopped. In a folder store inputs are read where they lie, and nothing is copied.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from orbit_core.errors import OrbitError
from orbit_core.steps.contract import StepSpec
from orbit_core.steps.runner import input_artifact
from orbit_core.steps.workspace import Workspace
from orbit_core.store import open_store
from orbit_core.store.artifacts import Artifact, ArtifactStore
from orbit_core.store.room import room_explained


def stage_inputs(spec: StepSpec, emit: Callable[..., None], scratch: Path | None = None) -> None:
    """Bring every artifact that `spec` names into the scratch cache, each file checked against its sha256.

    Emits progress in bytes and "staged" at the end. Nothing is fetched if the step's own artifact is there already.
    Raises InputError for an input that has not been made.
    """
    began = time.monotonic()
    store = open_store(spec.store)
    artifacts = ArtifactStore(store)
    cache = Workspace(spec, store, scratch).cache
    inputs: dict[str, Artifact] = {}
    if artifacts.find(spec.step, spec.digest) is None:
        inputs = {
            name: input_artifact(spec, name, ref, artifacts)
            for name, ref in spec.inputs.items()
            if ref.step is not None
        }
    missing = {name: artifact for name, artifact in inputs.items() if not artifact.is_fetched(cache)}
    total = sum(artifact.size for artifact in missing.values())
    _check_room(spec, cache, total)
    done = 0
    for name, artifact in missing.items():

        def advance(size: int, name: str = name) -> None:
            nonlocal done
            done += size
            emit("progress", done=done, total=total, message=f"staging {name}", unit="bytes")

        def wait(holder: str, name: str = name) -> None:
            emit("progress", done=done, total=total, message=f"waiting: {holder} stages {name}", unit="bytes")

        with room_explained(f"scratch for the inputs of step {spec.step}", cache):
            artifact.fetch(cache, on_file=advance, on_wait=wait)
    emit("staged", step=spec.step, digest=spec.digest, bytes=total, seconds=round(time.monotonic() - began, 3))


def _check_room(spec: StepSpec, cache: Path, needed: int) -> None:
    if not needed:
        return
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise OrbitError(
            f"scratch {cache} for the inputs of step {spec.step}\n  expected: {needed / 2**30:.1f} GiB free\n"
            f"  found: {free / 2**30:.1f} GiB\n"
            f"  what to do: raise resources.{spec.step}.scratch_gib in the recipe, or clean the folder"
        )
