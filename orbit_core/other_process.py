"""Python in a process of its own, for what may take its process along."""

from __future__ import annotations

import json
import sys


def python_command(statements: str, *arguments: str) -> list[str]:
    """Runs `statements` where modules are found as this process finds them. The arguments are sys.argv[2:]."""
    own = "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    return [sys.executable, "-c", own + statements, json.dumps(sys.path), *arguments]
