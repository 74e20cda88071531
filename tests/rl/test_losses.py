"""The loss that every trainer uses: against formulas written out by hand and against finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orbit_core.errors import InputError
from orbit_core.recipe import Algorithm
from orbit_core.rl.losses import mean_metrics, policy_loss, token_weights

LENGTHS = [3, 1, 5]


def algorithm(**fields) -> Algorithm:
    return Algorithm.model_validate({"sampling": {"max_new_tokens": 10}, **fields})


def batch(seed=0, spread=0.3, dtype=torch.float64):
    """Log-probs of a policy that has moved a little from the old one, and all that a loss needs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    noise = lambda scale: torch.randn(shape, generator=generator, dtype=dtype) * scale  # noqa: E731
    old = -noise(1).abs()
    return {
        "logprobs": (old + noise(spread)).requires_grad_(),
        "old_logprobs": old,
        "rollout_logprobs": old + noise(0.5),
        "reference_logprobs": old + noise(0.2),
        "advantages": torch.tensor([1.0, -0.5, 2.0], dtype=dtype),
        "mask": torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None],
    }


def by_hand(given, settings: Algorithm) -> float:
    """The formula of the module, token by token, in plain Python."""
    total = 0.0
    for i, length in enumerate(LENGTHS):
        gaps = [(given["old_logprobs"] - given["rollout_logprobs"])[i, t].item() for t in range(length)]
        for t in range(length):
            new, old = (given[name][i, t].item() for name in ("logprobs", "old_logprobs"))
            ratio, advantage = torch.tensor(new - old).double().exp().item(), given["advantages"][i].item()
            clipped = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_upper)
            gap = {"off": 0.0, "token": gaps[t], "sequence": sum(gaps)}[settings.importance_sampling.level]
            weight = min(torch.tensor(gap).double().exp().item(), settings.importance_sampling.cap)
            difference = new - given["reference_logprobs"][i, t].item()
            kl = {
                "k1": difference,
                "k2": difference**2 / 2,
                "k3": torch.tensor(-difference).double().exp().item() - 1 + difference,
            }[settings.kl.estimator]
            loss = -weight * min(ratio * advantage, clipped * advantage)
            loss += settings.kl.coefficient * kl * (settings.kl.place == "loss")
            total += (
                loss
                * {
                    "token": 1 / sum(LENGTHS),
                    "sequence": 1 / (len(LENGTHS) * length),
                    "constant": 1 / (len(LENGTHS) * settings.sampling.max_new_tokens),
                }[settings.aggregation]
            )
    return total


@pytest.mark.parametrize(
    "variant, level, estimator",
    itertools.product(["grpo", "dr_grpo", "dapo"], ["off", "token", "sequence"], ["k1", "k2", "k3"]),
)
def test_loss_is_the_formula(variant, level, estimator):
    chosen = algorithm(
        variant=variant,
        importance_sampling={"level": level, "cap": 1.3},
        kl={"coefficient": 0.1, "estimator": estimator},
    )
    given = batch()
    loss, _ = policy_loss(**given, weights=token_weights(LENGTHS, chosen), algorithm=chosen)
    assert loss.item() == pytest.approx(by_hand(given, chosen), rel=1e-5)


@pytest.mark.parametrize("variant", ["grpo", "dapo"])
def test_gradient_agrees_with_finite_differences(variant):
    chosen = algorithm(variant=variant, kl={"coefficient": 0.05})
    given = batch(seed=1)
    weights = token_weights(LENGTHS, chosen).double()
    others = {name: value for name, value in given.items() if name != "logprobs"}
    assert torch.autograd.gradcheck(
        lambda logprobs: policy_loss(logprobs, **others, weights=weights, algorithm=chosen)[0], given["logprobs"]
    )


def test_on_policy_gradient_is_the_policy_gradient():
    """With ratio 1 and no correction, d loss / d logprob = -A * weight on every token, none on padding."""
    chosen = algorithm(importance_sampling={"level": "off"})
    given = batch()
    given["logprobs"] = given["old_logprobs"].clone().requires_grad_()
    weights = token_weights(LENGTHS, chosen)
    policy_loss(**given, weights=weights, algorithm=chosen)[0].backward()
    expected = -(given["advantages"] * weights)[:, None] * given["mask"]
    assert torch.allclose(given["logprobs"].grad, expected)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.05, 0.5), st.floats(0.05, 0.9))
