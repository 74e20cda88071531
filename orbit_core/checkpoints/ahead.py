"""The next piece is read while this one is worked on: reading waits for the disk, and another core is free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(calls: Iterable[Callable[[], T]], threads: int = 1) -> Generator[T, None, None]:
    """What `calls` return, in their order. Each is called by another thread before it is asked for, as many at a time
    as there are `threads`; so one result more than that is in memory. What a call raises is raised in its turn."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, "ahead") as pool:
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
