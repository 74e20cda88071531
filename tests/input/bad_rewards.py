"""Rewards that misbehave in each way in which a person's function can; a prompt is `<n>+1=`."""

from __future__ import annotations

import time
from typing import Any


def raises(prompt: Any, response: str, label: str) -> float:
    raise ZeroDivisionError("of course")


def nan(prompt: Any, response: str, label: str) -> float:
    return float("nan")


def hangs(prompt: Any, response: str, label: str) -> float:
    while True:
        time.sleep(0.01)


_calls = 0


def _every_fourth() -> bool:
    global _calls
    _calls += 1
    return _calls % 4 == 0


def raises_at_times(prompt: Any, response: str, label: str) -> float:
    if _every_fourth():
        raise KeyError("now and then")
    return float(len(response) % 2)


def nan_at_times(prompt: Any, response: str, label: str) -> float:
    return float("nan") if _every_fourth() else float(len(response) % 2)


def hangs_at_times(prompt: Any, response: str, label: str) -> float:
    while _every_fourth():
        hangs(prompt, response, label)
    return float(len(response) % 2)


def swallows_everything(prompt: Any, response: str, label: str) -> float:
    """Three careless handlers in a row, then an end: only a limit that rings again gets through."""
    for _ in range(3):
        try:
            hangs(prompt, response, label)
        except BaseException:
            continue
    return 1.0
