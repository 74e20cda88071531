"""A training run that can be harmed: started in processes of its own, compared with one that nobody touched.

What runs in the fork is the real command, `python -m orbit_core step train ...`, from its first line on.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # as the demo's recipe has it; torch reads it once
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's: a fork has one thread

from forks import Process, in_fork
from places import BadBucket, Folders

from orbit_core import command
from orbit_core.executors.local import LocalExecutor
from orbit_core.pipeline import plan
from orbit_core.recipe import Recipe
from orbit_core.steps.contract import StepSpec, json_digest
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore
from orbit_core.store.commits import KEEP_STATES
from orbit_core.store.rollouts import TIMING_COLUMNS, Commit, RolloutReader

IMPORTS = (
    *("orbit_core.steps.train", "orbit_core.trainers.torch", "orbit_core.rollout.torch"),
    *("transformers.models.qwen3.modeling_qwen3", "transformers.models.auto.tokenization_auto", "pyarrow.dataset"),
)
Outcome = dict[str, Any]


def prepare(recipe: Recipe, store: Path) -> None:
    """Makes the steps before `train` in `store`; what is finished there already is taken."""
    for spec in plan(recipe, str(store)).values():
        if spec.step == "train":
            return
        LocalExecutor().run(spec, lambda event: None)


@dataclass
class Trial:
    """One run in a store of its own. `harm` in `start` is called in the new process before anything of ours runs."""

    recipe: Recipe
    place: Folders | BadBucket
    store: str
    folder: Path
    processes: list[Process] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe, place: Folders | BadBucket, prepared: Path, folder: Path) -> Trial:
        folder.mkdir()
        return cls(recipe, place, place.new(folder, prepared), folder)

    @property
    def spec(self) -> StepSpec:
        return plan(self.recipe, self.store)["train"]

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self, harm: Callable[[], None] = lambda: None, holder: str = "") -> Process:
        """With a `holder` under a lease of the place's seconds."""
        file = self.log.with_name("spec.json")
        if not file.exists():
            file.write_text(self.spec.model_dump_json())
        arguments = ["step", "train", "--spec", str(file)]
        arguments += ["--holder", holder, "--lease-seconds", str(self.place.lease_seconds)] if holder else []

        def main() -> int:
            harm()
            return command.main(arguments)

        process = Process(main, self.log)
        self.processes.append(process)
        return process

    def finish(self, holder: str = "") -> None:
        """Start it once more and let it run to its end."""
        code = self.start(holder=holder).wait()
        assert code == 0, f"exit code {code} when nothing was in its way any more\n{self.tail()}"

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def outcome(self) -> Outcome:
        """What must be equal whatever happened on the way, as `_outcome` says."""
        found: Outcome = in_fork(lambda: _outcome(self), self.folder)
        return found


def _outcome(trial: Trial) -> Outcome:
    """All that a reader can find, wall clock left out."""
    os.environ.update(trial.place.undisturbed)
    store = open_store(trial.store)
    artifact = ArtifactStore(store).find("train", trial.spec.digest)
    assert artifact is not None, f"no artifact\n{trial.tail()}"
    reader = RolloutReader(store, trial.spec.digest[:16])
    commits = list(reader.commits())
    timeless = [{name: v for name, v in c.metrics.items() if not name.startswith("seconds_")} for c in commits]
    rows = [reader.rows(commit.step).drop_columns(list(TIMING_COLUMNS)).to_pylist() for commit in commits]
    return {
        "adapter": {n: e.sha256 for n, e in artifact.manifest.files.items() if n.startswith("adapter/")},
        "facts": {name: value for name, value in artifact.facts.items() if name != "seconds"},
        "commits": [c.model_dump(exclude={"metrics", "previous"}) for c in commits],  # the state's sha256 is in them
        "metrics": timeless,
        "rows": [json_digest(step) for step in rows],
        "visible": sorted(_visible(trial.place, store.list(), artifact.manifest.attempt, commits)),
    }


def _visible(place: Folders | BadBucket, paths: list[str], attempt: str, commits: list[Commit]) -> set[str]:
    """What is there, but for what no reader looks at: attempts that no manifest names, claims of leases, the file of a
    check of the store that was killed, and where sweeps may leave something for later, states that the run has left
    behind."""
    tries = re.compile(r"artifacts/train/[0-9a-f]{16}/([^/]+)/")
    named = {path for path in paths if not (found := tries.match(path)) or found[1] == attempt}
    kept = {commit.state.path for commit in commits[-KEEP_STATES:]}
    if place.listings_late:
        named = {path for path in named if "/state/" not in path or path in kept}
    return {path.replace(attempt, "ATTEMPT") for path in named if not path.startswith(("leases/", "checks/"))}


def warm_up(place: Folders | BadBucket) -> None:
    """Imports what the step imports, once for all forks."""
    for name in (*IMPORTS, *place.imports):
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: a fork would have one of them"
