"""One step through the Kubernetes executor, in a process of its own: what a flow does, small enough to be killed.

    python orchestrate.py spec.json site.yaml resources.json

Events go to stdout as JSON lines, and at the end {"orbit": "end", "error": class name or null, "message", "exit_code"}.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from k8s.executor import KubernetesExecutor
from k8s.site import Site
from orbit_core.errors import Interrupted, OrbitError
from orbit_core.recipe import Resources
from orbit_core.steps.contract import StepSpec


def main(spec_file: str, site_file: str, resources_file: str) -> None:
    spec = StepSpec.model_validate_json(Path(spec_file).read_text())
    resources = Resources.model_validate_json(Path(resources_file).read_text())
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        artifact = KubernetesExecutor(Site.load(site_file), {spec.step: resources}).run(spec, _print)
        _print({"orbit": "end", "error": None, "facts": artifact.facts})
    except OrbitError as error:
        _print({"orbit": "end", "error": type(error).__name__, "message": str(error), "exit_code": error.exit_code})


def _print(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise Interrupted("called off")


if __name__ == "__main__":
    main(*sys.argv[1:])
