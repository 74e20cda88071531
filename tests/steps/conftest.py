"""Real small steps (samples/) run by the real runner in real subprocesses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(autouse=True)
def samples_importable_in_subprocesses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
