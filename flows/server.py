"""Prefect without a server to install: a temporary one for the length of a run.

Prefect starts one by itself when no API is configured, but imports the whole server into the flow's process first and
then again in the child, one after the other. Here the child starts at once, beside our own imports, and dies with us.
Its database is the person's own (PREFECT_HOME), so the runs are there when they start `prefect server start` later.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from orbit_core.errors import OrbitError
from orbit_core.executors.lifetime import die_with

STARTUP_SECONDS = 180  # a fresh database is migrated first: 15 s on two idle cores

# What a run on a laptop does not need; a person's own settings win.
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "DO_NOT_TRACK": "1",
}
SMALL = {
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}


_for_life = contextlib.ExitStack()


def settle_environment(verbose: bool = False) -> None:
    """Defaults for a run in this process; call before Prefect is imported."""
    for name, value in QUIET.items():
        if not (verbose and "LOGGING" in name):
            os.environ.setdefault(name, value)


def ensure_server() -> None:
    """After it Prefect has an API in this process: the configured one, or a temporary server on loopback.

    The temporary server is stopped when the process exits, after Prefect's own threads have sent what they hold.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        return
    url = _start()
    _for_life.enter_context(temporary_settings({PREFECT_API_URL: url}))
    import prefect.flows  # noqa: F401  beside the server, which needs as long for its own imports

    _wait_until_healthy(url)


def _start() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, **{name: value for name, value in SMALL.items() if name not in os.environ}}
    command = [sys.executable, "-m", "flows.server", str(port), str(os.getpid())]
    server = subprocess.Popen(command, env=environment, stdin=-3, stdout=-3, start_new_session=True)
    atexit.register(_stop, server)
    return f"http://127.0.0.1:{port}/api"


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(timeout=5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise OrbitError(f"the temporary Prefect server at {url} did not start in {STARTUP_SECONDS} s")


def _serve(port: int, parent: int) -> None:
    if not die_with(parent):
        return
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="on",
    )


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
