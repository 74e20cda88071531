"""Which executor a recipe's word means. `kubernetes` will come from k8s/, which orbit_core must not know."""

from __future__ import annotations

from orbit_core.errors import InputError
from orbit_core.executors.base import Executor
from orbit_core.executors.local import LocalExecutor


def executor_for(kind: str) -> Executor:
    """The executor that a recipe names; InputError if this installation has none of that name."""
    if kind == "local":
        return LocalExecutor()
    raise InputError(f"executor {kind}", "local", f"the {kind} executor is not installed", "set executor: local")
