"""Truncated importance weights for what mismatch remains between the engine that sampled and the engine that trains.

A token was drawn from pi_rollout, but its gradient is taken under pi_trainer. The policy gradient stays unbiased with
the weight w = pi_trainer_old / pi_rollout, and its variance stays bounded with min(w, cap):

    token:     w_t = min(exp(trainer_t - rollout_t), cap)
    sequence:  w   = min(exp(sum_t (trainer_t - rollout_t)), cap), the same for all tokens of the sequence

`trainer` are the trainer's log-probs before the first update of the step, so weights carry no gradient.
"""

from __future__ import annotations

import torch

from orbit_core.errors import InputError
from orbit_core.recipe import ImportanceSampling


def importance_weights(
    trainer: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, settings: ImportanceSampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (float32 [sequences, tokens]) and which of them were cut at the cap (bool, same shape).

    trainer, rollout: float32 [sequences, tokens]; mask: bool, True on tokens of the response. Padding has weight 1 and
    is never cut.
    """
    if settings.level == "off":
        return torch.ones_like(trainer), torch.zeros_like(mask)
    difference = (trainer - rollout).detach().float().masked_fill(~mask, 0.0)
    if settings.level == "sequence":
        difference = difference.sum(dim=-1, keepdim=True).expand_as(difference).masked_fill(~mask, 0.0)
    elif settings.level != "token":
        raise InputError("importance sampling level", "off, token or sequence", settings.level, "choose one of them")
    weights = difference.exp()
    cut = (weights > settings.cap) & mask
    return torch.where(cut, torch.full_like(weights, settings.cap), weights), cut
