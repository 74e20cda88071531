"""A training run that can be harmed: started in processes of its own, compared with one that nobody touched.

Processes are forked from this one, which has imported what a training step imports and never runs any of it: a start
costs a tenth of a second in place of five, so thousands can be tried. What runs in the fork is the real command,
`python -m orbit_core step train ...`, from its first line on.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # as the demo's recipe has it; torch reads it once
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's: a fork has one thread

from orbit_core import command
from orbit_core.executors.local import LocalExecutor
from orbit_core.pipeline import plan
from orbit_core.recipe import Recipe
from orbit_core.steps.contract import StepSpec, json_digest
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore
from orbit_core.store.rollouts import TIMING_COLUMNS, RolloutReader

IMPORTS = (
    *("orbit_core.steps.train", "orbit_core.trainers.torch", "orbit_core.rollout.torch", "reasoning_gym"),
    *("transformers.models.qwen3.modeling_qwen3", "transformers.models.auto.tokenization_auto", "pyarrow.dataset"),
)
PATIENCE_SECONDS = 300.0
Outcome = dict[str, Any]


def prepare(recipe: Recipe, store: Path) -> None:
    """Makes the steps before `train` in `store`; what is finished there already is taken."""
    for spec in plan(recipe, str(store)).values():
        if spec.step == "train":
            return
        LocalExecutor().run(spec, lambda event: None)


class Process:
    """A forked process, leader of its group."""

    def __init__(self, main: Callable[[], int], log: Path) -> None:
        self.log, self.started, self.seconds, self._status = log, time.monotonic(), 0.0, None
        self.pid = os.fork()
        if self.pid == 0:
            _become(main, log)

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status, self.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.started
        return self._status

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int | None:
        """Exit code, or None if it still runs after so many seconds."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        return self._status

    def signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()


def _become(main: Callable[[], int], log: Path) -> NoReturn:
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Trial:
    """One run in a store of its own. `harm` in `start` is called in the new process before anything of ours runs."""

    recipe: Recipe
    store: Path
    log: Path
    processes: list[Process] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe, prepared: Path, folder: Path, name: str) -> Trial:
        """In a copy of the prepared store; nothing that is in a store is ever changed, so links will do."""
        store = folder / name / "store"
        shutil.copytree(prepared / "artifacts", store / "artifacts", copy_function=os.link)
        return cls(recipe, store, folder / name / "log")

    @property
    def spec(self) -> StepSpec:
        return plan(self.recipe, str(self.store))["train"]

    def start(self, harm: Callable[[], None] = lambda: None, holder: str = "", lease_seconds: float = 2.0) -> Process:
        file = self.log.with_name("spec.json")
        if not file.exists():
            file.write_text(self.spec.model_dump_json())
        arguments = ["step", "train", "--spec", str(file)]
        arguments += ["--holder", holder, "--lease-seconds", str(lease_seconds)] if holder else []

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
        shutil.rmtree(self.store.parent, ignore_errors=True)


def outcome(trial: Trial) -> Outcome:
    """What must be equal whatever happened on the way: all that a reader can find, wall clock left out."""
    store = open_store(str(trial.store))
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
        "visible": sorted(_visible(store.list(), artifact.manifest.attempt)),
    }


def _visible(paths: list[str], attempt: str) -> set[str]:
    """What is there, but for what no reader looks at: attempts that no manifest names, and claims of leases."""
    tries = re.compile(r"artifacts/train/[0-9a-f]{16}/([^/]+)/")
    named = {path for path in paths if not (found := tries.match(path)) or found[1] == attempt}
    return {path.replace(attempt, "ATTEMPT") for path in named if not path.startswith("leases/")}


def warm_up() -> None:
    """Imports what the step imports, once for all forks."""
    for name in IMPORTS:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: a fork would have one of them"
