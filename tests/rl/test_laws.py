"""Laws of advantages, filters, KL estimators, importance weights and schedules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orbit_core.errors import InputError
from orbit_core.recipe import Algorithm, ImportanceSampling, Optimizer
from orbit_core.rl.advantages import group_advantages
from orbit_core.rl.corrections import importance_weights
from orbit_core.rl.filters import kept_groups, prompts_to_draw
from orbit_core.rl.kl import kl_per_token
from orbit_core.rl.schedule import generator, learning_rate, prompts_of_step

rewards = st.lists(st.floats(-10, 10), min_size=2, max_size=16)
logprob = st.floats(-12, 0)


@given(rewards, st.booleans())
def test_advantages_of_a_group_add_up_to_zero_and_keep_the_order_of_rewards(values, std):
    advantages = group_advantages(values, std)
    assert sum(advantages) == pytest.approx(0, abs=1e-6)
    for i in range(len(values)):
        for j in range(len(values)):
            if values[i] > values[j]:
                assert advantages[i] >= advantages[j]


@given(rewards, st.floats(-5, 5))
def test_a_constant_added_to_all_rewards_changes_no_advantage(values, constant):
    moved = group_advantages([value + constant for value in values], False)
    assert moved == pytest.approx(group_advantages(values, False), abs=1e-7)


@given(st.floats(-10, 10), st.integers(2, 9), st.booleans())
def test_equal_rewards_have_no_advantage(value, count, std):
    assert group_advantages([value] * count, std) == [0.0] * count


def test_grpo_divides_by_the_standard_deviation_and_dr_grpo_does_not():
    assert group_advantages([1, 0, 0, 0], True) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert group_advantages([1, 0, 0, 0], False) == pytest.approx([0.75, -0.25, -0.25, -0.25])


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), max_size=12), st.integers(1, 6))
def test_dynamic_sampling_keeps_the_first_groups_with_variance(groups, wanted):
    kept = kept_groups(groups, Algorithm(prompts_per_step=wanted, oversample=2))
    varied = [number for number, group in enumerate(groups) if len(set(group)) > 1]
    assert kept == varied[:wanted]


@given(st.integers(1, 64), st.floats(1, 8))
def test_oversampling_draws_at_least_what_is_trained(prompts, factor):
    drawn = prompts_to_draw(Algorithm(prompts_per_step=prompts, oversample=factor))
    assert prompts * factor <= drawn < prompts * factor + 1


def test_without_skipping_all_groups_are_kept():
    assert kept_groups([[1.0, 1.0], [0.0, 1.0]], Algorithm(skip_zero_variance=False)) == [0, 1]


@given(st.lists(st.tuples(logprob, logprob), min_size=1))
def test_k2_and_k3_are_never_negative_and_vanish_for_equal_policies(pairs):
    ours, reference = torch.tensor(pairs, dtype=torch.float64).T
    for estimator in ("k2", "k3"):
        assert (kl_per_token(ours, reference, estimator) >= 0).all()
    for estimator in ("k1", "k2", "k3"):
        assert (kl_per_token(ours, ours, estimator) == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    """Expectation under the policy, summed over the whole vocabulary, is the divergence itself."""
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    estimate = (policy.exp() * kl_per_token(policy, reference, estimator)).sum()
    assert estimate.item() == pytest.approx(exact.item(), abs=1e-12)


def test_gradient_of_k2_is_the_gradient_of_the_divergence():
    """On-policy, sum_x p(x) d k2(x) / d theta = d KL / d theta; for k1 it is zero."""
    torch.manual_seed(0)
    logits = torch.randn(20, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(20, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    weight = policy.exp().detach()
    gradients = {}
    for estimator in ("k1", "k2"):
        estimate = (weight * kl_per_token(policy, reference, estimator)).sum()
        (gradients[estimator],) = torch.autograd.grad(estimate, logits, retain_graph=True)
    assert torch.allclose(gradients["k2"], exact)
    assert torch.allclose(gradients["k1"], torch.zeros_like(exact), atol=1e-12)


def test_unknown_estimator_is_refused():
    with pytest.raises(InputError, match="k1, k2 or k3"):
        kl_per_token(torch.zeros(1), torch.zeros(1), "k4")


@st.composite
def scored_batches(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    width = max(lengths)
    rows = st.lists(logprob, min_size=width, max_size=width)
    trainer, rollout = (torch.tensor([draw(rows) for _ in lengths]) for _ in range(2))
    return trainer, rollout, torch.arange(width) < torch.tensor(lengths)[:, None]


@given(scored_batches(), st.floats(0.5, 4), st.sampled_from(["token", "sequence"]))
def test_importance_weights_are_capped_and_padding_weighs_one(batch, cap, level):
    trainer, rollout, mask = batch
    weights, cut = importance_weights(trainer, rollout, mask, ImportanceSampling(level=level, cap=cap))
    assert (weights[mask] <= cap * (1 + 1e-6)).all() and (weights >= 0).all()
    assert (weights[~mask] == 1).all() and not cut[~mask].any()
    exact = (trainer - rollout).masked_fill(~mask, 0).double()
    exact = (exact.sum(-1, keepdim=True).expand_as(exact) if level == "sequence" else exact).exp()
    uncut = mask & ~cut
    assert torch.allclose(weights[uncut].double(), exact[uncut], rtol=1e-4)
    assert (exact[cut] > cap * (1 - 1e-4)).all()


@given(scored_batches())
def test_no_correction_means_weights_of_one(batch):
    weights, cut = importance_weights(*batch, ImportanceSampling(level="off"))
    assert (weights == 1).all() and not cut.any()


@given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 12))
def test_every_epoch_shows_every_prompt_once(seed, total, count):
    drawn = [row for step in range(2 * total) for row in prompts_of_step(seed, step, total, count)]
    for epoch in range(len(drawn) // total):
        assert sorted(drawn[epoch * total : (epoch + 1) * total]) == list(range(total))


def test_prompts_of_a_step_depend_on_seed_and_step_alone():
    late = prompts_of_step(3, 1000, 77, 8)
    assert late == prompts_of_step(3, 1000, 77, 8) != prompts_of_step(4, 1000, 77, 8)
    assert generator("prompts", 1, 23).random() != generator("prompts", 12, 3).random()
    assert generator("prompts", 1, 2).random() != generator("shuffle", 1, 2).random()


@given(st.integers(1, 50), st.integers(0, 60), st.sampled_from(["constant", "linear", "cosine"]), st.floats(1e-6, 1))
def test_learning_rate_warms_up_then_falls_and_the_last_step_still_moves(steps, warmup, schedule, peak):
    optimizer = Optimizer(learning_rate=peak, warmup_steps=warmup, schedule=schedule)
    rates = [learning_rate(step, steps, optimizer) for step in range(steps)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    if falling:
        assert falling[0] == peak


def test_schedules_at_half_way():
    half = {
        schedule: learning_rate(60, 110, Optimizer(learning_rate=1.0, warmup_steps=10, schedule=schedule))
        for schedule in ("constant", "linear", "cosine")
    }
    assert half == {"constant": 1.0, "linear": 0.5, "cosine": pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))}
