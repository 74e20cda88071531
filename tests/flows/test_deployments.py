"""What a platform team deploys, on a real Prefect server: pools, automation, deployments, and what they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "k8s" / "prefect.yaml"
DEPLOYED = {"post-train/demo", "post-train/cluster", "evaluate/cluster", "retrain/nightly"}


@pytest.fixture
def client(prefect_api: str) -> Iterator[Any]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def prepared(client: Any) -> list[str]:
    from k8s.orchestration import prepare

    return prepare(client, heartbeat_seconds=180)


@pytest.fixture
def deployed(prefect_api: str, prepared: list[str]) -> subprocess.CompletedProcess[str]:
    return prefect(prefect_api, "deploy", "--all", "--prefect-file", "k8s/prefect.yaml")


def prefect(api: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a person runs it from the root of the repository, with nobody to answer questions."""
    environment = {**os.environ, "PREFECT_API_URL": api, "PREFECT_CLI_PROMPT": "false"}
    command = [sys.executable, "-m", "prefect", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )


def deployment_of(client: Any, name: str) -> Any:
    return client.read_deployment_by_name(name)


def test_setup_makes_what_is_missing_and_leaves_what_is_there(client: Any) -> None:
    from k8s.orchestration import AUTOMATION, prepare

    first, second = prepare(client, 180), prepare(client, 180)
    assert {line.rpartition(" ")[2] for line in second} == {"there"}, second
    assert len(first) == 3 and len(client.read_automations_by_name(AUTOMATION)) == 1
    assert prepare(client, 60)[-1].endswith("was brought up to date")
    (automation,) = client.read_automations_by_name(AUTOMATION)
    assert automation.trigger.within.total_seconds() == 180 and automation.enabled
    assert prepare(client, 180)[-1].endswith("was brought up to date")


def test_everything_deploys_without_a_question(client: Any, deployed: subprocess.CompletedProcess[str]) -> None:
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    for name in DEPLOYED:
        found = deployment_of(client, name)
        assert found.work_pool_name == ("local" if name.endswith("demo") else "orbit")
        assert found.enforce_parameter_schema and found.parameter_openapi_schema["properties"]
    nightly = deployment_of(client, "retrain/nightly")
    assert nightly.global_concurrency_limit.limit == 1
    assert nightly.concurrency_options.collision_strategy.value == "ENQUEUE"
    (schedule,) = nightly.schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone, schedule.active) == ("0 3 * * *", "Etc/UTC", True)


@pytest.mark.parametrize(
    "entry", yaml.safe_load(FILE.read_text())["deployments"], ids=lambda entry: f"{entry['entrypoint']}-{entry['name']}"
)
def test_the_parameters_of_every_deployment_are_those_of_its_flow(entry: dict[str, Any]) -> None:
    from prefect.flows import load_flow_from_entrypoint

    flow: Any = load_flow_from_entrypoint(entry["entrypoint"].replace("flows/", f"{ROOT}/flows/"))
    validated = flow.validate_parameters(entry["parameters"])
    assert set(validated) >= set(entry["parameters"])
    clustered = entry["work_pool"]["name"] == "orbit"
    assert validated["recipe"].executor == ("kubernetes" if clustered else "local")
    assert not clustered or validated["store"].startswith("s3://"), "pods do not share a folder with the orchestrator"


def test_the_store_is_the_one_of_the_example_site() -> None:
    site = yaml.safe_load((ROOT / "k8s" / "overlays" / "s3" / "site.yaml").read_text())
    stores = {entry["parameters"]["store"] for entry in yaml.safe_load(FILE.read_text())["deployments"]}
    assert stores == {".orbit", site["store"]}


def test_a_worker_finds_the_flow_where_orbit_is_installed(
    client: Any, prefect_api: str, deployed: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    """From another folder than the repository, as in the orchestrator's pod. Nothing is promoted, and that is said."""
    recipe = deployment_of(client, "evaluate/cluster").parameters["recipe"]
    parameters = {"store": str(tmp_path / "store"), "recipe": {**recipe, "executor": "local"}}
    run = client.create_flow_run_from_deployment(deployment_of(client, "evaluate/cluster").id, parameters=parameters)
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "orbit", "--type", "process", "--run-once"]
    environment = {**os.environ, "PREFECT_API_URL": prefect_api}
    done = subprocess.run(worker, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    state = client.read_flow_run(run.id).state
    assert state.is_failed() and "orbit promote demo DIGEST" in state.message, f"{state}\n{done.stdout}{done.stderr}"


SILENT = """
import time
from prefect import flow

@flow(name="{name}")
def working():
    print("working", flush=True)
    time.sleep(600)

working()
"""


def killed_run(client: Any, api: str, name: str) -> Any:
    """A flow of that name whose process was killed while it ran."""
    environment = {**os.environ, "PREFECT_API_URL": api, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    command = [sys.executable, "-c", SILENT.format(name=name)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        time.sleep(2)  # the first heartbeat is on its way
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return max(
        (run for run in client.read_flow_runs() if run.state.is_running()),
        key=lambda run: run.start_time or run.created,
    )


def test_a_run_whose_process_is_gone_is_marked_crashed_and_nobody_elses(client: Any, prefect_api: str) -> None:
    from k8s.orchestration import prepare

    prepare(client, heartbeat_seconds=4)  # three of them in 12 s; the processes below live shorter than that
    try:
        ours = killed_run(client, prefect_api, "retrain")
        theirs = killed_run(client, prefect_api, "somebody-elses")
        deadline = time.monotonic() + 60
        while not client.read_flow_run(ours.id).state.is_crashed() and time.monotonic() < deadline:
            time.sleep(0.5)
        state = client.read_flow_run(ours.id).state
        assert state.is_crashed() and "Retry goes on" in state.message
        assert client.read_flow_run(theirs.id).state.is_running()
    finally:
        prepare(client, heartbeat_seconds=180)
