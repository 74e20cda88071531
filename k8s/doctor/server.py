"""The Prefect server: there, of our version, with pools, a live worker, deployments, automation and leases on disk."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator

import httpx
import prefect
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.settings import PREFECT_API_URL, get_current_settings

from k8s.doctor.finding import Finding
from k8s.orchestration import AUTOMATION, FLOWS, HEARTBEATS, POOL, same, zombie_automation

SECONDS = 10.0
DEPLOY = "from the repository: prefect deploy --all --prefect-file k8s/prefect.yaml"
LEASES = "prefect.server.concurrency.lease_storage"


def examine_server() -> Iterator[Finding]:
    url = PREFECT_API_URL.value()
    if not url:
        yield Finding(
            "wrong", "Prefect API", "PREFECT_API_URL is not set", "export PREFECT_API_URL=http://HOST:4200/api"
        )
        return
    if trouble := _unreachable(url):
        yield Finding("wrong", "Prefect API", f"{url}: {trouble}", "start the server, or correct PREFECT_API_URL")
        return
    with get_client(sync_client=True) as client:
        try:
            yield _version(client, url)
            yield from _pool(client)
            yield _deployments(client)
            yield _automation(client)
            yield _leases(client)
        except (httpx.HTTPError, PrefectException) as error:
            yield Finding("wrong", "Prefect API", str(error), "check PREFECT_API_AUTH_STRING or PREFECT_API_KEY")


def _unreachable(url: str) -> str:
    """Why nothing answers; empty if something does. Asked without the client, which would try for a minute."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code in (401, 403) else str(error)
    except (OSError, ValueError) as error:
        return str(error)


def _version(client: SyncPrefectClient, url: str) -> Finding:
    theirs, ours = client.api_version(), prefect.__version__
    if theirs.split(".")[:2] == ours.split(".")[:2]:
        return Finding("ok", "Prefect API", f"{theirs} at {url}")
    fix = f"run server and workers with one version (Orbit is tested with {ours})"
    return Finding("note", "Prefect API", f"{theirs} at {url}, and {ours} here", fix)


def _pool(client: SyncPrefectClient) -> Iterator[Finding]:
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        yield Finding("wrong", "work pool", f"no work pool {POOL!r}", "orbit k8s setup")
        return
    if pool.is_paused:
        yield Finding("wrong", "work pool", f"{POOL} is paused", f"prefect work-pool resume {POOL}")
    elif pool.type != "process":
        fix = f"delete it (prefect work-pool delete {POOL}) and run: orbit k8s setup"
        yield Finding("wrong", "work pool", f"{POOL} is of type {pool.type}, not process", fix)
    else:
        limit = f"at most {pool.concurrency_limit} runs" if pool.concurrency_limit is not None else "no limit"
        yield Finding("ok", "work pool", f"{POOL}, {limit}")
    workers = client.read_workers_for_work_pool(POOL)
    live = [worker.name for worker in workers if worker.status == WorkerStatus.ONLINE]
    if live:
        yield Finding("ok", "worker", ", ".join(live))
    else:
        silent = f", {len(workers)} silent" if workers else ""
        fix = "see after the orchestrator: kubectl -n NAMESPACE get pods -l app.kubernetes.io/name=orbit-orchestrator"
        yield Finding("wrong", "worker", f"none is online for pool {POOL}{silent}", fix)


def _deployments(client: SyncPrefectClient) -> Finding:
    names: dict[str, list[str]] = {flow: [] for flow in FLOWS}
    ours = FlowFilter(name=FlowFilterName(any_=list(FLOWS)))
    flows = {flow.id: flow.name for flow in client.read_flows(flow_filter=ours)}
    for deployment in client.read_deployments(flow_filter=ours):
        flow = flows.get(deployment.flow_id, "")
        if deployment.work_pool_name == POOL and flow in names:
            names[flow].append(f"{flow}/{deployment.name}" + (" (paused)" if deployment.paused else ""))
    missing = [flow for flow, found in names.items() if not found]
    if missing:
        return Finding("wrong", "deployments", f"none of {', '.join(missing)} on pool {POOL}", DEPLOY)
    return Finding("ok", "deployments", ", ".join(name for found in names.values() for name in found))


def _automation(client: SyncPrefectClient) -> Finding:
    """A period shorter than three heartbeats would end runs that live."""
    found = client.read_automations_by_name(AUTOMATION)
    if not found:
        lost = "none: a run whose process dies stays Running"
        return Finding("wrong", "zombie automation", lost, "orbit k8s setup")
    heartbeat = get_current_settings().flows.heartbeat_frequency
    if heartbeat is None:
        fix = "unset PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
        return Finding("wrong", "zombie automation", "flows send no heartbeat here", fix)
    if not found[0].enabled:
        return Finding("wrong", "zombie automation", "it is disabled", "orbit k8s setup")
    if not same(found[0], zombie_automation(heartbeat)):
        other = f"not that of this Orbit with a heartbeat every {heartbeat} s"
        return Finding("wrong", "zombie automation", other, "orbit k8s setup, where the worker's environment is set")
    return Finding("ok", "zombie automation", f"after {HEARTBEATS * heartbeat} s of silence a run is marked Crashed")


def _leases(client: SyncPrefectClient) -> Finding:
    """Where the server keeps the leases of concurrency limits; told by its settings."""
    settings = client.request("GET", "/admin/settings").json()
    storage = settings.get("server", {}).get("concurrency", {}).get("lease_storage")
    if storage is None:
        return Finding("note", "concurrency leases", "the server does not say where it keeps them")
    if storage == f"{LEASES}.memory":
        fix = f"on the server: PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={LEASES}.filesystem"
        return Finding(
            "wrong", "concurrency leases", "in memory: a restart of the server ends runs that hold a limit", fix
        )
    return Finding("ok", "concurrency leases", storage.removeprefix(f"{LEASES}."))
