"""The instants at which a process leaves something behind, counted, so that one can be killed at each of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def around(owner: object, name: str, tick: Callable[[str], object], after: bool = True) -> None:
    """`tick(name)` before each call of `owner.name` and, unless it leaves nothing behind, `after` it."""
    original = getattr(owner, name)

    def ticking(*arguments: object, **named: object) -> object:
        tick(name)
        result = original(*arguments, **named)
        if after:
            tick(name)
        return result

    setattr(owner, name, ticking)


class Boundaries:
    """Those that this process has `passed`, by name; at number `at` it dies by SIGKILL."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.passed: list[str] = []

    def tick(self, name: str) -> None:
        if len(self.passed) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(name)
