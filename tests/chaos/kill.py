"""Kill -9 a run at random instants, start it again, compare with an undisturbed run.

    python tests/chaos/kill.py --trials 25 --seed 0 --recipe flows/recipes/demo.yaml --set algorithm.steps=20

The steps before `train` are made once. Each trial trains in a copy of that store: the process is killed after a random
time, up to `--kills` times, then left to finish. Every trial must end with the undisturbed run's adapter digest, the
same rows in its rollouts (timings aside), no step twice and none missing. Prints one JSON object; exit code 1 if a
trial differs. With `--level flow` the whole `orbit run` is killed instead of the step's process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from orbit_core.executors.local import LocalExecutor
from orbit_core.pipeline import plan
from orbit_core.recipe import Recipe
from orbit_core.steps.contract import StepSpec, canonical_json
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore
from orbit_core.store.rollouts import TIMING_COLUMNS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--kills", type=int, default=2, help="at most this many kills in a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", choices=["step", "flow"], default="step")
    parser.add_argument("--recipe", default="flows/recipes/demo.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--work", type=Path, help="folder to work in; default: a temporary one")
    parser.add_argument("--prepared", type=Path, help="a store whose finished artifacts are reused")
    arguments = parser.parse_args()
    overrides = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in arguments.set)}
    recipe = Recipe.load(arguments.recipe, overrides)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        result = run_trials(
            recipe, work, arguments.trials, arguments.kills, arguments.seed, arguments.level, arguments.prepared
        )
    print(json.dumps(result))
    return 0 if result["identical"] == result["trials"] else 1


def run_trials(
    recipe: Recipe, work: Path, trials: int, kills: int, seed: int, level: str, prepared: Path | None = None
) -> dict[str, object]:
    """`prepared`: a store in which steps before `train` may be finished already; only artifacts are taken from it."""
    prepared = prepared or work / "prepared"
    for spec in plan(recipe, str(prepared)).values():
        if spec.step == "train":
            break
        LocalExecutor().run(spec, lambda event: None)
    chance = random.Random(seed)
    began = time.monotonic()
    expected = outcome(recipe, finish(recipe, work, "undisturbed", prepared, [], level))
    assert expected["once"], expected["steps"]
    duration = time.monotonic() - began
    identical, landed, differing = 0, 0, []
    for trial in range(trials):
        instants = [chance.uniform(0, duration) for _ in range(chance.randint(1, kills))]
        store = finish(recipe, work, f"trial-{trial}", prepared, instants, level)
        landed += len(instants)
        if outcome(recipe, store) == expected:
            identical += 1
        else:
            differing.append({"trial": trial, "instants": instants})
        shutil.rmtree(store)
        say(
            f"trial {trial + 1}/{trials}: killed after {[f'{i:.1f} s' for i in instants]}; {identical} identical so far"
        )
    return {
        "trials": trials,
        "kills": landed,
        "identical": identical,
        "differing": differing,
        "level": level,
        "seed": seed,
        "undisturbed_seconds": round(duration, 1),
        "adapter_digest": expected["adapter"],
        "steps": recipe.algorithm.steps,
    }


def finish(recipe: Recipe, work: Path, name: str, prepared: Path, instants: list[float], level: str) -> Path:
    """Train in a copy of the prepared store, killed at each of `instants` (seconds after a start), then to the end."""
    store = work / name
    shutil.copytree(prepared / "artifacts", store / "artifacts", copy_function=os.link)
    for instant in [*instants, None]:
        process = start(recipe, store, level)
        try:
            process.wait(timeout=instant)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            continue
        if process.returncode != 0:
            raise SystemExit(f"{name}: exit code {process.returncode}; see {store}.log")
        if instant is not None:
            break  # it had ended before the kill
    return store


def start(recipe: Recipe, store: Path, level: str) -> subprocess.Popen[bytes]:
    log = open(f"{store}.log", "ab")  # noqa: SIM115  # the child's, for as long as it lives
    if level == "flow":
        file = store.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        command = [str(Path(sys.executable).with_name("orbit")), "run", str(file), "--store", str(store)]
    else:
        file = store.with_suffix(".json")
        file.write_text(train_spec(recipe, store).model_dump_json())
        command = [sys.executable, "-m", "orbit_core", "step", "train", "--spec", str(file)]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def train_spec(recipe: Recipe, store: Path) -> StepSpec:
    return plan(recipe, str(store))["train"]


def outcome(recipe: Recipe, store: Path) -> dict[str, object]:
    """What must be equal: the adapter, and every rollout row with its timings left out."""
    spec = train_spec(recipe, store)
    artifact = ArtifactStore(open_store(str(store))).find(spec.step, spec.digest)
    assert artifact is not None
    rows = []
    files = sorted((store / "rollouts").glob("run=*/step=*/*.parquet"))
    for file in files:
        for row in pq.ParquetFile(file).read().to_pylist():
            rows.append(canonical_json({key: value for key, value in row.items() if key not in TIMING_COLUMNS}))
    steps = [file.parent.name for file in files]
    return {
        "adapter": artifact.facts["adapter_digest"],
        "rows": rows,
        "steps": steps,
        "once": len(steps) == len(set(steps)) == recipe.algorithm.steps,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
