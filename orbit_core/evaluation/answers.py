"""Answers of one policy to the held-out prompts, judged: one greedy, some sampled.

The sampled answers of two policies share their random numbers, so what differs between them is the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orbit_core.recipe import Evaluation, Sampling
from orbit_core.rl.rewards import Judge
from orbit_core.rl.types import Completion, Prompt, Request, SampleKey
from orbit_core.rollout.base import RolloutEngine

EVALUATION_STREAM = 2**32  # in place of the step in the key: no step of training is numbered so


@dataclass(frozen=True)
class Answers:
    """Answers by prompt, in the order of the prompts."""

    greedy: list[Completion]
    texts: list[str]
    right: list[bool]
    sampled: list[Completion]  # `samples` in a row for each prompt
    sampled_right: list[int]  # how many of a prompt's samples are right; empty without samples


@dataclass(frozen=True)
class Examination:
    """The prompts, how they are asked and how they are judged."""

    prompts: Sequence[Prompt]
    encoded: Sequence[tuple[int, ...]]
    evaluation: Evaluation
    sampling: Sampling
    seed: int
    decode: Callable[[Sequence[int]], str]
    judge: Judge

    def ask(self, engine: RolloutEngine) -> Answers:
        """Every prompt to the engine, with the adapter that is active there."""
        samples = self.evaluation.samples
        greedy = engine.generate(self._requests(1), self.sampling, greedy=True)
        texts = [self.decode(completion.token_ids) for completion in greedy]
        sampling = self.sampling.model_copy(update={"temperature": self.evaluation.temperature})
        sampled = engine.generate(self._requests(samples), sampling) if samples else []
        marks = self._marks([self.decode(completion.token_ids) for completion in sampled], samples)
        return Answers(
            greedy,
            texts,
            self._marks(texts, 1),
            sampled,
            [sum(marks[start : start + samples]) for start in range(0, len(marks), samples)] if samples else [],
        )

    def sequences(self, answers: Answers) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(prompt ids, response ids) of the sampled answers, or of the greedy ones where none were sampled."""
        completions = answers.sampled or answers.greedy
        each = len(completions) // len(self.prompts)
        return [(self.encoded[i // each], completion.token_ids) for i, completion in enumerate(completions)]

    def _requests(self, samples: int) -> list[Request]:
        return [
            Request(ids, SampleKey(self.seed, EVALUATION_STREAM, group, sample))
            for group, ids in enumerate(self.encoded)
            for sample in range(samples)
        ]

    def _marks(self, texts: Sequence[str], each: int) -> list[bool]:
        """Right or not, of `each` texts in a row for every prompt."""
        asked = [prompt for prompt in self.prompts for _ in range(each)]
        return [verdict.right for verdict in self.judge.judge(list(zip(asked, texts, strict=True)))] if texts else []
