"""What Orbit needs of a Prefect server: two work pools, and an automation that ends runs whose process is gone.

A flow sends a heartbeat while it runs. When its process dies with its pod and nobody is left to say so, the run stays
Running for ever, and holds its place in a concurrency limit; Prefect's own server has nothing against that unless it is
told. The automation marks such a run Crashed after three silent heartbeats: Retry then goes on from what is finished,
and adopts a Job that runs. It looks at Orbit's flows alone, so that others on the same server are left in peace.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

POOL = "orbit"
POOLS = {POOL: "runs in the cluster: a worker in the orchestrator's pod", "local": "runs on a machine of one's own"}
FLOWS = ("post-train", "evaluate", "retrain")
AUTOMATION = "orbit: runs whose process is gone"
HEARTBEATS = 3  # silent ones, after which a process counts as gone
HEARTBEAT = "prefect.flow-run.heartbeat"
# After these no heartbeat is due: the run is over, or waits for somebody.
QUIET = ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut", "AwaitingRetry", "Paused", "Suspended", "Scheduled")


def zombie_automation(heartbeat_seconds: float) -> AutomationCore:
    """`heartbeat_seconds`: PREFECT_FLOWS_HEARTBEAT_FREQUENCY of the flows, 180 by default."""
    return AutomationCore(
        name=AUTOMATION,
        description="A run of Orbit that sends no heartbeat any more is marked Crashed. Made by `orbit k8s setup`.",
        enabled=True,
        trigger=EventTrigger(
            posture=Posture.Proactive,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)},
            for_each={"prefect.resource.id"},
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{name}" for name in QUIET)},
            threshold=1,
            within=timedelta(seconds=HEARTBEATS * heartbeat_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message="No heartbeat any more: its process is gone. Retry goes on from what is finished.",
            )
        ],
    )


def prepare(client: SyncPrefectClient, heartbeat_seconds: float) -> list[str]:
    """Make what is missing and bring up to date what is there; one line for each, whatever was done."""
    return [*(_pool(client, name) for name in POOLS), _automation(client, zombie_automation(heartbeat_seconds))]


def same(found: Automation, wanted: AutomationCore) -> bool:
    """Whether an automation of the server does what is wanted."""
    meaning = {"enabled", "trigger", "actions"}
    return found.model_dump(include=meaning) == wanted.model_dump(include=meaning)  # not as JSON: sets have no order


def _pool(client: SyncPrefectClient, name: str) -> str:
    try:
        found = client.read_work_pool(name)
        return f"work pool {name} is there" + ("" if found.type == "process" else f", of type {found.type}")
    except ObjectNotFound:
        pass
    try:
        client.create_work_pool(WorkPoolCreate(name=name, type="process", description=POOLS[name]))
    except ObjectAlreadyExists:
        return f"work pool {name} is there"
    return f"work pool {name} was made: {POOLS[name]}"


def _automation(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    there = client.read_automations_by_name(AUTOMATION)
    if not there:
        client.create_automation(wanted)
        return f"automation {AUTOMATION!r} was made"
    found, *others = there
    for other in others:  # of two setups at once
        client.delete_automation(other.id)
    if same(found, wanted):
        return f"automation {AUTOMATION!r} is there"
    client.update_automation(found.id, wanted)
    return f"automation {AUTOMATION!r} was brought up to date"
