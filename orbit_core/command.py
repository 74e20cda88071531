"""`python -m orbit_core step NAME --spec spec.json [--scratch DIR]`: what a subprocess or a pod runs.
`python -m orbit_core stage --spec spec.json --scratch DIR`: fetches the step's inputs before it, in an init container.

stdout carries events, one JSON object a line: {"orbit": "progress" | "report" | "reused" | "done" | "error", ...}, of
stage {"orbit": "progress" | "staged" | "error", ...}.
Everything else, also what a library prints, goes to stderr. Exit codes are those of orbit_core.errors.
On SIGTERM a step that asks `should_stop` finishes what is in flight; any other is stopped at once, since it could not
resume anyway. A second SIGTERM stops every step at once. A step that loses its lease (`--holder`) is stopped likewise.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from orbit_core.errors import ExitCode, InputError, Interrupted, OrbitError, Stopped
from orbit_core.executors.lifetime import die_with
from orbit_core.secrets import MaskingFormatter, masked, masked_all
from orbit_core.steps.contract import StepSpec
from orbit_core.steps.runner import PACKAGE, Holder, run_step
from orbit_core.steps.staging import stage_inputs


class Events:
    """Takes stdout for events alone: file descriptor 1 becomes stderr for everybody else."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._channel: int | None = os.dup(1)
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def emit(self, event: str, /, **values: Any) -> None:
        line = json.dumps({"orbit": event, **masked_all(values)}, ensure_ascii=False, default=str) + "\n"
        with self._lock:
            if self._channel is None:
                return
            try:
                left = memoryview(line.encode())
                while left:
                    left = left[os.write(self._channel, left) :]
            except BrokenPipeError:  # nobody listens any more; the work is still worth finishing
                self._channel = None


class StopRequest:
    """True after SIGTERM or SIGINT; called by the step as `should_stop()`."""

    def __init__(self) -> None:
        self.requested = self.asked = False
        self.reason = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def __call__(self) -> bool:
        self.asked = True
        return self.requested

    def stop(self, reason: str) -> None:
        """From another thread, as if SIGTERM had come."""
        self.reason = reason
        os.kill(os.getpid(), signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        at_once = self.requested or not self.asked
        self.requested = True
        if at_once:
            raise Stopped(self.reason or f"stopped by {signal.Signals(number).name}")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "step" and options.parent is not None and not die_with(options.parent):
        return ExitCode.RESUMABLE  # what is published is whole at any instant: nothing is lost
    events, stop = Events(), StopRequest()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for talkative in ("botocore", "aiobotocore"):  # these say where the credentials are, at every start
        logging.getLogger(talkative).setLevel(logging.WARNING)
    try:
        spec = _load_spec(options.spec)
        if options.command == "stage":
            stage_inputs(spec, events.emit, options.scratch)
        else:
            _check_name(options.name, spec, options.spec)
            holder = Holder(options.holder, options.lease_seconds, stop.stop) if options.holder else None
            run_step(spec, events.emit, stop, options.scratch, options.package, holder)
        return ExitCode.DONE
    except Stopped as error:
        return _told(Interrupted(str(error)), events)
    except OrbitError as error:
        return _told(error, events)
    except Exception as error:
        print(masked(traceback.format_exc()), end="", file=sys.stderr)
        events.emit("error", kind=type(error).__name__, message=f"{type(error).__name__}: {error}")
        return 1


def _told(error: OrbitError, events: Events) -> int:
    print(masked(str(error)), file=sys.stderr)
    names = ("what", "expected", "found", "fix") if isinstance(error, InputError) else ()
    details = {name: getattr(error, name) for name in names}
    events.emit("error", kind=type(error).__name__, message=str(error), **details)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m orbit_core", description="Run one step of an Orbit pipeline.")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="run one step")
    step.add_argument("name", help="quantize, train, ...")
    stage = commands.add_parser("stage", help="fetch the inputs of a step")
    for command in (step, stage):
        command.add_argument("--spec", type=Path, required=True, help="JSON file of a StepSpec")
        command.add_argument(
            "--scratch", type=Path, help="node-local folder; default: in the folder store, or the user's cache"
        )
    step.add_argument("--package", default=PACKAGE, help="package that holds the step's module")
    step.add_argument("--parent", type=int, help="process id of the executor: die when it dies (Linux)")
    step.add_argument("--holder", help="name of this pod: hold the step's lease in the store while it runs")
    step.add_argument("--lease-seconds", type=float, default=60.0, help="silence after which a lease may be taken over")
    return parser


def _load_spec(file: Path) -> StepSpec:
    try:
        return StepSpec.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"spec {file}", "a JSON file", "no such file", "check --spec") from None
    except ValidationError as error:
        raise InputError(
            f"spec {file}", "a StepSpec in JSON", str(error), "plan and run with the same version of Orbit"
        ) from None


def _check_name(name: str, spec: StepSpec, file: Path) -> None:
    if spec.step != name:
        raise InputError(
            f"spec {file}", f"a spec of step {name}", f"one of step {spec.step}", "give the step of the spec"
        )
