"""What Orbit reads of Jobs and pods, as plain typed values. In the client's own types every field may be None."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kubernetes.client import V1Job, V1Pod

NO_TIME = datetime.min


@dataclass(frozen=True)
class Condition:
    true: bool
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Container:
    """`state` is waiting, running or terminated; `exit_code` only then. 128 + n for signal n."""

    name: str
    image: str = ""
    state: str = "waiting"
    reason: str = ""
    message: str = ""
    exit_code: int | None = None


@dataclass(frozen=True)
class Pod:
    name: str
    uid: str
    created: datetime = NO_TIME
    deleting: bool = False
    phase: str = "Pending"
    node: str = ""
    message: str = ""
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    containers: tuple[Container, ...] = ()  # init containers first
    memory: str = ""  # limit of its container

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")


@dataclass(frozen=True)
class Job:
    name: str
    namespace: str
    uid: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    deleting: bool = False
    suspended: bool = False
    tried: bool = False  # it has been started, or has had a pod that failed
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    retries: int = 0
    deadline_seconds: int | None = None
    grace_seconds: int = 30


def job_of(model: V1Job) -> Job:
    raw = model.model_dump(by_alias=True, exclude_none=True)
    meta, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    return Job(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        labels=meta.get("labels", {}),
        annotations=meta.get("annotations", {}),
        deleting="deletionTimestamp" in meta,
        suspended=bool(spec.get("suspend")),
        tried=bool(status.get("failed") or status.get("startTime")),
        conditions=_conditions(status),
        retries=spec.get("backoffLimit", 0),
        deadline_seconds=spec.get("activeDeadlineSeconds"),
        grace_seconds=spec["template"]["spec"].get("terminationGracePeriodSeconds", 30),
    )


def pod_of(model: V1Pod) -> Pod:
    raw = model.model_dump(by_alias=True, exclude_none=True)
    meta, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    statuses = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    limits = spec["containers"][0].get("resources", {}).get("limits", {})
    return Pod(
        name=meta["name"],
        uid=meta["uid"],
        created=meta.get("creationTimestamp", NO_TIME),
        deleting="deletionTimestamp" in meta,
        phase=status.get("phase", "Pending"),
        node=spec.get("nodeName", ""),
        message=status.get("message") or status.get("reason") or "",
        conditions=_conditions(status),
        containers=tuple(_container(each) for each in statuses),
        memory=str(limits.get("memory", "")),
    )


def _container(raw: dict[str, Any]) -> Container:
    states: dict[str, dict[str, Any]] = raw.get("state", {})
    state, detail = next(iter(states.items()), ("waiting", {}))
    return Container(
        name=raw["name"],
        image=raw.get("image", ""),
        state=state,
        reason=detail.get("reason", ""),
        message=detail.get("message", ""),
        exit_code=detail.get("exitCode"),
    )


def _conditions(status: dict[str, Any]) -> dict[str, Condition]:
    return {
        each["type"]: Condition(each["status"] == "True", each.get("reason", ""), each.get("message", ""))
        for each in status.get("conditions", [])
    }
