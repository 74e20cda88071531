"""What a step does is a function of (seed, t) alone, so that a killed run repeats the step in flight exactly.

The learning rate rises linearly over `warmup_steps`, then follows the chosen schedule down to zero at the end of the
run; the last step still moves. Prompts are drawn epoch by epoch: each epoch is one permutation of the whole table, so
every prompt is seen once before any is seen twice.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np

from orbit_core.recipe import Optimizer


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """Learning rate of step `step` (counted from 0) of a run of `steps` steps."""
    if step < optimizer.warmup_steps:
        return optimizer.learning_rate * (step + 1) / optimizer.warmup_steps
    progress = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[optimizer.schedule]
    return optimizer.learning_rate * factor


def prompts_of_step(seed: int, step: int, total: int, count: int) -> list[int]:
    """Row numbers (below `total`) of the `count` prompts of step `step`; any step is found without its forerunners.

    A step at the seam of two epochs takes its prompts from both; only there, or with fewer prompts than `count`, may a
    prompt stand twice.
    """
    positions = range(step * count, (step + 1) * count)
    return [int(_epoch(seed, position // total, total)[position % total]) for position in positions]


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, total: int) -> np.ndarray:
    return generator("prompts", seed, epoch).permutation(total)


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """An independent stream of random numbers for each purpose and each tuple of numbers."""
    name = ":".join([purpose, *map(str, numbers)])
    entropy = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.PCG64(entropy))
