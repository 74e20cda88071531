"""How answers are judged: 1.0 is right.

A judge that raises, overruns its time limit or returns something that is not a finite number has not said "wrong": the
verdict is marked as failed, its score counts as 0, and a step in which more than half of the verdicts failed is
refused with the reason. The time limit is one interval timer per answer, a microsecond each; it interrupts Python code
on the main thread, again and again until it gets through (a bare `except` may swallow the first). Elsewhere (a thread
may not receive signals) an overrun is found only when the judge returns.

What no signal interrupts (a computation inside a C library, a handler that swallows everything for ever) would hang the
run without a word: after LAST_RESORT seconds beyond the limit the process ends, and stderr shows the line that hangs.
"""

from __future__ import annotations

import faulthandler
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from orbit_core.errors import InputError
from orbit_core.recipe import Reward
from orbit_core.rl.judges import Scorer, make_scorer
from orbit_core.rl.types import Prompt

RING_AGAIN = 0.1  # seconds between two interruptions of a judge that went on after the first
LAST_RESORT = 60.0  # seconds beyond the limit after which the process ends
MAX_FAILED = 0.5  # share of a batch above which the reward, not the answers, is at fault


@dataclass(frozen=True)
class Verdict:
    score: float
    parts: dict[str, float] = field(default_factory=dict)  # raw marks and whatever else the judge returned
    failure: str = ""  # why there is no verdict; the score is 0 then
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        return self.score >= 1.0


class Judge:
    """Judges answers as a recipe's `reward` section says. Raises InputError when the judge cannot be made."""

    def __init__(self, settings: Reward) -> None:
        self.settings = settings
        self._score: Scorer = make_scorer(settings)

    def judge(self, answers: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """One verdict per (prompt, text of the response). InputError when more than half of them failed."""
        with _time_limit(self.settings.timeout_seconds) as limited:
            verdicts = [self._verdict(prompt, text, limited) for prompt, text in answers]
        failures = [verdict.failure for verdict in verdicts if verdict.failure]
        if len(failures) > MAX_FAILED * len(verdicts):
            raise InputError(
                f"reward {self.settings.function or self.settings.kind}",
                "a finite score for at least half of the answers of a step",
                f"{len(failures)} of {len(verdicts)} failed, the first with: {failures[0]}",
                "mend the reward, the labels or reward.timeout_seconds",
            )
        return verdicts

    def _verdict(self, prompt: Prompt, text: str, limited: Limited) -> Verdict:
        answer = self._answer(text)
        if answer is None:
            return Verdict(0.0)
        start = time.perf_counter()
        try:
            parts = limited(lambda: self._score(prompt, answer))
            raw = parts["score"]
            if not all(math.isfinite(value) for value in parts.values()):
                raise ValueError(f"expected finite numbers, found {parts}")
        except _Overrun as error:
            return Verdict(0.0, failure=str(error), seconds=time.perf_counter() - start)
        except Exception as error:  # whatever a person's function raises is about this answer, not about the run
            failure = f"{type(error).__name__}: {error} (prompt {prompt.id}, answer {answer[:80]!r})"
            return Verdict(0.0, failure=failure, seconds=time.perf_counter() - start)
        score = (1.0 if raw >= 1.0 else 0.0) if self.settings.right_only else raw
        others = {name: value for name, value in parts.items() if name != "score"}
        return Verdict(score, {"raw": raw, **others}, seconds=time.perf_counter() - start)

    def _answer(self, text: str) -> str | None:
        """The part of the response that is judged; None when the mark that precedes an answer is missing."""
        mark = self.settings.answer_after
        if mark is None:
            return text.strip()
        _, found, answer = text.rpartition(mark)
        return answer.strip() if found else None


Limited = Callable[[Callable[[], dict[str, float]]], dict[str, float]]


class _Overrun(BaseException):
    """Not an Exception, so that a judge's own `except Exception` cannot swallow it."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[Limited]:
    """Within, a function that runs another one and raises _Overrun when that takes longer than `seconds`."""
    reason = f"took longer than {seconds:g} s"

    def timed(function: Callable[[], dict[str, float]]) -> dict[str, float]:
        start = time.perf_counter()
        result = function()
        if time.perf_counter() - start > seconds:
            raise _Overrun(reason)
        return result

    if threading.current_thread() is not threading.main_thread():
        yield timed
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise _Overrun(reason)

    armed = -math.inf

    def interrupted(function: Callable[[], dict[str, float]]) -> dict[str, float]:
        nonlocal armed
        start = time.perf_counter()
        if start - armed > LAST_RESORT / 2:  # a thread is started for it: not for every answer
            faulthandler.dump_traceback_later(seconds + LAST_RESORT, exit=True, file=sys.__stderr__ or sys.stderr)
            armed = start
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, RING_AGAIN)
            result = function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if time.perf_counter() - start > seconds:  # it swallowed the limit and came back all the same
            raise _Overrun(reason)
        return result

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield interrupted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
