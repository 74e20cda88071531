"""A namespace of the test cluster as Orbit uses it, and orchestrators that run one step in it.

The orchestrator is a process of its own with the rights of the Role in k8s/overlays/base and no others. Its steps are
pods of the test node; their store is on S3, with credentials from a Secret.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from cluster.api import ApiError, Object
from cluster.running import Cluster
from podsteps import PACKAGE
from podsteps.tally import pods_of

from k8s.naming import job_name
from k8s.site import Site
from orbit_core.recipe import Resources
from orbit_core.steps.contract import StepSpec
from orbit_core.store import open_store
from orbit_core.store.artifacts import Artifact, ArtifactStore

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 180.0  # a promise is about what happens; on a machine full of others it takes its time
# A pod that lives keeps its lease however crowded the machine is; where one dies with it, nobody waits long.
LEASE_SECONDS, SHORT_LEASE = 60.0, {"lease_seconds": 12.0}
Event = dict[str, Any]


@dataclass
class World:
    cluster: Cluster
    namespace: str
    store: str
    folder: Path
    environment: dict[str, str]  # of S3, as the orchestrator has it
    brief: bool = False  # whole runs of the demo learn a little in place of everything
    site_changes: dict[str, Any] = field(default_factory=dict)
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # what ends with it

    def site(self) -> Site:
        return Site.model_validate(
            {
                "namespace": self.namespace,
                "images": {"cpu": "orbit:test", "gpu": "orbit-node:test", "patience_seconds": 5},
                "environment_secret": "orbit-store",
                "lease_seconds": LEASE_SECONDS,
                "package": PACKAGE,
                **self.site_changes,
            }
        )

    def orchestrate(self, spec: StepSpec, **resources: Any) -> Orchestrator:
        """A started orchestrator. Steps are small and end soon after SIGTERM."""
        asked = Resources.model_validate({"cpus": 1, "memory_gib": 1, "shm_gib": 0, "grace_seconds": 5, **resources})
        folder = self.folder / uuid.uuid4().hex[:8]
        folder.mkdir()
        files = {
            "spec.json": spec.model_dump_json(),
            "site.yaml": yaml.safe_dump(self.site().model_dump(mode="json")),
            "resources.json": asked.model_dump_json(),
        }
        for name, text in files.items():
            (folder / name).write_text(text)
        orchestrator = Orchestrator([str(folder / name) for name in files], self.process_environment())
        self.closing.callback(orchestrator.close)
        return orchestrator

    def process_environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "KUBE"))},
            **self.environment,
            "KUBECONFIG": str(self.cluster.plane.kubeconfig("orchestrator")),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "k8s")]),
        }

    # What is in the cluster, seen as its admin

    def job(self, spec: StepSpec) -> Object:
        return self._get(f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{job_name(spec)}")

    def has_job(self, spec: StepSpec) -> bool:
        try:
            self.job(spec)
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        return True

    def pods(self, spec: StepSpec) -> list[Object]:
        """Oldest first."""
        selector = f"batch.kubernetes.io/job-name={job_name(spec)}"
        answer = self.cluster.plane.api().get(f"/api/v1/namespaces/{self.namespace}/pods", labelSelector=selector)
        return sorted(answer["items"], key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def running_pod(self, spec: StepSpec) -> str:
        """Name of the pod whose step container runs; waits for it."""

        def look() -> str | None:
            for pod in self.pods(spec):
                for container in pod.get("status", {}).get("containerStatuses", []):
                    if "running" in container.get("state", {}) and "deletionTimestamp" not in pod["metadata"]:
                        return str(pod["metadata"]["name"])
            return None

        return until(look, "a running pod")

    def artifact(self, spec: StepSpec) -> Artifact | None:
        return ArtifactStore(open_store(spec.store)).find(spec.step, spec.digest)

    def patch_job(self, spec: StepSpec, **changes: Any) -> None:
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{job_name(spec)}"
        self.cluster.plane.api().patch(path, {"spec": changes})

    def committed(self, spec: StepSpec) -> list[str]:
        """The pod of each tick committed so far."""
        return pods_of(open_store(spec.store), spec.digest)

    def give_up_node(self, name: str, given_up: bool = True) -> None:
        """What a person does about a node that is lost for good: without it its pods are never taken for ended."""
        taint = "node.kubernetes.io/out-of-service"
        self.cluster.plane.kubectl("taint", "node", name, f"{taint}=lost:NoExecute" if given_up else f"{taint}-")

    def evict(self, pod: str) -> None:
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": self.namespace}}
        self.cluster.plane.api().post(f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction", body)

    def _get(self, path: str) -> Object:
        return self.cluster.plane.api().get(path)


class Orchestrator:
    """A process that runs one step and tells its events; see orchestrate.py."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        command = [sys.executable, str(Path(__file__).with_name("orchestrate.py")), *arguments]
        self.events: list[Event] = []
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self._errors: list[str] = []
        self._threads = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, what: str, matches: Callable[[Event], Any], patience: float = PATIENCE_SECONDS) -> Event:
        """The first event that matches, also one that has come already."""
        return until(lambda: next((event for event in list(self.events) if matches(event)), None), what, patience, self)

    def wait_for_status(self, words: str, patience: float = PATIENCE_SECONDS) -> Event:
        return self.wait_for(
            f"status {words!r}", lambda event: event["orbit"] == "status" and words in event["message"], patience
        )

    def wait_for_tick(self, number: int) -> None:
        self.wait_for(f"tick {number}", lambda event: _is_tick(event) and event["done"] >= number)

    def end(self, patience: float = PATIENCE_SECONDS) -> Event:
        """How it ended: {"error": None | class name, ...}."""
        found = self.wait_for("its end", lambda event: event["orbit"] == "end", patience)
        self.process.wait(timeout=10)
        return found

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM: called off."""
        self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()

    @property
    def told(self) -> list[str]:
        """Sentences about where the step runs, in order."""
        return [event["message"] for event in self.events if event["orbit"] == "status"]

    def describe(self) -> str:
        shown = [json.dumps(event) for event in self.events[-25:]]
        return "\n".join([*shown, *self._errors[-25:], f"exit code {self.process.poll()}"])

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self._errors.extend(line.rstrip() for line in self.process.stderr)


def _is_tick(event: Event) -> bool:
    return event["orbit"] == "progress" and "unit" not in event  # staging counts bytes


def until(
    look: Callable[[], Any],
    what: str,
    patience: float = PATIENCE_SECONDS,
    whose: Orchestrator | None = None,
    pause: float = 0.15,
) -> Any:
    """What `look` returns as soon as it is true; AssertionError with all that is known after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        found = look()
        if found:
            return found
        over = whose is not None and whose.process.poll() is not None
        if time.monotonic() > deadline or over:
            time.sleep(0.3)  # the readers may have lines in hand
            found = look()
            if found:
                return found
            story = f"\n{whose.describe()}" if whose else ""
            raise AssertionError(f"waited {'in vain' if over else f'{patience:.0f} s'} for {what}{story}")
        time.sleep(pause)


