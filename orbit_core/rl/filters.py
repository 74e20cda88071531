"""Which groups are trained on.

A group whose answers were all right or all wrong has no gradient; `skip_zero_variance` drops it, so that the mean is
over groups that teach something. With `oversample` > 1 more prompts are drawn than are trained (dynamic sampling): the
first `prompts_per_step` groups with variance are kept, in the order in which they were drawn. No redrawing: the cost
of a step is known before it starts, and what is kept depends on the rewards alone, not on which answer came first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from orbit_core.recipe import Algorithm
from orbit_core.rl.advantages import has_variance


def prompts_to_draw(algorithm: Algorithm) -> int:
    return math.ceil(algorithm.prompts_per_step * algorithm.oversample)


def kept_groups(rewards: Sequence[Sequence[float]], algorithm: Algorithm) -> list[int]:
    """Numbers of the groups to train on, ascending; `rewards[g]` are the rewards of group g."""
    candidates = [
        group for group, values in enumerate(rewards) if not algorithm.skip_zero_variance or has_variance(values)
    ]
    return candidates[: algorithm.prompts_per_step]
