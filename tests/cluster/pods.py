"""One pod, from its binding to its end: volumes, init containers in order, then all containers, each a local process.

Only what a pod of `restartPolicy: Never` needs. Probes, hooks, sidecars and the like make it fail at once, with the
reason `UnsupportedByTestNode`, rather than run as something it is not. What takes a container is not there: its user,
a read-only root, limits of memory and CPU (`Node.oom` and `Node.evict` play what would come of them).
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from cluster.api import ApiError, ApiUnreachable, Object
from cluster.containers import Container, now
from cluster.environment import Paths, Unsupported, Waiting, base_environment, command_line, variables
from cluster.volumes import Host, folders_of, mounted

RETRY_SECONDS = 0.5
UNSUPPORTED = ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle")
NOT_FOUND = "The container could not be located when the pod was terminated"

Made = TypeVar("Made")
EventSink = Callable[[Object, str, str, str], None]  # (pod, type, reason, message)


class Stopped(Exception):
    """The pod is to end before it has started all that it has."""


class PodRun:
    """`on_change(self)` whenever its status has changed. Everything of it lies under `folder` until `forget`."""

    def __init__(
        self,
        pod: Object,
        host: Host,
        folder: Path,
        address: str,
        environment: dict[str, str],
        has_image: Callable[[str], bool],
        on_change: Callable[[PodRun], None],
        event: EventSink,
    ) -> None:
        self.pod, self._host, self._folder, self._environment = pod, host, folder, environment
        self.address, self._has_image, self._event = address, has_image, event
        self.uid: str = pod["metadata"]["uid"]
        self.started: str = pod["status"].get("startTime") or now()
        self.finished = threading.Event()
        self.failure: Object = {}  # reason and message of a pod that failed as a whole
        self.evicted = False
        self._changed = lambda: on_change(self)
        self._stopping, self._starting, self._deadline = threading.Event(), threading.Lock(), float("inf")
        self.init = [self._container(spec) for spec in pod["spec"].get("initContainers", [])]
        self.main = [self._container(spec) for spec in pod["spec"]["containers"]]

    @property
    def containers(self) -> list[Container]:
        return [*self.init, *self.main]

    def start(self) -> None:
        threading.Thread(target=self._run, name=f"pod {self.pod['metadata']['name']}", daemon=True).start()

    def terminate(self, grace_seconds: float) -> None:
        """SIGTERM now, SIGKILL after the grace period; a second call can only shorten it."""
        self._deadline = min(self._deadline, time.monotonic() + grace_seconds)
        with self._starting:
            first = not self._stopping.is_set()
            self._stopping.set()
        if first:
            threading.Thread(target=self._terminate, daemon=True).start()

    def evict(self, message: str) -> None:
        self.failure, self.evicted = {"reason": "Evicted", "message": message}, True
        self._event(self.pod, "Warning", "Evicted", message)
        self.power_off()

    def power_off(self) -> None:
        """SIGKILL to all, and nothing more is started."""
        with self._starting:
            self._stopping.set()
        for container in self.containers:
            container.signal(signal.SIGKILL)

    def lose(self, reason: str = "ContainerStatusUnknown", message: str = NOT_FOUND) -> None:
        """For a pod that ran before this node started anew: nothing is left of it but its status."""
        for container in self.containers:
            container.lose(reason, message)
        self.finished.set()
        self._changed()

    def forget(self) -> None:
        """Removes its folder, once nothing of it runs."""
        self.finished.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _container(self, spec: Object) -> Container:
        return Container(spec, f"{self.uid}/{spec['name']}", self._folder / "logs" / spec["name"], self._changed)

    # Its life, in a thread of its own

    def _run(self) -> None:
        try:
            self._refuse_unsupported()
            volumes = self._until(self.containers[0], lambda: mounted(self.pod, self._host, self._folder / "volumes"))
            for container in self.init:
                self._launch(container, volumes)
                container.ended.wait()
                if container.exit_code != 0:
                    return
            for container in self.main:
                self._launch(container, volumes)
            for container in self.main:
                container.ended.wait()
        except Stopped:
            for container in self.containers:
                if container.started:
                    container.ended.wait()
                else:
                    container.lose("ContainerStatusUnknown", NOT_FOUND)
        except Unsupported as error:
            self._fail("UnsupportedByTestNode", str(error))
        except Exception as error:  # a fault of this node must show as a failed pod, not as one that hangs
            self._fail("FaultOfTestNode", f"{type(error).__name__}: {error}")
            raise
        finally:
            self.finished.set()
            self._changed()

    def _fail(self, reason: str, message: str) -> None:
        self.failure = {"reason": reason, "message": message}
        self._event(self.pod, "Warning", reason, message)
        self.power_off()
        for container in self.containers:
            if container.started:
                container.ended.wait()
            else:
                container.lose(reason, message)

    def _launch(self, container: Container, volumes: dict[str, Path]) -> None:
        spec = container.spec
        self._until(container, lambda: self._pull(container))
        own = self._until(container, lambda: variables(spec, self.pod, self._lookup))
        folders = folders_of(spec, volumes)
        message_path = spec.get("terminationMessagePath", "/dev/termination-log")
        container.message_file = folders[message_path] = self._folder / "messages" / container.name
        container.message_file.parent.mkdir(parents=True, exist_ok=True)
        paths = Paths(folders)
        home = self._folder / "home" / container.name
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        base = base_environment(home, self.pod["metadata"]["name"]) | self._environment
        command = command_line(spec, own, paths)
        environment = base | {name: paths(value) for name, value in own.items()}
        working = Path(paths(spec.get("workingDir", str(home))))
        with self._starting:
            if self._stopping.is_set():
                raise Stopped
            self._event(self.pod, "Normal", "Started", f"Started container {container.name}")
            container.start(command, environment, working if working.is_dir() else home)

    def _lookup(self, kind: str, name: str, optional: bool) -> dict[str, bytes]:
        return self._host.lookup(self.pod["metadata"]["namespace"])(kind, name, optional)

    def _pull(self, container: Container) -> None:
        """As a kubelet: the error itself first, then the back-off that quotes it."""
        image = container.spec["image"]
        if self._has_image(image):
            return
        error = f'failed to pull and unpack image "{image}": failed to resolve reference "{image}": {image}: not found'
        if container.state.get("waiting", {}).get("reason") in ("ErrImagePull", "ImagePullBackOff"):
            message = f'Back-off pulling image "{image}": ErrImagePull: rpc error: code = NotFound desc = {error}'
            self._event(self.pod, "Normal", "BackOff", f'Back-off pulling image "{image}"')
            raise Waiting("ImagePullBackOff", message)
        self._event(self.pod, "Warning", "Failed", f'Failed to pull image "{image}": {error}')
        self._event(self.pod, "Warning", "Failed", "Error: ErrImagePull")
        raise Waiting("ErrImagePull", f"rpc error: code = NotFound desc = {error}")

    def _until(self, container: Container, action: Callable[[], Made]) -> Made:
        """Tries until it succeeds, or until the pod is to end; the container's status shows what it waits for."""
        while not self._stopping.is_set():
            try:
                return action()
            except Waiting as waiting:
                container.wait_for(waiting.reason, waiting.message)
            except (ApiUnreachable, ApiError) as error:
                container.wait_for("ContainerCreating", str(error))
            self._stopping.wait(RETRY_SECONDS)
        raise Stopped

    def _terminate(self) -> None:
        alive = [container for container in self.containers if container.started and not container.ended.is_set()]
        for container in alive:
            self._event(self.pod, "Normal", "Killing", f"Stopping container {container.name}")
            container.signal(signal.SIGTERM)
        while any(not container.ended.is_set() for container in alive) and time.monotonic() < self._deadline:
            time.sleep(0.02)
        for container in alive:
            container.signal(signal.SIGKILL)

    def _refuse_unsupported(self) -> None:
        spec = self.pod["spec"]
        if spec.get("restartPolicy") != "Never":
            raise Unsupported(f"restartPolicy {spec.get('restartPolicy')}: this node restarts nothing")
        if "activeDeadlineSeconds" in spec:
            raise Unsupported("activeDeadlineSeconds of a pod: set it on its Job")
        for container in self.containers:
            self._refuse_keys(container.spec, UNSUPPORTED)
        for container in self.init:
            self._refuse_keys(container.spec, ("restartPolicy",))

    @staticmethod
    def _refuse_keys(spec: Object, keys: Iterable[str]) -> None:
        for key in keys:
            if key in spec:
                raise Unsupported(f"{key} of container {spec['name']}")
