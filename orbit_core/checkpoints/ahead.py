"""The next piece is read while this one is worked on: reading waits for the disk, and another core is free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(calls: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """What `calls` return, in their order. Each is called by a second thread, one before it is asked for; so two
    results are in memory at a time. What a call raises is raised in its turn."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, "ahead") as pool:
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) == 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
