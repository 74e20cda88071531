"""Whole runs, every step a Job: what a team starts with `prefect deployment run`, and what its schedule does.

Like prefect_scenarios.py; a scenario is a function of a World and a Prefect server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from prefect_world import COMMAND_SECONDS, PrefectServer, Worker, call, prefect
from small_run import RECIPE
from world import ROOT, World

from orbit_core.pipeline import plan
from orbit_core.publication.promotions import Promotions
from orbit_core.recipe import Recipe, Resources
from orbit_core.steps.runner import PACKAGE
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore

STEPS = ("data", "pretrain", "quantize", "convert", "preflight", "train", "evaluate", "publish", "report")
SMALL = Resources(cpus=1, memory_gib=2, shm_gib=0, scratch_gib=1, grace_seconds=20).model_dump()
AS_JOBS: dict[str, Any] = {"executor": "kubernetes", "resources": dict.fromkeys(STEPS, SMALL)}
BRIEF = {"model": {"steps": 20}, "algorithm": {"steps": 4}, "evaluation": {"samples": 0}}
RETRAIN = """
import json, sys
from flows.retrain import retrain
from orbit_core.recipe import Recipe
outcome = retrain(Recipe.parse(json.loads(sys.argv[1])), sys.argv[2], tolerance=1.0)
print(json.dumps({"line": outcome["line"], "promoted": outcome["promoted"]}))
"""

WholeRun = Callable[[World, PrefectServer], None]
_THE_POOL = threading.Lock()
WHOLE_RUNS: dict[str, WholeRun] = {}


def scenario(function: WholeRun) -> WholeRun:
    WHOLE_RUNS[function.__name__] = function
    return function


@scenario
def demo(world: World, server: PrefectServer) -> None:
    """The demo recipe, started with `prefect deployment run`: nine Jobs, held-out accuracy from below 45% to 95%."""
    deployed, _ = deployed_demo(world, server)
    changes = BRIEF if world.brief else {}
    recipe = deployed | {section: deployed.get(section, {}) | fields for section, fields in changes.items()}
    given = json.dumps({"recipe": recipe, "store": world.store})
    prefect(server, "deployment", "run", "post-train/cluster", "--params", given, "--watch")
    assert jobs_of(world) == sorted(STEPS), "one Job a step"
    spec = plan(Recipe.parse(recipe), world.store)["evaluate"]
    artifact = ArtifactStore(open_store(spec.store)).find(spec.step, spec.digest)
    assert artifact is not None
    before, after = artifact.facts["accuracy_before"], artifact.facts["accuracy_after"]
    assert world.brief or (before < 0.45 and after >= 0.95), (before, after)


@scenario
def scheduled_twice(world: World, server: PrefectServer) -> None:
    """The schedule's flow fired twice at once: one set of Jobs, one promotion. Fired again: nothing new."""
    recipe = {**RECIPE, **AS_JOBS, "publication": {}}
    both = [_fire(world, server, recipe) for _ in range(2)]
    lines = [_outcome_of(process)["line"] for process in both]
    again = _outcome_of(_fire(world, server, recipe))
    (entry,) = Promotions(open_store(world.store), "small").entries()
    assert all("promoted as number 1" in line for line in lines), lines
    assert again == {"line": "nothing new: data, base and recipe are those of promotion 1 of small", "promoted": False}
    assert jobs_of(world) == sorted(STEPS), "one Job a step"
    assert open_store(world.store).exists(f"{entry.adapter}/adapter_model.safetensors")


def deployed_demo(world: World, server: PrefectServer) -> tuple[dict[str, Any], Worker]:
    """Deploys post-train/cluster as k8s/README.md says; its recipe for this cluster, and a worker for it.

    For one world at a time: the pool has one name, and a second world's worker would take the first one's runs.
    """
    _THE_POOL.acquire()
    world.closing.callback(_THE_POOL.release)
    call(server, [str(Path(sys.executable).with_name("orbit")), "k8s", "setup"])
    prefect(server, "deploy", "--prefect-file", "k8s/prefect.yaml", "--name", "cluster")
    worker = Worker(server, world, pool="orbit", more={"ORBIT_SITE": str(_site(world))})
    world.closing.callback(worker.kill)
    deployments = yaml.safe_load((ROOT / "k8s" / "prefect.yaml").read_text())["deployments"]
    (deployment,) = [each for each in deployments if each["entrypoint"] == "flows.post_train.post_train"]
    return {**deployment["parameters"]["recipe"], **AS_JOBS}, worker


def jobs_of(world: World) -> list[str]:
    """The step of each Job, sorted."""
    jobs = world.cluster.plane.api().get(f"/apis/batch/v1/namespaces/{world.namespace}/jobs")["items"]
    return sorted(job["metadata"]["labels"]["orbit/step"] for job in jobs)


def _site(world: World) -> Path:
    world.site_changes["package"] = PACKAGE
    site = world.folder / "site.yaml"
    site.write_text(yaml.safe_dump(world.site().model_dump(mode="json")))
    return site


def _fire(world: World, server: PrefectServer, recipe: dict[str, Any]) -> subprocess.Popen[str]:
    environment = {**world.process_environment(), **server.environment, "ORBIT_SITE": str(_site(world))}
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[1])
    command = [sys.executable, "-c", RETRAIN, json.dumps(recipe), world.store]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _outcome_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=COMMAND_SECONDS)
    assert process.returncode == 0, err[-4000:]
    answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return answer
