"""Whoever shows a run while it happens (the terminal of `orbit demo`) listens here; tasks tell what steps say.

A watcher is called with (step, event) in the thread of the run. Events are those of orbit_core.executors plus
{"orbit": "started"} and {"orbit": "finished", "seconds": ..., "reused": ..., "facts": ...}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Watcher = Callable[[str, dict[str, Any]], None]

_watchers: list[Watcher] = []


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def tell(step: str, event: dict[str, Any]) -> None:
    for watcher in _watchers:
        watcher(step, event)
