"""What a node tells the API server of its pods: the newest status of each, again and again until it is heard."""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from datetime import UTC, datetime

from cluster.api import Api, ApiError, ApiUnreachable, Object
from cluster.pods import PodRun
from cluster.status import pod_status

RETRY_SECONDS = 0.2
log = logging.getLogger(__name__)


class Reporter:
    """`report` and `event` return at once; `run` does the work in one thread until the node is dead.

    A pod that is deleted and has finished is, after its last status, deleted for good: only then may something else
    take its place.
    """

    def __init__(self, api: Api, dead: threading.Event) -> None:
        self._api, self._dead = api, dead
        self._pending: dict[str, PodRun] = {}
        self._events: list[Object] = []
        self._warned: set[str] = set()
        self._said: dict[str, Object] = {}
        self._something = threading.Condition()

    def report(self, run: PodRun) -> None:
        with self._something:
            self._pending[run.uid] = run
            self._something.notify()

    def forget(self, run: PodRun) -> None:
        with self._something:
            self._pending.pop(run.uid, None)
            self._said.pop(run.uid, None)

    def event(self, pod: Object, kind: str, reason: str, message: str) -> None:
        """Shown by `kubectl describe`. As with a kubelet, an event may be lost, a status not."""
        metadata, moment = pod["metadata"], datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        keys = ("name", "namespace", "uid", "resourceVersion")
        event = {
            "metadata": {"name": f"{metadata['name']}.{uuid.uuid4().hex[:12]}", "namespace": metadata["namespace"]},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", **{key: metadata[key] for key in keys}},
            "type": kind,
            "reason": reason,
            "message": message,
            "count": 1,
            "firstTimestamp": moment,
            "lastTimestamp": moment,
            "source": {"component": "kubelet", "host": pod["spec"].get("nodeName", "")},
        }
        with self._something:
            self._events.append(event)
            self._something.notify()

    def wake(self) -> None:
        with self._something:
            self._something.notify()

    def run(self) -> None:
        while not self._dead.is_set():
            with self._something:
                self._something.wait_for(lambda: self._pending or self._events or self._dead.is_set())
                runs, self._pending = list(self._pending.values()), {}
                events, self._events = self._events, []
            for run in runs:
                self._try(run)
            for event in events:
                self._send_event(event)

    def _try(self, run: PodRun) -> None:
        try:
            self._send(run)
        except ApiUnreachable:
            self._again(run)
        except ApiError as error:
            if error.status not in (404, 409):  # the pod is gone, or another has its name
                if str(error) not in self._warned:
                    self._warned.add(str(error))
                    log.warning("status of pod %s: %s", run.pod["metadata"]["name"], error)
                self._again(run)

    def _again(self, run: PodRun) -> None:
        if not self._dead.wait(RETRY_SECONDS):
            with self._something:
                self._pending.setdefault(run.uid, run)

    def _send(self, run: PodRun) -> None:
        if self._dead.is_set():
            return
        metadata = run.pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        finished = run.finished.is_set()
        status = pod_status(run, self._said.get(run.uid) or run.pod["status"])
        if status != self._said.get(run.uid):
            self._api.patch(f"{path}/status", {"metadata": {"uid": run.uid}, "status": status})
            self._said[run.uid] = status
        if finished and "deletionTimestamp" in metadata:
            self._api.delete(path, {"gracePeriodSeconds": 0, "preconditions": {"uid": run.uid}})

    def _send_event(self, event: Object) -> None:
        with contextlib.suppress(ApiUnreachable, ApiError):
            self._api.post(f"/api/v1/namespaces/{event['metadata']['namespace']}/events", event)
