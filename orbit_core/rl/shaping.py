"""From judged answers to advantages, in one order that every step follows:

score      what the judge said
shuffle    control: the scores of the batch permuted, so that nothing can be learned
overlong   minus a penalty for an answer that was cut off (DAPO)
kl         minus coefficient * KL of the whole answer to the adapter-off reference, when its place is the reward
filter     which groups are trained on
advantage  within each group
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orbit_core.recipe import Algorithm
from orbit_core.rl.advantages import group_advantages
from orbit_core.rl.filters import kept_groups
from orbit_core.rl.kl import kl_per_token
from orbit_core.rl.rewards import Verdict
from orbit_core.rl.schedule import generator
from orbit_core.rl.types import Sample


def set_rewards(
    samples: Sequence[Sample], verdicts: Sequence[Verdict], algorithm: Algorithm, shuffle_seed: tuple[int, int] | None
) -> None:
    """Rewards before KL; `reward_parts` keeps the judge's own score whatever happens to it afterwards.

    shuffle_seed: (seed, step) permutes the scores over the batch; None leaves them.
    """
    scores = [verdict.score for verdict in verdicts]
    if shuffle_seed is not None:
        scores = [scores[index] for index in generator("shuffle", *shuffle_seed).permutation(len(scores))]
    for sample, verdict, score in zip(samples, verdicts, scores, strict=True):
        penalty = algorithm.overlong_penalty if sample.completion.finish_reason == "length" else 0.0
        sample.reward = score - penalty
        sample.reward_seconds = verdict.seconds
        sample.reward_parts = {"score": verdict.score, **verdict.parts}
        if verdict.failure:
            sample.reward_parts["failed"] = 1.0
        if penalty:
            sample.reward_parts["overlong"] = -penalty


def subtract_kl(samples: Sequence[Sample], algorithm: Algorithm) -> None:
    """KL in the reward; the samples must have been scored with the adapter on and off."""
    for sample in samples:
        ours, reference = torch.tensor(sample.trainer_logprobs), torch.tensor(sample.reference_logprobs)
        kl = float(kl_per_token(ours, reference, algorithm.kl.estimator).sum())
        sample.reward -= algorithm.kl.coefficient * kl
        sample.reward_parts["kl"] = -algorithm.kl.coefficient * kl


def set_advantages(samples: Sequence[Sample], algorithm: Algorithm) -> list[Sample]:
    """Advantages and `trained` of all samples, which stand group by group; returns those to train on."""
    size = algorithm.samples_per_prompt
    groups = [samples[start : start + size] for start in range(0, len(samples), size)]
    rewards = [[sample.reward for sample in group] for group in groups]
    kept = set(kept_groups(rewards, algorithm))
    for number, group in enumerate(groups):
        for sample, advantage in zip(group, group_advantages(rewards[number], algorithm.std), strict=True):
            sample.advantage, sample.trained = advantage, number in kept
    return [sample for sample in samples if sample.trained]
