"""The schedule fired twice at once, every step a Job: one set of Jobs, one promotion; fired again: nothing new."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.running import Cluster

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from prefect_world import PrefectServer  # noqa: E402
from small_run import RECIPE  # noqa: E402
from world import World, moto_bucket, new_world  # noqa: E402

from orbit_core.publication.promotions import Promotions  # noqa: E402
from orbit_core.recipe import Resources  # noqa: E402
from orbit_core.store import open_store  # noqa: E402

RETRAIN = """
import json, sys
from flows.retrain import retrain
from orbit_core.recipe import Recipe
outcome = retrain(Recipe.parse(json.loads(sys.argv[1])), sys.argv[2], tolerance=1.0)
print(json.dumps({"line": outcome["line"], "promoted": outcome["promoted"]}))
"""
SMALL = Resources(cpus=1, memory_gib=2, shm_gib=0, scratch_gib=1, grace_seconds=5).model_dump()
STEPS = ("data", "pretrain", "quantize", "convert", "preflight", "train", "evaluate", "publish", "report")


@pytest.fixture
def world(cluster: Cluster, tmp_path: Path) -> Iterator[World]:
    with moto_bucket() as (url, environment), new_world(cluster, url, environment, tmp_path) as made:
        made.site_changes["package"] = "orbit_core.steps"
        yield made


def fire(world: World, server: PrefectServer, recipe: dict[str, Any]) -> subprocess.Popen[str]:
    site = world.folder / "site.yaml"
    site.write_text(yaml.safe_dump(world.site().model_dump(mode="json")))
    environment = {**world.process_environment(), **server.environment, "ORBIT_SITE": str(site)}
    environment["PYTHONPATH"] += os.pathsep + str(HERE.parent)
    command = [sys.executable, "-c", RETRAIN, json.dumps(recipe), world.store]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-4000:]
    answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return answer


def test_the_schedule_fired_twice_promotes_once(world: World, tmp_path: Path) -> None:
    small = {**RECIPE, "executor": "kubernetes", "resources": dict.fromkeys(STEPS, SMALL), "publication": {}}
    with PrefectServer(tmp_path) as server:
        both = [fire(world, server, small) for _ in range(2)]
        lines = [outcome_of(process)["line"] for process in both]
        again = outcome_of(fire(world, server, small))
    (entry,) = Promotions(open_store(world.store), "small").entries()
    assert all("promoted as number 1" in line for line in lines), lines
    assert again == {"line": "nothing new: data, base and recipe are those of promotion 1 of small", "promoted": False}
    jobs = world.cluster.plane.api().get(f"/apis/batch/v1/namespaces/{world.namespace}/jobs")["items"]
    assert sorted(job["metadata"]["labels"]["orbit/step"] for job in jobs) == sorted(STEPS), "one Job a step"
    assert open_store(world.store).exists(f"{entry.adapter}/adapter_model.safetensors")