@contextlib.contextmanager
def moto_bucket() -> Iterator[tuple[str, dict[str, str]]]:
    """URL of a bucket on an S3 server of our own and the environment that opens it, ours too until it closes."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret-value",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    import s3fs

    bucket = f"orbit-{uuid.uuid4().hex[:8]}"  # moto keeps buckets for the life of the process
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    try:
        yield f"s3://{bucket}", environment
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def new_world(
    cluster: Cluster, bucket_url: str, environment: dict[str, str], folder: Path, brief: bool = False
) -> Iterator[World]:
    """A namespace with Orbit's Role, service account and Secret, and a prefix of the store of its own."""
    plane = cluster.plane
    namespace = plane.new_namespace()
    plane.kubectl("create", "--validate=false", "-f", "-", input=yaml.safe_dump_all(_set_up(namespace, environment)))
    world = World(cluster, namespace, f"{bucket_url}/{namespace}", folder, environment, brief)
    try:
        yield world
    finally:
        world.closing.close()
        plane.delete_namespace(namespace)


def _set_up(namespace: str, environment: dict[str, str]) -> Iterator[Object]:
    yield {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "orbit-store", "namespace": namespace},
        "stringData": environment,
    }
    for manifest in yaml.safe_load_all((ROOT / "k8s" / "overlays" / "base" / "access.yaml").read_text()):
        kind = manifest["kind"]
        if kind in ("ServiceAccount", "Role", "RoleBinding"):
            manifest["metadata"]["namespace"] = namespace
            if kind == "RoleBinding":  # the same rights for the user of the tests
                manifest["subjects"] = [
                    {"kind": "User", "name": "orchestrator", "apiGroup": "rbac.authorization.k8s.io"}
                ]
            yield manifest
