"""The real training step, made to be disturbed: its inputs and its undisturbed end are made once for all scenarios."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import threading
from functools import cached_property
from pathlib import Path

from small_run import RECIPE

from orbit_core.pipeline import plan
from orbit_core.recipe import Recipe
from orbit_core.steps.contract import StepSpec
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore

STEPS = 12
INPUTS = ("data", "pretrain", "quantize", "convert", "preflight")


class Undisturbed:
    """A small run up to its adapter, by local processes in a store of its own."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="orbit-training-")
        self._making = threading.Lock()

    def spec(self, store: str) -> StepSpec:
        """The training step in `store`, which is given its inputs."""
        with self._making:
            made = self._made
        local, there = Path(made), open_store(store)
        for file in sorted(path for path in local.rglob("*") if path.is_file()):
            name = str(file.relative_to(local))
            if name.startswith(tuple(f"artifacts/{step}/" for step in INPUTS)):
                there.put(name, file)
        return self._plan(store)["train"]

    def adapter(self) -> dict[str, str]:
        """sha256 of each file of the adapter."""
        with self._making:
            return adapter_in(self._plan(self._made)["train"])

    @cached_property
    def _made(self) -> str:
        store = f"{self._folder.name}/store"
        for step, spec in self._plan(store).items():
            if step in (*INPUTS, "train"):
                self._run(spec)
        return store

    def _run(self, spec: StepSpec) -> None:
        file = Path(self._folder.name) / f"{spec.step}.json"
        file.write_text(spec.model_dump_json())
        command = [sys.executable, "-m", "orbit_core", "step", spec.step, "--spec", str(file)]
        command += ["--scratch", str(file.with_name("scratch"))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    @staticmethod
    def _plan(store: str) -> dict[str, StepSpec]:
        recipe = copy.deepcopy(RECIPE)
        recipe["reward"] = {"kind": "python", "function": "peoples_rewards:names_a_one_slowly"}
        recipe["algorithm"]["steps"] = STEPS
        return plan(Recipe.parse(recipe), store)


def adapter_in(spec: StepSpec) -> dict[str, str]:
    """sha256 of each file of the adapter that this training step has made."""
    artifact = ArtifactStore(open_store(spec.store)).find(spec.step, spec.digest)
    assert artifact is not None, "no adapter"
    found = {name: entry.sha256 for name, entry in artifact.manifest.files.items() if name.startswith("adapter/")}
    assert found, list(artifact.manifest.files)
    return found


undisturbed = Undisturbed()
