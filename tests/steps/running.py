"""Start the real command on a spec and read its events; what the tests of steps, leases and staging share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from samples import PACKAGE

from orbit_core.steps.contract import StepSpec

Ended = tuple[int, list[dict[str, Any]], str]  # exit code, events, stderr


def start(spec: StepSpec, folder: Path, *more: str) -> subprocess.Popen[str]:
    return start_command(["step", spec.step], spec, folder, "--package", PACKAGE, *more)


def start_command(command: list[str], spec: StepSpec, folder: Path, *more: str) -> subprocess.Popen[str]:
    file = folder / f"{spec.step}-{spec.digest[:8]}.json"
    file.write_text(spec.model_dump_json())
    arguments = [sys.executable, "-m", "orbit_core", *command, "--spec", str(file), *more]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=60)
    return process.returncode, [json.loads(line) for line in out.splitlines()], err


def run(spec: StepSpec, folder: Path, *more: str) -> Ended:
    return finish(start(spec, folder, *more))


def wait_for(process: subprocess.Popen[str], event: str, message: str = "") -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        found = json.loads(line)
        if found["orbit"] == event and message in found.get("message", ""):
            return dict(found)
    raise AssertionError(f"ended without {event}: {process.stderr.read() if process.stderr else ''}")
