"""Seconds by the clock say more about a machine's other work than about ours."""

from __future__ import annotations

import resource


def processor_seconds() -> float:
    """Of all child processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
