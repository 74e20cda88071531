"""Advantage of a sample: how much better it did than the other answers to the same prompt.

    GRPO, DAPO   A_i = (r_i - mean(r)) / (std(r) + 1e-6)     std with n - 1
    Dr.GRPO      A_i =  r_i - mean(r)                        no prompt weighs more for being easy or hard

Advantages of a group add up to zero; a group whose rewards are all equal has advantages of exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], normalize_std: bool) -> list[float]:
    """Advantages of one group, in the order of its rewards."""
    values = np.asarray(rewards, dtype=np.float64)
    if not has_variance(rewards):
        return [0.0] * len(rewards)
    centred = values - values.mean()
    if normalize_std:
        centred = centred / (values.std(ddof=1) + EPSILON)
    return [float(value) for value in centred]


def has_variance(rewards: Sequence[float]) -> bool:
    """False for a group that teaches nothing: all rewards equal up to rounding."""
    return max(rewards) - min(rewards) > 1e-8
