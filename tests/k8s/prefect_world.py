"""A Prefect server and a process worker of our own, and deployed flow runs to watch, retry and cancel."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any
from uuid import UUID

from cluster.processes import CLUSTER_MARK, Guard, descendants
from world import PATIENCE_SECONDS, ROOT, World, until

HERE = Path(__file__).parent
COMMAND_SECONDS = 1800.0  # one may watch a whole run
LOOK_SECONDS = 0.5  # between two looks: each is a query of the server, which has others to serve


class PrefectServer:
    """`with PrefectServer(folder) as server:` Its database and leases outlive `kill` and `start`.

    Whatever has its environment ends with it, also when the tests are killed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.environment = {
            "PREFECT_HOME": str(folder),
            "PREFECT_API_URL": self.url,
            "PREFECT_UI_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "DO_NOT_TRACK": "1",
            CLUSTER_MARK: f"prefect-{uuid.uuid4().hex[:12]}",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrefectServer:
        self._guard = Guard(self.environment[CLUSTER_MARK])
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._guard.release()
        if self.process is not None:
            self.process.wait()

    def start(self) -> None:
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = start(command, {**os.environ, **self.environment}, self.folder / "server.log")
        until(self._healthy, "the Prefect server")

    def kill(self) -> None:
        """SIGKILL to it and its children."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
        return False


class Worker:
    """`prefect worker start` with the orchestrator's rights. Flow runs are its child processes."""

    def __init__(
        self,
        server: PrefectServer,
        world: World,
        name: str = "one",
        pool: str = "",
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        environment = {**world.process_environment(), **server.environment, **more}
        command = ["prefect", "worker", "start", "--pool", pool or world.namespace, "--type", "process", "--name", name]
        self.log = world.folder / f"worker-{name}.log"
        self.process = start(command, environment, self.log)

    def flow_process(self) -> int:
        """Process id of the flow run that it runs."""

        def look() -> int | None:
            for child in descendants(self.process.pid):
                command = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
                if re.search(r"prefect\.(flow_engine|engine)", command) or "flow-run\0execute" in command:
                    return child
            return None

        found: int = until(look, "a process of the flow run")
        return found

    def stop(self) -> None:
        """SIGTERM, as its pod gets it when it is moved."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=40)

    def kill(self) -> None:
        """SIGKILL to the worker and its flow runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class FlowRun:
    """A run as the dashboard shows it; `api` is a Prefect client of the server."""

    def __init__(self, api: Any, id: UUID, worker: Worker) -> None:
        self.api, self.id, self.worker = api, id, worker

    @property
    def state(self) -> Any:
        return self.api.read_flow_run(self.id).state

    def wait_for_state(self, *names: str, patience: float = PATIENCE_SECONDS) -> Any:
        reached = lambda: self.state is not None and self.state.name in names  # noqa: E731
        until(reached, f"the run to be {names}", patience, pause=LOOK_SECONDS)
        return self.state

    def log(self) -> list[str]:
        from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

        found = self.api.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[self.id])), limit=200)
        return [entry.message for entry in found]

    def retry(self) -> None:
        """What the dashboard's Retry button sends."""
        from prefect.states import AwaitingRetry

        self.api.set_flow_run_state(self.id, AwaitingRetry(), force=True)

    def lose(self) -> None:
        """What the automation for lost runs does when their heartbeats stop (tests/flows/test_deployments.py)."""
        from prefect.states import Crashed

        self.api.set_flow_run_state(self.id, Crashed())

    def cancel(self) -> None:
        """What the dashboard's Cancel button sends."""
        from prefect.states import Cancelling

        self.api.set_flow_run_state(self.id, Cancelling())


def prefect(server: PrefectServer, *arguments: str, cwd: Path = ROOT) -> str:
    """What `prefect ...` prints, as a person calls it."""
    return call(server, [sys.executable, "-m", "prefect", "--no-prompt", *arguments], cwd)


def call(server: PrefectServer, command: list[str], cwd: Path = ROOT) -> str:
    """What a command prints that talks to the server; AssertionError if it fails."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, **server.environment, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert done.returncode == 0, f"{command[:5]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A Prefect program in its own process group, with SIGINT as a shell would leave it for a foreground job."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            cwd=ROOT,
        )


@contextlib.contextmanager
def flow_runs(server: PrefectServer, world: World) -> Iterator[Any]:
    """Yields `run(spec, **resources) -> FlowRun`: the deployed flow `tally`, started through a worker."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from orbit_core.recipe import Resources

    with temporary_settings({PREFECT_API_URL: server.url}), get_client(sync_client=True) as api:
        deployment = _deploy(api, world.namespace)
        worker = Worker(server, world)

        def run(spec: Any, **resources: Any) -> FlowRun:
            asked = Resources.model_validate(
                {"cpus": 1, "memory_gib": 1, "shm_gib": 0, "grace_seconds": 5, **resources}
            )
            parameters = {
                "spec": spec.model_dump(mode="json"),
                "site": world.site().model_dump(mode="json"),
                "resources": asked.model_dump(mode="json"),
            }
            made = api.create_flow_run_from_deployment(deployment, parameters=parameters)
            return FlowRun(api, made.id, worker)

        try:
            yield run
        finally:
            worker.kill()


def _deploy(api: Any, pool: str) -> UUID:
    """The flow, on a pool of its own: side by side, a worker must not take another scenario's run.

    The same calls that `prefect work-pool create` and `prefect deploy` send, without their seconds of start.
    """
    from prefect.client.schemas.actions import WorkPoolCreate

    api.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    found: UUID = api.create_deployment(
        api.create_flow_from_name("tally"),
        pool,
        entrypoint="podflow.py:tally",
        work_pool_name=pool,
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(HERE)}}],
        enforce_parameter_schema=False,
    )
    return found
