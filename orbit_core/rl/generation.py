"""The samples of a step: a function of (seed, step, group, sample index) and of the adapter, however many engines."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from orbit_core.errors import OrbitError
from orbit_core.recipe import Sampling
from orbit_core.rl.types import Completion, Request, SampleKey
from orbit_core.rollout.base import RolloutEngine


def requests_of_step(
    prompts: Sequence[tuple[int, ...]], samples_per_prompt: int, seed: int, step: int
) -> list[Request]:
    """Requests group by group: sample s of group g asks for prompt g under the key (seed, step, g, s)."""
    return [
        Request(prompt_ids, SampleKey(seed, step, group, sample))
        for group, prompt_ids in enumerate(prompts)
        for sample in range(samples_per_prompt)
    ]


def generate(engines: Sequence[RolloutEngine], requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
    """Completions in the order of the requests, which are dealt out to the engines in equal stretches."""
    share = -(-len(requests) // len(engines))
    parts = [requests[start : start + share] for start in range(0, len(requests), share)]
    if len(parts) == 1:
        completions = engines[0].generate(requests, sampling)
    else:
        with ThreadPoolExecutor(max_workers=len(parts)) as pool:
            answers = pool.map(lambda engine, part: engine.generate(part, sampling), engines, parts)
            completions = [completion for answer in answers for completion in answer]
    if len(completions) != len(requests):
        raise OrbitError(f"rollout engines: expected {len(requests)} completions, found {len(completions)}")
    return completions
