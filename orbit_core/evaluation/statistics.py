"""The statistics of an evaluation, in closed form: the same numbers give the same intervals, with nothing drawn.

pass@k      1 - C(n - c, k) / C(n, k)     unbiased, from n samples of which c are right (Chen et al. 2021)
interval    Wilson's score interval       stays inside [0, 1], and is not empty at 0 of n or n of n
difference  Agresti and Min 2005          of paired proportions: half an observation is added to each cell
p-value     exact McNemar                 the prompts that changed sides, against a fair coin
"""

from __future__ import annotations

from math import comb, sqrt

Z95 = 1.959963984540054  # standard normal quantile of 0.975


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate for one prompt. ValueError unless 0 <= right <= samples and 1 <= k <= samples."""
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {right} right among {samples} samples")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def wilson_interval(mean: float, count: int, z: float = Z95) -> tuple[float, float]:
    """95% interval of a proportion seen in `count` independent trials.

    For a mean of values in [0, 1], such as pass@k over prompts, it is conservative: no such value varies more than a
    coin of the same mean.
    """
    if count < 1:
        raise ValueError(f"an interval needs at least one trial, found {count}")
    shrink = 1 + z * z / count
    centre = (mean + z * z / (2 * count)) / shrink
    half = z / shrink * sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def paired_difference(gained: int, lost: int, count: int, z: float = Z95) -> tuple[float, float]:
    """95% interval of (gained - lost) / count, for `count` prompts answered twice."""
    if count < 1 or gained < 0 or lost < 0 or gained + lost > count:
        raise ValueError(f"{gained} gained and {lost} lost among {count}")
    total, up, down = count + 2, gained + 0.5, lost + 0.5
    centre = (up - down) / total
    half = z * sqrt((up + down) / total - centre * centre) / sqrt(total)
    return max(-1.0, centre - half), min(1.0, centre + half)


def mcnemar_p_value(gained: int, lost: int) -> float:
    """Two-sided probability of a split at least this uneven, were both directions equally likely."""
    changed = gained + lost
    tail = sum(comb(changed, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)
