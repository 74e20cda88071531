"""One temporary Prefect server for all tests of flows, with a database of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

STEPS = Path(__file__).parents[1] / "steps"
sys.path.insert(0, str(STEPS))  # the sample steps


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the API; also the API of this process."""
    os.environ["PREFECT_HOME"] = str(tmp_path_factory.mktemp("prefect"))
    from flows.server import ensure_server, settle_environment

    settle_environment()
    ensure_server()
    from prefect.settings import PREFECT_API_URL

    return str(PREFECT_API_URL.value())


@pytest.fixture(autouse=True)
def subprocesses_find_orbit_and_the_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    paths = [str(STEPS), str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
