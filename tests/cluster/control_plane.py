"""A real Kubernetes control plane on loopback: etcd, API server, controller manager and scheduler as local processes.

Ready in seconds, without root or containers. Its faults are methods: `kill_api` and `start_api` on the same port,
`pause_api` and `resume_api`, `expire_watches`. Its clocks are short, so that what takes minutes in a cluster is seen in
seconds: a silent node counts as lost after 16 s, and its pods are evicted a second later.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from cluster.api import Api, ApiError, ApiUnreachable, Object
from cluster.binaries import assets
from cluster.processes import CLUSTER_MARK, Guard
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

NODES = ("gpu-0", "gpu-1", "rest")  # names that a node of the tests may have: each is a user of its own
CONTROLLERS = (
    "job-controller",
    "garbage-collector-controller",
    "pod-garbage-collector-controller",
    "node-lifecycle-controller",
    "taint-eviction-controller",
    "ttl-after-finished-controller",
    "namespace-controller",
    "disruption-controller",
    "serviceaccount-controller",
    "root-ca-certificate-publisher-controller",
    "ephemeral-volume-controller",
    "persistentvolume-binder-controller",
    "persistentvolumeclaim-protection-controller",
    "persistentvolume-protection-controller",
)
CLIENTS = ("kube-controller-manager", "kube-scheduler")
READY_SECONDS = 60.0


class ControlPlane:
    """`with ControlPlane() as plane:` Users are "admin" (everything) and "orchestrator" (what RBAC objects grant)."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.programs = assets()
        self.folder = Path(tempfile.mkdtemp(prefix="orbit-cluster-"))
        self._guard = Guard(self.id, self.folder)
        self._ports = {name: _free_port() for name in ("etcd", "peers", "api")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._tokens = {user: secrets.token_hex(16) for user in ("admin", "orchestrator", *NODES)}

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self._ports['api']}"

    @property
    def authority(self) -> Path:
        """Certificate that clients trust: the API server's own."""
        return self.folder / "certificates" / "apiserver.crt"

    def __enter__(self) -> ControlPlane:
        try:
            self._write_keys()
            self._start("etcd", self._etcd_flags())
            self.start_api()
            return self
        except BaseException:
            self.stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all of it, pods included, and removes the folder."""
        self._guard.release()
        for process in self._processes.values():
            process.wait()

    # What clients need

    def api(self, user: str = "admin") -> Api:
        return Api(self.server, self._tokens[user], self.authority)

    def kubeconfig(self, user: str = "admin") -> Path:
        return self._kubeconfig(user, self._tokens[user])

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig with a real token of that ServiceAccount, good for an hour."""
        answer = self.api().post(
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token",
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}},
        )
        return self._kubeconfig(f"{namespace}-{name}", answer["status"]["token"])

    def kubectl(self, *arguments: str, input: str | None = None, user: str = "admin") -> str:
        """What kubectl prints; RuntimeError with what it complains about."""
        command = [str(self.programs / "kubectl"), "--kubeconfig", str(self.kubeconfig(user)), *arguments]
        environment = {"HOME": str(self.folder), "PATH": os.environ["PATH"]}
        done = subprocess.run(command, input=input, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: exit code {done.returncode}: {done.stderr}")
        return done.stdout

    def new_namespace(self, name: str | None = None) -> str:
        """Made, with its default ServiceAccount, which pods need."""
        name = name or f"test-{uuid.uuid4().hex[:8]}"
        self.api().post("/api/v1/namespaces", {"metadata": {"name": name}})
        _eventually(lambda: self.api().get(f"/api/v1/namespaces/{name}/serviceaccounts/default"))
        return name

    def delete_namespace(self, name: str) -> None:
        """Returns when its pods are gone; the rest goes in the background."""
        api, pods = self.api(), f"/api/v1/namespaces/{name}/pods"
        api.delete(f"/apis/batch/v1/namespaces/{name}/jobs", {"propagationPolicy": "Background"})
        until = time.monotonic() + 30
        while api.get(pods)["items"] and time.monotonic() < until:
            api.delete(pods, {"gracePeriodSeconds": 1})
            time.sleep(0.1)
        api.delete(f"/api/v1/namespaces/{name}")

    # Faults

    def delete_node(self, name: str) -> None:
        """Takes a node that died out of the cluster: the pods it had are declared failed 40 to 60 s later, unless it
        comes back before and says so itself.
        """
        self.api().delete(f"/api/v1/nodes/{name}")

    # Controllers and scheduler go with the API server and come with it, as those of a cluster do, which end when they
    # cannot renew their leadership. Were they to stay, they would take nodes for lost that only could not be heard.

    def kill_api(self) -> None:
        """SIGKILL: connections break at once, new ones are refused."""
        self._kill(*CLIENTS, "kube-apiserver")

    def start_api(self) -> None:
        """On the same port as before; returns when it is ready."""
        self._start("kube-apiserver", self._api_flags())
        self._wait_until_ready()
        self._start_clients()

    def pause_api(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        self._kill(*CLIENTS)
        self._processes["kube-apiserver"].send_signal(signal.SIGSTOP)

    def resume_api(self) -> None:
        self._processes["kube-apiserver"].send_signal(signal.SIGCONT)
        self._start_clients()

    def expire_watches(self) -> None:
        """Every resource version seen so far answers 410 from now on: an API server with an empty watch cache, and an
        etcd without history.
        """
        self.kill_api()
        revision = self._etcd("kv/put", key="L29yYml0", value="MQ==")["header"]["revision"]
        self._etcd("kv/compaction", revision=revision, physical=True)
        self.start_api()

    # Processes

    def _start_clients(self) -> None:
        flags = ["--kubeconfig", str(self.kubeconfig("admin")), "--leader-elect=false", "--secure-port=0"]
        flags += ["--kube-api-qps=500", "--kube-api-burst=1000"]
        self._start("kube-controller-manager", [*flags, *self._controller_flags()])
        self._start("kube-scheduler", flags)

    def _kill(self, *programs: str) -> None:
        for program in programs:
            process = self._processes.pop(program)
            process.kill()
            process.wait()

    def _start(self, program: str, flags: list[str]) -> None:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), CLUSTER_MARK: self.id}
        with (self.folder / f"{program}.log").open("ab") as log:
            self._processes[program] = subprocess.Popen(
                [str(self.programs / program), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C is for the tests; they stop us
            )

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + READY_SECONDS
        while True:
            self._raise_if_dead()
            with contextlib.suppress(ApiUnreachable, ApiError, OSError):
                if self.api().text("/readyz") == "ok":
                    return
            if time.monotonic() > until:
                raise RuntimeError(
                    f"kube-apiserver is not ready after {READY_SECONDS} s\n{self._tail('kube-apiserver')}"
                )
            time.sleep(0.05)

    def _raise_if_dead(self) -> None:
        for program, process in self._processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"{program} ended with exit code {process.returncode}\n{self._tail(program)}")

    def _tail(self, program: str) -> str:
        return "\n".join((self.folder / f"{program}.log").read_text(errors="replace").splitlines()[-15:])

    def _etcd(self, method: str, **values: Any) -> Object:
        """One call through etcd's JSON gateway."""
        url = f"http://127.0.0.1:{self._ports['etcd']}/v3/{method}"
        request = urllib.request.Request(url, json.dumps(values).encode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            parsed: Object = json.load(answer)
        return parsed

    def _etcd_flags(self) -> list[str]:
        clients, peers = (f"http://127.0.0.1:{self._ports[name]}" for name in ("etcd", "peers"))
        return [
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={clients}",
            f"--advertise-client-urls={clients}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
            "--unsafe-no-fsync",
        ]

    def _api_flags(self) -> list[str]:
        return [
            f"--etcd-servers=http://127.0.0.1:{self._ports['etcd']}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._ports['api']}",
            f"--cert-dir={self.folder / 'certificates'}",
            "--advertise-address=10.0.0.1",  # nobody reaches it there: clients know the loopback address
            "--endpoint-reconciler-type=none",
            "--service-cluster-ip-range=10.0.0.0/24",
            f"--service-account-key-file={self.folder / 'sa.key'}",
            f"--service-account-signing-key-file={self.folder / 'sa.key'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=Node,RBAC",
            "--kubelet-preferred-address-types=InternalIP",
            "--default-not-ready-toleration-seconds=1",
            "--default-unreachable-toleration-seconds=1",
        ]

    def _controller_flags(self) -> list[str]:
        return [
            f"--controllers={','.join(CONTROLLERS)}",
            f"--service-account-private-key-file={self.folder / 'sa.key'}",
            f"--root-ca-file={self.authority}",
            "--node-monitor-period=1s",
            "--node-monitor-grace-period=16s",
            "--node-eviction-rate=100",
        ]

    # Files

    def _write_keys(self) -> None:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (self.folder / "sa.key").write_bytes(key)
        lines = [f"{self._tokens['admin']},admin,admin,system:masters"]
        lines += [f"{self._tokens['orchestrator']},orchestrator,orchestrator"]
        lines += [f"{self._tokens[name]},system:node:{name},{name},system:nodes" for name in NODES]
        (self.folder / "tokens.csv").write_text("\n".join(lines) + "\n")

    def _kubeconfig(self, user: str, token: str) -> Path:
        file = self.folder / f"kubeconfig-{user}.yaml"
        if file.exists():  # others may be reading it
            return file
        cluster = {"server": self.server, "certificate-authority": str(self.authority)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }
        written = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        written.write_text(yaml.safe_dump(content))
        return written.rename(file)


def _free_port() -> int:
    """Below the range from which outgoing connections take theirs: it stays free while its server is down."""
    for _ in range(100):
        port = random.randint(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port between 20000 and 32000")


def _eventually(action: Any, patience_seconds: float = 30.0) -> None:
    until = time.monotonic() + patience_seconds
    while True:
        try:
            action()
            return
        except ApiError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