def test_clipped_tokens_have_no_gradient_and_others_do(seed, low, high):
    """Clipped: the ratio has left [1 - low, 1 + high] in the direction that the advantage asks for."""
    chosen = algorithm(variant="dapo", clip_low=low, clip_high=high)
    given = batch(seed, spread=1.0)
    policy_loss(**given, weights=token_weights(LENGTHS, chosen), algorithm=chosen)[0].backward()
    ratio = (given["logprobs"] - given["old_logprobs"]).exp().detach()
    wanted = given["advantages"][:, None].sign()
    outside = torch.where(wanted > 0, ratio > 1 + high, ratio < 1 - low)
    moves = given["logprobs"].grad != 0
    assert torch.equal(moves, given["mask"] & ~outside)


def test_dapo_lets_rare_tokens_rise_further_than_they_may_fall():
    assert (algorithm(variant="dapo").clip_low, algorithm(variant="dapo").clip_upper) == (0.2, 0.28)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_micro_batches_add_up_to_the_whole_batch(aggregate):
    chosen = algorithm(aggregate=aggregate, kl={"coefficient": 0.1})
    given = batch()
    weights = token_weights(LENGTHS, chosen)
    whole, sums = policy_loss(**given, weights=weights, algorithm=chosen)
    whole.backward()
    gradient, given["logprobs"].grad = given["logprobs"].grad, None
    parts = []
    for rows in ([0], [1, 2]):
        part = {name: value[rows] for name, value in given.items()}
        loss, part_sums = policy_loss(**part, weights=weights[rows], algorithm=chosen)
        loss.backward()
        parts.append(part_sums)
    assert torch.allclose(given["logprobs"].grad, gradient)
    assert mean_metrics(parts) == pytest.approx(mean_metrics([sums]), rel=1e-6)


@pytest.mark.parametrize("aggregate, expected", [("sequence", 1.0), ("token", 1.0), ("constant", 9 / 30)])
def test_weights_of_all_tokens_make_a_mean(aggregate, expected):
    weights = token_weights(LENGTHS, algorithm(aggregate=aggregate))
    assert (weights * torch.tensor(LENGTHS)).sum().item() == pytest.approx(expected)


def test_padding_changes_nothing():
    chosen = algorithm(kl={"coefficient": 0.1})
    given = batch()
    weights = token_weights(LENGTHS, chosen)
    loss, sums = policy_loss(**given, weights=weights, algorithm=chosen)
    garbage = {
        name: torch.where(given["mask"], value, 1e4 * torch.ones_like(value))
        if value.dim() == 2 and name != "mask"
        else value
        for name, value in given.items()
    }
    other, other_sums = policy_loss(**garbage, weights=weights, algorithm=chosen)
    assert other.item() == loss.item()
    assert mean_metrics([other_sums]) == mean_metrics([sums])


def test_metrics_are_means_per_token():
    chosen = algorithm(importance_sampling={"cap": 1.0})
    given = batch(spread=1.0)
    _, sums = policy_loss(**given, weights=token_weights(LENGTHS, chosen), algorithm=chosen)
    metrics, mask = mean_metrics([sums]), given["mask"]
    above = (given["old_logprobs"] > given["rollout_logprobs"])[mask]
    assert metrics["tokens"] == sum(LENGTHS)
    assert metrics["importance_capped_fraction"] == pytest.approx(above.double().mean().item())
    ratio = (given["logprobs"] - given["old_logprobs"]).exp()[mask]
    assert metrics["ratio_mean"] == pytest.approx(ratio.mean().item())
    assert 0 < metrics["clip_fraction"] < 1


def test_kl_in_the_loss_without_a_reference_is_refused():
    given = {**batch(), "reference_logprobs": None}
    chosen = algorithm(kl={"coefficient": 0.1})
    with pytest.raises(InputError, match="adapter=False"):
        policy_loss(**given, weights=token_weights(LENGTHS, chosen), algorithm=chosen)
