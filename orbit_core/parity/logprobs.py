"""Log-probabilities: trainer against rollout engine, on every token of prompts and of the engine's own answers.

The adapter is random and away from the identity, so that an adapter that is dropped, transposed or misplaced shows. The
engine's side is what it reported while it decoded (with its cache) for answers, and what it scores for prompts; the
KL reference, adapter off, is compared as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orbit_core.recipe import Sampling
from orbit_core.rl.types import Request, SampleKey
from orbit_core.rollout.base import RolloutEngine
from orbit_core.trainers.base import Trainer

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]  # (prompt ids, response ids)
PARTS = ("prompt", "response", "reference")


@dataclass(frozen=True)
class Gap:
    """|log-prob difference| of one token."""

    prompt: int  # which of the prompts
    part: str  # "prompt" | "response" | "reference"
    position: int  # in the prompt, or in the response
    token: int
    trainer: float
    rollout: float

    @property
    def size(self) -> float:
        size = abs(self.trainer - self.rollout)
        return size if math.isfinite(size) else math.inf

    def to_json(self) -> dict[str, Any]:
        """Numbers that JSON has no name for (NaN, infinity) are written as text."""
        values = {"trainer": self.trainer, "rollout": self.rollout, "gap": self.size}
        written = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        return {"prompt": self.prompt, "part": self.part, "position": self.position, "token": self.token, **written}


@dataclass(frozen=True)
class Measurement:
    gaps: list[Gap]
    sequences: list[tuple[tuple[int, ...], tuple[int, ...]]]  # (prompt ids, response ids) that were compared

    def sizes(self, part: str) -> list[float]:
        return [gap.size for gap in self.gaps if gap.part == part]

    def mean(self, part: str) -> float:
        sizes = self.sizes(part)
        return sum(sizes) / len(sizes) if sizes else 0.0

    @property
    def worst(self) -> Gap:
        return max(self.gaps, key=lambda gap: gap.size)

    def summary(self, part: str) -> dict[str, Any]:
        sizes = self.sizes(part)
        return {
            "tokens": len(sizes), "mean_gap": number(self.mean(part)), "max_gap": number(max(sizes, default=0.0))
        }  # fmt: skip


def measure(
    trainer: Trainer, rollout: RolloutEngine, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
) -> Measurement:
    """Gaps of all tokens. Both engines must hold the same adapter; `prompts` are token ids, none of them empty."""
    requests = [Request(tuple(prompt), SampleKey(seed, 0, index, 0)) for index, prompt in enumerate(prompts)]
    completions = rollout.generate(requests, sampling)
    answers = [
        (request.prompt_ids, completion.token_ids) for request, completion in zip(requests, completions, strict=True)
    ]
    inside = [(prompt[:1], prompt[1:]) for prompt, _ in answers]  # the first token has nothing that predicts it
    temperature = sampling.temperature
    sides: dict[str, tuple[Sequences, Sequence[Tensor], Sequence[Tensor | Sequence[float]]]] = {
        "prompt": (inside, trainer.score(inside, temperature), rollout.score(inside, temperature)),
        "response": (answers, trainer.score(answers, temperature), [c.logprobs for c in completions]),
        "reference": (
            answers,
            trainer.score(answers, temperature, adapter=False),
            rollout.score(answers, temperature, adapter=False),
        ),
    }
    gaps = [
        gap
        for part, (sequences, ours, theirs) in sides.items()
        for index, (sequence, left, right) in enumerate(zip(sequences, ours, theirs, strict=True))
        for gap in _gaps(index, part, sequence[1], left, right)
    ]
    return Measurement(gaps, answers)


def _gaps(
    prompt: int, part: str, tokens: Sequence[int], trainer: Tensor, rollout: Tensor | Sequence[float]
) -> list[Gap]:
    offset = 1 if part == "prompt" else 0
    values = zip(tokens, trainer.tolist(), list(map(float, rollout)), strict=True)
    return [
        Gap(prompt, part, offset + place, token, ours, theirs) for place, (token, ours, theirs) in enumerate(values)
    ]


def number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
