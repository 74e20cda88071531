"""How answers are judged: 1.0 is right.

A judge that raises, overruns its time limit, crashes or returns something that is not a finite number has not said
"wrong": the verdict is marked as failed, its score counts as 0, and a step in which more than half of the verdicts
failed is refused with the reason. Judges run in a process of their own (judge_process.py): none of them ends the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from orbit_core.errors import InputError
from orbit_core.recipe import Reward
from orbit_core.rl.judge_process import JudgeProcess, NoVerdict
from orbit_core.rl.types import Prompt

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
        self._process = JudgeProcess(settings)

    def judge(self, answers: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """One verdict per (prompt, text of the response). InputError when more than half of them failed."""
        verdicts = [self._verdict(prompt, text) for prompt, text in answers]
        failures = [verdict.failure for verdict in verdicts if verdict.failure]
        if len(failures) > MAX_FAILED * len(verdicts):
            raise InputError(
                f"reward {self.settings.function or self.settings.kind}",
                "a finite score for at least half of the answers of a step",
                f"{len(failures)} of {len(verdicts)} failed, the first with: {failures[0]}",
                "mend the reward, the labels or reward.timeout_seconds",
            )
        return verdicts

    def _verdict(self, prompt: Prompt, text: str) -> Verdict:
        answer = self._answer(text)
        if answer is None:
            return Verdict(0.0)
        start = time.perf_counter()
        try:
            parts = self._process.score(prompt, answer)
            raw = parts["score"]
            if not all(math.isfinite(value) for value in parts.values()):
                raise NoVerdict(f"expected finite numbers, found {parts}")
        except NoVerdict as error:
            failure = f"{error} (prompt {prompt.id}, answer {answer[:80]!r})"
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
