"""Two sets of answers to the same prompts as the figures that are reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orbit_core.evaluation.answers import Answers
from orbit_core.evaluation.statistics import mcnemar_p_value, paired_difference, pass_at_k, wilson_interval
from orbit_core.recipe import Evaluation
from orbit_core.rl.types import Completion


def summarise(answers: Answers, evaluation: Evaluation) -> dict[str, Any]:
    """Figures of one policy: greedy accuracy, pass@k, answer length."""
    count, correct = len(answers.right), sum(answers.right)
    summary: dict[str, Any] = {
        "greedy": {
            "accuracy": correct / count,
            "interval": wilson_interval(correct / count, count),
            "correct": correct,
        },
        "pass_at_k": {},
        "response_length_mean": _mean([len(completion.token_ids) for completion in answers.greedy]),
        "cut_off_fraction": _cut_off([*answers.greedy, *answers.sampled]),
    }
    if evaluation.samples:
        summary["pass_at_k"] = {str(k): _pass_at(k, answers, evaluation.samples) for k in sorted(set(evaluation.k))}
    return summary


def compare(before: Answers, after: Answers) -> dict[str, Any]:
    """What changed, prompt by prompt."""
    pairs = list(zip(before.right, after.right, strict=True))
    gained = sum(not was and now for was, now in pairs)
    lost = sum(was and not now for was, now in pairs)
    return {
        "greedy": {
            "difference": (gained - lost) / len(pairs),
            "interval": paired_difference(gained, lost, len(pairs)),
            "gained": gained,
            "lost": lost,
            "p_value": mcnemar_p_value(gained, lost),
        }
    }


def _pass_at(k: int, answers: Answers, samples: int) -> dict[str, Any]:
    value = _mean([pass_at_k(samples, right, k) for right in answers.sampled_right])
    return {"value": value, "interval": wilson_interval(value, len(answers.sampled_right))}


def _cut_off(completions: Sequence[Completion]) -> float:
    return _mean([completion.finish_reason == "length" for completion in completions])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
