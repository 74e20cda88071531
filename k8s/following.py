"""Everything that happens to one Job, as one stream in the caller's thread: changes, lines of its logs, trouble.

Threads watch and read; what they find goes through one queue. The caller may be interrupted at any time by a signal
(cancellation), so it never waits longer than a moment.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

import urllib3
from kubernetes.client.exceptions import ApiException

from k8s.api import TIMEOUT, Api, patient, short
from k8s.logs import LogFollower
from k8s.objects import Job, Pod, job_of, pod_of
from k8s.watching import ListWatch

TICK_SECONDS = 0.5
JOIN_SECONDS = 5.0  # for threads to end: one that outlives the interpreter aborts it
EVENTS_SECONDS = 5.0  # between two looks at the Job's events
TROUBLE_SECONDS = 5.0  # a shorter silence of the API server is not worth a word


class Following:
    """Iterate for (kind, content): ("line", text), ("status", sentence), ("change", None).

    A "change" comes at least every few seconds, so that the caller can look at the clock. `job`, `pods` and `gone` are
    as of the last change.
    """

    def __init__(self, api: Api, job: Job, adopted: bool) -> None:
        self.job, self.pods, self.gone = job, list[Pod](), False
        self.refused: list[str] = []  # why its pods were not made, in the Job's own events
        self.api = api
        self._items: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._events_asked = self._trouble_since = 0.0
        self._told = False
        namespace, name = job.namespace, job.name
        self._logs = LogFollower(api, namespace, lambda line: self._items.put(("line", line)), adopted)
        self._pods_of_job: dict[str, Any] = {"label_selector": f"batch.kubernetes.io/controller-uid={job.uid}"}
        self._watches: list[ListWatch[Job] | ListWatch[Pod]] = [
            ListWatch(
                f"Job {name}",
                api.batch.list_namespaced_job,
                job_of,
                lambda found: self._items.put(("job", found)),
                self._on_trouble,
                namespace=namespace,
                field_selector=f"metadata.name={name}",
            ),
            ListWatch(
                f"pods of Job {name}",
                api.core.list_namespaced_pod,
                pod_of,
                lambda found: self._items.put(("pods", found)),
                self._on_trouble,
                namespace=namespace,
                **self._pods_of_job,
            ),
        ]

    def __enter__(self) -> Following:
        for watch in self._watches:
            watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watch in self._watches:
            watch.stop()
        self._logs.stop()
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in (*self._watches, *self._logs.threads):
            thread.join(max(0.0, deadline - time.monotonic()))

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        while True:
            try:
                kind, content = self._items.get(timeout=TICK_SECONDS)
            except queue.Empty:
                yield "change", None
                continue
            if kind == "job":
                self._see_job(content)
                yield "change", None
            elif kind == "pods":
                self._see_pods(content)
                yield "change", None
            elif kind == "trouble":
                sentence = self._trouble(*content)
                if sentence:
                    yield "status", sentence
            else:
                yield kind, content

    def last_look(self) -> None:
        """The pods as they are now: the Job's end may be known before theirs."""
        call = self.api.core.list_namespaced_pod
        answer = patient(
            f"pods of Job {self.job.name}",
            lambda: call(self.job.namespace, **self._pods_of_job, _request_timeout=TIMEOUT),
        )
        self._see_pods([pod_of(item) for item in answer.items])

    def last_lines(self, seconds: float) -> Iterator[str]:
        """What the logs still hold after the Job's end; waits for it at most `seconds`."""
        self._logs.drain(seconds)
        while not self._items.empty():
            kind, content = self._items.get_nowait()
            if kind == "line":
                yield content

    def why_no_pod(self) -> list[str]:
        """Messages of the Job's FailedCreate events; asked for now and then, while it has no pod."""
        now = time.monotonic()
        if not self.pods and now - self._events_asked > EVENTS_SECONDS:
            self._events_asked = now
            selector = f"involvedObject.uid={self.job.uid},reason=FailedCreate"
            with contextlib.suppress(ApiException, urllib3.exceptions.HTTPError):  # they only explain
                call = self.api.core.list_namespaced_event
                answer = call(self.job.namespace, field_selector=selector, _request_timeout=TIMEOUT)
                self.refused = [event.message or "" for event in answer.items]
        return self.refused

    def _see_job(self, found: list[Job]) -> None:
        ours = [job for job in found if job.uid == self.job.uid]
        self.job, self.gone = (ours[0], False) if ours else (self.job, True)

    def _see_pods(self, found: list[Pod]) -> None:
        """A pod that is gone stays in memory: how it ended may be all that explains the Job's end."""
        self._logs.see(found)
        known = {pod.uid: pod for pod in (*self.pods, *found)}
        gone = known.keys() - {pod.uid for pod in found}
        self.pods = [
            replace(pod, phase="Failed") if pod.uid in gone and not pod.ended else pod for pod in known.values()
        ]

    def _on_trouble(self, error: Exception | None, final: bool) -> None:
        self._items.put(("trouble", (error, final)))

    def _trouble(self, error: Exception | None, final: bool) -> str:
        """What to tell the person, if anything; raises what repeating cannot help."""
        if error is not None and final:
            raise error
        if error is None:
            told, self._told, self._trouble_since = self._told, False, 0.0
            return "the Kubernetes API server answers again" if told else ""
        self._trouble_since = self._trouble_since or time.monotonic()
        if self._told or time.monotonic() - self._trouble_since < TROUBLE_SECONDS:
            return ""
        self._told = True
        return f"the Kubernetes API server does not answer ({short(error)}); the Job goes on without us"
