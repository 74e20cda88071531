"""The process in which answers are judged, started by judge_process.py.

Lines of JSON come on stdin and go to stdout. The first is the recipe's reward; it is answered with "ready", or with the
four parts of an InputError. Each further line is one answer to judge. What a judge prints goes to stderr.

The time limit is one interval timer per answer, a microsecond each; it interrupts Python code again and again until it
gets through (a bare `except` may swallow the first). What it does not interrupt, the other side kills.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TextIO

from orbit_core.errors import InputError
from orbit_core.executors.lifetime import die_with
from orbit_core.recipe import Reward
from orbit_core.rl.judges import Scorer, make_scorer
from orbit_core.rl.types import Prompt

RING_AGAIN = 0.1  # seconds between two interruptions of a judge that went on after the first
SHOW_THE_LINE = signal.SIGUSR1  # asks for a traceback on stderr, also from within a C library


class _Overrun(BaseException):
    """Not an Exception, so that a judge's own `except Exception` cannot swallow it."""


def main(parent: int) -> None:
    """Judges until stdin ends or the process `parent` does."""
    if not die_with(parent):
        return
    questions, replies = _channels()
    faulthandler.register(SHOW_THE_LINE)
    settings = Reward.model_validate_json(questions.readline())
    try:
        scorer = make_scorer(settings)
    except InputError as error:
        _say(replies, refused=[error.what, error.expected, error.found, error.fix])
        return
    _say(replies, ready=True)
    signal.signal(signal.SIGALRM, _ring)
    for line in questions:
        question = json.loads(line)
        _say(replies, number=question["number"], **_outcome(scorer, question, settings.timeout_seconds))


def _channels() -> tuple[TextIO, TextIO]:
    """The pipes to the other side, out of the way of a judge that prints or reads stdin."""
    questions, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return questions, replies


def _say(replies: TextIO, **what: Any) -> None:
    replies.write(json.dumps(what) + "\n")
    replies.flush()


def _outcome(scorer: Scorer, question: dict[str, Any], limit: float) -> dict[str, Any]:
    prompt = Prompt(**question["prompt"])
    try:
        return {"parts": _within(limit, lambda: scorer(prompt, question["answer"]))}
    except _Overrun:
        return {"failure": f"took longer than {limit:g} s"}
    except Exception as error:  # whatever a person's function raises is about this answer, not about the run
        return {"failure": f"{type(error).__name__}: {error}"}


def _within(seconds: float, function: Callable[[], dict[str, float]]) -> dict[str, float]:
    start = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, RING_AGAIN)
        result = function()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.perf_counter() - start > seconds:  # it swallowed the limit and came back all the same
        raise _Overrun
    return result


def _ring(signum: int, frame: FrameType | None) -> None:
    raise _Overrun
