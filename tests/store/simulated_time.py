"""Processes of one world in virtual time, so that a thousand races take a second and every one can be run again.

A task is a thread, and one runs at a time: whoever wakes first by the world's clock. Time passes only in `pause`, where
a process may also be stopped (as by SIGSTOP) or found dead (as by kill -9). The store is real; each of its operations
takes a random time before and after it happens, and fails during an outage.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orbit_core.store import Store


class Killed(BaseException):
    """The process is gone: whatever its `finally` blocks try, they cannot reach the world any more."""


@dataclass
class Process:
    stopped_until: float = 0.0
    dead: bool = False


@dataclass
class Task:
    process: Process
    wake: float
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class World:
    def __init__(self, seed: int) -> None:
        self.chance, self.now = random.Random(seed), 0.0
        self.outages: list[tuple[float, float]] = []
        self._tasks: list[Task] = []
        self._back = threading.Semaphore(0)
        self._current = Task(Process(), 0.0)
        self._failure: BaseException | None = None

    def clock(self) -> float:
        return self.now

    def spawn(self, process: Process, body: Callable[[], None], after: float = 0.0) -> None:
        task = Task(process, self.now + after)

        def run() -> None:
            task.go.acquire()
            try:
                body()
            except Killed:
                pass
            except BaseException as error:
                self._failure = error
            self._tasks.remove(task)
            self._back.release()

        self._tasks.append(task)
        threading.Thread(target=run, daemon=True).start()

    def run(self, until: float) -> None:
        """Until every task has ended; AssertionError if one still runs at the time `until`."""
        while self._tasks:
            self._current = min(self._tasks, key=lambda task: task.wake)
            if (stopped := self._current.process.stopped_until) > self._current.wake:
                self._current.wake = stopped
                continue
            self.now = max(self.now, self._current.wake)
            assert self.now < until, "somebody waits for ever"
            self._current.go.release()
            self._back.acquire()
            if self._failure is not None:
                raise self._failure

    def pause(self, seconds: float) -> None:
        task = self._current
        task.wake = self.now + seconds
        self._back.release()
        task.go.acquire()
        if task.process.dead:
            raise Killed

    @property
    def process(self) -> Process:
        return self._current.process


class SlowStore:
    """`store` as a process sees it that may be delayed before and after each operation."""

    def __init__(self, world: World, store: Store, delay: Callable[[], float]) -> None:
        self._world, self._store, self._delay = world, store, delay

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)

        def slow(*arguments: Any, **options: Any) -> Any:
            self._world.pause(self._delay())
            for begin, end in self._world.outages:
                if begin <= self._world.now < end:
                    raise OSError("the store is out of reach")
            result = operation(*arguments, **options)
            self._world.pause(self._delay())
            return result

        return slow
