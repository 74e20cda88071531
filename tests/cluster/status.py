"""What a kubelet says about a pod: phase, conditions, container statuses; a function of what its containers do."""

from __future__ import annotations

from cluster.api import Object
from cluster.containers import now
from cluster.pods import PodRun


def pod_status(run: PodRun, before: Object) -> Object:
    """`before`: the status last said, whose transition times stay where nothing has changed."""
    phase = phase_of(run)
    return {
        "phase": phase,
        "startTime": run.started,
        "hostIP": "127.0.0.1",
        "hostIPs": [{"ip": "127.0.0.1"}],
        "podIP": run.address,
        "podIPs": [{"ip": run.address}],
        "qosClass": run.pod["status"].get("qosClass", "BestEffort"),
        "conditions": conditions(run, phase, before),
        **({"initContainerStatuses": [container.status() for container in run.init]} if run.init else {}),
        "containerStatuses": [container.status() for container in run.main],
        **run.failure,
    }


def phase_of(run: PodRun) -> str:
    if run.finished.is_set():
        good = not run.failure and all(container.exit_code == 0 for container in run.containers)
        return "Succeeded" if good else "Failed"
    return "Running" if any(container.started for container in run.main) else "Pending"


def conditions(run: PodRun, phase: str, before: Object) -> list[Object]:
    initialized = all(container.exit_code == 0 for container in run.init)
    ready = all("running" in container.state for container in run.main)
    unready = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(phase, "ContainersNotReady")
    wanted = {
        "PodReadyToStartContainers": (phase != "Pending" or any(c.started for c in run.init), ""),
        "Initialized": (initialized, "ContainersNotInitialized"),
        "Ready": (ready, unready),
        "ContainersReady": (ready, unready),
    }
    if run.evicted:
        wanted["DisruptionTarget"] = (True, "TerminationByKubelet")
    last = {condition["type"]: condition for condition in before.get("conditions", [])}
    found = []
    for name, (holds, reason) in wanted.items():
        value = "True" if holds else "False"
        same = last.get(name, {}).get("status") == value
        said = reason if name == "DisruptionTarget" or not holds else ""
        since = last[name]["lastTransitionTime"] if same else now()
        found.append({"type": name, "status": value, "lastTransitionTime": since, "reason": said})
    return found
