"""What a flow asks of an executor. `local` is a subprocess; `kubernetes` is one Job per step and lives in k8s/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from orbit_core.errors import OrbitError
from orbit_core.steps.contract import StepSpec
from orbit_core.store.artifacts import Artifact

# {"orbit": kind, ...} as the step wrote it. Executors add "log" (one line of its stderr) and "status" (one sentence
# about where the step runs: "message", and "fix" if a person should do something).
Event = dict[str, Any]


class StepFailed(OrbitError):
    """The step ended in a way that trying again may help: it crashed, was killed or lost its machine."""


class GaveUp(StepFailed):
    """The executor has tried again as often as it may, or a limit that a person set is reached: a person decides."""


class Executor(Protocol):
    def run(self, spec: StepSpec, on_event: Callable[[Event], None]) -> Artifact:
        """Run the step to its end and return its artifact; `on_event` is called in the caller's thread.

        Raises InputError (exit 42: do not retry), Interrupted (exit 75: stopped, resumable) or StepFailed. Any
        exception in the caller's thread meanwhile (cancellation, Ctrl-C) stops the step before it is passed on.
        """
