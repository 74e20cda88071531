"""Each figure against its definition."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit_core.evaluation.statistics import mcnemar_p_value, paired_difference, pass_at_k, wilson_interval

counts = st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


@given(counts)
def test_pass_at_k_is_the_share_of_draws_of_k_with_a_right_one(case: tuple[int, int, int]) -> None:
    samples, right, k = case
    draws = list(combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


@given(st.floats(0, 1), st.integers(1, 6))
def test_pass_at_k_is_unbiased(probability: float, k: int) -> None:
    samples = 8
    expected = sum(
        comb(samples, c) * probability**c * (1 - probability) ** (samples - c) * pass_at_k(samples, c, k)
        for c in range(samples + 1)
    )
    assert expected == pytest.approx(1 - (1 - probability) ** k, abs=1e-9)


def test_pass_at_k_of_more_than_was_sampled_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval_has_the_published_values(right: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=5e-4)


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_value_stays_in_range_and_is_never_empty(case: tuple[int, int]) -> None:
    right, count = case
    low, high = wilson_interval(right / count, count)
    assert 0 <= low <= right / count <= high <= 1 and high > low
    assert wilson_interval(1 - right / count, count) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.5, 0.9])
def test_the_interval_covers_the_truth_as_often_as_it_says(probability: float) -> None:
    n = 400
    covered = sum(
        comb(n, c) * probability**c * (1 - probability) ** (n - c)
        for c in range(n + 1)
        if wilson_interval(c / n, n)[0] <= probability <= wilson_interval(c / n, n)[1]
    )
    assert covered == pytest.approx(0.95, abs=0.015)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 300))
def test_the_paired_difference_is_the_mirror_of_its_opposite(gained: int, lost: int, more: int) -> None:
    count = gained + lost + more
    low, high = paired_difference(gained, lost, count)
    assert paired_difference(lost, gained, count) == pytest.approx((-high, -low))
    assert -1 <= low < high <= 1


def test_more_pairs_changed_one_way_move_the_interval_off_zero() -> None:
    assert paired_difference(20, 20, 400)[0] < 0 < paired_difference(20, 20, 400)[1]
    assert paired_difference(40, 5, 400)[0] > 0


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (5, 5, 1.0), (1, 9, 0.02148)])
def test_mcnemar_is_the_two_sided_binomial_test(gained: int, lost: int, p: float) -> None:
    assert mcnemar_p_value(gained, lost) == pytest.approx(p, abs=1e-5)
