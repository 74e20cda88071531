"""Run a step as a subprocess: its own process group, its own memory, gone when we are gone."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

from orbit_core.errors import ExitCode
from orbit_core.executors.base import Event, StepFailed
from orbit_core.executors.outcome import Said, error_of
from orbit_core.steps.contract import StepSpec
from orbit_core.steps.runner import PACKAGE
from orbit_core.store import open_store
from orbit_core.store.artifacts import Artifact, ArtifactStore


class LocalExecutor:
    """`grace_seconds`: how long a step may take to finish what is in flight when it is asked to stop."""

    def __init__(self, scratch: Path | None = None, package: str = PACKAGE, grace_seconds: float = 25.0) -> None:
        self.scratch, self.package, self.grace_seconds = scratch, package, grace_seconds

    def run(self, spec: StepSpec, on_event: Callable[[Event], None]) -> Artifact:
        said = Said(on_event)
        with self._process(spec) as process:
            for stream, line in _lines(process):
                said.line(line, may_be_event=stream is process.stdout)
            code = process.wait()
        if code != ExitCode.DONE:
            raise error_of(spec, code, said.failure, list(said.tail))
        artifact = ArtifactStore(open_store(spec.store)).find(spec.step, spec.digest)
        if artifact is None:
            raise StepFailed(f"step {spec.step}: ended with exit code 0 but its artifact is not in store {spec.store}")
        return artifact

    @contextlib.contextmanager
    def _process(self, spec: StepSpec) -> Iterator[subprocess.Popen[bytes]]:
        with tempfile.TemporaryDirectory(prefix="orbit-") as folder:
            file = Path(folder) / "spec.json"
            file.write_text(spec.model_dump_json())
            command = [sys.executable, "-m", "orbit_core", "step", spec.step, "--spec", str(file)]
            command += ["--package", self.package, "--parent", str(os.getpid())]
            command += ["--scratch", str(self.scratch)] if self.scratch else []
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C reaches us alone; we pass it on and wait
            )
            try:
                yield process
            finally:
                self._stop(process)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """Ask the step to stop, wait for it, then end whatever is left of its group."""
        try:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=self.grace_seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _lines(process: subprocess.Popen[bytes]) -> Iterator[tuple[IO[bytes], str]]:
    """(stream, line) of both streams as they come, in this thread, until both are closed or the process is gone and
    silent (a grandchild may keep its streams open)."""
    with selectors.DefaultSelector() as selector:
        rest: dict[IO[bytes], bytes] = {}
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                selector.register(pipe, selectors.EVENT_READ)
                rest[pipe] = b""
        while rest:
            ready = selector.select(timeout=0.5)
            if not ready and process.poll() is not None:
                break
            for key, _ in ready:
                stream = cast("IO[bytes]", key.fileobj)
                chunk = os.read(key.fd, 65_536)
                *lines, rest[stream] = (rest[stream] + chunk).split(b"\n")
                if not chunk:
                    selector.unregister(stream)
                    lines = [last] if (last := rest.pop(stream)) else []
                for line in lines:
                    yield stream, line.decode(errors="replace")
