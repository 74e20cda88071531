"""How the tests of the cluster ask for pods, and wait for what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from cluster.api import ApiError, ApiUnreachable, Object
from cluster.running import Cluster

PATIENCE_SECONDS = 120.0
KEEP = "tests/keep"  # a finalizer: what became of a deleted pod stays to be read, until its namespace is cleaned up

Seen = TypeVar("Seen")


def until(look: Callable[[], Seen | None], what: str, patience_seconds: float = PATIENCE_SECONDS) -> Seen:
    """The first answer that is not None or False; an API server that is away is asked again."""
    end = time.monotonic() + patience_seconds
    while time.monotonic() < end:
        try:
            seen = look()
        except ApiUnreachable:
            seen = None
        if seen is not None and seen is not False:
            return seen
        time.sleep(0.05)
    raise AssertionError(f"not within {patience_seconds:g} s: {what}")


def python(script: str) -> list[str]:
    return ["python", "-u", "-c", script]


def pod(name: str, command: list[str], gpus: int = 0, **spec: object) -> Object:
    """Keys of `spec` that a container has go to its container, the others to the pod."""
    of_container = {"env", "envFrom", "volumeMounts", "terminationMessagePolicy", "image", "args"}
    container: Object = {"name": "step", "image": "orbit:test", "command": command}
    container |= {key: value for key, value in spec.items() if key in of_container}
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": str(gpus)}}
    rest = {key: value for key, value in spec.items() if key not in of_container}
    body: Object = {"restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [container]}
    return {"metadata": {"name": name, "finalizers": [KEEP]}, "spec": body | rest}


def job(name: str, command: list[str], gpus: int = 0, **spec: object) -> Object:
    template = {"spec": pod(name, command, gpus, **spec)["spec"]}
    return {"metadata": {"name": name}, "spec": {"backoffLimit": 0, "template": template}}


class Asking:
    """The API as the tests use it, in one namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace, self.api = cluster, namespace, cluster.plane.api()
        self.pods, self.jobs = f"/api/v1/namespaces/{namespace}/pods", f"/apis/batch/v1/namespaces/{namespace}/jobs"

    def start(self, pod: Object) -> str:
        name: str = self.api.post(self.pods, pod)["metadata"]["name"]
        return name

    def start_job(self, job: Object) -> str:
        name: str = self.api.post(self.jobs, job)["metadata"]["name"]
        return name

    def pod(self, name: str) -> Object:
        return self.api.get(f"{self.pods}/{name}")

    def pod_of(self, job: str) -> Object | None:
        found = self.api.get(self.pods, labelSelector=f"batch.kubernetes.io/job-name={job}")["items"]
        return found[0] if found else None

    def running(self, name: str) -> Object:
        return until(lambda: self._if(name, lambda state: "running" in state), f"pod {name} runs")

    def ended(self, name: str) -> Object:
        """Its last status, in which the node says no more."""
        return until(lambda: self._if_phase(name, "Succeeded", "Failed"), f"pod {name} has ended")

    def condition(self, path: str, kind: str) -> Object | None:
        """A condition that is true, of a pod, a Job or a node."""
        conditions = self.api.get(path).get("status", {}).get("conditions", [])
        return next((each for each in conditions if (each["type"], each["status"]) == (kind, "True")), None)

    def completed(self, job: str) -> Object:
        return until(lambda: self.condition(f"{self.jobs}/{job}", "Complete"), f"job {job} is complete")

    def log(self, name: str) -> str:
        return self.api.text(f"{self.pods}/{name}/log")

    def says(self, name: str, text: str) -> None:
        def look() -> bool:
            try:
                return text in self.log(name)
            except ApiError as error:
                if error.status not in (400, 404):  # not started yet, or not yet known to its node
                    raise
                return False

        until(look, f"pod {name} says {text!r}")

    def let_go(self) -> None:
        """Of the deleted pods that were kept to be read."""
        for found in self.api.get(self.pods)["items"]:
            if KEEP in found["metadata"].get("finalizers", []):
                removal = {"metadata": {"$deleteFromPrimitiveList/finalizers": [KEEP]}}
                self.api.patch(f"{self.pods}/{found['metadata']['name']}", removal)

    def _if(self, name: str, holds: Callable[[Object], bool]) -> Object | None:
        found = self.pod(name)
        statuses = found["status"].get("containerStatuses", [])
        return found if statuses and all(holds(status["state"]) for status in statuses) else None

    def _if_phase(self, name: str, *phases: str) -> Object | None:
        found = self.pod(name)
        return found if found["status"].get("phase") in phases else None


def end_of(pod: Object) -> Object:
    """How its first container ended."""
    end: Object = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    return end


def waits_for(pod: Object) -> str:
    statuses = pod["status"].get("containerStatuses", [])
    return str(statuses[0]["state"].get("waiting", {}).get("reason", "")) if statuses else ""
