"""Estimators of KL(policy || reference) from the tokens that were sampled.

With d = log pi(token) - log pi_ref(token), for tokens drawn from pi (J. Schulman, "Approximating KL divergence"):

    k1 = d                    unbiased, may be negative, large variance
    k2 = d^2 / 2              biased, never negative; its gradient is that of the true KL when on-policy
    k3 = exp(-d) - 1 + d      unbiased, never negative

In the loss, k1 has a gradient of zero in expectation: it measures there, it does not restrain. Use k1 in the reward.
The reference is the same model with the adapter off; there is no second copy.
"""

from __future__ import annotations

import torch

from orbit_core.errors import InputError


def kl_per_token(logprobs: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """KL estimate of each token, same shape as `logprobs` (any float tensor); differentiable in `logprobs`."""
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise InputError("KL estimator", "k1, k2 or k3", estimator, "choose one of them")
