"""Kernels compiled for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_compiling(code: str, folder: Path, *arguments: object) -> None:
    """Runs a script that compiles kernels and writes what comes out into `folder`, its first argument."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(folder)}
    script = folder / "compile.py"  # a file, because Triton reads a kernel's source
    script.write_text(code)
    command = [sys.executable, script, folder, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
