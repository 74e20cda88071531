"""A node of the test cluster: a small kubelet that runs pods as local processes.

It registers itself with the capacity it is given, keeps its Lease, runs what is bound to it, tells the API server what
became of it, serves logs, and obeys deletion. It has a kubelet's rights and no others. An API server that is away
changes nothing for what runs: what there is to say is said when it is back. A node that died and starts again finds
nothing of its earlier pods but their status, as after a reboot.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from cluster.api import Api, ApiError, ApiUnreachable, Object
from cluster.containers import Container, now
from cluster.logs import LogServer
from cluster.pods import PodRun
from cluster.reporting import Reporter
from cluster.volumes import Host

HEARTBEAT_SECONDS = 1.0
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
CAPACITY = {"cpu": "192", "memory": "2Ti", "ephemeral-storage": "8Ti", "pods": "110"}

NODE_INFO = "machineID systemUUID bootID kernelVersion osImage architecture containerRuntimeVersion kubeProxyVersion"


class Node:
    """`with Node(plane.api(name), name, plane.folder) as node:` `has_image` says which images can be pulled."""

    def __init__(
        self,
        api: Api,
        name: str,
        folder: Path,
        certificates: Path,
        gpus: int = 8,
        taints: tuple[Object, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name, self._api, self._certificates = name, api, certificates
        self.folder = folder / name
        self.host = Host(api, self.folder / "disk")
        self.has_image: Callable[[str], bool] = lambda image: "missing" not in image
        self._capacity = CAPACITY | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        self._taints, self._environment = taints, environment or {}
        self._runs: dict[str, PodRun] = {}
        self._lock, self._addresses = threading.RLock(), itertools.count(2)
        self._threads: list[threading.Thread] = []
        self._dead = threading.Event()

    def __enter__(self) -> Node:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.die()

    def start(self) -> None:
        """Registers and serves; returns when the API server knows it as ready."""
        self._dead = threading.Event()
        self._runs = {}
        self._logs = LogServer(self._find, self._certificates / "apiserver.crt", self._certificates / "apiserver.key")
        self._reporter = Reporter(self._api, self._dead)
        self._register()
        loops = (self._keep_alive, self._follow_pods, self._reporter.run)
        self._threads = [threading.Thread(target=loop, args=(), daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    # Faults

    def die(self) -> None:
        """Power off: no heartbeat, no processes, no last word. `start` brings it back, as after a reboot."""
        self._dead.set()
        self._logs.close()
        with self._lock:
            for run in self._runs.values():
                run.power_off()
        self._reporter.wake()

    def cut_off(self) -> None:
        """The control plane and it no longer reach each other. What runs goes on, and reaches the store."""
        self._api.cut_off = True

    def reconnect(self) -> None:
        self._api.cut_off = False

    def freeze(self, namespace: str, pod: str) -> None:
        """SIGSTOP to a running pod, as when its machine is paused; its clock goes on."""
        self._running(namespace, pod, None).signal(signal.SIGSTOP)

    def thaw(self, namespace: str, pod: str) -> None:
        self._running(namespace, pod, None).signal(signal.SIGCONT)

    def kill(self, namespace: str, pod: str, container: str | None = None) -> None:
        """SIGKILL to a running container (its first main one): exit code 137, reason Error."""
        self._running(namespace, pod, container).kill()

    def oom(self, namespace: str, pod: str, container: str | None = None) -> None:
        """As the kernel does when the container needs more memory than its limit."""
        self._running(namespace, pod, container).kill("OOMKilled")

    def evict(self, namespace: str, pod: str, message: str = "The node was low on resource: memory.") -> None:
        """As a kubelet that needs what the pod has: at once, without asking the API server."""
        for run in self._runs_of(namespace, pod):
            run.evict(message)

    def drop_log_connections(self) -> int:
        return self._logs.drop_connections()

    def runs(self, namespace: str, pod: str) -> bool:
        """Whether it has the pod: bound to it, and not yet gone for good."""
        return bool(self._runs_of(namespace, pod))

    # Its loops

    def _keep_alive(self) -> None:
        while not self._dead.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(ApiUnreachable, ApiError):
                self._beat()

    def _follow_pods(self) -> None:
        self._api.follow(
            "/api/v1/pods",
            self._dead,
            on_object=self._take,
            on_deleted=lambda pod: self._forget(pod["metadata"]["uid"]),
            on_list=lambda pods: self._forget_all_but({pod["metadata"]["uid"] for pod in pods}),
            fieldSelector=f"spec.nodeName={self.name}",
        )

    def _take(self, pod: Object) -> None:
        """A pod as the API server has it now."""
        uid, ended = pod["metadata"]["uid"], pod["status"].get("phase") in ("Succeeded", "Failed")
        with self._lock:
            run = self._runs.get(uid)
            if run is None:
                if ended and "deletionTimestamp" not in pod["metadata"]:
                    return
                run = self._runs[uid] = self._new_run(pod)
                if "deletionTimestamp" in pod["metadata"] or pod["status"].get("startTime"):
                    run.lose()
                else:
                    run.start()
            run.pod = pod
        if "deletionTimestamp" in pod["metadata"]:
            run.terminate(pod["metadata"].get("deletionGracePeriodSeconds", 30))
            self._reporter.report(run)

    def _new_run(self, pod: Object) -> PodRun:
        folder, number = self.folder / "pods" / pod["metadata"]["uid"], next(self._addresses)
        return PodRun(
            pod,
            self.host,
            folder,
            pod["status"].get("podIP") or f"10.244.{number // 256}.{number % 256}",
            self._environment,
            lambda image: self.has_image(image),
            self._reporter.report,
            self._reporter.event,
        )

    def _forget_all_but(self, known: set[str]) -> None:
        for uid in set(self._runs) - known:
            self._forget(uid)

    def _forget(self, uid: str) -> None:
        """The API server no longer knows the pod: whatever still runs of it must not, and its folder goes."""
        with self._lock:
            run = self._runs.pop(uid, None)
        if run is not None:
            self._reporter.forget(run)
            run.terminate(0)
            threading.Thread(target=run.forget, daemon=True).start()

    # What it says of itself

    def _register(self) -> None:
        node = {
            "metadata": {
                "name": self.name,
                "labels": {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux"},
            },
            "spec": {"taints": list(self._taints)},
        }
        self._post_unless_there("/api/v1/nodes", node)
        self._post_unless_there(LEASES, {"metadata": {"name": self.name}, "spec": self._lease()})
        self._beat()

    def _post_unless_there(self, path: str, body: Object) -> None:
        try:
            self._api.post(path, body)
        except ApiError as error:
            if error.status != 409:
                raise

    def _beat(self) -> None:
        self._api.patch(f"{LEASES}/{self.name}", {"spec": self._lease()})
        conditions = [
            {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "", "lastHeartbeatTime": now()},
            *(
                {"type": f"{name}Pressure", "status": "False", "reason": f"KubeletHasNo{name}Pressure"}
                for name in ("Memory", "Disk", "PID")
            ),
        ]
        info = {"kubeletVersion": "v1.37.2", "operatingSystem": "linux", **dict.fromkeys(NODE_INFO.split(), "test")}
        status = {
            "capacity": self._capacity,
            "allocatable": self._capacity,
            "conditions": conditions,
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": self.name}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._logs.port}},
            "nodeInfo": info,
        }
        self._api.patch(f"/api/v1/nodes/{self.name}/status", {"status": status})

    def _lease(self) -> Object:
        return {
            "holderIdentity": self.name,
            "leaseDurationSeconds": 40,
            "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        }

    # Finding what runs

    def _running(self, namespace: str, pod: str, container: str | None) -> Container:
        for run in self._runs_of(namespace, pod):
            for found in run.main if container is None else run.containers:
                if container in (None, found.name) and "running" in found.state:
                    return found
        raise LookupError(f"no running container {container or ''} of pod {namespace}/{pod} on node {self.name}")

    def _find(self, namespace: str, pod: str, container: str) -> Container:
        runs = self._runs_of(namespace, pod)
        for found in (each for run in runs for each in run.containers if each.name == container):
            return found
        raise LookupError(f'container "{container}" is not in pod "{pod}"' if runs else f'pod "{pod}" does not exist')

    def _runs_of(self, namespace: str, pod: str) -> list[PodRun]:
        """Newest first: a pod that is gone may still be ending while another has its name."""
        with self._lock:
            runs = list(self._runs.values())
        names = {run.uid: (run.pod["metadata"]["namespace"], run.pod["metadata"]["name"]) for run in runs}
        return [run for run in reversed(runs) if names[run.uid] == (namespace, pod)]
