"""A step that says every secret it knows, in every way in which a step or its libraries can say something."""

from __future__ import annotations

import logging
import os
from typing import Any

from orbit_core.errors import InputError
from orbit_core.steps.contract import StepContext


def run(context: StepContext) -> dict[str, Any]:
    secret = os.environ["CANARY_API_KEY"]
    url = f"https://me:{secret}@host/file?X-Amz-Signature={secret}&part=1"
    os.write(1, f"a library on stdout: {secret}\n".encode())
    os.write(2, f"a library on stderr: {url}\n".encode())
    logging.getLogger("library").warning("cannot reach %s", url)
    context.progress(1, 2, f"fetching {url}")
    context.emit("report", name="leak", content={"tried": [url]})
    if context.spec.params["how"] == "refuse":
        raise InputError(f"file {url}", "a file", f"403 for {secret}", f"ask for {url}")
    raise RuntimeError(f"403 for {url}")
