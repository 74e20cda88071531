"""Create, read and delete Jobs: the calls that must not be lost, repeated until the API server has answered."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from kubernetes.client import V1DeleteOptions, V1Job, V1Preconditions
from kubernetes.client.exceptions import ApiException

from k8s.api import TIMEOUT, Api, patient, short
from k8s.objects import Job, job_of
from orbit_core.errors import InputError, OrbitError

POLL_SECONDS = 0.5
CONTROLLER_SECONDS = 120.0  # for the control plane to remove a Job whose pods have ended
Say = Callable[[str], None]


class Jobs:
    def __init__(self, api: Api, namespace: str) -> None:
        self.api, self.namespace = api, namespace

    def create(self, manifest: V1Job, say: Say) -> Job | None:
        """The Job as made, or None if one of this name is there. A repeated request may find its own first try."""
        name = manifest.metadata.name if manifest.metadata else ""
        call = self.api.batch.create_namespaced_job
        try:
            made = patient(
                f"creating Job {name}", lambda: call(self.namespace, manifest, _request_timeout=TIMEOUT), say
            )
        except ApiException as error:
            if error.status == 409:
                return None
            raise InputError(
                f"namespace {self.namespace}", "to exist", short(error), "kubectl apply -k k8s/overlays/<yours>"
            ) from None
        return job_of(made)

    def read(self, name: str, say: Say) -> Job | None:
        call = self.api.batch.read_namespaced_job
        try:
            found = patient(f"reading Job {name}", lambda: call(name, self.namespace, _request_timeout=TIMEOUT), say)
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        return job_of(found)

    def delete(self, job: Job) -> None:
        """Delete this very Job, not another of its name; it is gone when its pods have had their grace period."""
        options = V1DeleteOptions(propagation_policy="Foreground", preconditions=V1Preconditions(uid=job.uid))
        call = self.api.batch.delete_namespaced_job
        with contextlib.suppress(ApiException):  # 404, 409: it is gone, or another has its name
            patient(
                f"deleting Job {job.name}",
                lambda: call(job.name, self.namespace, body=options, _request_timeout=TIMEOUT),
            )

    def wait_until_gone(self, job: Job) -> None:
        """Raises OrbitError if the Job is still there well after the grace period of its pods."""
        patience = job.grace_seconds + CONTROLLER_SECONDS
        deadline = time.monotonic() + patience
        while (found := self.read(job.name, lambda message: None)) is not None and found.uid == job.uid:
            if time.monotonic() > deadline:
                raise OrbitError(
                    f"Job {job.name}\n  expected: its pods to end within {patience:.0f} s\n  found: still there\n"
                    "  what to do: see whether their node answers (`kubectl get pods,nodes`)"
                )
            time.sleep(POLL_SECONDS)
