"""One container as one local process: started, signalled, its output kept line by line with the time of each.

Its end is the end of all its processes, as in a real container. SIGTERM goes to its first process alone, and is lost if
that has no handler for it, as the kernel does with a container's process 1. The log is a file of lines
`<RFC 3339 time, nine digits> <stream> <text>`, both streams in the order in which they were written.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from cluster.api import Object
from cluster.processes import CONTAINER_MARK, catches, kill_marked

BEYOND_HANDLERS = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT}
TERMINATION_MESSAGE_LINES, TERMINATION_MESSAGE_BYTES = 80, 2048


def now() -> str:
    """As statuses have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def now_exactly() -> str:
    """As log lines have it."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


class Container:
    """`state` is Kubernetes' ContainerState. `on_change` is called after every change of it."""

    def __init__(self, spec: Object, identity: str, log: Path, on_change: Callable[[], None]) -> None:
        self.spec, self.log, self._on_change = spec, log, on_change
        self.name: str = spec["name"]
        self.state: Object = {"waiting": {"reason": "ContainerCreating"}}
        self.started = False
        self.ended = threading.Event()
        self.reason_if_killed: str | None = None
        self.message_file: Path | None = None
        self._identity, self._lock = identity, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def wait_for(self, reason: str, message: str) -> None:
        waiting = {"reason": reason, "message": message}
        if self.state.get("waiting") != waiting:
            self.state = {"waiting": waiting}
            self._on_change()

    def start(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        started = now()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**environment, CONTAINER_MARK: self._identity},
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            self.started = True
            self._terminate(128, "StartError", f'failed to start: exec: "{command[0]}": {error.strerror}', started)
            return
        self._process, self.started = process, True
        self.state = {"running": {"startedAt": started}}
        self._on_change()
        threading.Thread(target=self._attend, args=(process, started), daemon=True).start()

    def signal(self, number: signal.Signals) -> None:
        """To process 1 as from outside of the container."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        if number in BEYOND_HANDLERS or catches(process.pid, number):
            process.send_signal(number)

    def kill(self, reason: str | None = None) -> None:
        """SIGKILL, and what its status will give as the reason."""
        self.reason_if_killed = reason
        self.signal(signal.SIGKILL)

    def lose(self, reason: str, message: str) -> None:
        """It ended in a way that nobody saw, or never began."""
        if "terminated" not in self.state:
            self._terminate(137, reason, message, None)

    @property
    def exit_code(self) -> int | None:
        code: int | None = self.state.get("terminated", {}).get("exitCode")
        return code

    def status(self) -> Object:
        running = "running" in self.state
        return {
            "name": self.name,
            "image": self.spec["image"],
            "imageID": self.spec["image"] if self.started else "",
            "ready": running,
            "started": running,
            "restartCount": 0,
            "state": self.state,
            **({"containerID": f"process://{self._identity}"} if self.started else {}),
        }

    def _attend(self, process: subprocess.Popen[bytes], started: str) -> None:
        """Reads until the end, in a thread of its own."""
        assert process.stdout is not None and process.stderr is not None
        with self.log.open("ab", buffering=0) as log:
            streams = {"stdout": process.stdout, "stderr": process.stderr}
            readers = [threading.Thread(target=self._keep, args=(*item, log), daemon=True) for item in streams.items()]
            for reader in readers:
                reader.start()
            code = process.wait()
            kill_marked(CONTAINER_MARK, self._identity)
            for reader in readers:
                reader.join(timeout=5)
        code = 128 - code if code < 0 else code
        reason = (self.reason_if_killed if code == 137 else None) or ("Error" if code else "Completed")
        self._terminate(code, reason, self._termination_message(code), started)

    def _keep(self, stream: str, source: IO[bytes], log: IO[bytes]) -> None:
        with source:
            for line in source:
                with self._lock:
                    log.write(f"{now_exactly()} {stream} ".encode() + line.rstrip(b"\n") + b"\n")

    def _termination_message(self, code: int) -> str:
        if self.message_file is not None and self.message_file.is_file():
            return self.message_file.read_text(errors="replace")[:4096]
        if code == 0 or self.spec.get("terminationMessagePolicy") != "FallbackToLogsOnError":
            return ""
        lines = self.log.read_text(errors="replace").splitlines()[-TERMINATION_MESSAGE_LINES:]
        text = "".join(line.split(" ", 2)[2] + "\n" for line in lines)
        return text.encode()[-TERMINATION_MESSAGE_BYTES:].decode(errors="ignore")

    def _terminate(self, code: int, reason: str, message: str, started: str | None) -> None:
        end: Object = {"exitCode": code, "reason": reason, "finishedAt": now(), "startedAt": started or now()}
        end |= {"message": message} if message else {}
        end |= {"containerID": f"process://{self._identity}"} if self.started else {}
        self.state = {"terminated": end}
        self.ended.set()
        self._on_change()
