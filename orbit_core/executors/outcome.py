"""How a step ended, from its exit code and what it said: the error that the caller raises. Shared by all executors."""

from __future__ import annotations

import json
import signal
from collections import deque
from collections.abc import Callable

from orbit_core import errors
from orbit_core.errors import ExitCode, InputError, Interrupted
from orbit_core.executors.base import Event, StepFailed
from orbit_core.secrets import masked
from orbit_core.steps.contract import StepSpec

TAIL_LINES = 20  # of its stderr, in the message of a step that crashed


class Said:
    """What a step has said: its events handed on, its last lines and its last error kept."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self.on_event = on_event
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.failure: Event = {}

    def line(self, line: str, may_be_event: bool = True) -> None:
        event = parsed(line) if may_be_event else None
        if event is None:
            line = masked(line)  # what a library printed; events were masked where they were made
            self.tail.append(line)
            event = {"orbit": "log", "message": line}
        elif event["orbit"] == "error":
            self.failure = event
        self.on_event(event)


def parsed(line: str) -> Event | None:
    """The event of a line of a step's stdout; None for anything else."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("orbit"), str) else None


def error_of(spec: StepSpec, code: int, failure: Event, tail: list[str]) -> errors.OrbitError:
    """`code` is negative for a signal; `failure` the step's error event or {}; `tail` its last lines."""
    message = failure.get("message", "")
    if code == ExitCode.REFUSED:
        kind = errors.GateError if failure.get("kind") == "GateError" else InputError
        fields = [failure.get(name, "") for name in ("what", "expected", "found", "fix")]
        return kind(*fields) if fields[0] else kind(message or "\n".join(tail))
    if code == ExitCode.RESUMABLE:
        return Interrupted(message or f"step {spec.step} was stopped; running it again resumes it")
    died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return StepFailed("\n  ".join([f"step {spec.step}: {died}{': ' + message if message else ''}", *tail]))
